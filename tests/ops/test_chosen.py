"""Pre-activations of chosen features in chunks: the definition's values and gradient, less memory."""

from __future__ import annotations

import pytest
import torch

from qscope_trl.ops import chosen, reference


def problem(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 24, generator=generator).to(dtype).requires_grad_()
    W, b = torch.randn(5, 24, generator=generator), torch.randn(5, generator=generator)
    return x, W, b, torch.randn(2, tokens, 5, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_values_and_gradient_are_the_definitions(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eight tokens a chunk: several, and one that is not full.
    monkeypatch.setattr(chosen, "_CHUNK_ELEMENTS", 8 * 24)
    x, W, b, weights = problem(tokens, dtype)
    found = chosen.pre_activations(x, W, b)
    (grad,) = torch.autograd.grad(found, x, weights.to(found.dtype))
    wanted = reference.pre_activations(x, W, b)
    (grad_wanted,) = torch.autograd.grad(wanted, x, weights.to(found.dtype))
    assert found.dtype == wanted.dtype
    assert grad.dtype == dtype
    # A chunk's matrix product may sum in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, grad_wanted, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=1e-6)


def test_gradient_is_that_of_finite_differences() -> None:
    x, W, b, _ = problem(7, torch.float64)
    leaf = x[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: chosen._PreActivations.apply(x, W.double(), b.double()), leaf)


def test_autocast_does_not_round() -> None:
    x, W, b, _ = problem(7, torch.bfloat16)
    plain = chosen.pre_activations(x, W, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chosen.pre_activations(x, W, b)
        (grad,) = torch.autograd.grad(found.sum(), x)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), x)[0])


class _Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest tensor that any operation returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def test_no_second_copy_of_the_residuals_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "_CHUNK_ELEMENTS", 8 * 24)
    x, W, b, _ = problem(200, torch.bfloat16)
    peaks = []
    for function in (chosen.pre_activations, reference.pre_activations):
        with _Peak() as peak:
            forward = function(x, W, b)
            before = peak.largest
            forward.sum().backward()
        peaks.append((before, peak.largest))
    copy = 2 * 200 * 24 * 4
    # The residuals themselves and their gradient, in their own dtype, are half of a copy in fp32.
    assert peaks[0] == (copy // 2, copy // 2)
    assert peaks[1] == (copy, copy)
