"""The Top-K encoder: exact top k features per token without ever holding their `(T, d_sae)` pre-activations.

A matrix product fills a slab for a chunk of features; a kernel reads the slab once while it is in cache, and keeps of
each token what is still among its best k. `reference.topk_encode` says what is computed. On a CPU with bf16 units,
bf16 inputs take a coarse bf16 product whose best candidates are rescored in fp32, with a certificate per token; a
token without one is redone in fp32.

Shape legend: `T` tokens, `D` d_model, `F` d_sae, `K` active features per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qscope_trl.errors import ConfigError
from qscope_trl.ops import backend, reference
from qscope_trl.ops.reference import TopKActs
from qscope_trl.ops.sparse import gather_sum

# fp32 elements of a slab: 32 MiB stay in the second-level cache of an A100 or H100; on a CPU 2 MiB near the cores.
_SLAB = {"cuda": 8 * 1024 * 1024, "cpu": 512 * 1024}
_CHUNK_FEATURES = {"cuda": 4096, "cpu": 1024}
# Tokens whose running selection is kept at a time.
_TOKENS = {"cuda": 32768, "cpu": 4096}
# Rounding a fp32 sum to bf16 moves it by at most 2^-9 of its size; twice that also covers the sum's own rounding.
_BF16_ERROR = 2.0**-8


@torch.library.custom_op(
    "qscope_trl::topk_encode",
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, int k) -> (Tensor, Tensor)",
)
def _topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    kernel = backend.choose((x, W_enc), k)
    if kernel == "torch" or x.shape[0] == 0:
        dense = reference.topk_encode(x, W_enc, b_enc, k)
        return dense.top_acts, dense.top_indices
    acts = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    run = _encode_cuda if kernel == "cuda" else _encode_cpu
    with torch.autocast(device_type=x.device.type, enabled=False), torch.no_grad():
        for start in range(0, x.shape[0], _TOKENS[kernel]):
            rows = slice(start, start + _TOKENS[kernel])
            run(x[rows], W_enc, b_enc.float().contiguous(), k, acts[rows], indices[rows])
    return acts, indices


@_topk_encode.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=reference.result_dtype(x, W_enc)), x.new_empty(shape, dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, _, _ = inputs
    acts, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(acts > 0, indices, W_enc)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad_acts: Tensor, _grad_indices: Tensor) -> tuple[Tensor | None, ...]:
    positive, indices, W_enc = ctx.saved_tensors
    weights = torch.where(positive, grad_acts, 0)
    return gather_sum(weights, indices, W_enc).to(ctx.dtype), None, None, None


_topk_encode.register_autograd(_backward, setup_context=_keep)


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> TopKActs:
    """Exact top k of `x @ W_enc.T + b_enc` per token, then ReLU; differentiable in `x`.

    Pre-activations are accumulated in fp32 whatever the dtypes, also under autocast; the order is value descending,
    then index ascending; NaN comes first and stays. The same inputs give the same bits in every run of one backend.
    Not guaranteed: the same last bits from different backends or processors, and so, for features whose values at the
    k-th place differ by rounding alone, the same one of them.

    Args:
        x: Residuals `(..., D)`: fp32, bf16 or fp16 (fp64 in plain torch).
        W_enc: Encoder `(F, D)`, frozen. A checkpoint's fp32 weights cast to bf16 are other weights: fp32 is exact,
            bf16 faster.
        b_enc: Encoder bias `(F,)`, frozen.
        k: Active features per token, 1 to `F`; above 1024, CUDA falls back to plain torch.

    Returns:
        `top_acts (..., K)`, at least fp32, and `top_indices (..., K)`, int64. The gradient reaches `x` through
        selected features with a positive pre-activation, as through `torch.topk` and ReLU.

    Raises:
        ConfigError: If shapes, devices or `k` do not fit, or the encoder requires a gradient.
        KernelError: If `QSCOPE_TRL_KERNEL` names a backend that cannot run here.
    """
    check_operands(x, W_enc, b_enc, k)
    acts, indices = _topk_encode(x.reshape(-1, x.shape[-1]), W_enc, b_enc, k)
    return TopKActs(acts.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))


def check_operands(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> None:
    """Raise `ConfigError` unless the operands of an encoder fit each other."""
    if W_enc.dim() != 2 or x.shape[-1] != W_enc.shape[1] or b_enc.shape != W_enc.shape[:1]:
        raise ConfigError(
            f"`x` is {tuple(x.shape)}, `W_enc` {tuple(W_enc.shape)} and `b_enc` {tuple(b_enc.shape)}; expected "
            f"`(..., d_model)`, `(d_sae, d_model)` and `(d_sae,)`."
        )
    if not 1 <= k <= W_enc.shape[0]:
        raise ConfigError(f"`k={k}` is outside 1 to `d_sae={W_enc.shape[0]}`, the number of features there are.")
    if not (x.device == W_enc.device == b_enc.device):
        raise ConfigError(
            f"`x` is on `{x.device}`, `W_enc` on `{W_enc.device}` and `b_enc` on `{b_enc.device}`. Move them to one "
            f"device."
        )
    if torch.is_grad_enabled() and (W_enc.requires_grad or b_enc.requires_grad):
        raise ConfigError(
            "`W_enc` or `b_enc` requires a gradient, and encoding gives none: SAEs are frozen here. Detach them."
        )


def feature_chunks(kernel: str, num_tokens: int, W_enc: Tensor) -> Iterator[slice]:
    """Chunks of features whose slab, and whose fp32 copy of the weights, stay small."""
    F, D = W_enc.shape
    size = max(_CHUNK_FEATURES[kernel], _SLAB[kernel] // max(1, num_tokens))
    if kernel == "cpu" and W_enc.dtype != torch.float32:
        size = min(size, max(256, 8 * _SLAB[kernel] // D))
    return (slice(start, min(start + size, F)) for start in range(0, F, size))


def token_blocks(kernel: str, num_tokens: int, num_features: int) -> list[slice]:
    """Blocks of tokens whose slab with so many features stays small."""
    size = max(1, _SLAB[kernel] // num_features)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def product_dtype(kernel: str, x: Tensor, W_enc: Tensor) -> torch.dtype:
    """What both operands of the matrix product are cast to; it accumulates in fp32 in any case."""
    return x.dtype if kernel == "cuda" and x.dtype == W_enc.dtype else torch.float32


def fill_slab(slab: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """`x @ W.T` in fp32, in the slab's memory."""
    view = slab[: x.shape[0] * W.shape[0]].view(x.shape[0], W.shape[0])
    if x.dtype == torch.float32:
        return torch.mm(x, W.T, out=view)
    return torch.mm(x, W.T, out_dtype=torch.float32, out=view)


