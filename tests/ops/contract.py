"""What an exact top-k encoder owes, checked against fp64 on the same inputs, with tolerances arithmetic implies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qscope_trl.ops import backend, build

BACKENDS = ["torch", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def use(kernel: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Switch to a backend; returns the device its tensors are on."""
    if kernel == "cpu" and build.find_compiler("cpu") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(backend.SWITCH, kernel)
    return "cuda" if kernel == "cuda" else "cpu"


def problem(
    tokens: int, d_model: int, d_sae: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals, encoder and bias with as many positive as negative pre-activations."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=generator)
    W = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5
    b = torch.randn(d_sae, generator=generator) / 4
    return x.to(device, dtype), W.to(device, dtype), b.to(device)


def exact(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations in fp64, and how far a fp32 sum of these terms, in any order, may lie from them."""
    x, W, b = x.double(), W.double(), b.double()
    size = x.abs() @ W.abs().T + b.abs()
    return x @ W.T + b, (x.shape[1] + 1) * 2.0**-24 * size


def assert_contract(acts: Tensor, indices: Tensor, x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    """Raise unless the result is the exact top k, rectified and in order, as far as fp32 sums can tell."""
    T = x.shape[0]
    assert acts.shape == indices.shape == (T, k)
    assert acts.dtype == torch.float32
    assert indices.dtype == torch.int64
    if T == 0:
        return
    f, tolerance = exact(x, W, b)
    values, allowed = f.gather(1, indices), tolerance.gather(1, indices)
    ordered = indices.sort(dim=1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all()), "a feature is returned twice"
    assert bool(((acts.double() - values.relu()).abs() <= allowed).all()), "a value is off"
    kth = f.topk(k, dim=1).values[:, -1:]
    assert bool((values >= kth - allowed - tolerance.amax(1, keepdim=True)).all()), "a larger feature was missed"
    falling = acts[:, 1:] < acts[:, :-1]
    # Zeros hide what they were before ReLU, so only positive equals show the order of indices.
    tied = (acts[:, 1:] == acts[:, :-1]) & ((indices[:, 1:] > indices[:, :-1]) | (acts[:, 1:] == 0))
    assert bool((falling | tied).all()), "the order is not value descending, index ascending"
