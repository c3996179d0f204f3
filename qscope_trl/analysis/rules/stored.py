"""The feature store of labelled texts, checked to be one of exactly these texts, read as this run reads others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qscope_trl.activations.store import FeatureStore
from qscope_trl.activations.store_checks import (
    model_reading,
    refuse_other_data,
    refuse_other_reading,
    sae_reading,
    settings_reading,
    store_reading,
)
from qscope_trl.errors import ConfigError

if TYPE_CHECKING:
    from qscope_trl.activations.opening import Opened
    from qscope_trl.analysis.rules.data import Labelled
    from qscope_trl.config.rules import LabelledConfig
    from qscope_trl.sae.suite import SAESuite


def open_store(
    path: str,
    data: Labelled,
    config: LabelledConfig,
    saes: SAESuite,
    layers: Sequence[int],
    aggregations: Sequence[str],
) -> FeatureStore:
    """Open the store of labelled texts; the model is compared by `refuse_other_model`, if it is opened at all.

    Args:
        path: Its folder.
        data: The texts.
        config: How texts are read.
        saes: The SAEs.
        layers: Layers that are read.
        aggregations: Aggregations that are read.

    Raises:
        ConfigError: If it lacks a row, a layer or an aggregation, or was made with other SAEs.
        DataError: If it was made from other data, or read in another way.
    """
    store = FeatureStore.open(path)
    refuse_other_data(store, data.fingerprint, data.name, config.text_column)
    if len(store) != len(data):
        raise ConfigError(
            f"The store '{path}' has {len(store)} rows, but {len(data)} of '{data.name}' are read. Give the "
            f"`--max-rows` that it was made with."
        )
    missing = [name for name in aggregations if name not in store.aggregations]
    if missing:
        raise ConfigError(
            f"The store '{path}' has no `{missing[0]}`, but {', '.join(store.aggregations)}. Index the data with it."
        )
    for layer in layers:
        if layer not in store.layers:
            raise ConfigError(
                f"The store '{path}' has no layer {layer}, but {', '.join(map(str, store.layers))}. Choose among "
                f"them by `--layers`, or index the data with it."
            )
        if store.fingerprint(layer) != saes.fingerprint(layer):
            raise ConfigError(f"The store '{path}' was made with another SAE of layer {layer} than '{config.saes}'.")
    wanted = settings_reading(config.max_length) | sae_reading(saes, layers)
    refuse_other_reading(f"The store '{path}'", store_reading(store, layers), wanted, than="this run")
    return store


def refuse_other_model(store: FeatureStore, opened: Opened) -> None:
    """Raise `DataError` if a store was made with another model, dtype or tokenizer than those that are opened."""
    wanted = model_reading(opened.model, opened.tokenizer)
    refuse_other_reading(f"The store '{store.path}'", store_reading(store), wanted, than="this run")
