"""Whether chosen features are active after TopK, without selecting a top k.

A feature is active exactly if its pre-activation is positive and fewer than k features rank above it. So the features
above the chosen ones are counted, chunk by chunk, and a token is dropped as soon as all its chosen features are
decided: at once where none is positive, early where the count reaches k. Exact; `reference.feature_rank` is the
definition.

Shape legend: `T` tokens, `D` d_model, `F` d_sae, `S` chosen features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_trl.errors import ConfigError
from qscope_trl.ops import backend, reference
from qscope_trl.ops.chosen import weighted_rows
from qscope_trl.ops.reference import FeatureActs
from qscope_trl.ops.topk_encode import check_operands, feature_chunks, fill_slab, product_dtype, token_blocks

# Dropping tokens copies the remaining residuals: worth it once a fifth of them is gone.
_SHRINK_BELOW = 0.8


@torch.library.custom_op(
    "qscope_trl::feature_rank",
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor features) -> (Tensor, Tensor)",
)
def _feature_rank(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor) -> tuple[Tensor, Tensor]:
    outside = features[(features < 0) | (features >= W_enc.shape[0])]
    if outside.numel():
        raise ConfigError(
            f"Feature {int(outside[0])} does not exist; the encoder has features 0 to {W_enc.shape[0] - 1}."
        )
    kernel = backend.choose((x, W_enc), k=1)
    if kernel == "torch" or x.shape[0] == 0 or features.numel() == 0:
        dense = reference.feature_rank(x, W_enc, b_enc, k, features)
        return dense.acts, dense.active
    with torch.autocast(device_type=x.device.type, enabled=False), torch.no_grad():
        values, counts, _ = count_above(kernel, x, W_enc, b_enc.float(), k, features)
    active = (counts < k) & ~(values <= 0)
    return torch.where(active, values, 0), active


@_feature_rank.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], features.shape[0])
    return x.new_empty(shape, dtype=reference.result_dtype(x, W_enc)), x.new_empty(shape, dtype=torch.bool)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, _, _, features = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], W_enc, features)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad_acts: Tensor, _grad_active: Tensor) -> tuple[Tensor | None, ...]:
    active, W_enc, features = ctx.saved_tensors
    weights = torch.where(active, grad_acts, 0)
    return weighted_rows(weights, W_enc[features], ctx.dtype), None, None, None, None


_feature_rank.register_autograd(_backward, setup_context=_keep)


def feature_rank(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor) -> FeatureActs:
    """Activations after TopK and ReLU of chosen features only; differentiable in `x`.

    Equal to looking the features up in `topk_encode`'s result, at a fraction of its work when they are few. Reads the
    result of a comparison after every chunk, so it cannot be captured in a CUDA graph.

    Args:
        x: Residuals `(..., D)`: fp32, bf16 or fp16 (fp64 in plain torch).
        W_enc: Encoder `(F, D)`, frozen.
        b_enc: Encoder bias `(F,)`, frozen.
        k: Active features per token, 1 to `F`.
        features: Indices of the chosen features, int64 `(S,)`.

    Returns:
        `acts (..., S)`, at least fp32, and `active (..., S)`.

    Raises:
        ConfigError: If shapes, devices, `k` or a feature do not fit, or the encoder requires a gradient.
        KernelError: If `QSCOPE_TRL_KERNEL` names a backend that cannot run here.
    """
    check_operands(x, W_enc, b_enc, k)
    if features.dtype != torch.int64 or features.dim() != 1:
        raise ConfigError(f"`features` is {features.dtype} {tuple(features.shape)}; expected int64 indices `(S,)`.")
    acts, active = _feature_rank(x.reshape(-1, x.shape[-1]), W_enc, b_enc, k, features.to(x.device).contiguous())
    shape = (*x.shape[:-1], features.shape[0])
    return FeatureActs(acts.view(shape), active.view(shape))


def count_above(kernel: str, x: Tensor, W: Tensor, b: Tensor, k: int, features: Tensor) -> tuple[Tensor, Tensor, int]:
    """The work behind `feature_rank`, with its cost.

    Args:
        kernel: `cpu` or `cuda`.
        x: Residuals `(T, D)`.
        W: Encoder.
        b: Encoder bias, fp32.
        k: Active features per token.
        features: Chosen features.

    Returns:
        Pre-activations `(T, S)`; for each, how many features rank above it, counted up to k or until it did not
        matter; and how many pre-activations of the dense `T * F` were computed.
    """
    ops = getattr(torch.ops, f"qscope_trl_{kernel}")
    dtype = product_dtype(kernel, x, W)
    x = x.to(dtype)
    slab = torch.empty(0, dtype=torch.float32, device=x.device)
    with backend.on_device(x):
        values = fill_slab(slab.new_empty(x.shape[0] * features.numel()), x, W[features].to(dtype)) + b[features]
        counts = torch.zeros(values.shape, dtype=torch.int32, device=x.device)
        positive = ~(values <= 0)
        open_rows = positive.any(1).nonzero()[:, 0]
        x_open, values_open, counts_open = x[open_rows], values[open_rows], counts[open_rows]
        work = x.shape[0] * features.numel()
        for chunk in feature_chunks(kernel, x.shape[0], W):
            if open_rows.numel() == 0:
                break
            W_chunk, b_chunk = W[chunk].to(dtype), b[chunk].contiguous()
            blocks = token_blocks(kernel, open_rows.numel(), W_chunk.shape[0])
            size = (blocks[0].stop - blocks[0].start) * W_chunk.shape[0]
            slab = slab if slab.numel() >= size else slab.new_empty(size)
            for rows in blocks:
                filled = fill_slab(slab, x_open[rows], W_chunk)
                ops.count_above(filled, b_chunk, chunk.start, values_open[rows], features, counts_open[rows], k)
            work += open_rows.numel() * W_chunk.shape[0]
            stays = ((counts_open < k) & ~(values_open <= 0)).any(1)
            if int(stays.sum()) < _SHRINK_BELOW * stays.numel():
                counts[open_rows] = counts_open
                open_rows, x_open = open_rows[stays], x_open[stays]
                values_open, counts_open = values_open[stays], counts_open[stays]
        counts[open_rows] = counts_open
    return values, counts, work
