from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qscope_trl.errors import ConfigError, KernelError
from qscope_trl.ops import reference
from qscope_trl.ops import topk_encode as module
from qscope_trl.ops.reference import TopKActs
from qscope_trl.ops.topk_encode import topk_encode
from tests.ops.contract import BACKENDS, assert_contract, exact, problem, use

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend with chunks so small that every problem here crosses borders of features and of tokens."""
    for name, small in (("_SLAB", 4096), ("_CHUNK_FEATURES", 128), ("_TOKENS", 96)):
        monkeypatch.setattr(module, name, {"cpu": small, "cuda": small})
    return use(request.param, monkeypatch)


def encode_and_check(x: Tensor, W: Tensor, b: Tensor, k: int) -> TopKActs:
    result = topk_encode(x, W, b, k)
    assert_contract(result.top_acts, result.top_indices, x, W, b, k)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k"), [(130, 64, 1000, 16), (7, 48, 512, 50), (200, 8, 129, 3)]
)
def test_result_is_the_exact_top_k(
    dtype: torch.dtype, tokens: int, d_model: int, d_sae: int, k: int, device: str
) -> None:
    encode_and_check(*problem(tokens, d_model, d_sae, dtype=dtype, device=device), k)


@pytest.mark.parametrize("tokens", [0, 1, 127, 129])
def test_any_number_of_tokens(tokens: int, device: str) -> None:
    encode_and_check(*problem(tokens, 32, 300, device=device), 8)


@pytest.mark.parametrize("d_model", [1, 7, 33])
def test_width_that_is_no_multiple_of_eight(d_model: int, device: str) -> None:
    encode_and_check(*problem(20, d_model, 300, device=device), 8)


@pytest.mark.parametrize("k", [1, 300])
def test_k_of_one_and_of_all_features(k: int, device: str) -> None:
    encode_and_check(*problem(20, 32, 300, device=device), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_features_are_taken_by_index(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(9, 32, 300, dtype=dtype, device=device)
    W[:], b[:] = W[0], 50.0
    result = encode_and_check(x, W, b, 20)
    assert torch.equal(result.top_indices.cpu(), torch.arange(20).expand(9, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_duplicates_across_chunk_borders_keep_the_lower_index(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(9, 32, 300, dtype=dtype, device=device)
    W[150:], b[150:] = W[:150].clone(), b[:150].clone()
    acts, indices = encode_and_check(x, W, b, 21)
    for row in range(9):
        taken = {int(i) for i, a in zip(indices[row], acts[row], strict=True) if a > 0}
        assert all(i < 150 or i - 150 in taken for i in taken)


def test_rows_without_a_positive_feature_are_zero(device: str) -> None:
    x, W, b = problem(9, 32, 300, device=device)
    b[:] = -1000.0
    assert bool((encode_and_check(x, W, b, 20).top_acts == 0).all())


def test_rows_with_fewer_positive_features_than_k_end_in_zeros(device: str) -> None:
    x, W, b = problem(9, 32, 300, device=device)
    b[:] = -1000.0
    b[[5, 130, 299]] = 1000.0
    acts, indices = encode_and_check(x, W, b, 20)
    assert bool(((acts > 0).sum(1) == 3).all())
    assert torch.equal(indices[:, :3].sort(1).values.cpu(), torch.tensor([5, 130, 299]).expand(9, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", [1, -1])
def test_sorted_features_in_both_directions(dtype: torch.dtype, direction: int, device: str) -> None:
    """Ascending: every feature is better than all before it, so every one of them has to be kept for a while."""
    x, W, b = problem(9, 4, 300, dtype=dtype, device=device)
    x[:], W[:], W[:, 0] = 1.0, 0.0, (direction * torch.arange(-150.0, 150.0) / 8).to(dtype)
    encode_and_check(x, W, torch.zeros_like(b), 20)


def test_nan_comes_first_and_stays(device: str) -> None:
    x, W, b = problem(9, 32, 300, device=device)
    b[[200, 7]] = torch.nan
    acts, indices = topk_encode(x, W, b, 5)
    assert torch.equal(indices[:, :2].cpu(), torch.tensor([7, 200]).expand(9, 2))
    assert bool(acts[:, :2].isnan().all())
    assert bool(acts[:, 2:].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_of_nan_spoils_no_other(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(9, 32, 300, dtype=dtype, device=device)
    clean = topk_encode(x, W, b, 5)
    x[4] = torch.nan
    acts, indices = topk_encode(x, W, b, 5)
    assert bool(acts[4].isnan().all())
    assert torch.equal(indices[4].cpu(), torch.arange(5))
    others = torch.arange(9) != 4
    assert torch.equal(acts[others], clean.top_acts[others])
    assert torch.equal(indices[others], clean.top_indices[others])


def test_infinities_rank_at_the_ends(device: str) -> None:
    x, W, b = problem(9, 32, 300, device=device)
    b[[250, 3]], b[[0, 128]] = torch.inf, -torch.inf
    acts, indices = topk_encode(x, W, b, 300)
    assert torch.equal(indices[:, :2].cpu(), torch.tensor([3, 250]).expand(9, 2))
    assert torch.equal(indices[:, -2:].cpu(), torch.tensor([0, 128]).expand(9, 2))
    assert bool(acts[:, :2].isinf().all())
    assert bool(acts[:, 2:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_need_not_be_contiguous(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(40, 64, 600, dtype=dtype, device=device)
    strided = (x.T.contiguous().T, W.T.contiguous().T, b.repeat_interleave(2)[::2])
    assert not strided[0].is_contiguous()
    encode_and_check(*strided, 8)


def test_leading_dimensions_are_kept(device: str) -> None:
    x, W, b = problem(24, 32, 300, device=device)
    flat, shaped = topk_encode(x, W, b, 8), topk_encode(x.view(2, 3, 4, 32), W, b, 8)
    assert shaped.top_acts.shape == (2, 3, 4, 8)
    assert torch.equal(shaped.top_acts.view(24, 8), flat.top_acts)


def test_runs_agree_to_the_last_bit(device: str) -> None:
    operands = problem(130, 64, 1000, dtype=torch.bfloat16, device=device)
    first, second = (topk_encode(*operands, 16) for _ in range(2))
    assert torch.equal(first.top_acts, second.top_acts)
    assert torch.equal(first.top_indices, second.top_indices)


def test_autocast_changes_nothing(device: str) -> None:
    operands = problem(50, 64, 1000, device=device)
    plain = topk_encode(*operands, 16)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = topk_encode(*operands, 16)
    assert torch.equal(plain.top_acts, cast.top_acts)
    assert torch.equal(plain.top_indices, cast.top_indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_a_dense_fp32_product(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(200, 512, 2000, dtype=dtype, device=device)
    acts, indices = topk_encode(x, W, b, 32)
    f = exact(x, W, b)[0].gather(1, indices).relu()
    dense = torch.nn.functional.linear(x.float(), W.float(), b).gather(1, indices).relu()
    mine, theirs = ((values.double() - f).abs().mean() for values in (acts, dense))
    assert mine <= 2 * theirs


def dense_gradient(x: Tensor, W: Tensor, b: Tensor, k: int, weights: Tensor) -> Tensor:
    """Through torch's own TopK and ReLU in fp64."""
    x = x.double().requires_grad_()
    values = torch.nn.functional.linear(x, W.double(), b.double()).topk(k, dim=1).values.relu()
    (values * weights).sum().backward()
    return x.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_equals_that_of_topk_and_relu(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(50, 64, 1000, dtype=dtype, device=device)
    b -= 2.6  # so that some of the k are not positive
    weights = torch.linspace(-1, 1, 50 * 16, device=device).view(50, 16)
    x.requires_grad_()
    acts, indices = topk_encode(x, W, b, 16)
    assert not indices.requires_grad
    assert bool((acts == 0).any())
    (acts * weights).sum().backward()
    wanted = dense_gradient(x.detach(), W, b, 16, weights.double())
    # The gradient is rounded to the dtype of x; sums of 16 terms in fp32 before that.
    bound = torch.finfo(dtype).eps * wanted.abs() + 1e-5
    assert bool(((x.grad.double() - wanted).abs() <= bound).all())
    assert x.grad.dtype == dtype


def test_gradcheck_and_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    use("torch", monkeypatch)
    x, W, b = (t.double() for t in problem(5, 6, 40))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_encode(x, W, b, 4).top_acts, (x,))
    assert torch.autograd.gradgradcheck(lambda x: topk_encode(x, W, b, 4).top_acts.square(), (x,))