def _encode_cuda(x: Tensor, W: Tensor, b: Tensor, k: int, acts: Tensor, indices: Tensor) -> None:
    ops = torch.ops.qscope_trl_cuda
    T = x.shape[0]
    dtype = product_dtype("cuda", x, W)
    x = x.to(dtype)
    with backend.on_device(x):
        keys = torch.zeros(T, k, dtype=torch.int64, device=x.device)
        slab = torch.empty(_SLAB["cuda"], dtype=torch.float32, device=x.device)
        for chunk in feature_chunks("cuda", T, W):
            W_chunk, b_chunk = W[chunk].to(dtype), b[chunk]
            for rows in token_blocks("cuda", T, W_chunk.shape[0]):
                ops.select_chunk(fill_slab(slab, x[rows], W_chunk), b_chunk, chunk.start, keys[rows], k)
        ops.finish(keys, acts, indices)


def _encode_cpu(x: Tensor, W: Tensor, b: Tensor, k: int, acts: Tensor, indices: Tensor) -> None:
    # Half as many candidates again: at the k-th place a few features differ by less than bf16 shows.
    kept = min(W.shape[0], k + max(16, k // 2))
    is_coarse = x.dtype == W.dtype == torch.bfloat16 and torch.ops.qscope_trl_cpu.has_bf16_units()
    if not is_coarse:
        keys, counts = _select_cpu(x.float(), W, b, k)
        torch.ops.qscope_trl_cpu.finish(keys, counts, k, acts, indices)
        return
    keys, counts = _select_cpu(x, W, b, kept)
    certain = torch.empty(x.shape[0], dtype=torch.bool)
    torch.ops.qscope_trl_cpu.rescore(
        x.contiguous(),
        W.contiguous(),
        b,
        float(b.min()),
        float(b.max()),
        _BF16_ERROR,
        keys,
        counts,
        kept,
        k,
        acts,
        indices,
        certain,
    )
    if not bool(certain.all()):
        again = (~certain).nonzero()[:, 0]
        redone, places = acts.new_empty(again.numel(), k), indices.new_empty(again.numel(), k)
        keys, counts = _select_cpu(x[again].float(), W, b, k)
        torch.ops.qscope_trl_cpu.finish(keys, counts, k, redone, places)
        acts[again], indices[again] = redone, places


def _select_cpu(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k keys of each token, unordered, and their number; in the dtype of `x`: fp32, or bf16 coarsely."""
    T = x.shape[0]
    # Room to collect as many again before sorting out.
    keys = torch.empty(T, 2 * k + 16, dtype=torch.int64)
    counts, floors = torch.zeros(T, dtype=torch.int32), torch.zeros(T, dtype=torch.int64)
    slab = torch.empty(max(_SLAB["cpu"], _CHUNK_FEATURES["cpu"]), dtype=x.dtype)
    for chunk in feature_chunks("cpu", T, W):
        W_chunk, b_chunk = W[chunk].to(x.dtype), b[chunk]
        for rows in token_blocks("cpu", T, W_chunk.shape[0]):
            view = slab[: (rows.stop - rows.start) * W_chunk.shape[0]].view(-1, W_chunk.shape[0])
            torch.mm(x[rows], W_chunk.T, out=view)
            torch.ops.qscope_trl_cpu.select_chunk(
                view, b_chunk, chunk.start, keys[rows], counts[rows], floors[rows], k
            )
    return keys, counts
