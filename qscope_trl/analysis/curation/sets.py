"""Documents as sparse sets of active features, in compressed rows, and what makes two of them near.

Three measures, each a number from 0 to 1:

* `jaccard`: features active in both over features active in either.
* `weighted_jaccard`: the same, each feature counted by its inverse document frequency (idf).
* `cosine`: of the activations times idf. Each layer is brought to length 1 before, so that layers with larger
  activations count no more than others.

A document without an active feature is near nothing, not even its like; equal texts are told by `equal.py`. Left out:
learned or dense embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_trl.errors import ConfigError

MEASURES = ("jaccard", "weighted_jaccard", "cosine")
"""How near two documents are; see the module's text."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def sparse() -> Any:
    """`scipy.sparse`.

    Raises:
        ConfigError: If SciPy is not installed.
    """
    try:
        import scipy.sparse
    except ImportError as err:
        raise ConfigError("Curation needs SciPy, which is not installed: pip install 'qscope-trl[data]'.") from err
    return scipy.sparse


@dataclass(frozen=True)
class ActiveSets:
    """The active features of documents, one entry per document and feature that fires in it.

    The features of all layers are numbered in one row: those of the first layer, then those of the second.

    Args:
        offsets: Where the entries of each document begin, and where the last ones end, int64 `(documents + 1,)`.
        features: Number of the feature of each entry, ascending within a document, int32 `(entries,)`.
        values: Its activation, positive, fp32 `(entries,)`; `None` if only sets are compared.
        starts: Number of the first feature of each layer, and the number of all features.
    """

    offsets: NDArray[np.int64]
    features: NDArray[np.int32]
    values: NDArray[np.float32] | None
    starts: tuple[int, ...]

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return self.offsets.size - 1

    @property
    def num_features(self) -> int:
        """Features of all layers."""
        return self.starts[-1]

    def sizes(self) -> IntArray:
        """Active features of each document."""
        return np.diff(self.offsets)

    def document_frequency(self) -> IntArray:
        """In how many documents each feature is active."""
        return np.bincount(self.features, minlength=self.num_features).astype(np.int64)

    def take(self, rows: Sequence[int] | IntArray) -> ActiveSets:
        """The sets of some documents, in the order given."""
        chosen = np.asarray(rows, dtype=np.int64)
        sizes = self.sizes()[chosen]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], sizes)
        values = None if self.values is None else self.values[places]
        return ActiveSets(offsets, self.features[places], values, self.starts)


def join(parts: Sequence[ActiveSets]) -> ActiveSets:
    """The documents of several parts, one after another; all of the same layers, all with values or all without."""
    offsets, end = [np.zeros(1, dtype=np.int64)], 0
    for part in parts:
        offsets.append(part.offsets[1:] + end)
        end += int(part.offsets[-1])
    values = [part.values for part in parts if part.values is not None]
    return ActiveSets(
        np.concatenate(offsets),
        np.concatenate([part.features for part in parts]),
        np.concatenate(values) if len(values) == len(parts) else None,
        parts[0].starts,
    )


def inverse_document_frequency(sets: ActiveSets) -> FloatArray:
    """`ln((N + 2) / (df + 1))` of each feature over N documents: above 0 for each, largest for what never fires."""
    return np.log((sets.num_documents + 2) / (sets.document_frequency() + 1.0))


@dataclass(frozen=True)
class Nearness:
    """One of the measures, with the weight of each feature.

    Args:
        measure: One of `MEASURES`.
        idf: Weight of each feature `(features,)`; not used by `jaccard`.
    """

    measure: str
    idf: FloatArray

    def rows(self, sets: ActiveSets) -> Any:
        """Documents as a sparse matrix whose rows' dot products are what two documents share.

        Returns:
            `scipy.sparse.csr_matrix (documents, features)`, fp64, columns ascending in each row.
        """
        if self.measure == "jaccard":
            data = np.ones(sets.features.size)
        elif self.measure == "weighted_jaccard":
            data = np.sqrt(self.idf[sets.features])
        else:
            data = self._unit_values(sets)
        shape = (sets.num_documents, sets.num_features)
        return sparse().csr_matrix((data, sets.features, sets.offsets), shape=shape)

    def weights(self, rows: Any) -> FloatArray:
        """The weight of each document, given its row: what it shares with itself."""
        return row_sums(np.square(rows.data), rows.indptr)

    def similarity(self, shared: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
        """From what two documents share and the weight of each."""
        if self.measure == "cosine":
            ratio = shared
        else:
            either = first + second - shared
            ratio = np.divide(shared, either, out=np.zeros_like(either), where=either > 0)
        # Sums in another order differ in the last digits; a document and itself are to give 1.
        return ratio if self.measure == "jaccard" else np.round(ratio, 12)

    def _unit_values(self, sets: ActiveSets) -> FloatArray:
        if sets.values is None:
            raise ConfigError("The measure `cosine` needs the activations of the sets, which were not kept.")
        data = sets.values * self.idf[sets.features]
        num_layers = len(sets.starts) - 1
        layer = np.searchsorted(np.asarray(sets.starts[1:]), sets.features, side="right")
        document = np.repeat(np.arange(sets.num_documents), sets.sizes())
        key = document * num_layers + layer
        squares = np.bincount(key, weights=data * data, minlength=sets.num_documents * num_layers)
        active_layers = (squares.reshape(-1, num_layers) > 0).sum(1)
        return np.asarray(data / np.sqrt(squares[key] * active_layers[document]))


def row_sums(data: FloatArray, offsets: NDArray[Any]) -> FloatArray:
    """Sum of the entries of each row of a sparse matrix; 0 for rows without any."""
    row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    # Without an entry, `bincount` forgets that its weights are floats.
    return np.bincount(row, weights=data, minlength=offsets.size - 1).astype(np.float64)
