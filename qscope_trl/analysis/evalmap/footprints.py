"""Footprints: which features the samples of a set activate, as sparse bitmaps.

A sample is its active set; a set's footprint is the union over its samples. Columns are features of all chosen layers
side by side, so feature 7 of two layers is two columns. Left out: where activations come from.

Shape legend: `N` samples of a set, `F` features of all layers, `B` sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId


@dataclass(frozen=True)
class Footprints:
    """Active sets of every sample of several evaluation sets.

    Args:
        bitmaps: By set, `scipy.sparse.csr_matrix (N, F)` whose stored entries are the active features; their values do
            not matter.
        columns: For each layer, its number of features, in the order of the columns.
        row_ids: By set, the row of the dataset that each sample was; samples without a token are left out.
    """

    bitmaps: Mapping[str, Any]
    columns: Mapping[int, int]
    row_ids: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = sum(self.columns.values())
        for name, bitmap in self.bitmaps.items():
            if bitmap.shape[1] != width:
                raise DataError(f"The footprint of `{name}` has {bitmap.shape[1]} columns; the layers have {width}.")
            if not bitmap.nnz:
                raise DataError(
                    f"No feature is active in any sample of `{name}`, so nothing can be said of it. Check its text "
                    f"column, or leave the set out."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, in order."""
        return tuple(self.bitmaps)

    def num_samples(self, name: str) -> int:
        """Samples of a set."""
        return int(self.bitmaps[name].shape[0])

    def feature(self, column: int) -> FeatureId:
        """Which feature a column is."""
        for layer, size in self.columns.items():
            if column < size:
                return FeatureId(layer, int(column))
            column -= size
        raise DataError(f"There is no column {column}.")

    def counts(self, name: str) -> NDArray[np.int64]:
        """In how many samples of a set each feature is active, `(F,)`."""
        bitmap = self.bitmaps[name]
        return np.bincount(bitmap.indices, minlength=bitmap.shape[1])

    def unions(self) -> Any:
        """The footprints, `csr_matrix (B, F)` of ones."""
        import scipy.sparse as sp

        rows = [np.flatnonzero(self.counts(name)) for name in self.names]
        indptr = np.concatenate([[0], np.cumsum([row.size for row in rows])])
        data = np.ones(indptr[-1], dtype=np.int64)
        return sp.csr_matrix((data, np.concatenate(rows), indptr), shape=(len(rows), sum(self.columns.values())))


def bitmap(active: Iterable[Sequence[int] | NDArray[Any]], num_features: int) -> Any:
    """A bitmap `csr_matrix (N, F)` from one list of active columns per sample."""
    import scipy.sparse as sp

    rows = [np.unique(np.asarray(row, dtype=np.int64)) for row in active]
    indptr = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    indices = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
    return sp.csr_matrix((np.ones(indices.size, dtype=np.int8), indices, indptr), shape=(len(rows), num_features))


def side_by_side(layers: Sequence[Any]) -> Any:
    """Bitmaps of several layers over the same samples as one, entries that are zero taken out."""
    import scipy.sparse as sp

    joined = sp.hstack([layer != 0 for layer in layers], format="csr")
    joined.eliminate_zeros()
    joined.sort_indices()
    return joined
