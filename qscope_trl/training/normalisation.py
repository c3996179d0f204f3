"""What the sum of penalties over tokens is divided by, so that it weighs as the trainer's own loss does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qscope_trl.config.training import PenaltyConfig


def loss_divisor(
    trainer: Any, count: Tensor, num_items: Any, batch: Mapping[str, Any], config: PenaltyConfig
) -> Tensor:
    """Divisor of one micro-batch's sum of penalties.

    Args:
        trainer: The trainer whose loss is joined.
        count: Penalised tokens of this micro-batch.
        num_items: What the trainer passed as `num_items_in_batch`, or None.
        batch: The trainer's inputs.
        config: Says which tokens are penalised.

    Returns:
        * the trained tokens of the optimizer step, shared over processes as the trainer shares its loss, where the
          trainer normalises its loss by them and the penalised tokens are the trained ones;
        * GRPO family: the trained tokens of the accumulation window, TRL's normalisation of the DAPO loss;
        * `count`, where the trainer divides by the accumulation steps itself;
        * `count` times the accumulation steps otherwise.
    """
    mean = count.clamp(min=1)
    steps = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    own_tokens = config.penalty_tokens != "all"
    window = batch.get("num_items_in_batch")
    if own_tokens and isinstance(window, Tensor):
        spanned = getattr(trainer.args, "steps_per_generation", None) or steps
        scale: float = steps / spanned / trainer.accelerator.num_processes
        return window.clamp(min=1) * scale
    if not loss_is_scaled(trainer, num_items):
        return mean
    if num_items is None or not own_tokens:
        return mean * int(steps)
    items = torch.as_tensor(num_items, device=count.device).clamp(min=1)
    if not trainer.args.average_tokens_across_devices:
        return items
    # Tensor-parallel processes see the same tokens; newer trainers count them once.
    copies: int = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    processes: int = max(1, trainer.accelerator.num_processes // copies)
    return items / processes


def loss_is_scaled(trainer: Any, num_items: Any) -> bool:
    """Whether `compute_loss` itself normalises over the accumulation window (else the trainer divides afterwards)."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return bool(declared)
    return bool((trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None)
