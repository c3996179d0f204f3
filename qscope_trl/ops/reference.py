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


def token_chunks(num_tokens: int, d_sae: int) -> list[slice]:
    """Slices over tokens such that one chunk of dense pre-activations stays near 64 MiB."""
    size = max(1, _CHUNK_ELEMENTS // max(1, d_sae))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


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
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, W_SD.dtype), torch.float32)
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        return torch.nn.functional.linear(x_TD.to(dtype), W_SD.to(dtype), b_S.to(dtype))


@torch.no_grad()
def topk_encode(x_TD: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> TopKActs:
    """Exact top k of `x @ W_enc.T + b_enc` per token, then ReLU.

    The order is total: value descending, then index ascending.

    Args:
        x_TD: Residuals `(T, D)`.
        W_enc: Encoder `(F, D)`, as in the checkpoint.
        b_enc: Encoder bias `(F,)`.
        k: Active features per token, `1 <= k <= F`.

    Returns:
        `TopKActs` with `top_acts (T, K)` and `top_indices (T, K)`.
    """
    T, F = x_TD.shape[0], W_enc.shape[0]
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, W_enc.dtype), torch.float32)
    acts = torch.zeros(T, k, dtype=dtype, device=x_TD.device)
    indices = torch.zeros(T, k, dtype=torch.int64, device=x_TD.device)
    for rows in token_chunks(T, F):
        f_TF = pre_activations(x_TD[rows], W_enc, b_enc)
        # A stable descending sort of the k best and their ties: topk alone leaves the order among equals open.
        kth = f_TF.topk(k, dim=1, sorted=True).values[:, -1:]
        if bool(((f_TF >= kth).sum(1) > k).any()):
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
def topk_membership(x_TD: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, features: Tensor) -> Tensor:
    """Which of the chosen features are active (among the top k and positive) at each token.

    Feature s is among the top k exactly if fewer than k features rank above it (value descending, index ascending).

    Args:
        x_TD: Residuals `(T, D)`.
        W_enc: Encoder `(F, D)`.
        b_enc: Encoder bias `(F,)`.
        k: Active features per token.
        features: Chosen indices `(S,)`, int64.

    Returns:
        Boolean `(T, S)`.
    """
    T, F = x_TD.shape[0], W_enc.shape[0]
    active = torch.zeros(T, features.numel(), dtype=torch.bool, device=x_TD.device)
    positions = torch.arange(F, device=x_TD.device)
    for rows in token_chunks(T, F):
        f_TF = pre_activations(x_TD[rows], W_enc, b_enc)
        for column, feature in enumerate(features.tolist()):
            f_s = f_TF[:, feature : feature + 1]
            above = (f_TF > f_s) | ((f_TF == f_s) & (positions < feature))
            active[rows, column] = (above.sum(1) < k) & (f_s[:, 0] > 0)
    return active
