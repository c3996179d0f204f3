"""Which tokens of a forward are penalised, and to which group each belongs.

A capture knows token ids, attention mask and position ids of its forward; the trainer's batch knows labels or a
completion mask. Both are brought together by shape and by token ids, so padding, packing, padding-free batches and
trainers that concatenate prompt and completion themselves all end in one boolean mask over the residual's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.errors import DataError
from qscope_trl.hooks.residual import Capture

GroupFn = Callable[[list[int]], str | None]

# Batch keys under which trainers keep the token ids of a forward, with their label or completion-mask keys.
_ID_KEYS = (
    ("input_ids", "labels", "completion_mask"),
    ("completion_input_ids", "completion_labels", "completion_mask"),
)


def token_mask(capture: Capture, batch: Mapping[str, Any], config: PenaltyConfig) -> Tensor | None:
    """Positions of a forward at which residuals are penalised.

    Args:
        capture: One forward of the decoder.
        batch: The trainer's inputs of this loss, before the trainer changed them.
        config: Says which tokens, shifted or not, with or without position 0.

    Returns:
        Boolean `(B, T)` on the residual's device, or None if neither the forward nor the batch says which tokens are
        trained.
    """
    residual = next(iter(capture.residuals.values()))
    shape = residual.shape[:2]
    valid = valid_tokens(capture, shape)
    if config.penalty_tokens == "all":
        mask = valid
    else:
        trained = _trained_tokens(capture, batch, config.penalty_tokens, shape)
        if trained is None:
            return None
        mask = trained.to(valid.device) & valid
        if config.penalty_shift:
            mask = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    if config.penalty_skip_first:
        mask = mask & ~first_tokens(capture, valid)
    return mask.to(residual.device)


def valid_tokens(capture: Capture, shape: Sequence[int]) -> Tensor:
    """Positions that are not padding, `(B, T)`; all of them if the forward had no 2D attention mask."""
    if capture.attention_mask is not None and capture.attention_mask.shape == tuple(shape):
        return capture.attention_mask.bool()
    device = next(iter(capture.residuals.values())).device
    return torch.ones(tuple(shape), dtype=torch.bool, device=device)


def first_tokens(capture: Capture, valid: Tensor) -> Tensor:
    """Position 0 of every sequence, `(B, T)`, also inside packed rows and after left padding."""
    position_ids = _position_ids(capture, valid.shape)
    if position_ids is not None:
        return (position_ids == 0).to(valid.device)
    return valid & (valid.cumsum(dim=1) == 1)


def token_groups(
    capture: Capture, groups: Sequence[str], names: Sequence[str | None] | None, group_fn: GroupFn | None
) -> Tensor | None:
    """Group of each token: 0 for none, else 1 + its place in `groups`.

    Args:
        capture: One forward of the decoder.
        groups: Known group names.
        names: Group of each row, from the collator.
        group_fn: Names the group of a sequence from its token ids; called once per sequence, also in packed rows.

    Returns:
        Long `(B, T)`, or None if nothing names groups.

    Raises:
        DataError: If rows and names do not correspond.
    """
    shape = next(iter(capture.residuals.values())).shape[:2]
    place = {name: 1 + n for n, name in enumerate(groups)}
    if names is not None:
        if len(names) != shape[0]:
            raise DataError(
                f"The batch names {len(names)} groups, but the model ran {shape[0]} rows. A group column cannot "
                f"follow packed or concatenated rows; pass `group_fn`, which sees token ids, instead."
            )
        rows = torch.tensor([place.get(str(name), 0) for name in names])
        return rows[:, None].expand(tuple(shape))
    if group_fn is None:
        return None
    if capture.input_ids is None:
        raise DataError("`group_fn` needs token ids, but the model was called with `inputs_embeds`.")
    valid = valid_tokens(capture, shape).cpu()
    starts = first_tokens(capture, valid).cpu() & valid
    ids = capture.input_ids.cpu()
    result = torch.zeros(tuple(shape), dtype=torch.long)
    for row in range(shape[0]):
        begins = starts[row].nonzero().flatten().tolist()
        ends = [*begins[1:], shape[1]]
        for begin, end in zip(begins, ends, strict=True):
            inside = valid[row, begin:end]
            name = group_fn(ids[row, begin:end][inside].tolist())
            result[row, begin:end] = place.get(str(name), 0)
    return result


def _position_ids(capture: Capture, shape: Sequence[int]) -> Tensor | None:
    position_ids = capture.position_ids
    if position_ids is None:
        return None
    if position_ids.dim() == 3:
        position_ids = position_ids[0]
    return position_ids.expand(tuple(shape)) if position_ids.shape[-1] == shape[1] else None


def _trained_tokens(capture: Capture, batch: Mapping[str, Any], tokens: str, shape: Sequence[int]) -> Tensor | None:
    shape = tuple(shape)
    if tokens == "labels" and capture.labels is not None and capture.labels.shape == shape:
        return capture.labels != -100
    for ids_key, labels_key, completion_key in _ID_KEYS:
        ids = batch.get(ids_key)
        if not isinstance(ids, Tensor) or not _same_tokens(ids, capture):
            continue
        labels, completion = batch.get(labels_key), batch.get(completion_key)
        if tokens == "labels" and isinstance(labels, Tensor) and labels.shape == shape:
            return labels != -100
        if isinstance(completion, Tensor) and completion.shape == shape:
            return completion.bool()
        if isinstance(labels, Tensor) and labels.shape == shape:
            return labels != -100
    if "completion_ids" in batch:
        return _concatenated_rollouts(batch, shape)
    return _preference_rows(capture, batch, shape)


def runs_batch(capture: Capture, batch: Mapping[str, Any]) -> bool:
    """Whether a forward ran the batch's own token ids (compared by value; for evaluation only)."""
    for ids_key, _, _ in _ID_KEYS:
        ids = batch.get(ids_key)
        if isinstance(ids, Tensor) and capture.input_ids is not None and torch.equal(ids, capture.input_ids):
            return True
    return False


