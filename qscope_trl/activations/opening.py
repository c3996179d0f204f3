"""Opening what texts are run through: a model with its tokenizer, and the encoders of its SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from qscope_trl.bundled import model_path, sae_path
from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.errors import AttachError, ConfigError, ModelStructureError
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.layers import d_model, find_layers
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE


class Opened(NamedTuple):
    """A model on its device with its tokenizer and SAEs."""

    model: Any
    tokenizer: Any
    saes: SAESuite
    layers: tuple[int, ...]


def open_all(config: EncodingConfig) -> Opened:
    """Open the model, its tokenizer and its SAEs as a command's settings say.

    Raises:
        ConfigError: If the model cannot be loaded.
        CheckpointError: If a layer has no SAE.
    """
    saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
    layers = config.layer_list(saes.layers)
    saes = SAESuite.from_pretrained(saes, layers=layers)
    model, tokenizer = open_model(
        config.model, revision=config.model_revision, dtype=config.dtype, device=config.device
    )
    return Opened(model, tokenizer, saes, layers)


def open_model(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """A causal language model on its device, and its tokenizer.

    Args:
        name: Hub id, folder, or `demo` for the bundled one.
        revision: Commit, tag or branch on the Hub.
        dtype: Of the weights; `auto` is the checkpoint's.
        device: By default a GPU if there is one.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    tokenizer = open_tokenizer(name, revision=revision)
    try:
        model = auto_model.from_pretrained(model_path(name), revision=revision, dtype=wanted)
    except (OSError, ValueError) as err:
        raise ConfigError(f"The model '{name}' cannot be loaded: {err}") from err
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def open_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """A model's tokenizer alone; see `open_model`.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(name), revision=revision)
    except (OSError, ValueError) as err:
        raise ConfigError(f"The model '{name}' cannot be loaded: {err}") from err


def load_encoders(
    model: nn.Module, saes: SAESuite, layers: Sequence[int], *, decoder: bool = False
) -> dict[int, TopKSAE]:
    """The encoders of some layers, each on its layer's device; raises `ModelStructureError` if they do not fit."""
    modules = find_layers(model)
    for layer in layers:
        if layer >= len(modules):
            raise ModelStructureError(
                f"No decoder layer {layer} in `{type(model).__name__}`: it has layers 0-{len(modules) - 1}. Choose "
                f"`layers` within that range."
            )
        require_width(model, saes, layer)
    return {
        layer: saes.load(layer, device=next(modules[layer].parameters()).device, decoder=decoder) for layer in layers
    }


def require_width(
    model: nn.Module, saes: SAESuite, layer: int, error: type[AttachError | ModelStructureError] = ModelStructureError
) -> None:
    """Raise `error` if a layer's SAE reads residuals of another width than the model's."""
    if saes.spec(layer).d_model != d_model(model):
        raise error(
            f"The SAE of layer {layer} in '{saes.source}' reads residuals of width {saes.spec(layer).d_model}, but "
            f"`{type(model).__name__}` has `hidden_size={d_model(model)}`. Use the SAEs made for this model."
        )


def require_fit(
    model: nn.Module | None,
    saes: SAESuite,
    chosen: FeatureSet,
    error: type[AttachError | ModelStructureError] = ModelStructureError,
) -> None:
    """Refuse features that are not of these SAEs, and SAEs that are not of this model, where there is one.

    Raises:
        ModelStructureError: Or `error`: if an SAE reads residuals of another width.
        FeatureSetError: If the set was made for other SAEs or another model, or an index is out of range.
        CheckpointError: If an SAE cannot be read.
    """
    for layer in chosen.layers:
        if model is not None:
            require_width(model, saes, layer, error)
        spec = saes.spec(layer)
        chosen.check_fits(
            d_model=spec.d_model,
            num_layers=None if model is None else len(find_layers(model)),
            d_sae=spec.d_sae,
            sae=saes.source,
            fingerprints={layer: saes.fingerprint(layer)} if layer in chosen.sae_fingerprints else None,
        )
