"""Values of chosen features by document, from a model or from a store, in one shape that rules read.

What is kept is documents x chosen features, never documents x all features. Left out: reading rows (`sources`) and
storing all features on disk (`store`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qscope_trl.activations.active import AGGREGATIONS, DocumentFeatures, active_features, document_batches
from qscope_trl.activations.encode import num_kept, residual_batches, tokenize
from qscope_trl.activations.opening import load_encoders
from qscope_trl.activations.store import FeatureStore
from qscope_trl.errors import ConfigError, DataError, FeatureSetError
from qscope_trl.features import FeatureId
from qscope_trl.sae.suite import SAESuite


class FeatureTable:
    """Aggregated activations of chosen features over documents; what `Rule.evaluate` reads.

    Args:
        features: The features, in the order of the columns.
        columns: By aggregation, `(documents, features)`. Kept as they are, in fp32 as a rule.
        num_tokens: Kept tokens of each document, `(documents,)`, if known. One without has 0 everywhere.

    Raises:
        ConfigError: If shapes disagree, or an aggregation is unknown.
        DataError: If a value is negative or not finite.
    """

    def __init__(
        self,
        features: Sequence[FeatureId],
        columns: Mapping[str, NDArray[Any]],
        num_tokens: NDArray[np.int64] | None = None,
    ) -> None:
        self.features = tuple(features)
        self.columns = dict(columns)
        self.num_tokens = num_tokens
        self._place = {feature: place for place, feature in enumerate(self.features)}
        if len(self._place) != len(self.features):
            raise ConfigError("A feature stands twice among the columns of a feature table.")
        shapes = {values.shape for values in self.columns.values()}
        if len(shapes) != 1 or (shape := shapes.pop())[1:] != (len(self.features),):
            raise ConfigError(
                f"The columns of a feature table have the shapes {sorted(v.shape for v in columns.values())}; each is "
                f"(documents, {len(self.features)})."
            )
        if num_tokens is not None and num_tokens.shape != shape[:1]:
            raise ConfigError(f"`num_tokens` has the shape {num_tokens.shape}, but there are {shape[0]} documents.")
        for name, values in self.columns.items():
            _require_aggregation(name)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise DataError(f"`{name}` of a feature is negative, NaN or infinite; activations are none of these.")

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return int(next(iter(self.columns.values())).shape[0])

    @property
    def aggregations(self) -> tuple[str, ...]:
        """Which aggregations there are."""
        return tuple(self.columns)

    def values(self, feature: FeatureId, aggregation: str) -> NDArray[np.float64]:
        """Values of one feature, `(documents,)`, float64.

        Raises:
            DataError: If the feature or the aggregation is not among the columns.
        """
        _require_aggregation(aggregation)
        if feature not in self._place:
            raise DataError(
                f"{feature} is not among the {len(self.features)} features of this table. Make it with the features "
                f"that the rule needs (`rule.features`)."
            )
        if aggregation not in self.columns:
            raise DataError(
                f"`{aggregation}` of {feature} was not kept: there are {', '.join(self.columns)}. Store or encode the "
                f"documents with it."
            )
        found: NDArray[np.float64] = self.columns[aggregation][:, self._place[feature]].astype(np.float64)
        return found

    def matrix(self, aggregation: str, features: Sequence[FeatureId] | None = None) -> NDArray[np.float64]:
        """Values of several features, `(documents, features)`, float64; by default of all.

        Raises:
            DataError: As `values`.
        """
        chosen = self.features if features is None else features
        if not chosen:
            return np.zeros((self.num_documents, 0))
        return np.stack([self.values(feature, aggregation) for feature in chosen], axis=1)

    def take(self, documents: Any) -> FeatureTable:
        """The same columns for some documents.

        Args:
            documents: Places from 0, or a boolean mask over all documents.
        """
        tokens = None if self.num_tokens is None else self.num_tokens[documents]
        return FeatureTable(self.features, {name: v[documents] for name, v in self.columns.items()}, tokens)

    def followed_by(self, other: FeatureTable) -> FeatureTable:
        """The documents of both tables, which have the same columns, one after another.

        Raises:
            ConfigError: If they have other features or aggregations.
        """
        if (self.features, set(self.columns)) != (other.features, set(other.columns)):
            raise ConfigError("Two feature tables with other features or aggregations cannot be joined.")
        columns = {name: np.concatenate([values, other.columns[name]]) for name, values in self.columns.items()}
        known = [counts for counts in (self.num_tokens, other.num_tokens) if counts is not None]
        return FeatureTable(self.features, columns, np.concatenate(known) if len(known) == 2 else None)


class TokenActs(NamedTuple):
    """Activations of chosen features along one text."""

    token_ids: list[int]
    """Every token of the text, position 0 included."""

    acts: NDArray[np.float64]
    """Activations at the tokens after position 0, `(tokens - 1, features)`."""


class TableEncoder:
    """Texts in, a `FeatureTable` out, through a model and encoders that are opened once.

    Args:
        model: A transformers model, wrapped or not, on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs; those of the features' layers are loaded here.
        features: Which features.
        aggregations: In which aggregations; the table takes `4 * texts * features` bytes for each.
        max_length: Tokens kept of each text: its first ones.
        batch_size: Texts in one forward.
        show_progress: Whether to show a progress bar on stderr.

    Raises:
        ConfigError: If no feature is given, or an aggregation is unknown.
        FeatureSetError: If a feature's index is out of range.
        CheckpointError: If a layer has no SAE.
        ModelStructureError: If the SAEs do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        saes: SAESuite,
        features: Sequence[FeatureId],
        *,
        aggregations: Sequence[str] = AGGREGATIONS,
        max_length: int = 512,
        batch_size: int = 8,
        show_progress: bool = True,
    ) -> None:
        self.features, self.aggregations = tuple(features), tuple(aggregations)
        if not self.features:
            raise ConfigError("No feature is given, so there is nothing to encode.")
        for name in self.aggregations:
            _require_aggregation(name)
        layers = sorted({feature.layer for feature in self.features})
        for feature in self.features:
            d_sae = saes.spec(feature.layer).d_sae
            if feature.index >= d_sae:
                raise FeatureSetError(
                    f"Feature {feature} is out of range: the SAE has `d_sae={d_sae}` features, so indices end at "
                    f"{d_sae - 1}."
                )
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.show_progress = max_length, batch_size, show_progress
        self.encoders = load_encoders(model, saes, layers)
        self._columns = {}
        for layer in layers:
            column_F = torch.full((self.encoders[layer].d_sae,), -1, dtype=torch.int64)
            for place, feature in enumerate(self.features):
                if feature.layer == layer:
                    column_F[feature.index] = place
            self._columns[layer] = column_F

    def __call__(self, texts: Sequence[str]) -> FeatureTable:
        """Values of the features over some texts, in their order; a text without a kept token has 0 everywhere.

        Raises:
            DataError: If a residual is not finite.
        """
        ids = tokenize(self.tokenizer, texts, max_length=self.max_length)
        shape = (len(texts), len(self.features))
        columns = {name: np.zeros(shape, dtype=np.float32) for name in self.aggregations}
        num_tokens = np.array([num_kept(len(row)) for row in ids], dtype=np.int64)
        if num_tokens.any():
            batches = document_batches(
                self.model, self.encoders, ids, batch_size=self.batch_size, show_progress=self.show_progress
            )
            for batch in batches:
                for layer, found in batch.layers.items():
                    self._enter(columns, layer, found)
        return FeatureTable(self.features, columns, num_tokens)

    def tokens(self, text: str) -> TokenActs:
        """Activations token by token: what `Rule.evaluate_tokens` and a display of one text read.

        Raises:
            DataError: If a residual is not finite.
        """
        ids = tokenize(self.tokenizer, [text], max_length=self.max_length)[0]
        acts = torch.zeros(num_kept(len(ids)), len(self.features), dtype=torch.float64)
        if len(acts):
            layers = tuple(self.encoders)
            (batch,) = residual_batches(self.model, [ids], layers, batch_size=1, show_progress=False)
            for layer, sae in self.encoders.items():
                for part in active_features(sae, batch.residuals[layer].to(sae.W_enc.device)):
                    place = self._columns[layer][part.feature.cpu()]
                    chosen = place >= 0
                    acts[part.token.cpu()[chosen], place[chosen]] = part.value.cpu()[chosen]
        return TokenActs(ids, acts.numpy())

    def _enter(self, columns: Mapping[str, NDArray[np.float32]], layer: int, found: DocumentFeatures) -> None:
        place = self._columns[layer][found.feature]
        chosen = place >= 0
        rows, places = found.document[chosen].numpy(), place[chosen].numpy()
        for name, values in columns.items():
            values[rows, places] = getattr(found, name)[chosen].numpy()


