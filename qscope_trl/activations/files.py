"""Rows of local data files, read in pieces: JSON lines, JSON lists, Parquet, CSV, lines of text.

Left out: compression other than gzip, and what an archive holds.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from qscope_trl.errors import DataError

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
"""Endings of data files. All but `.parquet` may have `.gz` behind."""

# Rows of Parquet, and bytes of CSV and of Parquet columns, that are in memory at a time. A CSV row must fit.
_BATCH_ROWS = 1000
_CSV_BLOCK = 16 * 1024 * 1024
_BUFFER = 1024 * 1024

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DESCRIPTION = re.compile(r"(?i)(readme|license|dataset_infos?|dataset_dict)\b")


def kind_of(path: Path) -> str:
    """The kind by a file's ending, without `.gz`; empty if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if len(suffixes) > 1 else ""
    return suffixes[-1] if suffixes else ""


def is_data_file(path: Path) -> bool:
    """Whether a file's ending names a kind that can be read."""
    return kind_of(path) in KINDS


def whole(value: Any) -> Any:
    """A text, or a row, with U+FFFD for each half of a character: neither tokenizers nor files take lone surrogates.

    JSON can hold them, as escapes, and no other kind of file can.
    """
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    return {whole(key): whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def left_out_kinds(folder: Path, taken: Sequence[Path]) -> list[str]:
    """Kinds of the data files in a folder, at any depth, of which none is taken.

    Files that `datasets` never takes for data do not count: hidden ones, and the folder's own description, in which
    `configs` may also say what the data are.
    """
    card = folder / "README.md"
    if card.is_file() and re.search(r"(?m)^configs:", card.read_text(encoding="utf-8", errors="replace")):
        return []
    found = set()
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__")) for part in inside)
        if not hidden and not _DESCRIPTION.match(path.name) and path.is_file() and is_data_file(path):
            found.add(kind_of(path))
    return sorted(found - {kind_of(path) for path in taken})


class Files:
    """Some files as one sequence of rows."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._counts: dict[Path, int] = {}

    @property
    def is_random_access(self) -> bool:
        """Whether starting at a later row leaves the ones before unread."""
        return all(kind_of(path) == ".parquet" for path in self.paths)

    def count(self, path: Path) -> int:
        """Rows of one of the files, counted once."""
        if path not in self._counts:
            self._counts[path] = count_rows(path)
        return self._counts[path]

    def rows(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Rows from number `start`.

        Raises:
            DataError: If a file cannot be read.
        """
        for place, path in enumerate(self.paths):
            # The last file counts nothing: what is before `start` there is skipped on the way.
            if start and place < len(self.paths) - 1 and start >= self.count(path):
                start -= self.count(path)
                continue
            yield from read_rows(path, start, columns)
            start = 0

    def arrow_schema(self) -> Any:
        """Types of the columns of Parquet files as a `pyarrow.Schema`; `None` for other kinds.

        Raises:
            DataError: If a file cannot be read, or files disagree.
        """
        if not self.paths or not self.is_random_access:
            return None
        import pyarrow as pa

        try:
            schemas = []
            for path in self.paths:
                with _open_parquet(path) as file:
                    schemas.append(file.schema_arrow)
            return pa.unify_schemas(schemas, promote_options="permissive")
        except (OSError, ValueError, pa.ArrowException) as err:
            raise DataError(f"The columns of '{self.paths[0]}' and the files with it cannot be read: {err}") from err

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            own = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(_BUFFER):
                        own.update(block)
            except OSError as err:
                raise DataError(f"'{path}' cannot be read: {err}") from err
            digest.update(own.digest())
        return digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """16 hex digits of a hash over the files' bytes, in their order.

        Raises:
            DataError: If a file cannot be read.
        """
        return self._fingerprint


def read_rows(path: Path, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of one file from number `start`.

    Lines of text are rows under the column `text`, blank ones included; blank lines between JSON lines are no rows.
    Values of CSV files are texts.

    Raises:
        DataError: If it is missing, of no known kind, or damaged; with the line where that is known.
    """
    kind = _known_kind(path)
    readers = {".parquet": _parquet, ".csv": _csv, ".json": _json, ".jsonl": _json_lines, ".txt": _lines}
    try:
        yield from readers[kind](path, start, columns)
    except DataError:
        raise
    # pyarrow's errors derive from ValueError or OSError.
    except (OSError, EOFError, ValueError, zlib.error) as err:
        raise DataError(f"'{path}' cannot be read as {kind[1:]}: {err}") from err


def count_rows(path: Path) -> int:
    """Number of rows of one file.

    Raises:
        DataError: As `read_rows`.
    """
    kind = _known_kind(path)
    try:
        if kind == ".parquet":
            with _open_parquet(path) as file:
                return int(file.metadata.num_rows)
        if kind == ".csv":
            return sum(batch.num_rows for batch in _csv_batches(path))
        if kind in (".jsonl", ".txt"):
            with _open_text(path) as lines:
                return sum(1 for line in lines if kind == ".txt" or line.strip())
        return sum(1 for _ in read_rows(path))
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as err:
        raise DataError(f"'{path}' cannot be read as {kind[1:]}: {err}") from err


def _known_kind(path: Path) -> str:
    kind = kind_of(path)
    if not path.is_file():
        raise DataError(f"No file at '{path}'.")
    if kind not in KINDS or (kind == ".parquet" and path.suffix.lower() == ".gz"):
        raise DataError(f"'{path}' is of no known kind. Known: {', '.join(KINDS)}, and all but Parquet with .gz.")
    return kind


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _lines(path: Path, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    name = columns[0] if columns is not None and len(columns) == 1 else "text"
    with _open_text(path) as lines:
        for place, line in enumerate(lines):
            if place >= start:
                yield {name: line.rstrip("\n")}


def _json_lines(path: Path, start: int, _columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    with _open_text(path) as lines:
        place = -1
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place += 1
            if place < start:
                continue
            try:
                row = _loads(line)
            except ValueError as err:
                raise DataError(f"Line {number} of '{path}' is not JSON: {err}") from err
            yield _mapping(row, f"Line {number} of '{path}'")


def _json(path: Path, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
        if head == "[":
            for place, row in enumerate(_loads(head + file.read())):
                if place >= start:
                    yield _mapping(row, f"Entry {place} of '{path}'")
            return
    # Many datasets call JSON lines `.json`.
    yield from _json_lines(path, start, columns)


def _loads(text: str) -> Any:
    found = json.loads(text)
    return whole(found) if _ESCAPED_SURROGATE.search(text) else found


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not a mapping from column to value.")
    return row


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, buffer_size=_BUFFER)


def _parquet(path: Path, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    with _open_parquet(path) as file:
        chosen = list(columns) if columns is not None and set(columns) <= set(file.schema_arrow.names) else None
        groups: list[int] = []
        first = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if groups or first + size > start:
                groups.append(group)
            else:
                first += size
        skip = start - first
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=chosen):
            if skip < batch.num_rows:
                yield from batch.slice(skip).to_pylist()
            skip = max(0, skip - batch.num_rows)


def _csv(path: Path, start: int, _columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    skip = start
    for batch in _csv_batches(path):
        if skip < batch.num_rows:
            yield from batch.slice(skip).to_pylist()
        skip = max(0, skip - batch.num_rows)


def _csv_batches(path: Path) -> Iterator[Any]:
    # Not the csv module: its limit of 128 KiB a field is the whole process's.
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    with _open_text(path) as file:
        names = next(csv.reader(file), [])
    if not names:
        return
    with pa.input_stream(str(path), compression="detect") as file:
        yield from pa_csv.open_csv(
            file,
            read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
