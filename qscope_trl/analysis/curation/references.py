"""How near documents are to those of a reference set: to the nearest one, or to all of them in the mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from qscope_trl.analysis.curation.leaders import LeaderIndex, rare_first
from qscope_trl.analysis.curation.sets import ActiveSets, FloatArray, IntArray, Nearness

# Documents compared at once, and entries of a product with all references.
_BATCH = 2048
_PRODUCT = 20_000_000


class NearReference(NamedTuple):
    """Documents near a reference."""

    rows: IntArray
    """The documents, ascending."""

    reference: IntArray
    """The nearest reference of each, the first of several as near."""

    similarity: FloatArray
    """Their similarity."""


def near_references(
    sets: ActiveSets,
    rows: IntArray,
    references: ActiveSets,
    nearness: Nearness,
    threshold: float,
    *,
    show_progress: bool = True,
) -> NearReference:
    """The documents whose similarity to a reference reaches a threshold.

    Args:
        sets: All documents.
        rows: Those that take part.
        references: The references, of the same layers.
        nearness: The measure.
        threshold: Similarity above 0, at most 1.
        show_progress: Whether to show a progress bar on stderr.
    """
    index = LeaderIndex(references, nearness, threshold, rare_first(sets))
    for start in range(0, references.num_documents, _BATCH):
        some = np.arange(start, min(start + _BATCH, references.num_documents))
        index.add(some, index.prepare(references.take(some)))
    best, of = np.zeros(rows.size), np.full(rows.size, -1, dtype=np.int64)
    with tqdm(total=rows.size, desc="comparing", unit="row", disable=not show_progress, leave=False) as bar:
        for start in range(0, rows.size, _BATCH):
            some = np.arange(start, min(start + _BATCH, rows.size))
            for pairs in index.near(index.prepare(sets.take(rows[some]))):
                # The most similar reference of each document last; of equal ones the first.
                order = np.lexsort((-pairs.leader, pairs.similarity, pairs.query))
                query, value, leader = some[pairs.query[order]], pairs.similarity[order], pairs.leader[order]
                last = np.append(query[1:] != query[:-1], True)
                query, value, leader = query[last], value[last], leader[last]
                better = (value > best[query]) | ((value == best[query]) & (leader < of[query]))
                best[query[better]], of[query[better]] = value[better], leader[better]
            bar.update(some.size)
    found = np.flatnonzero(of >= 0)
    return NearReference(rows[found], of[found], best[found])


def similarity_to(
    sets: ActiveSets, references: ActiveSets, nearness: Nearness, by: str, *, show_progress: bool = True
) -> FloatArray:
    """Cosine of every document to the references: the `mean` over all of them, or the largest (`max`).

    Args:
        sets: The documents.
        references: The references, of the same layers, at least one.
        nearness: The measure `cosine`.
        by: `mean` or `max`.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        One number per document, 0 where nothing is shared. Shape `(documents,)`.
    """
    others = nearness.rows(references)
    found = np.zeros(sets.num_documents)
    mean_F = np.asarray(others.mean(axis=0)).ravel()
    inverted = others.T.tocsr()
    batch = _BATCH if by == "mean" else max(1, min(_BATCH, _PRODUCT // max(1, references.num_documents)))
    bar = tqdm(total=found.size, desc="comparing", unit="row", disable=not show_progress, leave=False)
    with bar:
        for start in range(0, found.size, batch):
            stop = min(start + batch, found.size)
            mine = nearness.rows(sets.take(np.arange(start, stop)))
            if by == "mean":
                found[start:stop] = mine @ mean_F
            else:
                product = (mine @ inverted).tocsr()
                filled = np.flatnonzero(np.diff(product.indptr))
                found[start + filled] = np.maximum.reduceat(product.data, product.indptr[filled]) if filled.size else 0
            bar.update(stop - start)
    return np.round(found, 12)