def encode_table(
    opened_model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    texts: Sequence[str],
    features: Sequence[FeatureId],
    *,
    aggregations: Sequence[str] = AGGREGATIONS,
    max_length: int = 512,
    batch_size: int = 8,
    show_progress: bool = True,
) -> FeatureTable:
    """Values of chosen features over texts; see `TableEncoder`, which this opens and uses once."""
    encoder = TableEncoder(
        opened_model,
        tokenizer,
        saes,
        features,
        aggregations=aggregations,
        max_length=max_length,
        batch_size=batch_size,
        show_progress=show_progress,
    )
    return encoder(texts)


def table_from_store(
    store: FeatureStore, features: Sequence[FeatureId], aggregations: Sequence[str] | None = None
) -> FeatureTable:
    """Values of chosen features over all rows of a store, in some aggregations or in every one that it has.

    Raises:
        ConfigError: If no feature is given, the store lacks its layer or an aggregation, or an index is out of range.
        DataError: If a shard of the store is damaged.
    """
    if not features:
        raise ConfigError("No feature is given, so there is nothing to read.")
    columns = {name: store.values(features, name) for name in aggregations or store.aggregations}
    return FeatureTable(features, columns, store.token_counts())


def _require_aggregation(name: str) -> None:
    if name not in AGGREGATIONS:
        raise ConfigError(f"`{name}` is no aggregation; choose one of {', '.join(AGGREGATIONS)}.")
