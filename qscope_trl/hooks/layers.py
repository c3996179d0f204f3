"""Finding decoder layers by structure, under PEFT, DDP, FSDP2, torch.compile and multimodal wrappers.

No table of architectures: the decoder is what `get_decoder()` gives, or else the module that owns as many layers as
the text configuration says.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qscope_trl.errors import ModelStructureError

_LAYER_LISTS = ("layers", "h", "blocks")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed (`module`) and torch.compile (`_orig_mod`) wrappers; PEFT models are left."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        # A DeepSpeed engine has a `config` too, its own.
        if inner is None and not hasattr(getattr(model, "config", None), "get_text_config"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def text_config(model: nn.Module) -> Any:
    """Configuration of the language part of a model.

    Raises:
        ModelStructureError: If the model has no transformers configuration.
    """
    config = getattr(unwrap(model), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelStructureError(
            f"`{type(model).__name__}` has no transformers `config`, so its decoder layers cannot be counted. Pass a "
            f"transformers model, or one wrapped by PEFT, DDP or torch.compile."
        )
    return config.get_text_config()


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose forward runs all decoder layers (embeddings in, final norm out).

    Args:
        model: A transformers model, wrapped or not.

    Returns:
        For Qwen3ForCausalLM its `model`, for GPT-2 its `transformer`, for Qwen3.5's multimodal class the
        `model.language_model`.

    Raises:
        ModelStructureError: If no module has as many layers as the configuration says.
    """
    inner = unwrap(model)
    num_layers = text_config(model).num_hidden_layers
    candidates: list[nn.Module] = []
    get_decoder: Any = getattr(inner, "get_decoder", None)
    if get_decoder is not None:
        decoder = get_decoder()
        if isinstance(decoder, nn.Module):
            candidates.append(decoder)
    candidates.extend(module for module in inner.modules() if not isinstance(module, nn.ModuleList))
    for candidate in candidates:
        layers = _layers_of(candidate)
        if layers is not None and len(layers) == num_layers:
            return candidate
    raise ModelStructureError(
        f"No decoder with {num_layers} layers in `{type(inner).__name__}`: looked for a module list named "
        f"{', '.join(f'`{name}`' for name in _LAYER_LISTS)}. Encoder-decoder and state-space models are not supported."
    )


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order; the output of layer n is what an SAE of layer n reads (`resid_post`).

    Raises:
        ModelStructureError: As `find_decoder`.
    """
    layers = _layers_of(find_decoder(model))
    return list(layers or [])


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model or its decoder: wrapped around it, or in place by `Module.compile()`."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in (model, find_decoder(model))
    )


def d_model(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(text_config(model).hidden_size)


def _layers_of(module: nn.Module) -> nn.ModuleList | None:
    for name in _LAYER_LISTS:
        layers = getattr(module, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    return None
