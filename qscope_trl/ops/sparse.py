"""Sparse sums and products of matrix rows: the backward of TopK, and decoding, without a dense `(T, d_sae)`.

Registered torch operations with fake and autograd; each other's gradients. `reference` says what they compute.

Shape legend: `T` tokens, `D` width of the rows, `F` rows of the matrix, `K` chosen rows per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qscope_trl.ops import backend, reference

# Rows of a transposed decoder at a time, 64 MiB of fp32.
_BLOCK_ELEMENTS = 16 * 1024 * 1024


@torch.library.custom_op(
    "qscope_trl::gather_sum", mutates_args=(), schema="(Tensor weights, Tensor indices, Tensor W) -> Tensor"
)
def _gather_sum(weights: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    kernel = backend.choose((weights, W))
    if kernel == "torch" or weights.numel() == 0:
        return reference.gather_sum(weights, indices, W)
    out = torch.empty(weights.shape[0], W.shape[1], dtype=torch.float32, device=W.device)
    ops = getattr(torch.ops, f"qscope_trl_{kernel}")
    with backend.on_device(W):
        ops.gather_sum(weights.float().contiguous(), indices.contiguous(), W.contiguous(), out)
    return out


@torch.library.custom_op(
    "qscope_trl::gather_dot", mutates_args=(), schema="(Tensor x, Tensor indices, Tensor W) -> Tensor"
)
def _gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return reference.gather_dot(x, indices, W)


@torch.library.custom_op(
    "qscope_trl::sparse_decode",
    mutates_args=(),
    schema="(Tensor acts, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor",
)
def _sparse_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    kernel = backend.choose((acts, W_dec))
    if kernel == "torch" or acts.numel() == 0:
        return reference.sparse_decode(acts, indices, W_dec, b_dec)
    D, F = W_dec.shape
    total = torch.empty(acts.shape[0], D, dtype=torch.float32, device=acts.device)
    if W_dec.T.is_contiguous() or indices.numel() < F // 2:
        rows = W_dec.T
        if not rows.is_contiguous():
            # Few tokens: only their columns are turned into rows.
            used, indices = torch.unique(indices, return_inverse=True)
            rows = W_dec[:, used].T.contiguous()
        total.copy_(_gather_sum(acts, indices, rows))
    else:
        size = max(1, _BLOCK_ELEMENTS // F)
        for start in range(0, D, size):
            block = slice(start, start + size)
            total[:, block] = _gather_sum(acts, indices, W_dec[block].T.contiguous())
    return total.add_(b_dec.float())


@_gather_sum.register_fake
def _(weights: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return weights.new_empty(weights.shape[0], W.shape[1], dtype=reference.result_dtype(weights, W))


@_gather_dot.register_fake
def _(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return x.new_empty(indices.shape, dtype=reference.result_dtype(x, W))


@_sparse_decode.register_fake
def _(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return acts.new_empty(acts.shape[0], W_dec.shape[0], dtype=reference.result_dtype(acts, W_dec))


def _keep_matrix(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    first, indices, matrix = inputs[:3]
    ctx.save_for_backward(indices, matrix)
    ctx.dtype = first.dtype


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, W = ctx.saved_tensors
    return gather_dot(grad, indices, W).to(ctx.dtype), None, None


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, W = ctx.saved_tensors
    return gather_sum(grad, indices, W).to(ctx.dtype), None, None


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, W_dec = ctx.saved_tensors
    return gather_dot(grad, indices, W_dec.T).to(ctx.dtype), None, None, None


_gather_sum.register_autograd(_sum_backward, setup_context=_keep_matrix)
_gather_dot.register_autograd(_dot_backward, setup_context=_keep_matrix)
_sparse_decode.register_autograd(_decode_backward, setup_context=_keep_matrix)


def gather_sum(weights: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Weighted sums of rows, `out[t] = sum_i weights[t, i] * W[indices[t, i]]`; a weight of 0 takes no part.

    Differentiable in the weights; the matrix is frozen. A gather-sum in a fixed order: the same bits in every run.

    Args:
        weights: `(T, K)`.
        indices: Rows of `W`, int64 `(T, K)`.
        W: `(F, D)`.

    Returns:
        `(T, D)`, in the widest of the dtypes and fp32.
    """
    result: Tensor = _gather_sum(weights, indices, W)
    return result


def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Products with chosen rows, `out[t, i] = x[t] . W[indices[t, i]]`; differentiable in `x`.

    Args:
        x: `(T, D)`.
        indices: Rows of `W`, int64 `(T, K)`.
        W: `(F, D)`, any strides.

    Returns:
        `(T, K)`, in the widest of the dtypes and fp32.
    """
    result: Tensor = _gather_dot(x, indices, W)
    return result


def sparse_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction `x_hat = sum_i acts[:, i] * W_dec[:, indices[:, i]] + b_dec`; differentiable in the activations.

    Fastest where `W_dec.T` is contiguous; else the columns that are needed are turned into rows, 64 MiB at a time.

    Args:
        acts: `(T, K)`.
        indices: Features, int64 `(T, K)`.
        W_dec: Decoder `(D, F)`, as in the checkpoint.
        b_dec: Decoder bias `(D,)`.

    Returns:
        `(T, D)`, at least fp32.
    """
    result: Tensor = _sparse_decode(acts, indices, W_dec, b_dec)
    return result
