"""Rows of any dataset, one after another, each under a number that stays: local files, saved datasets, the Hub.

Local files are read in pieces whatever their size, `.json` lists excepted. Left out: transforms, shuffling and images;
what `datasets` can do to a dataset is done there, and the result saved.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.activations.files import KINDS, Files, is_data_file, kind_of, left_out_kinds, whole
from qscope_trl.bundled import data_path
from qscope_trl.errors import ConfigError, DataError

ChatRenderer = Callable[[list[Any]], str]
"""A conversation, a list of `{"role", "content"}` mappings, to its text."""

# Rows of a `datasets.Dataset` fetched at once.
_BLOCK = 1000


class RowSource(ABC):
    """Rows with stable numbers from 0. Reading twice gives the same rows in the same order."""

    name: str
    """What the user called it; for messages and manifests."""

    revision: str | None = None
    """Commit on the Hub, where that is known."""

    split: str | None = None
    """Split, where the dataset has any."""

    is_random_access: bool = False
    """Whether `rows(start)` costs nothing for the rows before `start`."""

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Number of rows; `None` for a stream. Files of lines are read through once to count them."""

    @property
    def expected_rows(self) -> int | None:
        """Number of rows that the dataset's card states, for progress bars; may be wrong."""
        return self.num_rows

    @abstractmethod
    def rows(self, start: int = 0, *, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers and rows, from number `start`.

        Args:
            start: First row to give.
            columns: Columns to read, where the format can leave others out; other formats give all. Names that the
                dataset lacks are ignored, and then all are read, so that `text_of` can list what there is.

        Raises:
            DataError: If a file cannot be read, or holds something else than rows.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change when the data does: a hash of the files' bytes, or of the commit on the Hub."""

    def arrow_schema(self) -> Any:
        """Types of the columns as a `pyarrow.Schema`, where the format states them; else `None`."""
        return None

    def __len__(self) -> int:
        if self.num_rows is None:
            raise TypeError(f"'{self.name}' is a stream: its number of rows is not known before its end")
        return self.num_rows

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self.rows()


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


class FileRows(RowSource):
    """Rows of local files, one file after another."""

    def __init__(self, name: str, paths: Sequence[Path], *, streaming: bool = False, split: str | None = None) -> None:
        self.name = name
        self.split = split
        self._files = Files(paths)
        self._streaming = streaming
        self.is_random_access = self._files.is_random_access

    @property
    def num_rows(self) -> int | None:
        """Number of rows, counted once; `None` if opened as a stream."""
        return None if self._streaming else sum(self._files.count(path) for path in self._files.paths)

    def rows(self, start: int = 0, *, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """See `RowSource.rows`."""
        return enumerate(self._files.rows(start, columns), start)

    def fingerprint(self) -> str:
        """Hash of the files' bytes, in their order."""
        return self._files.fingerprint()

    def arrow_schema(self) -> Any:
        """Of Parquet files."""
        return self._files.arrow_schema()


class DatasetRows(RowSource):
    """Rows of a `datasets.Dataset`."""

    is_random_access = True

    def __init__(
        self, name: str, dataset: Any, fingerprint: str, *, split: str | None = None, revision: str | None = None
    ) -> None:
        self.name = name
        self.split = split
        self.revision = revision
        self._dataset = dataset
        self._fingerprint = fingerprint

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def rows(self, start: int = 0, *, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """See `RowSource.rows`."""
        dataset = self._dataset
        if columns is not None and set(columns) <= set(dataset.column_names):
            dataset = dataset.select_columns(list(columns))
        for first in range(start, len(dataset), _BLOCK):
            block = dataset[first : min(first + _BLOCK, len(dataset))]
            names = list(block)
            for place, values in enumerate(zip(*block.values(), strict=True)):
                yield first + place, dict(zip(names, values, strict=True))

    def fingerprint(self) -> str:
        """Of the commit and split, or of the dataset object."""
        return self._fingerprint

    def arrow_schema(self) -> Any:
        """Of the dataset's features."""
        return self._dataset.features.arrow_schema


class StreamRows(RowSource):
    """Rows of a `datasets.IterableDataset`, read anew from its beginning each time."""

    def __init__(
        self,
        name: str,
        dataset: Any,
        fingerprint: str,
        *,
        split: str | None = None,
        revision: str | None = None,
        expected_rows: int | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.revision = revision
        self._dataset = dataset
        self._fingerprint = fingerprint
        self._expected_rows = expected_rows

    @property
    def num_rows(self) -> None:
        """Not known."""
        return None

    @property
    def expected_rows(self) -> int | None:
        """What the dataset's card states."""
        return self._expected_rows

    def rows(self, start: int = 0, *, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """See `RowSource.rows`."""
        dataset = self._dataset
        known = dataset.column_names
        if columns is not None and known is not None and set(columns) <= set(known):
            dataset = dataset.select_columns(list(columns))
        return enumerate(dataset.skip(start) if start else dataset, start)

    def fingerprint(self) -> str:
        """Of the commit, configuration and split."""
        return self._fingerprint

    def arrow_schema(self) -> Any:
        """Of the dataset's features, if the stream states them."""
        features = self._dataset.features
        return None if features is None else features.arrow_schema


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
