"""Pre-activations of chosen features, without a second copy of the residuals.

`reference.pre_activations` is the definition. In plain torch, residuals narrower than fp32 are copied to fp32 whole,
and so is their gradient: at 32,768 tokens of width 4,096 half a gigabyte each. Here both are made in chunks.

Shape legend: `T` tokens, `D` d_model, `S` chosen features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_trl.ops import reference

# Elements of a chunk of residuals: 16 MiB in fp32.
_CHUNK_ELEMENTS = 4 * 1024 * 1024


def pre_activations(x: Tensor, W_SD: Tensor, b_S: Tensor) -> Tensor:
    """Pre-activations `f = x @ W.T + b`, accumulated in at least fp32; differentiable in `x`.

    Args:
        x: Residuals `(..., D)`, any float dtype.
        W_SD: Rows of `W_enc`, frozen.
        b_S: Entries of `b_enc`, frozen.

    Returns:
        `(..., S)` in the widest of both dtypes and fp32.
    """
    if reference.result_dtype(x, W_SD) == x.dtype:
        return reference.pre_activations(x, W_SD, b_S)
    flat: Tensor = _PreActivations.apply(x.reshape(-1, x.shape[-1]), W_SD, b_S)  # type: ignore[no-untyped-call]
    return flat.view(*x.shape[:-1], W_SD.shape[0])


def weighted_rows(weights_TS: Tensor, W_SD: Tensor, dtype: torch.dtype) -> Tensor:
    """`weights @ W` in `dtype`, rounded once: the gradient of pre-activations with respect to residuals."""
    T, D = weights_TS.shape[0], W_SD.shape[1]
    out = torch.empty(T, D, dtype=dtype, device=weights_TS.device)
    with torch.autocast(device_type=weights_TS.device.type, enabled=False):
        for rows in _chunks(T, D):
            out[rows] = weights_TS[rows] @ W_SD.to(weights_TS.dtype)
    return out


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, W_SD: Tensor, b_S: Tensor) -> Tensor:
        ctx.save_for_backward(W_SD)
        ctx.dtype = x_TD.dtype
        T, S = x_TD.shape[0], W_SD.shape[0]
        f_TS = torch.empty(T, S, dtype=reference.result_dtype(x_TD, W_SD), device=x_TD.device)
        for rows in _chunks(T, x_TD.shape[1]):
            f_TS[rows] = reference.pre_activations(x_TD[rows], W_SD, b_S)
        return f_TS

    @staticmethod
    def backward(ctx: Any, grad_TS: Tensor) -> tuple[Tensor | None, ...]:
        (W_SD,) = ctx.saved_tensors
        return weighted_rows(grad_TS, W_SD, ctx.dtype), None, None


def _chunks(num_tokens: int, d_model: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, d_model))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]
