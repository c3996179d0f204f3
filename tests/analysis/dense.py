"""An SAE in numpy, fp64 and dense, sharing nothing with the package: what its figures are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qscope_trl.sae.topk_sae import TopKSAE
from tests.tiny import D_MODEL, K, random_sae

N = 40
"""Tokens."""


def make_sae(**changes: Any) -> TopKSAE:
    return TopKSAE(**{**random_sae(3), "k": K, **changes})


def residuals(seed: int = 0, count: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D_MODEL, generator=generator) + torch.randn(D_MODEL, generator=generator)


def dense(sae: TopKSAE, x: torch.Tensor, *, k: int | None = None, relu: bool = True, bias: Any = None) -> np.ndarray:
    """Activations `(N, d_sae)` in fp64, nothing shared with the package: sort, keep k, cut at 0."""
    f = x.double().numpy() @ sae.W_enc.double().numpy().T + sae.b_enc.double().numpy()
    if bias is not None:
        f = f + sae.W_enc.double().numpy() @ bias
    if sae.activation == "relu":
        return np.maximum(f, 0)
    if sae.activation == "jumprelu":
        return np.maximum(f, 0) * (f > sae.jump.double().numpy())
    k = k or sae.k
    kept = np.zeros_like(f)
    for row, values in enumerate(f):
        for index in np.argsort(-values, kind="stable")[:k]:
            kept[row, index] = max(values[index], 0) if relu else values[index]
    return kept


def decoded(sae: TopKSAE, acts: np.ndarray) -> np.ndarray:
    return acts @ sae.W_dec.double().numpy().T + sae.b_dec.double().numpy()


def unexplained(x: np.ndarray, x_hat: np.ndarray, about: np.ndarray | None = None) -> float:
    about = x.mean(0) if about is None else about
    return float(((x - x_hat) ** 2).sum() / ((x - about) ** 2).sum())
