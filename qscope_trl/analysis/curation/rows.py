"""Rows of the data as they are read once: their keys, columns of few values, and the types of their columns.

Texts are handed on in blocks and not kept, so memory grows by some bytes a row. Left out: columns that hold images or
sound; `datasets` can leave them out and save the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.row_sources import RowSource
from qscope_trl.analysis.curation.choosing import Keys, content_key, value_name
from qscope_trl.analysis.curation.equal import TextKeys, text_key, text_keys
from qscope_trl.errors import ConfigError, DataError

BLOCK = 2048
"""Rows handed on at once."""

# A column is reported if it has no more values than this, none longer than that.
_MOST_VALUES = 20
_LONGEST_VALUE = 60
_MAX_LISTED = 20


class Column(NamedTuple):
    """A column's values, each once, and which one every row has."""

    names: list[str]
    """Values as `choosing.value_name` writes them, in the order in which they appear."""

    of: NDArray[np.int32]
    """Place of each row's value in `names`."""

    def values(self) -> list[str]:
        """The value of every row."""
        return [self.names[place] for place in self.of.tolist()]

    def counts(self, rows: Any) -> dict[str, int]:
        """How many of some rows have each value that any row of the data has."""
        counts = np.bincount(self.of[rows], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


class RowFacts(NamedTuple):
    """What is kept of every row."""

    num_rows: int
    """Rows of the data."""

    keys: Keys
    """Hash of each row's content and the seed."""

    columns: dict[str, Column]
    """Columns of few values, and those that were asked for."""

    schema: Any
    """`pyarrow.Schema` of the columns, in the order in which they appear."""

    texts: TextKeys | None = None
    """Hash of each row's text, if rows are compared."""


class RowReader:
    """Reads rows and keeps their facts.

    Args:
        source: The data.
        seed: Seed of the keys.
        wanted: Columns whose values are needed, however many they are.
        added: Columns that will be added, and must not be there.
        text_column: Column of the texts, which is no column of few values.
        hashes_texts: Whether texts are hashed, to tell equal ones.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        seed: int,
        wanted: Iterable[str] = (),
        added: Iterable[str] = (),
        text_column: str,
        hashes_texts: bool = False,
    ) -> None:
        self.source = source
        self.seed = seed
        self.text_column = text_column
        self._text_columns = {text_column, *map(str.strip, text_column.split("+"))}
        self._texts: list[bytes] | None = [] if hashes_texts else None
        self._wanted = list(wanted)
        self._added = list(added)
        self._keys: list[int] = []
        self._values: dict[str, _Values] = {}
        self._schema = _Schema(source)
        self._num_rows = 0

    def blocks(self) -> Iterator[list[dict[str, Any]]]:
        """Rows, some at a time; `facts` holds afterwards.

        Raises:
            ConfigError: If a column that will be added is there.
            DataError: If a column that is needed is not there, there is no row, or a column holds values of different
                kinds.
        """
        block: list[dict[str, Any]] = []
        for _, row in self.source.rows():
            block.append(row)
            if len(block) == BLOCK:
                yield self._taken(block)
                block = []
        if block:
            yield self._taken(block)
        if not self._num_rows:
            raise DataError(f"'{self.source.name}' has no rows.")

    def facts(self) -> RowFacts:
        """What was kept of all rows."""
        columns = {name: values.column() for name, values in self._values.items() if not values.too_many}
        keys = np.array(self._keys, dtype=np.uint64)
        texts = None if self._texts is None else text_keys(self._texts)
        return RowFacts(self._num_rows, keys, columns, self._schema.schema(), texts)

    def _taken(self, block: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = list(dict.fromkeys(name for row in block for name in row))
        for name in names:
            if name in self._added:
                raise ConfigError(
                    f"'{self.source.name}' has a column `{name}` already, which curation would add. Give the tag or "
                    f"score another name, or the other columns another `--prefix`."
                )
            if name not in self._values and (name in self._wanted or name not in self._text_columns):
                self._values[name] = _Values(self._num_rows, limited=name not in self._wanted)
        missing = next((name for name in self._wanted if name not in self._values), None)
        if missing is not None:
            raise DataError(
                f"'{self.source.name}' has no column `{missing}`, and no tag is named so; it has "
                f"{', '.join(f'`{name}`' for name in names[:_MAX_LISTED])}."
            )
        for name, values in self._values.items():
            values.add([row.get(name) for row in block])
        self._schema.add(block, names, self._num_rows)
        self._keys.extend(content_key(row, self.seed) for row in block)
        if self._texts is not None:
            self._texts.extend(
                text_key(row, text_column=self.text_column, source_name=self.source.name, index=self._num_rows + place)
                for place, row in enumerate(block)
            )
        self._num_rows += len(block)
        return block


class _Values:
    """The values of a column as they come; forgotten once they are too many to be reported."""

    def __init__(self, rows_before: int, *, limited: bool) -> None:
        self.limited = limited
        self.too_many = False
        self._place: dict[str, int] = {}
        self._parts: list[NDArray[np.int32]] = []
        if rows_before:
            self._parts.append(np.full(rows_before, self._place.setdefault(value_name(None), 0), dtype=np.int32))

    def add(self, values: Sequence[Any]) -> None:
        if self.too_many:
            return
        if self.limited and not all(value is None or isinstance(value, str | bool | int) for value in values):
            self._forget()
            return
        names = [value_name(value) for value in values]
        places = [self._place.setdefault(name, len(self._place)) for name in names]
        self._parts.append(np.array(places, dtype=np.int32))
        if self.limited and (len(self._place) > _MOST_VALUES or any(len(name) > _LONGEST_VALUE for name in names)):
            self._forget()

    def column(self) -> Column:
        return Column(list(self._place), np.concatenate(self._parts))

    def _forget(self) -> None:
        self.too_many, self._place, self._parts = True, {}, []


class _Schema:
    """The types of columns: what the format states, else what all values have in common."""

    def __init__(self, source: RowSource) -> None:
        self._name = source.name
        self._stated = source.arrow_schema()
        self._found: Any = None

    def add(self, block: Sequence[Mapping[str, Any]], names: Sequence[str], first: int) -> None:
        import pyarrow as pa

        if self._stated is not None:
            return
        fields = []
        for name in names:
            try:
                kind = pa.array([row.get(name) for row in block]).type
            except (pa.ArrowException, OverflowError, UnicodeError) as err:
                raise _different_kinds(self._name, name, first, first + len(block), err) from err
            fields.append(pa.field(name, kind))
        schema = pa.schema(fields)
        if self._found is None:
            self._found = schema
            return
        try:
            self._found = pa.unify_schemas([self._found, schema], promote_options="permissive")
        except pa.ArrowException as err:
            raise _different_kinds(self._name, None, 0, first + len(block), err) from err

    def schema(self) -> Any:
        import pyarrow as pa

        schema = self._stated if self._stated is not None else self._found
        # What `datasets` notes of each column stays. Other programs note what holds of all columns together, which
        # would be wrong once some are added.
        notes = {key: value for key, value in (schema.metadata or {}).items() if key == b"huggingface"}
        return pa.schema([field.with_type(_plain_type(field.type)) for field in schema], metadata=notes)


def _plain_type(kind: Any) -> Any:
    """The type without dictionary encoding, which is a matter of storage."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _different_kinds(source: str, column: str | None, first: int, last: int, err: Exception) -> DataError:
    where = f"Column `{column}` of '{source}'" if column else f"A column of '{source}'"
    return DataError(
        f"{where} holds values of different kinds in rows {first} to {last - 1} ({err}), which neither `datasets` nor "
        f"Parquet can hold. Bring them to one kind first."
    )
