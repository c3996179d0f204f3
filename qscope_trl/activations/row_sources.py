"""Kinds of sources of rows: files read in pieces, `datasets` objects, and streams of them.

Left out: which kind a name stands for, and a row's text; that is `sources`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.activations.files import Files

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


class _OfDatasets(RowSource):
    """Rows of an object of the `datasets` library."""

    def __init__(
        self, name: str, dataset: Any, fingerprint: str, *, split: str | None = None, revision: str | None = None
    ) -> None:
        self.name = name
        self.split = split
        self.revision = revision
        self._dataset = dataset
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        """Of the commit, configuration and split, or of the dataset object."""
        return self._fingerprint


class DatasetRows(_OfDatasets):
    """Rows of a `datasets.Dataset`."""

    is_random_access = True

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

    def arrow_schema(self) -> Any:
        """Of the dataset's features."""
        return self._dataset.features.arrow_schema


class StreamRows(_OfDatasets):
    """Rows of a `datasets.IterableDataset`, read anew from its beginning each time."""

    def __init__(self, *args: Any, expected_rows: int | None = None, **origin: Any) -> None:
        super().__init__(*args, **origin)
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

    def arrow_schema(self) -> Any:
        """Of the dataset's features, if the stream states them."""
        features = self._dataset.features
        return None if features is None else features.arrow_schema
