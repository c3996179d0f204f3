"""The texts of the sets: rows of a dataset that hold what is asked for, as one set or one for each value of a column.

Left out: their features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.sources import ChatRenderer, open_source, text_columns, text_of
from qscope_trl.config.evalmap import SetSpec
from qscope_trl.errors import DataError

_MOST_VALUES = 200
_NONE = "(none)"


@dataclass(frozen=True)
class SampleSet:
    """The samples of one set.

    Args:
        name: What the set is called.
        source: Where it is from.
        rows: Row of the dataset that each sample is, `(N,)`.
        texts: Their texts; `None` if they are from a store.
    """

    name: str
    source: str
    rows: NDArray[np.int64]
    texts: Sequence[str] | None

    @property
    def num_samples(self) -> int:
        """Samples, those without a token too."""
        return int(self.rows.size)


def read_texts(spec: SetSpec, max_samples: int | None, chat: ChatRenderer) -> list[SampleSet]:
    """The sets of one dataset: one, or one for each value of a column.

    Raises:
        DataError: If it cannot be read, lacks a column, or has no row left.
    """
    source = open_source(spec.place, split=spec.split, config=spec.config, revision=spec.revision)
    conditions = [column for column, _ in spec.filters] + ([spec.by] if spec.by else [])
    groups: dict[str, tuple[list[int], list[str]]] = {}
    for index, row in source.rows(columns=[*text_columns(spec.text_column), *conditions]):
        missing = next((column for column in conditions if column not in row), None)
        if missing is not None:
            raise DataError(
                f"Row {index} of '{spec.place}' has no column `{missing}`, which `filter` or `by` names; it has "
                f"{', '.join(f'`{key}`' for key in row)}."
            )
        if any(value not in (str(row[column]), _shown(row[column])) for column, value in spec.filters):
            continue
        name = f"{spec.name}/{_shown(row[spec.by])}" if spec.by else spec.name
        rows, texts = groups.setdefault(name, ([], []))
        if len(groups) > _MOST_VALUES:
            raise DataError(
                f"Column `{spec.by}` of '{spec.place}' has more than {_MOST_VALUES} values, each of which would be a "
                f"set. Name a column of few values by `--by`."
            )
        if max_samples is not None and len(rows) == max_samples:
            if not spec.by:
                break
            continue
        rows.append(index)
        texts.append(text_of(row, text_column=spec.text_column, source_name=spec.place, index=index, chat=chat))
    if not groups:
        shown = " and ".join(f"`{column}={value}`" for column, value in spec.filters)
        what = f"has {shown}" if shown else "is there"
        raise DataError(f"No row of '{spec.place}' {what}, so `{spec.name}` is empty.")
    where = spec.place if spec.split is None else f"{spec.place} ({spec.split})"
    return [
        SampleSet(name, where, np.array(rows, dtype=np.int64), texts) for name, (rows, texts) in sorted(groups.items())
    ]


def _shown(value: Any) -> str:
    """A value of a column as the name of a set: no value is told from the word, and 1.0 is 1."""
    if value is None:
        return _NONE
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
