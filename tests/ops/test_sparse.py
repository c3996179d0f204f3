from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qscope_trl.ops import reference
from qscope_trl.ops import sparse as module
from qscope_trl.ops.sparse import gather_dot, gather_sum, sparse_decode
from tests.ops.contract import BACKENDS, use

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(request.param, monkeypatch)


def operands(
    tokens: int = 13, k: int = 6, rows: int = 40, width: int = 33, *, dtype: torch.dtype = torch.float32, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(tokens, k, generator=generator)
    weights[:, ::3] = 0
    indices = torch.randint(rows, (tokens, k), generator=generator)
    W = torch.randn(rows, width, generator=generator)
    return weights.to(device), indices.to(device), W.to(device, dtype)


def dense(weights: Tensor, indices: Tensor, rows: int) -> Tensor:
    return torch.zeros(weights.shape[0], rows, dtype=torch.float64).scatter_add_(
        1, indices.cpu(), weights.detach().cpu().double()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 33, 1000])
def test_gather_sum_is_the_product_with_a_sparse_matrix(dtype: torch.dtype, width: int, device: str) -> None:
    weights, indices, W = operands(width=width, dtype=dtype, device=device)
    out = gather_sum(weights, indices, W)
    assert out.dtype == torch.float32
    # Six terms summed in fp32.
    torch.testing.assert_close(
        out.cpu().double(), dense(weights, indices, 40) @ W.cpu().double(), rtol=1e-6, atol=1e-5
    )


def test_a_weight_of_zero_keeps_a_row_of_nan_out(device: str) -> None:
    weights, indices, W = operands(device=device)
    indices[:, 0], weights[:, 0] = 39, 0
    indices[:, 1:] = indices[:, 1:] % 39
    W[39] = torch.nan
    assert bool(gather_sum(weights, indices, W).isfinite().all())


def test_no_token_and_rows_that_are_not_contiguous(device: str) -> None:
    weights, indices, W = operands(device=device)
    assert gather_sum(weights[:0], indices[:0], W).shape == (0, 33)
    strided = W.T.contiguous().T
    assert torch.equal(gather_sum(weights, indices, strided), gather_sum(weights, indices, W))


def test_a_row_outside_the_matrix_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = use("cpu", monkeypatch)
    weights, indices, W = operands(device=device)
    indices[3, 1] = 40
    with pytest.raises(RuntimeError, match="an index is outside the matrix"):
        gather_sum(weights, indices, W)


def test_gather_dot_is_the_adjoint_of_gather_sum(device: str) -> None:
    weights, indices, W = operands(device=device)
    x = torch.randn(13, 33, generator=torch.Generator().manual_seed(1)).to(device)
    left = (gather_sum(weights, indices, W) * x).sum()
    right = (weights * gather_dot(x, indices, W)).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 60])
def test_decoding_is_the_dense_product(
    tokens: int, dtype: torch.dtype, layout: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40 * 5)
    acts, indices, rows = operands(tokens, dtype=dtype, device=device)
    W_dec = rows.T if layout == "rows" else rows.T.contiguous()
    b_dec = torch.linspace(-1, 1, 33, device=device)
    wanted = dense(acts, indices, 40) @ rows.cpu().double() + b_dec.cpu().double()
    got = sparse_decode(acts, indices, W_dec, b_dec)
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-6, atol=1e-5)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    use("torch", monkeypatch)
    weights, indices, W = operands(4, 3, 9, 5, device="cpu")
    weights, W = weights.double().requires_grad_(), W.double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(5, dtype=torch.float64)
    for function, operand in (
        (lambda w: gather_sum(w, indices, W), weights),
        (lambda x: gather_dot(x, indices, W), x),
        (lambda w: sparse_decode(w, indices, W.T, bias), weights),
    ):
        assert torch.autograd.gradcheck(function, (operand,))
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v).square(), (operand,))


def test_gradient_of_decoding_is_the_decoders_columns(device: str) -> None:
    acts, indices, rows = operands(device=device)
    acts.requires_grad_()
    sparse_decode(acts, indices, rows.T, torch.zeros(33, device=device)).sum().backward()
    torch.testing.assert_close(acts.grad, rows.sum(1)[indices], rtol=1e-5, atol=1e-5)


def test_operations_pass_opcheck(device: str) -> None:
    weights, indices, W = operands(device=device)
    x = torch.randn(13, 33).to(device)
    ops = torch.ops.qscope_trl
    torch.library.opcheck(ops.gather_sum.default, (weights.requires_grad_(), indices, W))
    torch.library.opcheck(ops.gather_dot.default, (x.requires_grad_(), indices, W))
    torch.library.opcheck(ops.sparse_decode.default, (weights, indices, W.T, torch.zeros(33, device=device)))


def test_runs_agree_to_the_last_bit(device: str) -> None:
    weights, indices, W = operands(200, 30, 500, 257, device=device)
    assert torch.equal(gather_sum(weights, indices, W), gather_sum(weights, indices, W))


def test_reference_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, indices, W = operands(device="cpu")
    whole = reference.gather_sum(weights, indices, W)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 6 * 33 * 2)
    torch.testing.assert_close(reference.gather_sum(weights, indices, W), whole, rtol=1e-6, atol=1e-6)
