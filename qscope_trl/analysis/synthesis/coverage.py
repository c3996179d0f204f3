"""Which target features a dataset covers, the texts in which they fire most, and control features to compare with.

Counting goes through the dataset in pieces, whatever its size. Left out: coverage weighted by activation, and a
footprint of all features.

Shape legend: `F` d_sae.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.activations.active import document_features
from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.encode import num_kept, residual_batches, tokenize
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import ChatRenderer, text_columns, text_of
from qscope_trl.activations.store import FeatureStore
from qscope_trl.analysis.synthesis.reading import FeatureReader
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.sae.topk_sae import TopKSAE

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Coverage:
    """How many texts fire each target feature.

    Args:
        counts: Texts in which a feature fires, in the targets' order.
        num_texts: Texts there are.
        weak_below: A feature with fewer texts than this is weak.
    """

    counts: Mapping[FeatureId, int]
    num_texts: int
    weak_below: int

    @property
    def value(self) -> float:
        """`Cov(D) = |{f in T: some text fires f}| / |T|`.

        References:
            Qwen-Scope, arXiv:2605.11887, section 6.
        """
        return (len(self.counts) - len(self.missing)) / len(self.counts)

    @property
    def missing(self) -> tuple[FeatureId, ...]:
        """Features that fire in no text."""
        return tuple(feature for feature, count in self.counts.items() if count == 0)

    @property
    def weak(self) -> tuple[FeatureId, ...]:
        """Features that fire in fewer texts than `weak_below`, the missing ones among them."""
        return tuple(feature for feature, count in self.counts.items() if count < self.weak_below)

    def plus(self, more: Mapping[FeatureId, int], num_texts: int) -> Coverage:
        """The coverage with further texts, of which `more` says how many fire each feature."""
        counts = {feature: count + more.get(feature, 0) for feature, count in self.counts.items()}
        return Coverage(counts, self.num_texts + num_texts, self.weak_below)


@dataclass
class Example:
    """A text in which a feature fires strongly."""

    text: str
    activation: float
    place: int
    """Token with the largest activation."""


@dataclass
class Survey:
    """What was counted in a dataset.

    Args:
        num_texts: Rows read, blank ones included.
        counts: Per layer, texts in which each feature fires, int64 `(F,)`.
        examples: Per feature its top texts, strongest first.
        beginnings: The first texts, as many as were asked for.
    """

    num_texts: int
    counts: dict[int, Tensor]
    examples: dict[FeatureId, list[Example]] = field(default_factory=dict)
    beginnings: list[str] = field(default_factory=list)

    def count(self, feature: FeatureId) -> int:
        """Texts in which a feature fires."""
        return int(self.counts[feature.layer][feature.index])


def survey(
    model: nn.Module,
    tokenizer: Any,
    saes: Mapping[int, TopKSAE],
    source: RowSource,
    *,
    text_column: str = "text",
    max_rows: int | None = None,
    min_activation: float = 0.0,
    max_length: int = 512,
    batch_size: int = 8,
    features: Sequence[FeatureId] = (),
    num_examples: int = 0,
    num_beginnings: int = 0,
    model_name: str = "model",
    show_progress: bool = True,
) -> Survey:
    """Count the texts of a dataset in which each feature fires, and keep the top ones of chosen features.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        saes: One SAE a layer.
        source: The dataset.
        text_column: Column of the texts; `prompt+completion` joins several.
        max_rows: Read the first rows, this many; by default all.
        min_activation: A feature fires in a text whose largest activation, position 0 left out, exceeds this.
        max_length: Tokens kept of each text.
        batch_size: Texts in one forward.
        features: Features whose top texts to keep.
        num_examples: How many of each; different ones.
        num_beginnings: First texts to keep that are not blank.
        model_name: What the model is called in messages.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        DataError: If the dataset has no text, or a row lacks the column.
    """
    counts = {layer: torch.zeros(sae.d_sae, dtype=torch.long) for layer, sae in saes.items()}
    found = Survey(0, counts)
    reader = FeatureReader(saes, features if num_examples else ())
    tops: dict[FeatureId, _Top] = {feature: _Top(num_examples) for feature in reader.features}
    for texts in _blocks(source, text_column, max_rows, chat_renderer(tokenizer, name=model_name)):
        found.num_texts += len(texts)
        missing = num_beginnings - len(found.beginnings)
        found.beginnings.extend(islice((text for text in texts if text.strip()), missing))
        ids = tokenize(tokenizer, texts, max_length=max_length)
        if not any(num_kept(len(row)) for row in ids):
            continue
        batches = residual_batches(
            model,
            ids,
            tuple(saes),
            batch_size=batch_size,
            show_progress=show_progress,
            description=f"reading {source.name}",
        )
        for batch in batches:
            for layer, sae in saes.items():
                x_ND = batch.residuals[layer].to(sae.W_enc.device)
                entries = document_features(sae, x_ND, batch.text_index)
                fired = entries.feature[entries.max > min_activation].cpu()
                counts[layer] += torch.bincount(fired, minlength=sae.d_sae)
            if tops:
                rows, largest, place = reader.batch(batch)
                for row, slot in (largest > min_activation).nonzero().tolist():
                    text = texts[int(rows[row])]
                    tops[reader.features[slot]].add(float(largest[row, slot]), text, int(place[row, slot]))
    if not found.num_texts:
        raise DataError(f"'{source.name}' has no rows, so there is nothing to measure.")
    found.examples = {feature: top.examples() for feature, top in tops.items()}
    return found


def survey_store(store: FeatureStore, layers: Sequence[int], *, min_activation: float = 0.0) -> Survey:
    """Count the rows of a feature store in which each feature fires; no model is run.

    Raises:
        ConfigError: If the store lacks a layer or the aggregation `max`, or scipy is missing.
    """
    counts = {}
    for layer in layers:
        counts[layer] = torch.zeros(store.d_sae(layer), dtype=torch.long)
        for matrix in store.iter_csr(layer, "max"):
            fired = torch.from_numpy(matrix.indices[matrix.data > min_activation]).long()
            counts[layer] += torch.bincount(fired, minlength=store.d_sae(layer))
    if not store.num_rows:
        raise DataError(f"'{store.path}' has no rows, so there is nothing to measure.")
    return Survey(store.num_rows, counts)


def matched_features(
    targets: Sequence[FeatureId],
    excluded: Sequence[FeatureId],
    counted: Sequence[Mapping[int, Tensor]],
    *,
    per_target: int = 10,
    seed: int = 0,
) -> dict[FeatureId, tuple[FeatureId, ...]]:
    """For each target, other features of its layer that fire in about as many texts.

    A generation that fires the target says something about the target only if it does not fire these as often.

    Args:
        targets: Features to match.
        excluded: Features never drawn, the targets among them.
        counted: Counts of texts per layer `(F,)`, as in `Survey.counts`: nearest by the first, among equals by the
            second, and so on; what is still equal is drawn by chance.
        per_target: How many to draw for each; fewer if the layer has no more.
        seed: Seed of that chance.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[FeatureId, tuple[FeatureId, ...]] = {}
    for target in targets:
        layer = target.layer
        order = torch.randperm(counted[0][layer].numel(), generator=generator)
        for counts in reversed(counted):
            distance = (counts[layer][order] - counts[layer][target.index]).abs()
            order = order[distance.argsort(stable=True)]
        taken = {feature.index for feature in excluded if feature.layer == layer}
        nearest = islice((index for index in order.tolist() if index not in taken), per_target)
        drawn[target] = tuple(FeatureId(layer, index) for index in nearest)
    return drawn


class _Top:
    """The strongest different texts of one feature."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, str, int]] = []
        self._texts: set[str] = set()
        self._added = 0

    def add(self, activation: float, text: str, place: int) -> None:
        if text in self._texts:
            return
        # Of equal activations the earlier text stays.
        self._added += 1
        entry = (activation, -self._added, text, place)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            self._texts.discard(heapq.heappushpop(self._heap, entry)[2])
        else:
            return
        self._texts.add(text)

    def examples(self) -> list[Example]:
        return [Example(text, activation, place) for activation, _, text, place in sorted(self._heap, reverse=True)]


def _blocks(source: RowSource, text_column: str, max_rows: int | None, chat: ChatRenderer) -> Iterator[list[str]]:
    rows = islice(source.rows(columns=text_columns(text_column)), max_rows)
    while block := list(islice(rows, _ROWS_AT_ONCE)):
        yield [
            text_of(row, text_column=text_column, source_name=source.name, index=index, chat=chat)
            for index, row in block
        ]
