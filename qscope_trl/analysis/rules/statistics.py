"""How every feature fires in the texts of each slice and class, in one pass; and which features are tried.

Sums are kept by slice, so that a fold's training part is told by adding slices: candidates are chosen anew in every
fold, on its training part alone. Memory is `2 * folds * (1 + 2 * aggregations) * 8` bytes per feature.

Shape legend: `P` slices, `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qscope_trl.activations.active import document_batches
from qscope_trl.activations.encode import num_kept, tokenize
from qscope_trl.activations.opening import load_encoders
from qscope_trl.activations.store import FeatureStore
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.sae.suite import SAESuite

Floats = NDArray[np.float64]


class Entries(NamedTuple):
    """A feature's values in documents: an entry per document and feature that fires in it."""

    document: NDArray[np.int64]
    feature: NDArray[np.int64]
    values: Mapping[str, Floats]


@dataclass
class LayerSums:
    """Sums of one layer over the texts of each slice and class.

    Args:
        texts: Number of texts, `(P, 2)`; the second column is positive.
        fired: Texts in which a feature fires, `(P, 2, F)`.
        total: Per aggregation, sum of its values over texts, `(P, 2, F)`.
        squares: Per aggregation, sum of their squares.
    """

    texts: NDArray[np.int64]
    fired: NDArray[np.int64]
    total: dict[str, Floats]
    squares: dict[str, Floats]

    @classmethod
    def empty(cls, texts: NDArray[np.int64], d_sae: int, aggregations: Sequence[str]) -> LayerSums:
        """Nothing seen yet."""
        shape = (*texts.shape, d_sae)
        return cls(
            texts,
            np.zeros(shape, dtype=np.int64),
            {name: np.zeros(shape) for name in aggregations},
            {name: np.zeros(shape) for name in aggregations},
        )

    def add(self, entries: Entries, slices: NDArray[np.int64], labels: NDArray[np.bool_]) -> None:
        """Add documents; those of a slice below 0 are left out."""
        part = slices[entries.document]
        chosen = part >= 0
        place = (part[chosen], labels[entries.document[chosen]].astype(np.int64), entries.feature[chosen])
        flat = np.ravel_multi_index(place, self.fired.shape)
        np.add.at(self.fired.reshape(-1), flat, 1)
        for name in self.total:
            value = entries.values[name][chosen]
            np.add.at(self.total[name].reshape(-1), flat, value)
            np.add.at(self.squares[name].reshape(-1), flat, value**2)

    def firing_rate(self, slices: Sequence[int]) -> Floats:
        """Share of texts of some slices in which each feature fires, `(2, F)`."""
        chosen = list(slices)
        rate: Floats = self.fired[chosen].sum(0) / self.texts[chosen].sum(0)[:, None]
        return rate

    def delta(self, slices: Sequence[int]) -> Floats:
        """`P(fires | positive) - P(fires | negative)`, `(F,)`.

        References:
            Qwen-Scope, arXiv:2605.11887, section 5.
        """
        negative, positive = self.firing_rate(slices)
        difference: Floats = positive - negative
        return difference

    def effect(self, slices: Sequence[int], aggregation: str) -> Floats:
        """Difference of the classes' means over their pooled standard deviation (Cohen's d), `(F,)`."""
        chosen = list(slices)
        count = self.texts[chosen].sum(0).astype(np.float64)[:, None]
        mean = self.total[aggregation][chosen].sum(0) / count
        spread = np.maximum(self.squares[aggregation][chosen].sum(0) - count * mean**2, 0)
        pooled = np.sqrt(spread.sum(0) / max(1.0, float(count.sum()) - 2))
        difference = mean[1] - mean[0]
        # A feature that fires always alike within both classes differs endlessly; it is among the first then.
        found: Floats = np.divide(
            difference, pooled, out=np.sign(difference) * np.where(difference == 0, 0, 1e9), where=pooled > 0
        )
        return found


class Candidate(NamedTuple):
    """A feature that is tried, in one aggregation."""

    feature: FeatureId
    aggregation: str


class Candidates(NamedTuple):
    """What is tried, best first."""

    positive: tuple[Candidate, ...]
    """Features that speak for the label."""

    negative: tuple[Candidate, ...]
    """Features that speak against it."""

    by_delta: tuple[FeatureId, ...]
    """Those that fire more often in positive texts, by that difference."""


