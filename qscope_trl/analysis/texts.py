"""Groups of texts for discovery: read from local files, tokenised, and parted into chosen-on and held out.

Left out: Hub datasets (`datasets` can save them as JSONL) and chat templates.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_trl.activations.encode import Positions, num_kept, tokenize
from qscope_trl.bundled import data_path
from qscope_trl.config.find import FindConfig
from qscope_trl.errors import ConfigError, DataError

_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class TextGroup:
    """Token ids of the texts of a group, and which of them are held out.

    Args:
        token_ids: Ids of each text, as `activations.encode.tokenize` gives them.
        heldout: Whether each text is held out.
    """

    token_ids: list[list[int]]
    heldout: list[bool]

    def kept(self) -> list[list[int]]:
        """Token ids of the texts that are not held out."""
        return [ids for ids, out in zip(self.token_ids, self.heldout, strict=True) if not out]


def prepare_group(
    name: str,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    positions: Positions = "all",
    max_length: int = 512,
    max_tokens: int | None = None,
    holdout: float = 0.2,
    seed: int = 0,
) -> TextGroup:
    """Tokenise a group and decide which texts are held out.

    Texts are ordered by a hash of their content and the seed, so the order in the file changes nothing, and equal
    texts are on the same side.

    Args:
        name: Name of the group, for messages.
        texts: Its texts.
        tokenizer: A transformers tokenizer.
        positions: `all` tokens or the `last` of each text.
        max_length: Tokens kept of each text.
        max_tokens: Stop taking texts at this many tokens.
        holdout: Share of the different texts to hold out; above 0 at least one is, and at least one is not.
        seed: Seed of the order.

    Raises:
        DataError: If no token is left, or there is one text and it would have to be held out.
    """
    ids = tokenize(tokenizer, texts, max_length=max_length, positions=positions)
    keys = [hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest() for text in texts]
    order = [i for i in sorted(range(len(texts)), key=lambda i: keys[i]) if num_kept(len(ids[i]), positions=positions)]
    if not order:
        raise DataError(
            f"No token of group `{name}` is left after masking: none of its {len(texts)} texts has a token after "
            f"position 0, which is left out. Give longer texts."
        )
    if max_tokens is not None:
        taken, total = [], 0
        for i in order:
            if total >= max_tokens:
                break
            taken.append(i)
            total += num_kept(len(ids[i]), positions=positions)
        order = taken
    different = sorted({keys[i] for i in order})
    if holdout > 0 and len(different) < 2:
        raise DataError(
            f"Group `{name}` has one usable text, so none can be held out. Give more texts, or set `holdout` to 0 and "
            f"go without held-out evidence."
        )
    num_out = min(max(1, round(holdout * len(different))), len(different) - 1) if holdout > 0 else 0
    out = set(different[:num_out])
    return TextGroup([ids[i] for i in order], [keys[i] in out for i in order])


def read_groups(config: FindConfig) -> tuple[dict[str, list[str]], str]:
    """The texts per group, and the target group's name.

    With `positive` and `negative`, groups are named after their files (`zh.jsonl.gz` is `zh`). `demo:NAME` stands for
    a bundled file.

    Raises:
        ConfigError: If groups are named twice, fewer than two, or lack the target.
        DataError: If a file is missing, empty, or lacks a column.
    """
    groups: dict[str, list[str]] = {}
    if config.data:
        groups = _split_by_column(Path(data_path(config.data)), config.text_column, str(config.group_column))
    else:
        for name, path in _named_files(config).items():
            groups[name] = read_texts(path, config.text_column)
    target = config.target or _group_name(Path(data_path(str(config.positive))))
    if target not in groups or len(groups) < 2:
        raise ConfigError(
            f"The target group `{target}` and at least one other are needed; the data has "
            f"{', '.join(f'`{name}`' for name in groups)}."
        )
    return groups, target


def read_texts(path: Path, column: str) -> list[str]:
    """The texts of one file, in order; blank ones are left out.

    Args:
        path: `.jsonl`, `.json` (a list of mappings), `.parquet` or `.txt` (one text a line), also with `.gz`.
        column: Column that holds the text; not used for `.txt`.

    Raises:
        DataError: If the file is missing, of another kind, unreadable, without texts, or lacks the column.
    """
    return _not_blank(path, (_string(path, row, column) for row in _rows(path, column)))


def _split_by_column(path: Path, column: str, group_column: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for row in _rows(path, column):
        groups.setdefault(_string(path, row, group_column, is_group=True), []).append(_string(path, row, column))
    return {name: _not_blank(path, texts) for name, texts in groups.items()}


def _named_files(config: FindConfig) -> dict[str, Path]:
    if config.positive and config.negative:
        paths = [Path(data_path(name)) for name in (config.positive, config.negative)]
        pairs = [(_group_name(path), path) for path in paths]
    else:
        pairs = []
        for entry in config.group:
            name, mark, path = entry.partition("=")
            if not (name and mark and path):
                raise ConfigError(f"`--group` is {entry!r}; write it as NAME=FILE, for example zh=data/zh.jsonl.")
            pairs.append((name, Path(data_path(path))))
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ConfigError(
            f"Two files would both be the group `{pairs[-1][0]}`. Name them with `--group NAME=FILE` and `--target`."
        )
    return named


def _group_name(path: Path) -> str:
    return path.name.split(".", 1)[0]


def _rows(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if not path.is_file():
        raise DataError(f"No text file at '{path}'.")
    if kind not in _SUFFIXES:
        raise DataError(f"'{path}' is of no known kind. Known: {', '.join(_SUFFIXES)}, and the text ones with .gz.")
    try:
        if kind == ".parquet":
            parquet: Any = importlib.import_module("pyarrow.parquet")
            yield from parquet.read_table(path).to_pylist()
            return
        with gzip.open(path, "rt", encoding="utf-8") if suffixes[-1] == ".gz" else path.open(encoding="utf-8") as file:
            if kind == ".txt":
                yield from ({column: line.rstrip("\n")} for line in file)
            elif kind == ".json":
                data = json.load(file)
                if not isinstance(data, list):
                    raise DataError(f"'{path}' holds a {type(data).__name__}, not a list of mappings.")
                yield from data
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except DataError:
        raise
    except (OSError, EOFError, ValueError) as err:
        raise DataError(f"'{path}' cannot be read as {kind[1:]}: {err}") from err


def _string(path: Path, row: Any, column: str, *, is_group: bool = False) -> str:
    """A column's value; groups may also be whole numbers and booleans, which are named `1` and `true`."""
    if not isinstance(row, Mapping):
        raise DataError(f"'{path}' holds a {type(row).__name__} where a mapping with the column `{column}` belongs.")
    if column not in row:
        raise DataError(
            f"'{path}' has no column `{column}`; it has {', '.join(f'`{key}`' for key in row)}. Name the right one by "
            f"`--text-column` or `--group-column`."
        )
    value = row[column]
    if is_group and isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str):
        raise DataError(f"Column `{column}` of '{path}' holds {value!r}, which is not a string.")
    return value


def _not_blank(path: Path, texts: Iterable[str]) -> list[str]:
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise DataError(f"'{path}' holds no text: every row is blank or there is none.")
    return kept
