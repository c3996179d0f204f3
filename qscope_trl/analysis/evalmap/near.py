"""Samples that are near one of another set, or of a training set: by their active sets, and by their texts beside.

Near by features is a hint, not a proof: at the last token, two samples that end alike may be near and say different
things. So equal texts are counted apart, and for the listed pairs the share of common token n-grams is given.

Bounded: all samples can be found, but of each set only some are looked up (chosen by a hash of their active set, so
neither by order nor by chance), and of each sample only the nearest one in each set is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from qscope_trl.analysis.curation.leaders import LeaderIndex
from qscope_trl.analysis.curation.sets import ActiveSets, Nearness
from qscope_trl.analysis.evalmap.footprints import Footprints
from qscope_trl.analysis.evalmap.samples import TrainBlock

_BATCH = 2048
# Samples of a set that are looked up first, then twice as many, ..., until so many near pairs are met.
_FIRST = 16
_MOST_PAIRS = 500_000
_NO_TEXT = np.uint64(0)
# Measured on sets of equal size, as those of the last token are: a third of the time of the default.
_SLACK = 0.04


class NearSample(NamedTuple):
    """A sample and the nearest one to it of a set."""

    sample: int
    """Place of the sample among those with an active set."""

    other: int
    """Place of the other one among those of its set; of a training set its row."""

    similarity: float
    """Jaccard similarity of their active sets."""

    same_text: bool
    """Whether their texts are equal."""


class NearSets(NamedTuple):
    """Samples of a set that have a near one in another set, or in the same."""

    name: str
    """The set."""

    other: str
    """The set that they are near to."""

    looked_up: int
    """Samples of the set that were looked up."""

    near: int
    """Those that have a near one."""

    same_text: int
    """Those that have one of the same text."""

    listed: tuple[NearSample, ...]
    """The nearest ones: equal texts first, then by similarity."""


class NearIndex:
    """All samples of all sets, to be compared with.

    Args:
        footprints: Their active sets.
        texts: By set, the texts of the samples with an active set; `None` where they are not at hand.
        threshold: Jaccard similarity from which two are near, above 0, at most 1.
    """

    def __init__(
        self, footprints: Footprints, texts: Mapping[str, Sequence[str] | None], threshold: float, *, listed: int = 100
    ) -> None:
        self.names = footprints.names
        self.listed = listed
        self.sets = _active_sets([footprints.bitmaps[name] for name in self.names])
        sizes = [footprints.num_samples(name) for name in self.names]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.hashes = np.concatenate(
            [text_hashes(texts[name], size) for name, size in zip(self.names, sizes, strict=True)]
        )
        frequency = self.sets.document_frequency()
        rank = np.empty(frequency.size, dtype=np.int64)
        rank[np.argsort(frequency, kind="stable")] = np.arange(frequency.size)
        nearness = Nearness("jaccard", np.zeros(0))
        self._index = LeaderIndex(self.sets, nearness, threshold, rank, slack=_SLACK)
        for start in range(0, self.sets.num_documents, _BATCH):
            some = np.arange(start, min(start + _BATCH, self.sets.num_documents))
            self._index.add(some, self._index.prepare(self.sets.take(some)))

    def between(self, most: int | None = None, *, show_progress: bool = True) -> list[NearSets]:
        """The nearest sample in each set of samples of each set, itself left out.

        Args:
            most: Samples of each set that are looked up; `None`: all. Fewer are where nearly all samples are near each
                other, as with a common form of prompts: a set is done with after half a million near pairs.
            show_progress: Whether to show a progress bar on stderr.
        """
        chosen = [self._chosen(place, most) for place in range(len(self.names))]
        found = []
        bar = tqdm(total=sum(map(len, chosen)), desc="comparing", unit="text", disable=not show_progress, leave=False)
        with bar:
            for mine, rows in enumerate(chosen):
                rows, best, other = self._nearest(rows, None if most is None else _MOST_PAIRS, bar.update)
                for place, their in enumerate(self.names):
                    at = np.flatnonzero(best[place] >= 0)
                    sample, leader = rows[at] - self.starts[mine], other[place, at] - self.starts[place]
                    found.append(self._listed(self.names[mine], their, rows.size, sample, leader, best[place, at]))
        return found

    def _nearest(
        self, rows: NDArray[np.int64], most_pairs: int | None, advance: Callable[[int], object]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """The rows that were looked up; by set and row, the best score and who has it."""
        shape = (len(self.names), rows.size)
        best, other = np.full(shape, -1.0), np.full(shape, -1, dtype=np.int64)
        done, pairs_met, size = 0, 0, _FIRST
        while done < rows.size and (most_pairs is None or pairs_met < most_pairs):
            some = rows[done : done + size]
            for pairs in self._index.near(self._index.prepare(self.sets.take(some))):
                is_other = pairs.leader != some[pairs.query]
                query, leader = pairs.query[is_other], pairs.leader[is_other]
                score = pairs.similarity[is_other] + _same(self.hashes[some[query]], self.hashes[leader])
                keep_best(best, other, self.owner[leader], query + done, leader, score)
                pairs_met += query.size
            done, size = done + some.size, min(2 * size, _BATCH)
            advance(some.size)
        return rows[:done], best[:, :done], other[:, :done]

    def train(self, name: str, blocks: Iterable[TrainBlock]) -> tuple[list[NearSets], dict[int, str]]:
        """For every sample the nearest text of a training set.

        Returns:
            One entry a set, and by row the texts of the pairs that are listed.
        """
        total = self.sets.num_documents
        best, other = np.full((1, total), -1.0, dtype=np.float64), np.full((1, total), -1, dtype=np.int64)
        texts: dict[int, str] = {}
        for block in blocks:
            ready = self._index.prepare(_active_sets([block.bitmap]))
            hashes = text_hashes(block.texts, block.bitmap.shape[0])
            for pairs in self._index.near(ready):
                score = pairs.similarity + _same(hashes[pairs.query], self.hashes[pairs.leader])
                keep_best(best, other, np.zeros_like(pairs.leader), pairs.leader, pairs.query + block.first, score)
            if block.texts is not None:
                needed = set(other[0].tolist())
                texts = {row: text for row, text in texts.items() if row in needed}
                inside = {row for row in needed if block.first <= row < block.first + len(block.texts)}
                texts |= {row: block.texts[row - block.first] for row in inside}
        found = []
        for mine, own in enumerate(self.names):
            start, stop = self.starts[mine], self.starts[mine + 1]
            at = start + np.flatnonzero(best[0, start:stop] >= 0)
            found.append(self._listed(own, name, int(stop - start), at - start, other[0, at], best[0, at]))
        return found, texts

    def _chosen(self, place: int, most: int | None) -> NDArray[np.int64]:
        rows = np.arange(self.starts[place], self.starts[place + 1])
        if most is None:
            return rows
        sets = self.sets
        keys = [_hash(sets.features[sets.offsets[row] : sets.offsets[row + 1]].tobytes()) for row in rows.tolist()]
        return rows[np.lexsort((self.hashes[rows], np.array(keys, dtype=np.uint64)))[:most]]

    def _listed(
        self,
        name: str,
        other: str,
        looked_up: int,
        sample: NDArray[np.int64],
        leader: NDArray[np.int64],
        score: NDArray[np.float64],
    ) -> NearSets:
        same = score > 1.5
        order = np.lexsort((leader, sample, -score))[: self.listed]
        listed = tuple(
            NearSample(int(sample[i]), int(leader[i]), float(score[i]) - bool(same[i]), bool(same[i])) for i in order
        )
        return NearSets(name, other, looked_up, sample.size, int(same.sum()), listed)


def keep_best(
    best: NDArray[np.float64],
    other: NDArray[np.int64],
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    candidate: NDArray[np.int64],
    score: NDArray[np.float64],
) -> None:
    """Enter candidates where their score is above the best so far; of equal ones the earlier candidate stays."""
    if not row.size:
        return
    value = score
    order = np.lexsort((-candidate, value, column, row))
    row, column, candidate, value = row[order], column[order], candidate[order], value[order]
    last = np.append((row[1:] != row[:-1]) | (column[1:] != column[:-1]), True)
    row, column, candidate, value = row[last], column[last], candidate[last], value[last]
    old, there = best[row, column], other[row, column]
    better = (value > old) | ((value == old) & (candidate < there))
    best[row[better], column[better]] = value[better]
    other[row[better], column[better]] = candidate[better]


def ngram_shares(first: Sequence[int], second: Sequence[int], size: int) -> tuple[float, float]:
    """Share of the first text's token n-grams that the second has, and the other way round.

    Of a text shorter than `size`, its whole length is taken for `size`; without a token the shares are NaN.
    """
    size = min(size, len(first), len(second))
    if not size:
        return float("nan"), float("nan")
    mine, their = (
        {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)} for ids in (list(first), list(second))
    )
    shared = len(mine & their)
    return shared / len(mine), shared / len(their)


def text_hashes(texts: Sequence[str] | None, count: int) -> NDArray[np.uint64]:
    """64 bits of each text, 0 where it is not known."""
    if texts is None:
        return np.zeros(count, dtype=np.uint64)
    return np.array([_hash(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.uint64)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def _same(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.float64]:
    same: NDArray[np.bool_] = (first == second) & (first != _NO_TEXT)
    return same.astype(np.float64)


def _active_sets(bitmaps: Sequence[object]) -> ActiveSets:
    import scipy.sparse as sp

    joined = sp.vstack(bitmaps, format="csr")
    joined.sort_indices()
    starts = (0, joined.shape[1])
    return ActiveSets(joined.indptr.astype(np.int64), joined.indices.astype(np.int32), None, starts)