def choose_candidates(
    sums: Mapping[int, LayerSums], slices: Sequence[int], count: int, aggregations: Sequence[str]
) -> Candidates:
    """The features to try, by what some slices show.

    Args:
        sums: Sums by layer.
        slices: Slices of the training part.
        count: How many by `delta`, and as many by `effect` in each aggregation; both for and against the label.
        aggregations: Aggregations to try.

    Raises:
        DataError: If no feature tells the classes apart.
    """
    layers = sorted(sums)
    widths = [sums[layer].fired.shape[2] for layer in layers]
    layer_of = np.repeat(layers, widths)
    index_of = np.concatenate([np.arange(width) for width in widths])

    def best(score: Floats) -> list[FeatureId]:
        # Stable: of equal scores the lower layer and index.
        first = np.argsort(-score, kind="stable")[:count]
        return [FeatureId(int(layer_of[i]), int(index_of[i])) for i in first if score[i] > 0]

    delta = np.concatenate([sums[layer].delta(slices) for layer in layers])
    effects = {name: np.concatenate([sums[layer].effect(slices, name) for layer in layers]) for name in aggregations}
    found = []
    for sign in (1, -1):
        lists = [(best(sign * delta), name) for name in aggregations]
        lists += [(best(sign * effects[name]), name) for name in aggregations]
        longest = max(len(features) for features, _ in lists)
        # One of each ranking in turn, so that the order says how good a candidate is.
        turns = [
            Candidate(features[rank], name)
            for rank in range(longest)
            for features, name in lists
            if rank < len(features)
        ]
        found.append(tuple(dict.fromkeys(turns)))
    if not found[0] and not found[1]:
        raise DataError("No feature of these layers fires differently in the two classes. Try other layers.")
    return Candidates(found[0], found[1], tuple(best(delta)))


def matched_at_random(
    sums: Mapping[int, LayerSums], chosen: Sequence[FeatureId], seed: int, nearest: int = 20
) -> dict[FeatureId, FeatureId]:
    """For each feature another one of its layer that fires in about as many texts, drawn at random.

    None is drawn twice, and none is one of the given features; a feature for which none is left has no match.

    Args:
        sums: Sums by layer.
        chosen: Features to match.
        seed: Decides the draw.
        nearest: Each is drawn from among this many of the nearest firing rates.
    """
    generator = np.random.default_rng(seed)
    taken = {layer: np.zeros(s.fired.shape[2], dtype=bool) for layer, s in sums.items()}
    for feature in chosen:
        taken[feature.layer][feature.index] = True
    drawn: dict[FeatureId, FeatureId] = {}
    for feature in dict.fromkeys(chosen):
        rate = sums[feature.layer].fired.sum((0, 1)) / sums[feature.layer].texts.sum()
        distance = np.where(taken[feature.layer], np.inf, np.abs(rate - rate[feature.index]))
        near = [int(i) for i in np.argsort(distance, kind="stable")[:nearest] if np.isfinite(distance[i])]
        if not near:
            continue
        index = near[int(generator.integers(len(near)))]
        taken[feature.layer][index] = True
        drawn[feature] = FeatureId(feature.layer, index)
    return drawn


def sums_of_texts(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    layers: Sequence[int],
    texts: Sequence[str],
    slices: NDArray[np.int64],
    labels: NDArray[np.bool_],
    aggregations: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    show_progress: bool = True,
) -> dict[int, LayerSums]:
    """Sums over texts that are run through the model; those of a slice below 0 are not.

    Raises:
        DataError: If no token is left, or a residual is not finite.
    """
    encoders = load_encoders(model, saes, layers)
    counts = _count(slices, labels)
    found = {layer: LayerSums.empty(counts, sae.d_sae, aggregations) for layer, sae in encoders.items()}
    chosen = np.flatnonzero(slices >= 0)
    ids = tokenize(tokenizer, [texts[int(i)] for i in chosen], max_length=max_length)
    if not any(num_kept(len(row)) for row in ids):
        raise DataError("None of the texts has a token after position 0, which is left out. Give longer texts.")
    batches = document_batches(
        model, encoders, ids, batch_size=batch_size, show_progress=show_progress, description="finding candidates"
    )
    for batch in batches:
        for layer, entries in batch.layers.items():
            values = {name: getattr(entries, name).double().numpy() for name in aggregations}
            document = chosen[entries.document.numpy()]
            found[layer].add(Entries(document, entries.feature.numpy(), values), slices, labels)
    return found


def sums_of_store(
    store: FeatureStore,
    layers: Sequence[int],
    slices: NDArray[np.int64],
    labels: NDArray[np.bool_],
    aggregations: Sequence[str],
) -> dict[int, LayerSums]:
    """Sums over the rows of a feature store."""
    counts = _count(slices, labels)
    found = {}
    for layer in layers:
        found[layer] = LayerSums.empty(counts, store.d_sae(layer), aggregations)
        for entries in _store_entries(store, layer, aggregations, len(slices)):
            found[layer].add(entries, slices, labels)
    return found


def _store_entries(
    store: FeatureStore, layer: int, aggregations: Sequence[str], num_rows: int, rows_per_batch: int = 4096
) -> Iterator[Entries]:
    for start in range(0, num_rows, rows_per_batch):
        stop = min(start + rows_per_batch, num_rows)
        matrices = {name: store.csr(layer, name, start, stop) for name in dict.fromkeys((*aggregations, "max"))}
        row, feature = matrices["max"].nonzero()
        values = {name: np.asarray(matrices[name][row, feature], dtype=np.float64).ravel() for name in aggregations}
        yield Entries(row.astype(np.int64) + start, feature.astype(np.int64), values)


def _count(slices: NDArray[np.int64], labels: NDArray[np.bool_]) -> NDArray[np.int64]:
    found = np.zeros((int(slices.max()) + 1, 2), dtype=np.int64)
    inside = slices >= 0
    np.add.at(found, (slices[inside], labels[inside].astype(np.int64)), 1)
    return found