def _same_tokens(ids: Tensor, capture: Capture) -> bool:
    if capture.input_ids is None:
        return ids.shape == next(iter(capture.residuals.values())).shape[:2]
    return ids is capture.input_ids or ids.shape == capture.input_ids.shape


def _concatenated_rollouts(batch: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    prompt, mask = batch.get("prompt_ids"), batch.get("completion_mask")
    if not isinstance(prompt, Tensor) or not isinstance(mask, Tensor):
        return None
    if isinstance(batch.get("tool_mask"), Tensor):
        mask = mask * batch["tool_mask"]
    whole = torch.cat([torch.zeros_like(prompt), mask], dim=1).bool()
    return whole if whole.shape == shape else None


def _preference_rows(capture: Capture, batch: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Rows `[chosen..., rejected...]` that older DPO trainers build from separate prompt and completion tensors."""
    parts = [_rows(batch, name) for name in ("prompt", "chosen", "rejected")]
    if any(part is None for part in parts) or capture.input_ids is None:
        return None
    prompts, chosen, rejected = (part or [] for part in parts)
    if shape[0] != len(chosen) + len(rejected) or len(prompts) != len(chosen):
        return None
    valid = valid_tokens(capture, shape).cpu()
    ids = capture.input_ids.cpu()
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts * 2, chosen + rejected, strict=True)):
        positions = valid[row].nonzero().flatten()
        seen, whole = ids[row][positions].tolist(), prompt + completion
        if seen == whole[: len(seen)]:
            first = len(prompt)
        elif seen == whole[len(whole) - len(seen) :]:
            first = max(0, len(seen) - len(completion))
        else:
            return None
        mask[row, positions[first:]] = True
    return mask


def _rows(batch: Mapping[str, Any], name: str) -> list[list[int]] | None:
    ids, mask = batch.get(f"{name}_input_ids"), batch.get(f"{name}_attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
        return None
    return [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
