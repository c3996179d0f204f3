"""Rows of any dataset, one after another, each under a number that stays: local files, saved datasets, the Hub.

Local files are read in pieces whatever their size, `.json` lists excepted. Left out: transforms, shuffling and images;
what `datasets` can do to a dataset is done there, and the result saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.activations.files import KINDS, Files, is_data_file, kind_of, left_out_kinds, whole
from qscope_trl.activations.row_sources import DatasetRows, FileRows, RowSource, StreamRows
from qscope_trl.bundled import data_path
from qscope_trl.errors import ConfigError, DataError

ChatRenderer = Callable[[list[Any]], str]
"""A conversation, a list of `{"role", "content"}` mappings, to its text."""


def open_source(
    name: str,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> RowSource:
    """Open a dataset by name, without reading its rows.

    Args:
        name: A local file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`; the text kinds also with `.gz`); a local
            folder of such files, or one that `datasets.save_to_disk` wrote; `demo:NAME` for what is bundled; otherwise
            a dataset on the Hub.
        split: Split of a folder or Hub dataset, needed if it has several. On the Hub also a slice, `train[:1000]`.
        config: Configuration (subset) of a folder or Hub dataset.
        revision: Commit, tag or branch on the Hub.
        streaming: Read the Hub dataset as it is downloaded, nothing kept on disk. Local files are always read in
            pieces; here it says not to count their rows beforehand.

    Raises:
        ConfigError: If `split`, `config` or `revision` does not fit what `name` is, or `split` is needed.
        DataError: If there is no such dataset, or it cannot be opened.
    """
    path = Path(data_path(name)).expanduser()
    is_local = path.exists()
    if not is_local and (path.is_absolute() or name.startswith((".", "~")) or is_data_file(path)):
        raise DataError(f"No file or folder at '{name}'.")
    if is_local and revision is not None:
        raise ConfigError(f"`revision` is for datasets on the Hub; '{name}' is local.")
    if path.is_file():
        if split is not None or config is not None:
            raise ConfigError(f"'{name}' is one file, which has neither splits nor configurations. Leave them out.")
        return FileRows(name, [path], streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(name, path, split, config)
    return _listed(name, str(path) if is_local else name, split, config, revision, streaming)


def source_of(dataset: Any, *, name: str = "dataset") -> RowSource:
    """A `datasets.Dataset` or `datasets.IterableDataset` in memory as a source.

    A stream in memory has no fingerprint of its own: its `name` stands in for one.

    Raises:
        DataError: If it is neither.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset):
        return DatasetRows(name, dataset, _hash(str(dataset._fingerprint)))
    if isinstance(dataset, IterableDataset):
        return StreamRows(name, dataset, _hash(name))
    raise DataError(f"'{name}' is a {type(dataset).__name__}, not a `datasets.Dataset` or `IterableDataset`.")


def text_columns(text_column: str) -> tuple[str, ...]:
    """The columns that `text_column` names: one, or several joined by `+`.

    Raises:
        ConfigError: If one of them is empty.
    """
    names = tuple(part.strip() for part in text_column.split("+"))
    if not all(names):
        raise ConfigError(f"`text_column` is {text_column!r}; write one column, or several as in `prompt+completion`.")
    return names


def text_of(
    row: Mapping[str, Any],
    *,
    text_column: str,
    source_name: str,
    index: int,
    chat: ChatRenderer | None = None,
) -> str:
    """The text of one row.

    Args:
        row: The row.
        text_column: Its column; `prompt+completion` joins several with nothing between. A column may hold a
            conversation instead of a text; conversations of several columns are joined to one.
        source_name: Name of the dataset, for messages.
        index: Number of the row, for messages.
        chat: Renders a conversation.

    Returns:
        The text, half characters replaced as by `whole`. A null counts as an empty one.

    Raises:
        DataError: If a column is missing, or holds something else than a text, or a conversation without `chat`.
    """
    where = f"Row {index} of '{source_name}'"
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}, not a mapping from column to value.")
    names = (text_column,) if text_column in row else text_columns(text_column)
    for name in names:
        if name not in row:
            raise DataError(
                f"{where} has no column `{name}`; it has {', '.join(f'`{key}`' for key in row)}. Name the right one "
                f"by `text_column`."
            )
    values = [row[name] for name in names]
    if any(_is_chat(value) for value in values):
        if not all(_is_chat(value) for value in values):
            raise DataError(
                f"{where} has a conversation in one of {names} and none in another; they cannot be joined."
            )
        if chat is None:
            raise DataError(
                f"{where} holds a conversation in column `{names[0]}`, and no chat template is at hand to render it."
            )
        return str(whole(chat([message for value in values for message in value])))
    for name, value in zip(names, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where} holds {_short(value)} in column `{name}`, which is not a text.")
    return str(whole("".join(value or "" for value in values)))


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _saved(name: str, path: Path, split: str | None, config: str | None) -> RowSource:
    from datasets import load_from_disk

    if config is not None:
        raise ConfigError(f"'{name}' was written by `save_to_disk`, which knows no configurations. Leave it out.")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
        split = _one_split(name, splits, split)
        path = path / split
    elif split is not None:
        raise ConfigError(f"'{name}' was written by `save_to_disk` as one dataset without splits. Leave `split` out.")
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"The dataset '{name}' cannot be opened: {_first_line(err)}") from err
    prints = Files([*sorted(path.glob("*.arrow")), path / "state.json"]).fingerprint()
    return DatasetRows(name, dataset, prints, split=split)


def _listed(
    name: str, place: str, split: str | None, config: str | None, revision: str | None, streaming: bool
) -> RowSource:
    """A folder of data files, or a dataset on the Hub: `datasets` knows which files belong to which split."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(place, config, revision=revision)
        data_files = {str(key): files for key, files in (builder.config.data_files or {}).items()}
        stated = builder.info.splits or {}
        chosen = _one_split(name, list(data_files or stated), split)
        if Path(place).is_dir():
            if chosen not in data_files:
                raise ConfigError(f"`split` is {chosen!r}; of a local folder it is the name of a split alone.")
            _refuse_mixed(name, Path(place), [str(file) for files in data_files.values() for file in files])
            return FileRows(name, _readable(name, data_files[chosen]), streaming=streaming, split=chosen)
        found = {"split": chosen, "revision": builder.hash}
        prints = _hash("\0".join([name, config or "", chosen, str(builder.hash)]))
        if streaming:
            expected = getattr(stated.get(chosen), "num_examples", None)
            return StreamRows(name, builder.as_streaming_dataset(chosen), prints, expected_rows=expected, **found)
        builder.download_and_prepare()
        return DatasetRows(name, builder.as_dataset(split=chosen), prints, **found)
    except (ConfigError, DataError):
        raise
    except (OSError, ValueError) as err:
        raise DataError(
            f"The dataset '{name}' cannot be opened: {_first_line(err)} It is a local file or folder, `demo:NAME`, or "
            f"the id of a dataset on the Hub."
        ) from err


def _refuse_mixed(name: str, folder: Path, taken: Sequence[str]) -> None:
    """`datasets` takes the files of the commonest kind, and leaves the others out without a word."""
    lost = left_out_kinds(folder, [Path(file) for file in taken])
    if lost:
        kinds = {*lost, *(kind_of(Path(file)) for file in taken)}
        raise DataError(
            f"'{name}' holds files of several kinds: {', '.join(sorted(kinds))}. Only one kind would be read, so put "
            f"each into a folder of its own."
        )


def _readable(name: str, files: Sequence[str]) -> list[Path]:
    paths = [Path(file) for file in files]
    for path in paths:
        if not is_data_file(path):
            raise DataError(f"'{name}' holds '{path.name}', which is of no known kind. Known: {', '.join(KINDS)}.")
    return paths


def _one_split(name: str, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    there = ", ".join(f"`{item}`" for item in splits) or "none"
    if split is None:
        raise ConfigError(f"'{name}' has several splits: {there}. Choose one by `split`.")
    # A slice, such as `train[:1000]`.
    if split.split("[", 1)[0] not in splits:
        raise ConfigError(f"'{name}' has no split `{split}`; there are {there}.")
    return split


def _first_line(err: Exception) -> str:
    line = (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip()
    return line if line.endswith(".") else f"{line}."