def test_operation_passes_opcheck(device: str) -> None:
    x, W, b = problem(30, 32, 300, device=device)
    torch.library.opcheck(torch.ops.qscope_trl.topk_encode.default, (x, W, b, 8))
    torch.library.opcheck(torch.ops.qscope_trl.topk_encode.default, (x.requires_grad_(), W, b, 8))


def test_compiled_code_holds_it_in_one_graph_for_any_number_of_tokens(device: str) -> None:
    _, W, b = problem(1, 32, 300, device=device)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return topk_encode(x * 2, W, b, 8).top_acts.square().sum()

    for tokens in (5, 9):
        x = problem(tokens, 32, 1, device=device)[0].requires_grad_()
        loss(x).backward()
        eager = x.detach().clone().requires_grad_()
        topk_encode(eager * 2, W, b, 8).top_acts.square().sum().backward()
        torch.testing.assert_close(x.grad, eager.grad)


class _Largest(TorchDispatchMode):
    """The most elements a tensor had that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_as_large_as_all_pre_activations(dtype: torch.dtype, device: str) -> None:
    x, W, b = problem(200, 16, 4000, dtype=dtype, device=device)
    acts, indices = torch.empty(200, 8, device=device), torch.empty(200, 8, dtype=torch.int64, device=device)
    run = module._encode_cuda if device == "cuda" else module._encode_cpu
    topk_encode(x[:1], W, b, 8)
    with _Largest() as largest:
        run(x, W, b, 8, acts, indices)
    assert 0 < largest.numel <= 4000 * 16 < 200 * 4000 / 10
    assert_contract(acts, indices, x, W, b, 8)


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each exact pass took, where the coarse bf16 pass is in use."""
    use("cpu", monkeypatch)
    topk_encode(*problem(1, 8, 20), 1)
    if not torch.ops.qscope_trl_cpu.has_bf16_units():
        pytest.skip("the processor has no bf16 units")
    passes: list[int] = []
    original = module._select_cpu

    def watch(x: Tensor, *args: Any) -> Any:
        if x.dtype == torch.float32:
            passes.append(x.shape[0])
        return original(x, *args)

    monkeypatch.setattr(module, "_select_cpu", watch)
    return passes


