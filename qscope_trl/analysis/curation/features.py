"""What the steps read of every row's features: values of the rules' features, and sets of all active ones.

From a model and its SAEs, some texts at a time, each encoded once for all steps. Left out: stores (`stored.py`), and
several processes; `qscope index` has them, and its store serves here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.active import DocumentFeatures, document_batches
from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.encode import num_kept, tokenize
from qscope_trl.activations.feature_table import FeatureTable, TableEncoder
from qscope_trl.activations.opening import load_encoders, open_model
from qscope_trl.activations.sources import open_source, text_of
from qscope_trl.analysis.curation.sets import ActiveSets, IntArray, join
from qscope_trl.bundled import sae_path
from qscope_trl.config.curate import CurateConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.rules import Rule
from qscope_trl.sae.suite import SAESuite

BLOCK = 2048
"""Rows read at once."""


class Needs(NamedTuple):
    """What must be read."""

    features: tuple[FeatureId, ...]
    """Features of the rules."""

    aggregations: tuple[str, ...]
    """In which aggregations."""

    compares_sets: bool
    """Whether whole sets of active features are compared."""

    value: str | None
    """Aggregation of the activations that are compared with them; `None` for sets alone."""

    @classmethod
    def of(cls, config: CurateConfig, rules: Sequence[Rule]) -> Needs:
        """What settings and their rules need."""
        pairs = {pair for rule in rules for pair in rule.needs}
        return cls(
            tuple(sorted({feature for feature, _ in pairs})),
            tuple(sorted({aggregation for _, aggregation in pairs})),
            config.needs_sets,
            config.aggregation if config.needs_values else None,
        )


class Block(NamedTuple):
    """Some rows' features."""

    columns: dict[str, NDArray[np.float32]]
    """By aggregation, values of the rules' features `(rows, features)`."""

    sets: ActiveSets | None
    """Their active features, if they are compared."""

    num_tokens: IntArray
    """Kept tokens of each row."""


class Features(NamedTuple):
    """All rows' features."""

    table: FeatureTable | None
    """Values of the rules' features, if there are rules."""

    sets: ActiveSets | None
    """Active features, if they are compared."""

    num_tokens: IntArray | None
    """Kept tokens of each row, if any feature was read."""


