"""One generation of a GRPO trainer: its rollouts as token ids, and where they lie in the forwards that follow.

Everything that depends on the shape of TRL's private methods is here. Left out: reading features; that is `scores`.

Shape legend: `C` completion tokens of one rollout, `S` features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qscope_trl.errors import AttachError
from qscope_trl.features import FeatureId
from qscope_trl.hooks.layers import unwrap

KNOWN_TRL = "TRL 0.24 to 1.16"
"""Versions whose GRPO trainer is known to have the methods that are wrapped."""

_SHAPES = {
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
}


_MARKS = {
    "amplify_negative": "amplified",
    "zero_advantage": "zeroed",
    "screen": "screened",
    "steered_negative": "steered",
}


@dataclass(frozen=True)
class RolloutActivations:
    """What one rollout's completion showed to one reader.

    Args:
        ids: Features, in the order of the columns.
        values_CS: Pre-activation (`preact_hinge`) or activation after TopK (`topk_act`) at each completion token; the
            residual *at* the token, which has read it.
        active_CS: Whether each feature fires: above its threshold, or among the top k.
        score_C: The readers' one number per token: the penalty function summed over features with their weights.
        generated_C: Tokens the model generated itself; False for tool results.
    """

    ids: tuple[FeatureId, ...]
    values_CS: Tensor
    active_CS: Tensor
    score_C: Tensor
    generated_C: Tensor


@dataclass
class Rollouts:
    """The rollouts of one generation, and what has been read of them so far, by source."""

    prompts: list[list[int]]
    completions: list[list[int]]
    generated: list[list[int]] | None
    next_row: dict[str, int] = field(default_factory=lambda: {"policy": 0, "frozen": 0})
    found: dict[str, list[dict[str, RolloutActivations] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class SeenRollouts:
    """One generation of this process as it will be trained on.

    Args:
        rollouts: Prompts and completions as token ids.
        scores: For each rollout, what each reader showed, or None.
        rewards_BF: Reward of each rollout by each function, in the trainer's order; NaN where there is none.
        before_B: Advantages before the rollout policy.
        after_B: Advantages that are trained on; the mean over a rollout's tokens, where they have their own.
        marks: What the policy did to each rollout, such as `steered`; empty where it did nothing.
    """

    rollouts: Rollouts
    scores: Sequence[Mapping[str, RolloutActivations] | None]
    rewards_BF: Tensor | None
    before_B: Tensor
    after_B: Tensor
    marks: Sequence[str]


def see_rollouts(
    trainer: Any,
    rollouts: Rollouts,
    scores: Sequence[Mapping[str, RolloutActivations] | None],
    gathered: Tensor | None,
    before: Tensor,
    output: Mapping[str, Any],
    policy: Any,
) -> SeenRollouts:
    """What an observer is told of a generation.

    Args:
        trainer: Whose it is.
        rollouts: Those of this process.
        scores: What each reader showed of them.
        gathered: Rewards of all processes, as the policy left them, or None.
        before: Advantages before the policy.
        output: What TRL will train on.
        policy: The rollout policy, or None.
    """
    first = trainer.accelerator.process_index * len(rollouts.completions)
    rewards_BF = None if gathered is None else gathered[first : first + len(rollouts.completions)]
    after, mask = output["advantages"], output["completion_mask"]
    after_B, before_B = (
        (one * mask).sum(-1) / mask.sum(-1).clamp(min=1) if one.dim() == 2 else one for one in (after, before)
    )
    kind, changed_B = getattr(policy, "kind", ""), torch.zeros(before.shape[0], dtype=torch.bool)
    if kind == "steered_negative" and policy.steered_B is not None:
        changed_B = policy.steered_B
    elif kind == "screen" and rewards_BF is not None:
        changed_B = rewards_BF.isnan().all(-1)
    elif kind in ("amplify_negative", "zero_advantage"):
        wide = before[:, None] if after.dim() > before.dim() else before
        changed_B = (after != wide).reshape(before.shape[0], -1).any(-1)
    marks = [_MARKS.get(kind, "") if changed else "" for changed in changed_B.tolist()]
    return SeenRollouts(rollouts, scores, rewards_BF, before_B, after_B, marks)


def refuse_unknown_shape(trainer: Any) -> None:
    """Raise `AttachError` unless the trainer has the methods that will be wrapped, with their known parameters."""
    for name, wanted in _SHAPES.items():
        method = getattr(trainer, name, None)
        names = list(inspect.signature(method).parameters) if callable(method) else None
        if names is None or tuple(names[: len(wanted)]) != wanted:
            found = "no such method" if names is None else f"the parameters ({', '.join(names)})"
            raise AttachError(
                f"`{type(trainer).__name__}.{name}` is expected to take ({', '.join(wanted)}); found {found}. Rollout "
                f"scoring knows {KNOWN_TRL}; install one of these."
            )


def read_generation(output: Any, num_prompts: int) -> Rollouts:
    """Token ids of prompts and completions, and the tool mask, from what `_generate` returned."""
    lists = [part for part in output[:2] if isinstance(part, list) and len(part) == num_prompts]
    if len(lists) != 2:
        raise AttachError(
            f"The trainer's `_generate` did not return one list of prompt ids and one of completion ids per prompt. "
            f"Rollout scoring knows {KNOWN_TRL}; install one of these."
        )
    prompts, completions = ([[int(i) for i in ids] for ids in part] for part in lists)
    mask = output[2] if len(output) > 2 and isinstance(output[2], list) and len(output[2]) == num_prompts else None
    if mask is not None:
        is_mask = all(isinstance(m, list) and len(m) == len(c) for m, c in zip(mask, completions, strict=True))
        mask = mask if is_mask and all(value in (0, 1) for row in mask for value in row) else None
    return Rollouts(prompts, completions, mask)


def find_rollouts(rows: list[list[int]], rollouts: Rollouts, first: int) -> list[int] | None:
    """Where the completion starts in each row of a forward; None if the rows are not the next rollouts."""
    places = []
    for number, row in enumerate(rows, first):
        if number >= len(rollouts.completions):
            return None
        prompt, completion = rollouts.prompts[number], rollouts.completions[number]
        wanted = prompt + completion
        starts = range(len(row) - len(wanted), -1, -1)
        start = next((s for s in starts if row[s : s + len(wanted)] == wanted), None)
        if start is None:
            return None
        places.append(start + len(prompt))
    return places


def padded_rollouts(
    rollouts: Rollouts, pad_token_id: int, end_token_ids: set[int], masks_truncated: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and attention mask of all rollouts, padded as TRL pads them: prompts left, completions right.

    Args:
        rollouts: The rollouts of one generation.
        pad_token_id: What fills.
        end_token_ids: Last tokens of a completion that was not truncated.
        masks_truncated: Whether TRL masks the attention of truncated completions in its own forwards
            (`mask_truncated_completions`), so that what is scored does not depend on whose forward showed it.
    """
    prompt_width = max(len(ids) for ids in rollouts.prompts)
    width = max(len(ids) for ids in rollouts.completions)
    rows, masks = [], []
    for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
        left, right = prompt_width - len(prompt), width - len(completion)
        rows.append([pad_token_id] * left + prompt + completion + [pad_token_id] * right)
        attended = int(not (masks_truncated and completion and completion[-1] not in end_token_ids))
        masks.append([0] * left + [1] * len(prompt) + [attended] * len(completion) + [0] * right)
    return rows, masks


def shows_frozen(model: Any) -> bool:
    """Whether the model runs with its adapters off, or with TRL's copy of the adapters it started from."""
    for module in model.modules():
        # PEFT's tuner layers; on the model itself `disable_adapters` is a method.
        disabled = getattr(module, "disable_adapters", None)
        if isinstance(disabled, bool):
            return disabled or list(getattr(module, "active_adapters", [])) == ["ref"]
    return False


def last_logits(model: Any, count: int) -> dict[str, int]:
    """What to pass to a model's forward so that it computes logits of the last `count` positions only, if it can."""
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


def log_metric(trainer: Any, name: str, value: Tensor) -> None:
    """Put a value into TRL's own metrics of the step, beside its rewards."""
    trainer._metrics["train"][name].append(float(value))


def mend_logged_advantages(trainer: Any, rows_B: Tensor) -> None:
    """Replace the advantages TRL noted for its completions table by those that are trained on."""
    noted = trainer._logs["advantages"]
    values = trainer.accelerator.gather(rows_B.contiguous()).tolist()
    for _ in range(min(len(values), len(noted))):
        noted.pop()
    noted.extend(values)