def test_coarse_pass_certifies_ordinary_tokens(redone: list[int]) -> None:
    encode_and_check(*problem(100, 128, 4000, dtype=torch.bfloat16), 32)
    assert redone == []


def test_tokens_that_the_coarse_pass_cannot_settle_are_redone_exactly(redone: list[int]) -> None:
    x, W, b = problem(40, 128, 4000, dtype=torch.bfloat16)
    # Features that differ by less than bf16 shows, for some tokens only: all sums are near 1000.
    W[:, 0], x[:, 0] = 10.0, 0.0
    x[5:9, 0] = 100.0
    encode_and_check(x, W, b, 32)
    assert redone == [4]


@pytest.mark.parametrize("bias", [-300.0, 300.0])
def test_the_certificate_knows_that_a_bias_hides_the_size_of_the_product(bias: float, redone: list[int]) -> None:
    """The rounding error belongs to the product, however small bias and product together are."""
    x, W, b = problem(40, 128, 4000, dtype=torch.bfloat16)
    W[:, 0], x[:, 0] = -bias / 10, 10.0
    encode_and_check(x, W, b + bias, 32)
    assert redone == [40]


def test_threads_may_encode_at_once(device: str) -> None:
    operands = problem(64, 32, 600, device=device)
    wanted = topk_encode(*operands, 8)
    results: list[TopKActs] = []
    threads = [threading.Thread(target=lambda: results.append(topk_encode(*operands, 8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(r.top_acts, wanted.top_acts) for r in results)


@pytest.mark.gpu
def test_streams_may_encode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = use("cuda", monkeypatch)
    operands = problem(2000, 256, 8192, dtype=torch.bfloat16, device=device)
    wanted = topk_encode(*operands, 32)
    torch.cuda.synchronize()
    results = []
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(topk_encode(*operands, 32))
    torch.cuda.synchronize()
    assert all(torch.equal(r.top_acts, wanted.top_acts) for r in results)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    device = use("cuda", monkeypatch)
    x, W, b = problem(500, 256, 8192, dtype=torch.bfloat16, device=device)
    topk_encode(x, W, b, 32)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        acts, indices = topk_encode(x, W, b, 32)
    x.copy_(problem(500, 256, 1, dtype=torch.bfloat16, device=device, seed=7)[0])
    graph.replay()
    torch.cuda.synchronize()
    assert_contract(acts, indices, x, W, b, 32)


def test_reference_agrees_with_a_stable_sort() -> None:
    x, W, b = problem(50, 4, 200)
    W = W.round()
    x = x.round()
    f = reference.pre_activations(x, W, b.round())
    values, order = f.sort(dim=1, descending=True, stable=True)
    acts, indices = reference.topk_encode(x, W, b.round(), 30)
    assert torch.equal(indices, order[:, :30])
    assert torch.equal(acts, values[:, :30].relu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"`x` is \(3, 5\), `W_enc` \(20, 4\) and `b_enc` \(20,\)"),
        ({"b": torch.zeros(4)}, r"expected `\(\.\.\., d_model\)`, `\(d_sae, d_model\)` and `\(d_sae,\)`"),
        ({"k": 21}, r"`k=21` is outside 1 to `d_sae=20`"),
        ({"k": 0}, r"`k=0` is outside 1"),
        ({"b": torch.zeros(20, device="meta")}, r"Move them to one device"),
        ({"W": torch.zeros(20, 4, requires_grad=True)}, r"SAEs are frozen here"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(3, 4), "W": torch.zeros(20, 4), "b": torch.zeros(20), "k": 2, **change}
    with pytest.raises(ConfigError, match=message):
        topk_encode(*given.values())


@pytest.mark.parametrize(
    ("kernel", "dtype", "message"),
    [
        ("cuda", torch.float32, r"`QSCOPE_TRL_KERNEL=cuda` cannot be followed: the tensors are on `cpu`"),
        (
            "cpu",
            torch.float64,
            r"`QSCOPE_TRL_KERNEL=cpu` cannot be followed: the kernels take fp32, bf16 and fp16, not",
        ),
    ],
)
def test_a_kernel_that_was_asked_for_and_cannot_run_raises(
    kernel: str, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(kernel, monkeypatch)
    x, W, b = problem(3, 4, 20)
    with pytest.raises(KernelError, match=message):
        topk_encode(x.to(dtype), W.to(dtype), b, 2)


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSCOPE_TRL_KERNEL", "triton")
    with pytest.raises(ConfigError, match=r"is 'triton'; choose one of auto, cuda, cpu, torch"):
        topk_encode(*problem(3, 4, 20), 2)


def test_automatic_choice_takes_plain_torch_for_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSCOPE_TRL_KERNEL", "auto")
    x, W, b = (t.double() for t in problem(3, 4, 20))
    assert topk_encode(x, W, b, 2).top_acts.dtype == torch.float64
