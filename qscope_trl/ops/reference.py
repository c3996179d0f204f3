"""The definition of every operation, in plain torch, chunked so that no `(T, d_sae)` tensor is ever whole.

Shape legend: `T` tokens, `D` d_model, `F` d_sae, `K` active features per token, `S` chosen features. Left out on
purpose: speed. Faster backends must agree with what is written here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# 64 MiB of fp32 pre-activations at a time: large enough to keep the matrix product efficient, small enough to forget.
_CHUNK_ELEMENTS = 16 * 1024 * 1024


class TopKActs(NamedTuple):
    """Sparse activations of a batch of tokens."""

    top_acts: Tensor
    """Activations after TopK and ReLU, descending, zero where fewer than k are positive. Shape `(T, K)`."""

    top_indices: Tensor
    """Feature index of each activation, int64. Shape `(T, K)`."""


class FeatureActs(NamedTuple):
    """Activations of chosen features."""

    acts: Tensor
    """Activation after TopK and ReLU, zero where the feature is not active. Shape `(T, S)`."""

    active: Tensor
    """Whether the feature is among the top k and positive. Shape `(T, S)`, bool."""


def token_chunks(num_tokens: int, d_sae: int) -> list[slice]:
    """Slices over tokens such that one chunk of dense pre-activations stays near 64 MiB."""
    size = max(1, _CHUNK_ELEMENTS // max(1, d_sae))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of the tensors' dtypes and fp32: what pre-activations and sums are returned in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def pre_activations(x_TD: Tensor, W_SD: Tensor, b_S: Tensor) -> Tensor:
    """Pre-activations `f = x @ W.T + b` of chosen features, accumulated in at least fp32.

    Autocast is switched off inside: it would round the result to bf16 and threshold comparisons with it.

    Args:
        x_TD: Residuals, any float dtype; differentiable.
        W_SD: Rows of `W_enc`.
        b_S: Entries of `b_enc`.

    Returns:
        `(T, S)` in the widest of both dtypes and fp32.
    """
    dtype = result_dtype(x_TD, W_SD)
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        return torch.nn.functional.linear(x_TD.to(dtype), W_SD.to(dtype), b_S.to(dtype))


@torch.no_grad()
def topk_encode(x_TD: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> TopKActs:
    """Exact top k of `x @ W_enc.T + b_enc` per token, then ReLU.

    The order is total: value descending, then index ascending; NaN ranks above every value and stays NaN.

    Args:
        x_TD: Residuals `(T, D)`.
        W_enc: Encoder `(F, D)`, as in the checkpoint.
        b_enc: Encoder bias `(F,)`.
        k: Active features per token, `1 <= k <= F`.

    Returns:
        `TopKActs` with `top_acts (T, K)` and `top_indices (T, K)`. Gradient of `top_acts` with respect to `x`: row
        `W_enc[index]` where the activation is positive, else 0.
    """
    T, F = x_TD.shape[0], W_enc.shape[0]
    acts = torch.zeros(T, k, dtype=result_dtype(x_TD, W_enc), device=x_TD.device)
    indices = torch.zeros(T, k, dtype=torch.int64, device=x_TD.device)
    for rows in token_chunks(T, F):
        f_TF = pre_activations(x_TD[rows], W_enc, b_enc)
        # topk leaves the order among equals open: where the k-th has an equal outside, only a stable sort will do.
        kth = f_TF.topk(k, dim=1, sorted=True).values[:, -1:]
        if bool(((f_TF >= kth).sum(1) > k).any()) or bool(f_TF.isnan().any()):
            values, order = f_TF.sort(dim=1, descending=True, stable=True)
            acts[rows], indices[rows] = values[:, :k], order[:, :k]
            continue
        values, order = f_TF.topk(k, dim=1, sorted=True)
        by_index = order.argsort(dim=1)
        values, order = values.gather(1, by_index), order.gather(1, by_index)
        values, by_value = values.sort(dim=1, descending=True, stable=True)
        acts[rows], indices[rows] = values, order.gather(1, by_value)
    return TopKActs(acts.relu_(), indices)


@torch.no_grad()
def feature_rank(x_TD: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor) -> FeatureActs:
    """Which of the chosen features are active (among the top k and positive) at each token, and with what value.

    Feature s is among the top k exactly if fewer than k features rank above it, in the order of `topk_encode`.

    Args:
        x_TD: Residuals `(T, D)`.
        W_enc: Encoder `(F, D)`.
        b_enc: Encoder bias `(F,)`.
        k: Active features per token.
        features: Chosen indices `(S,)`, int64.

    Returns:
        `FeatureActs`. Gradient of `acts` with respect to `x`: row `W_enc[feature]` where it is active, else 0.
    """
    T, S = x_TD.shape[0], features.numel()
    acts = torch.zeros(T, S, dtype=result_dtype(x_TD, W_enc), device=x_TD.device)
    active = torch.zeros(T, S, dtype=torch.bool, device=x_TD.device)
    positions = torch.arange(W_enc.shape[0], device=x_TD.device)
    for rows in token_chunks(T, W_enc.shape[0]):
        f_TF = pre_activations(x_TD[rows], W_enc, b_enc)
        is_nan = f_TF.isnan()
        for column, feature in enumerate(features.tolist()):
            f_s, nan_s = f_TF[:, feature : feature + 1], is_nan[:, feature : feature + 1]
            equal = ((f_TF == f_s) | (is_nan & nan_s)) & (positions < feature)
            above = (f_TF > f_s) | (is_nan & ~nan_s) | equal
            active[rows, column] = (above.sum(1) < k) & ~(f_s[:, 0] <= 0)
        acts[rows] = torch.where(active[rows], f_TF[:, features], 0)
    return FeatureActs(acts, active)


@torch.no_grad()
def gather_sum(weights_TK: Tensor, indices_TK: Tensor, W_FD: Tensor) -> Tensor:
    """Weighted sum of rows, `out[t] = sum_i weights[t, i] * W[indices[t, i]]`; a weight of 0 takes no part.

    Args:
        weights_TK: Weights.
        indices_TK: Rows of `W`, int64.
        W_FD: Matrix; any strides.

    Returns:
        `(T, D)`, summed in the widest of the dtypes and fp32.
    """
    T, K = indices_TK.shape
    D = W_FD.shape[1]
    dtype = result_dtype(weights_TK, W_FD)
    out = torch.zeros(T, D, dtype=dtype, device=weights_TK.device)
    for rows in token_chunks(T, K * D):
        weights = weights_TK[rows].to(dtype)
        taken = torch.where((weights != 0)[:, :, None], W_FD[indices_TK[rows]].to(dtype), 0)
        out[rows] = torch.bmm(weights[:, None], taken)[:, 0]
    return out


@torch.no_grad()
def gather_dot(x_TD: Tensor, indices_TK: Tensor, W_FD: Tensor) -> Tensor:
    """Products with chosen rows, `out[t, i] = x[t] . W[indices[t, i]]`: the adjoint of `gather_sum`.

    Args:
        x_TD: Vectors.
        indices_TK: Rows of `W`, int64.
        W_FD: Matrix; any strides.

    Returns:
        `(T, K)` in the widest of the dtypes and fp32.
    """
    T, K = indices_TK.shape
    dtype = result_dtype(x_TD, W_FD)
    out = torch.zeros(T, K, dtype=dtype, device=x_TD.device)
    for rows in token_chunks(T, K * W_FD.shape[1]):
        out[rows] = torch.bmm(W_FD[indices_TK[rows]].to(dtype), x_TD[rows].to(dtype)[:, :, None])[:, :, 0]
    return out


@torch.no_grad()
def sparse_decode(acts_TK: Tensor, indices_TK: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction from sparse activations: `x_hat = sum_i acts[:, i] * W_dec[:, indices[:, i]] + b_dec`.

    Args:
        acts_TK: Activations.
        indices_TK: Their features, int64.
        W_dec: Decoder `(D, F)`, as in the checkpoint.
        b_dec: Decoder bias `(D,)`.

    Returns:
        `(T, D)`, at least fp32. Gradient with respect to the activations: the decoder's columns.
    """
    total = gather_sum(acts_TK, indices_TK, W_dec.T)
    return total + b_dec.to(total.dtype)
