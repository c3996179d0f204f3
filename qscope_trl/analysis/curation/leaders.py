"""Which documents are near a leader, exactly, without a matrix of all documents by all.

`LeaderIndex` holds documents and finds, for others, every pair whose similarity reaches a threshold. Pairs are not
missed and not guessed:

1. Of two documents whose weights (sizes, for `jaccard`) differ by more than the threshold, neither is looked at.
2. Features are ordered from the rarest to the most frequent. Of each document only a prefix in that order is indexed:
   the shortest one that leaves at most `threshold - SLACK` of its weight (for `cosine`, of its length) outside. What
   two near documents share outside the prefix of whichever ends earlier is at most that, so they share at least
   `SLACK` of the larger one's weight within the prefixes. Frequent features, which nearly all documents share and
   which make up most of the work, are thus not multiplied.
3. Pairs that share so much by a sparse product of prefixes are candidates; their whole sets decide.

Time grows with the square of the number of leaders, memory with the entries of the leaders' prefixes.

References:
    Prefix filtering of set similarity joins: Chaudhuri, Ganti and Kaushik (2006), "A primitive operator for similarity
    joins in data cleaning"; Bayardo, Ma and Srikant (2007), "Scaling up all pairs similarity search".
    The leader algorithm: Hartigan (1975), "Clustering algorithms", chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from qscope_trl.analysis.curation.sets import ActiveSets, FloatArray, IntArray, Nearness, row_sums, sparse

SLACK = 0.15
"""Share of a document's weight that two near ones share within their prefixes: more costs larger prefixes, less costs
more candidates. Any value gives the same pairs."""

# Leaders whose prefixes are multiplied at once: the accumulators of a product stay in the processor's cache.
_CHUNK = 2048
# Documents compared with all leaders at once, and with each other.
_BATCH = 2048
_SUB_BATCH = 256
# Entries copied at once when candidates are verified.
_VERIFY_ENTRIES = 20_000_000
# Sums of a few thousand fp64 terms; far above their rounding, far below any difference that counts.
_ROUNDING = 1e-9


class Pairs(NamedTuple):
    """Some documents near some leaders."""

    query: IntArray
    """Place of the document among those asked for."""

    leader: IntArray
    """Number of the leader, in the order they were added."""

    similarity: FloatArray
    """Their similarity, at least the threshold."""


class _Rows(NamedTuple):
    """Documents made ready: whole rows, their prefixes, weights and buckets."""

    whole: Any
    prefix: Any
    weight: FloatArray
    bucket: IntArray

    def take(self, rows: IntArray) -> _Rows:
        return _Rows(self.whole[rows], self.prefix[rows], self.weight[rows], self.bucket[rows])


class _Bucket:
    """Leaders of like weight: closed chunks of inverted prefixes, and a last one that still grows."""

    def __init__(self) -> None:
        self.closed: list[tuple[IntArray, Any]] = []
        self.open: list[tuple[IntArray, Any]] = []
        self.inverted: Any = None

    def add(self, numbers: IntArray, prefix: Any) -> None:
        self.open.append((numbers, prefix))
        self.inverted = None

    def chunks(self) -> Iterator[tuple[IntArray, Any]]:
        if self.open and self.inverted is None:
            numbers = np.concatenate([numbers for numbers, _ in self.open])
            prefix = sparse().vstack([prefix for _, prefix in self.open], format="csr")
            self.open, self.inverted = [(numbers, prefix)], prefix.T.tocsr()
            if numbers.size >= _CHUNK:
                self.closed.append((numbers, self.inverted))
                self.open = []
        yield from self.closed
        if self.open:
            yield self.open[0][0], self.inverted


class LeaderIndex:
    """Documents to be compared with.

    Args:
        sets: Where the leaders are taken from; kept, not copied.
        nearness: The measure.
        threshold: Similarity that a pair must reach, above 0, at most 1.
        rank: Place of each feature in the order from rare to frequent. Any order gives the same pairs.
        slack: See `SLACK`.
    """

    def __init__(
        self, sets: ActiveSets, nearness: Nearness, threshold: float, rank: NDArray[Any], *, slack: float = SLACK
    ) -> None:
        self.sets = sets
        self.nearness = nearness
        self.threshold = threshold
        self.rank = rank.astype(np.int32)
        self.rows: list[int] = []
        self._weight: list[float] = []
        self._buckets: dict[int, _Bucket] = {}
        self._slack = min(slack, threshold / 2)
        # Two documents that can be near are in one bucket or in neighbouring ones.
        self._log_width = max(-math.log(threshold) * (1 + _ROUNDING), 0.1)

    def prepare(self, sets: ActiveSets) -> _Rows:
        """Make documents ready to be looked for or added."""
        whole = self.nearness.rows(sets)
        weight = self.nearness.weights(whole)
        if self.nearness.measure == "cosine":
            bucket = np.zeros(weight.size, dtype=np.int64)
        else:
            bucket = np.floor(np.log(np.maximum(weight, 1e-300)) / self._log_width).astype(np.int64)
        return _Rows(whole, self._prefixes(whole, weight), weight, bucket)

    def add(self, rows: IntArray, ready: _Rows) -> None:
        """Add leaders: their places in `sets`, and themselves made ready."""
        numbers = np.arange(len(self.rows), len(self.rows) + rows.size)
        self.rows.extend(rows.tolist())
        self._weight.extend(ready.weight.tolist())
        for bucket in np.unique(ready.bucket[ready.weight > 0]).tolist():
            chosen = np.flatnonzero((ready.bucket == bucket) & (ready.weight > 0))
            self._buckets.setdefault(bucket, _Bucket()).add(numbers[chosen], ready.prefix[chosen])

    def near(self, ready: _Rows) -> Iterator[Pairs]:
        """Every pair of a document and a leader whose similarity reaches the threshold, in some order."""
        leader_weight = np.asarray(self._weight)
        for bucket in np.unique(ready.bucket[ready.weight > 0]).tolist():
            rows = np.flatnonzero((ready.bucket == bucket) & (ready.weight > 0))
            prefix = ready.prefix[rows]
            for neighbour in (bucket - 1, bucket, bucket + 1):
                chunks = self._buckets[neighbour].chunks() if neighbour in self._buckets else ()
                for numbers, inverted in chunks:
                    place, column, shared = _entries(prefix @ inverted)
                    query, leader = rows[place], numbers[column]
                    first, second = ready.weight[query], leader_weight[leader]
                    likely = shared >= self._least(first, second)
                    yield from self._verified(ready, query[likely], leader[likely])

    def near_each_other(self, ready: _Rows) -> Pairs:
        """Pairs among a few documents that all come after the leaders; the earlier one as `leader`."""
        first, second, shared = _entries(ready.prefix @ ready.prefix.T)
        likely = (second < first) & (shared >= self._least(ready.weight[first], ready.weight[second]))
        found = list(self._verified(ready, first[likely], second[likely], among=True))
        empty = np.zeros(0, dtype=np.int64)
        return Pairs(*map(np.concatenate, zip(*found, strict=True))) if found else Pairs(empty, empty, np.zeros(0))

    def _least(self, first: FloatArray, second: FloatArray) -> FloatArray:
        """What the prefixes of a near pair share at least."""
        least = 1.0 if self.nearness.measure == "cosine" else np.maximum(first, second)
        return np.asarray(self._slack * least * (1 - _ROUNDING))

    def _prefixes(self, whole: Any, weight: FloatArray) -> Any:
        ranked = sparse().csr_matrix((whole.data.copy(), self.rank[whole.indices], whole.indptr), shape=whole.shape)
        ranked.sort_indices()
        row = np.repeat(np.arange(weight.size), np.diff(ranked.indptr))
        squares = np.square(ranked.data)
        before = np.cumsum(squares) - squares
        starts = np.append(before, 0.0)[ranked.indptr[:-1]] if before.size else np.zeros(weight.size)
        left = weight[row] - (before - starts[row])
        limit = self.threshold - self._slack
        outside = np.full(weight.size, limit * limit) if self.nearness.measure == "cosine" else limit * weight
        kept = left > outside[row] * (1 - _ROUNDING)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=weight.size))])
        return sparse().csr_matrix((ranked.data[kept], ranked.indices[kept], offsets), shape=whole.shape)

    def _verified(self, ready: _Rows, query: IntArray, other: IntArray, *, among: bool = False) -> Iterator[Pairs]:
        """The near ones of candidate pairs; `other` are leaders, or with `among` themselves of `ready`."""
        size = np.diff(ready.whole.indptr)
        for part in _parts(size[query], _VERIFY_ENTRIES):
            some, others = query[part], other[part]
            if among:
                theirs, weight = ready.whole[others], ready.weight[others]
            else:
                unique, place = np.unique(others, return_inverse=True)
                rows = self.nearness.rows(self.sets.take(np.asarray(self.rows)[unique]))
                theirs, weight = rows[place], self.nearness.weights(rows)[place]
            both = ready.whole[some].multiply(theirs).tocsr()
            shared = row_sums(both.data, both.indptr)
            similarity = self.nearness.similarity(shared, ready.weight[some], weight)
            near = similarity >= self.threshold
            if near.any():
                yield Pairs(some[near], others[near], similarity[near])


def rare_first(sets: ActiveSets) -> IntArray:
    """Place of each feature in the order from the rarest to the most frequent."""
    order = np.argsort(sets.document_frequency(), kind="stable")
    rank = np.empty(order.size, dtype=np.int64)
    rank[order] = np.arange(order.size)
    return rank


class Duplicates(NamedTuple):
    """What is near an earlier document."""

    rows: IntArray
    """Places of the duplicates, in the order of their priority."""

    leader: IntArray
    """For each, the document that stands for it: the first in the order of priority that is near enough."""

    similarity: FloatArray
    """Their similarity."""


def near_duplicates(
    sets: ActiveSets, order: IntArray, nearness: Nearness, threshold: float, *, show_progress: bool = True
) -> Duplicates:
    """Greedy leader clustering: a document is a duplicate if it is near one that comes before and is none itself.

    So every duplicate is near the document that is kept for it; no chain of small steps joins unlike ones.

    Args:
        sets: All documents.
        order: Those that take part, the ones to keep first.
        nearness: The measure.
        threshold: Similarity from which two documents are near, above 0, at most 1.
        show_progress: Whether to show a progress bar on stderr.
    """
    rank = rare_first(sets.take(order))
    leaders = LeaderIndex(sets, nearness, threshold, rank)
    of = np.full(order.size, -1, dtype=np.int64)
    similarity = np.zeros(order.size)
    bar = tqdm(total=order.size, desc="comparing", unit="row", disable=not show_progress, leave=False)
    with bar:
        for start in range(0, order.size, _BATCH):
            places = np.arange(start, min(start + _BATCH, order.size))
            ready = leaders.prepare(sets.take(order[places]))
            number, value = _first_leader(leaders.near(ready), places.size)
            found = number >= 0
            of[places[found]], similarity[places[found]] = number[found], value[found]
            _within_batch(leaders, order, places, ready, of, similarity)
            bar.update(places.size)
    rows = np.flatnonzero(of >= 0)
    leader = np.asarray(leaders.rows, dtype=np.int64)[of[rows]]
    return Duplicates(order[rows], leader, similarity[rows])


def _within_batch(
    leaders: LeaderIndex, order: IntArray, places: IntArray, ready: _Rows, of: IntArray, similarity: FloatArray
) -> None:
    """Compare what is near no earlier leader with each other, some at a time, and add the new leaders."""
    first_new = len(leaders.rows)
    fresh = LeaderIndex(leaders.sets, leaders.nearness, leaders.threshold, leaders.rank)
    undecided = np.flatnonzero(of[places] < 0)
    for start in range(0, undecided.size, _SUB_BATCH):
        inside = undecided[start : start + _SUB_BATCH]
        part = ready.take(inside)
        number, value = _first_leader(fresh.near(part), inside.size)
        pairs = leaders.near_each_other(part)
        # By the later document, then by the earlier one, so that its first leader is met first.
        by_order = np.lexsort((pairs.leader, pairs.query))
        for i, j, s in zip(*(column[by_order].tolist() for column in pairs), strict=True):
            if number[i] == number[j] == -1:
                number[i], value[i] = -2 - j, s
        new = np.flatnonzero(number == -1)
        place_of = np.full(inside.size, -1, dtype=np.int64)
        place_of[new] = np.arange(len(fresh.rows), len(fresh.rows) + new.size)
        within = number <= -2
        number[within] = place_of[-2 - number[within]]
        fresh.add(order[places[inside[new]]], part.take(new))
        found = number >= 0
        of[places[inside[found]]], similarity[places[inside[found]]] = number[found] + first_new, value[found]
    new = undecided[of[places[undecided]] < 0]
    leaders.add(order[places[new]], ready.take(new))


def _first_leader(pairs: Iterator[Pairs], count: int) -> tuple[IntArray, FloatArray]:
    """For each of `count` documents the first leader it is near, -1 for none, and their similarity."""
    number, value = np.full(count, np.iinfo(np.int64).max), np.zeros(count)
    for found in pairs:
        by_leader = np.lexsort((found.leader, found.query))
        query, at = np.unique(found.query[by_leader], return_index=True)
        leader, similarity = found.leader[by_leader][at], found.similarity[by_leader][at]
        earlier = leader < number[query]
        number[query[earlier]], value[query[earlier]] = leader[earlier], similarity[earlier]
    number[number == np.iinfo(np.int64).max] = -1
    return number, value


def _entries(product: Any) -> tuple[IntArray, IntArray, FloatArray]:
    """Row, column and value of each entry of a sparse matrix."""
    row = np.repeat(np.arange(product.shape[0]), np.diff(product.indptr))
    return row, product.indices, product.data


def _parts(entries: NDArray[Any], most: int) -> Iterator[slice]:
    """Cut a sequence where its entries sum up to `most`; at least one element a part."""
    start, total = 0, 0
    for place, count in enumerate(entries.tolist()):
        if place > start and total + count > most:
            yield slice(start, place)
            start, total = place, 0
        total += count
    if start < entries.size:
        yield slice(start, entries.size)
