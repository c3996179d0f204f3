"""Whether a feature store was read as the texts at hand are: only then do equal texts have equal features.

What decides a text's features: the data and its column, the tokenizer, how much of a text is read, the model, the SAEs
and their k. What is stored of each is compared. Left out: `batch_size` and device, which change values by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qscope_trl.activations.identity import model_identity, tokenizer_checksum
from qscope_trl.activations.store import FeatureStore
from qscope_trl.errors import DataError
from qscope_trl.sae.suite import SAESuite

Reading = Mapping[str, Any]
"""What decides a text's features, by name; the fingerprints of data and SAEs are compared apart."""


def store_reading(store: FeatureStore, layers: Sequence[int] = ()) -> dict[str, Any]:
    """How the texts of a store were read.

    Args:
        store: The store.
        layers: Layers whose k is named.

    Raises:
        ConfigError: If it lacks a layer.
    """
    manifest = store.manifest
    settings, model = manifest["settings"], manifest["model"]
    found = {
        "max_length": settings["max_length"],
        "skip_first": settings["skip_first"],
        "dtype": model["dtype"],
        "model": model["weights_checksum"],
        "tokenizer": manifest["tokenizer"]["checksum"],
    }
    return found | {f"k of layer {layer}": manifest["saes"]["layers"][str(layer)]["k"] for layer in layers}


def settings_reading(max_length: int) -> dict[str, Any]:
    """How texts are read by a command that keeps so many tokens of each, and leaves out position 0, as all do."""
    return {"max_length": max_length, "skip_first": True}


def sae_reading(saes: SAESuite, layers: Sequence[int]) -> dict[str, Any]:
    """How many features fire at a token, for the layers whose SAE says it; the fingerprint of an SAE does not."""
    stated = {f"k of layer {layer}": saes.spec(layer).k for layer in layers}
    return {name: k for name, k in stated.items() if k is not None}


def model_reading(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the model and the tokenizer decide."""
    identity = model_identity(model, name="", revision=None)
    return {
        "dtype": identity["dtype"],
        "model": identity["weights_checksum"],
        "tokenizer": tokenizer_checksum(tokenizer),
    }


def refuse_other_reading(what: str, mine: Reading, wanted: Reading, *, than: str = "the data") -> None:
    """Raise `DataError` if texts were read in another way, so that equal ones have unequal features.

    Args:
        what: What was read, for the message.
        mine: How.
        wanted: How it must be; what both name is compared.
        than: What it is compared with, for the message.
    """
    differs = next((name for name in wanted if name in mine and mine[name] != wanted[name]), None)
    if differs is not None:
        raise DataError(
            f"{what} was read with another `{differs}` ({mine[differs]}) than {than} ({wanted[differs]}), so equal "
            f"texts would have unequal features. Read both alike."
        )


def refuse_other_data(store: FeatureStore, fingerprint: str, name: str, text_column: str) -> None:
    """Raise `DataError` if a store was made from other data, or from another column of it.

    Args:
        store: The store.
        fingerprint: Of the data.
        name: Of the data, for messages.
        text_column: Column of its texts.
    """
    made_from = store.manifest["dataset"]
    if made_from["fingerprint"] != fingerprint:
        raise DataError(
            f"The store '{store.path}' was made from '{made_from['name']}', and '{name}' is other data, or has "
            f"changed since. Index it again."
        )
    column = store.manifest["settings"]["text_column"]
    if column != text_column:
        raise DataError(
            f"The store '{store.path}' was made from the column `{column}`, not `{text_column}`. "
            f"Name that one by `--text-column`, or index the other."
        )
