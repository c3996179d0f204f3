"""Refusals at the boundary and the self-check of the first step: no penalty is silently without effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from qscope_trl.errors import AttachError, DataError, PenaltySelfCheckError
from qscope_trl.hooks.layers import find_decoder, find_layers
from qscope_trl.hooks.residual import Capture

KNOWN_GOOD = "transformers 4.57-5.23 with TRL 0.24-1.16"
"""Versions on which the penalty's gradients were shown equal to an independent computation."""


def refuse_unsupported(trainer: Any) -> None:
    """Raise `AttachError` for a trainer in which a penalty cannot be right."""
    parallelism = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
    if parallelism is not None and (
        getattr(parallelism, "sp_enabled", False) or getattr(parallelism, "cp_enabled", False)
    ):
        raise AttachError(
            "The trainer splits sequences over processes (sequence or context parallelism), so no process sees whole "
            "sequences and the penalised tokens cannot be told. Train with data, tensor or ZeRO parallelism instead."
        )
    if getattr(trainer.args, "n_gpu", 1) > 1:
        raise AttachError(
            f"The trainer uses DataParallel over {trainer.args.n_gpu} GPUs in one process, which copies the model in "
            f"every step and leaves hooks behind. Start one process per GPU with `accelerate launch`."
        )
    adapters = getattr(getattr(trainer, "model", None), "peft_config", None) or {}
    learned = [name for name, config in adapters.items() if getattr(config, "is_prompt_learning", False)]
    if learned:
        raise AttachError(
            f"Adapter `{learned[0]}` learns virtual tokens ({type(adapters[learned[0]]).__name__}), which shift every "
            f"position against the batch's labels, so the penalised tokens cannot be told. Use LoRA or full weights."
        )
    if not callable(getattr(trainer, "compute_loss", None)):
        raise AttachError(
            f"`{type(trainer).__name__}` has no `compute_loss`, so there is no loss to join. Pass a transformers or "
            f"TRL trainer."
        )


def require_trainable_below(model: torch.nn.Module, layers: Sequence[int]) -> None:
    """Raise if a penalised layer has no trainable parameter at or below it."""
    decoder, found = find_decoder(model), find_layers(model)
    inside = {id(p) for layer in found for p in layer.parameters()}
    own = [p for p in decoder.parameters() if id(p) not in inside]
    # Embeddings come before every layer; the final norm, after them, is told apart by its one dimension.
    trainable = any(p.requires_grad and p.dim() > 1 for p in own)
    for layer, module in enumerate(found):
        trainable = trainable or any(p.requires_grad for p in module.parameters())
        if layer in layers and not trainable:
            raise AttachError(
                f"No trainable parameter lies at or below layer {layer}, so its penalty can change nothing. Penalise "
                f"features of a layer above the lowest trained one, or let LoRA's `layers_to_transform` reach layer "
                f"{layer} or below."
            )
        if layer >= max(layers):
            return


def check_captures(captures: Sequence[Capture], wanted: set[int]) -> None:
    """Raise unless every forward of a training step showed every hooked layer, one of them with gradients."""
    if not captures or any(wanted - capture.residuals.keys() for capture in captures):
        shown = set().union(*(capture.residuals.keys() for capture in captures))
        raise PenaltySelfCheckError(
            f"A training step ran without a residual of layers {sorted(wanted - shown)}: the hooks did not "
            f"fire. Usually the model was compiled before the penalty was attached; build the trainer before the "
            f"first compiled forward, or let `torch_compile=True` compile it."
        )
    if not any(capture.has_grad for capture in captures):
        raise PenaltySelfCheckError(
            f"A training step ran the model without gradients only, so no penalty can reach the weights. "
            f"Known to work: {KNOWN_GOOD}."
        )


def check_gradient(penalty: Tensor) -> None:
    """Raise if the first step's penalty has no graph."""
    if not penalty.requires_grad:
        raise PenaltySelfCheckError(
            f"The penalty of the first training step carries no gradient, so it would change nothing at any weight. "
            f"Known to work: {KNOWN_GOOD}; report the trainer's class and versions."
        )


def raise_bypassed(trainer: Any) -> NoReturn:
    """Refuse a trainer that finished a step without `compute_loss`."""
    raise PenaltySelfCheckError(
        f"`{type(trainer).__name__}` finished an optimizer step without calling `compute_loss`, so the penalty never "
        f"joined the loss. This trainer computes its loss elsewhere and is not supported; known to work: "
        f"{KNOWN_GOOD}, for SFT, DPO, KTO, Reward and plain `Trainer`."
    )


def raise_unknown_tokens(batch: Mapping[str, Any], penalty_tokens: str) -> NoReturn:
    """Refuse a batch that does not say which of its tokens are trained."""
    raise DataError(
        f"Neither the forward's `labels` nor the batch (keys {', '.join(f'`{key}`' for key in batch)}) says which of "
        f"its tokens are trained, so `penalty_tokens='{penalty_tokens}'` has no meaning here. Set "
        f"`penalty_tokens='all'`."
    )
