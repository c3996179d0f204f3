"""Features of rows from a feature store: of the data itself, or of rows that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.activations.layout import MANIFEST
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.store import FeatureStore
from qscope_trl.activations.store_checks import (
    model_reading,
    refuse_other_data,
    refuse_other_reading,
    sae_reading,
    settings_reading,
    store_reading,
)
from qscope_trl.analysis.curation.features import (
    BLOCK,
    Features,
    ModelReader,
    Needs,
    chosen_layers,
    sets_of,
    starts_of,
)
from qscope_trl.analysis.curation.sets import ActiveSets, join
from qscope_trl.config.curate import CurateConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.rules import Rule

# Any of these is above 0 exactly where a feature fires in a text.
_SHOWS_ACTIVE = ("max", "mean", "rate")


class StoreReader:
    """Features of a dataset from its store.

    Args:
        config: Which store.
        rules: Rules to check against its SAEs.
        needs: What to read.
        source: The dataset.

    Raises:
        ConfigError: If the store lacks a layer or an aggregation.
        DataError: If it was made from other data.
        RuleError: If a rule does not fit the SAEs.
    """

    def __init__(self, config: CurateConfig, rules: Sequence[Rule], needs: Needs, source: RowSource) -> None:
        self.store = FeatureStore.open(str(config.store))
        self.needs = needs
        refuse_other_data(self.store, source.fingerprint(), source.name, config.text_column)
        for rule in rules:
            rule.check(_StoredSAEs(self.store))
        self.set_layers = chosen_layers(config, self.store.layers) if needs.compares_sets else ()
        for layer in self.set_layers:
            self.store.fingerprint(layer)
        self.starts = starts_of([self.store.d_sae(layer) for layer in self.set_layers])

    def fingerprints(self) -> dict[int, str]:
        """Fingerprint of each layer that is compared."""
        return {layer: self.store.fingerprint(layer) for layer in self.set_layers}

    def read(self) -> Features:
        """Everything of all rows."""
        store, needs = self.store, self.needs
        num_tokens = store.token_counts()
        table = None
        if needs.features:
            columns = {name: store.values(needs.features, name) for name in needs.aggregations}
            table = FeatureTable(needs.features, columns, num_tokens)
        sets = stored_sets(store, self.set_layers, needs.value) if needs.compares_sets else None
        return Features(table, sets, num_tokens)


class _StoredSAEs:
    """A store's SAEs as `Rule.check` asks for them."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self.source = str(store.manifest["saes"]["source"])
        self.layers = store.layers

    def spec(self, layer: int) -> _Spec:
        return _Spec(self._store.d_sae(layer))

    def fingerprint(self, layer: int) -> str:
        return self._store.fingerprint(layer)


class _Spec(NamedTuple):
    d_sae: int


def is_store(name: str) -> bool:
    """Whether a name is the folder of a feature store."""
    return (Path(name) / MANIFEST).is_file()


def reference_sets(
    name: str, reader: ModelReader | StoreReader, config: CurateConfig, value: str | None
) -> ActiveSets:
    """The active features of the rows that others are compared with, from a dataset or from a feature store of it.

    Raises:
        ConfigError: If they are texts and there is no model.
        DataError: If a store was made with other SAEs.
    """
    if is_store(name):
        store = FeatureStore.open(name)
        for layer, mine in reader.fingerprints().items():
            if store.fingerprint(layer) != mine:
                raise DataError(f"The store '{name}' was made with other SAEs than the data's: layer {layer} differs.")
        read = store_reading(store, reader.set_layers)
        refuse_other_reading(f"The store '{name}'", read, reader_reading(reader))
        return stored_sets(store, reader.set_layers, value)
    if isinstance(reader, ModelReader):
        return reader.reference(name, value)
    if not config.model:
        raise ConfigError(
            f"'{name}' is to be encoded: give `--model` and `--saes`, or name a feature store of it instead."
        )
    encoder = ModelReader(config, (), Needs((), (), True, value))
    if encoder.fingerprints() != reader.fingerprints():
        raise DataError(f"'{config.saes}' are other SAEs than those of the store '{config.store}'.")
    refuse_other_reading(f"'{name}' as it is encoded here", reader_reading(encoder), reader_reading(reader))
    return encoder.reference(name, value)


def reader_reading(reader: ModelReader | StoreReader) -> dict[str, Any]:
    """What decides a text's features beside the SAEs."""
    layers = reader.set_layers
    if isinstance(reader, StoreReader):
        return store_reading(reader.store, layers)
    own = settings_reading(reader.config.max_length) | sae_reading(reader.saes, layers)
    return own | model_reading(reader.model, reader.tokenizer)


def stored_sets(store: FeatureStore, layers: Sequence[int], value: str | None) -> ActiveSets:
    """Active features of all rows of a store.

    Raises:
        ConfigError: If it lacks a layer, or holds no aggregation that shows them.
    """
    there = [name for name in _SHOWS_ACTIVE if name in store.aggregations]
    if value is None and not there:
        raise ConfigError(
            f"'{store.path}' holds {', '.join(store.aggregations)}, which does not show every feature that is active "
            f"in a text. Index with `max`."
        )
    aggregation = value or there[0]
    starts = starts_of([store.d_sae(layer) for layer in layers])
    parts = []
    for first in range(0, store.num_rows, BLOCK):
        stop = min(first + BLOCK, store.num_rows)
        entries = []
        for layer, start in zip(layers, starts, strict=False):
            matrix = store.csr(layer, aggregation, first, stop)
            row = np.repeat(np.arange(stop - first), np.diff(matrix.indptr))
            entries.append((row, matrix.indices + start, matrix.data))
        parts.append(sets_of(entries, stop - first, starts, with_values=value is not None))
    if not parts:
        raise DataError(f"The store '{store.path}' has no row.")
    return join(parts)