class ModelReader:
    """Texts to features, by a model and its SAEs.

    Args:
        config: Which model and SAEs.
        rules: Rules to check against the SAEs.
        needs: What to read.

    Raises:
        ConfigError: If the model cannot be loaded, or the layers to compare are not there.
        RuleError: If a rule does not fit the SAEs.
    """

    def __init__(self, config: CurateConfig, rules: Sequence[Rule], needs: Needs) -> None:
        self.config, self.needs = config, needs
        self.saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
        for rule in rules:
            rule.check(self.saes)
        self.set_layers = chosen_layers(config, self.saes.layers) if needs.compares_sets else ()
        self.layers = tuple(sorted({*self.set_layers, *(feature.layer for feature in needs.features)}))
        self.starts = starts_of([self.saes.spec(layer).d_sae for layer in self.set_layers])
        self.model, self.tokenizer = open_model(
            config.model, revision=config.model_revision, dtype=config.dtype, device=config.device
        )
        self.chat = chat_renderer(self.tokenizer, name=config.model)
        self._encoders = load_encoders(self.model, self.saes, self.layers)

    def fingerprints(self) -> dict[int, str]:
        """Fingerprint of each layer that is compared."""
        return {layer: self.saes.fingerprint(layer) for layer in self.set_layers}

    def read(
        self, texts: Sequence[str], needs: Needs | None = None, *, advance: Callable[[int], object] | None = None
    ) -> Block:
        """Features of some texts, in their order; a text without a kept token has none.

        Args:
            texts: The texts.
            needs: What to read; by default what the reader was made for.
            advance: Is told the number of texts done since it was told before.
        """
        needs = needs or self.needs
        ids = tokenize(self.tokenizer, texts, max_length=self.config.max_length)
        num_tokens = np.array([num_kept(len(row)) for row in ids], dtype=np.int64)
        columns = {name: np.zeros((len(texts), len(needs.features)), dtype=np.float32) for name in needs.aggregations}
        entries: list[tuple[NDArray[Any], ...]] = []
        if num_tokens.any():
            batches = document_batches(
                self.model, self._encoders, ids, batch_size=self.config.batch_size, show_progress=False
            )
            for batch in batches:
                for layer, found in batch.layers.items():
                    _enter(columns, needs.features, layer, found)
                    if needs.compares_sets and layer in self.set_layers:
                        start = self.starts[self.set_layers.index(layer)]
                        value = getattr(found, needs.value or "max").numpy()
                        entries.append((found.document.numpy(), found.feature.numpy() + start, value))
                if advance is not None:
                    advance(batch.documents.numel())
        if advance is not None:
            advance(int((num_tokens == 0).sum()))
        sets = None
        if needs.compares_sets:
            sets = sets_of(entries, len(texts), self.starts, with_values=needs.value is not None)
        return Block(columns, sets, num_tokens)

    def reference(self, name: str, value: str | None) -> ActiveSets:
        """The active features of all rows of a dataset.

        Raises:
            DataError: If it has no row, or a row has no text.
        """
        needs = Needs((), (), True, value)
        column = self.config.reference_column or self.config.text_column
        source = open_source(name, split=self.config.reference_split, config=self.config.reference_config)
        parts, texts = [], []
        for index, row in source.rows():
            texts.append(text_of(row, text_column=column, source_name=name, index=index, chat=self.chat))
            if len(texts) == BLOCK:
                parts.append(self.read(texts, needs).sets)
                texts = []
        if texts:
            parts.append(self.read(texts, needs).sets)
        if not parts:
            raise DataError(f"'{name}' has no row to compare with.")
        return join([part for part in parts if part is not None])

    def token_encoder(self, features: Sequence[FeatureId]) -> TableEncoder:
        """Activations of some features along a text; the encoders that `read` uses are given up for it."""
        self._encoders = {}
        return TableEncoder(
            self.model,
            self.tokenizer,
            self.saes,
            features,
            max_length=self.config.max_length,
            batch_size=self.config.batch_size,
            show_progress=False,
        )


def join_blocks(blocks: Sequence[Block], needs: Needs) -> Features:
    """The rows of all blocks, one after another."""
    num_tokens = np.concatenate([block.num_tokens for block in blocks])
    table = None
    if needs.features:
        columns = {name: np.concatenate([block.columns[name] for block in blocks]) for name in needs.aggregations}
        table = FeatureTable(needs.features, columns, num_tokens)
    sets = [block.sets for block in blocks if block.sets is not None]
    return Features(table, join(sets) if sets else None, num_tokens)


def chosen_layers(config: CurateConfig, available: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that are compared: those of the settings, or all."""
    return config.layer_list(available) if config.layers else available


def starts_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """`ActiveSets.starts` of layers with so many features."""
    return tuple(int(start) for start in np.cumsum([0, *sizes]))


def _enter(
    columns: dict[str, NDArray[np.float32]], features: Sequence[FeatureId], layer: int, found: DocumentFeatures
) -> None:
    """Put what fires of some features of a layer into their columns."""
    place_of = {chosen.index: place for place, chosen in enumerate(features) if chosen.layer == layer}
    if not place_of:
        return
    feature = found.feature.numpy()
    at = np.flatnonzero(np.isin(feature, list(place_of)))
    places = [place_of[index] for index in feature[at].tolist()]
    for name, values in columns.items():
        values[found.document.numpy()[at], places] = getattr(found, name).numpy()[at]


def sets_of(
    entries: Sequence[tuple[NDArray[Any], ...]], num_rows: int, starts: tuple[int, ...], *, with_values: bool
) -> ActiveSets:
    """Sets from (row, feature, value) entries in any order; each row and feature at most once."""
    row = np.concatenate([part[0] for part in entries]) if entries else np.zeros(0, dtype=np.int64)
    feature = np.concatenate([part[1] for part in entries]) if entries else np.zeros(0, dtype=np.int64)
    order = np.lexsort((feature, row))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))]).astype(np.int64)
    values = None
    if with_values:
        value = np.concatenate([part[2] for part in entries]) if entries else np.zeros(0)
        values = value[order].astype(np.float32)
    return ActiveSets(offsets, feature[order].astype(np.int32), values, starts)
