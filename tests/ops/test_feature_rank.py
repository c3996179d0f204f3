from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qscope_trl.errors import ConfigError
from qscope_trl.ops import feature_rank as module
from qscope_trl.ops import topk_encode as encoder
from qscope_trl.ops.feature_rank import count_above, feature_rank
from qscope_trl.ops.topk_encode import topk_encode
from tests.ops.contract import BACKENDS, exact, problem, use

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend with chunks so small that every problem here crosses borders of features and of tokens."""
    for name, small in (("_SLAB", 4096), ("_CHUNK_FEATURES", 128)):
        monkeypatch.setattr(encoder, name, {"cpu": small, "cuda": small})
    return use(request.param, monkeypatch)


def rank_and_check(x: Tensor, W: Tensor, b: Tensor, k: int, features: list[int]) -> tuple[Tensor, Tensor]:
    """Raise unless the answer is that of fp64, as far as fp32 sums can tell."""
    index = torch.tensor(features, dtype=torch.int64, device=x.device)
    acts, active = feature_rank(x, W, b, k, index)
    f, tolerance = exact(x, W, b)
    kth = f.topk(k, dim=1).values[:, -1:]
    slack = tolerance.amax(1, keepdim=True) + tolerance[:, index]
    values = f[:, index]
    assert bool((~active | ((values >= kth - slack) & (values >= -slack))).all()), "active, but it should not be"
    assert bool((active | (values <= kth + slack) | (values <= slack)).all()), "it should be active"
    wanted = torch.where(active, values, 0)
    assert bool(((acts.double() - wanted).abs() <= tolerance[:, index]).all())
    return acts, active


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_features_are_active_exactly_if_they_are_among_the_top_k(dtype: torch.dtype, device: str) -> None:
    operands = problem(150, 16, 1000, dtype=dtype, device=device)
    _, active = rank_and_check(*operands, 64, list(range(0, 1000, 37)))
    assert 0 < int(active.sum()) < active.numel()


@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_any_number_of_tokens(tokens: int, device: str) -> None:
    rank_and_check(*problem(tokens, 16, 300, device=device), 20, [5, 299])


def test_no_feature_and_all_features(device: str) -> None:
    operands = problem(20, 16, 300, device=device)
    assert rank_and_check(*operands, 20, [])[0].shape == (20, 0)
    rank_and_check(*operands, 20, list(range(300)))


@pytest.mark.parametrize("k", [1, 300])
def test_k_of_one_and_of_all_features(k: int, device: str) -> None:
    rank_and_check(*problem(20, 16, 300, device=device), k, [0, 150, 299])


def test_equal_features_are_ranked_by_index(device: str) -> None:
    x, W, b = problem(9, 16, 300, device=device)
    W[:], b[:] = W[0], 50.0
    _, active = rank_and_check(x, W, b, 150, [0, 149, 150, 299])
    assert torch.equal(active.cpu(), torch.tensor([True, True, False, False]).expand(9, 4))


def test_nan_ranks_above_everything(device: str) -> None:
    x, W, b = problem(9, 16, 300, device=device)
    b[[7, 200]] = torch.nan
    acts, active = feature_rank(x, W, b, 2, torch.tensor([200, 7, 3], device=device))
    assert torch.equal(active.cpu(), torch.tensor([True, True, False]).expand(9, 3))
    assert bool(acts[:, :2].isnan().all())


def test_operands_need_not_be_contiguous(device: str) -> None:
    x, W, b = problem(40, 16, 300, device=device)
    features = torch.arange(60, device=device)
    wanted = feature_rank(x, W, b, 40, features[::2].clone())
    strided = feature_rank(x.T.contiguous().T, W.T.contiguous().T, b.repeat_interleave(2)[::2], 40, features[::2])
    torch.testing.assert_close(strided.acts, wanted.acts, rtol=1e-5, atol=1e-5)
    assert int(wanted.active.sum()) > 0


def test_agrees_with_the_encoder(device: str) -> None:
    x, W, b = problem(150, 16, 1000, device=device)
    encoded = topk_encode(x, W, b, 64)
    dense = torch.zeros(150, 1000, device=device).scatter_(1, encoded.top_indices, encoded.top_acts)
    features = torch.arange(0, 1000, 7, device=device)
    acts, active = feature_rank(x, W, b, 64, features)
    torch.testing.assert_close(acts, dense[:, features], rtol=1e-5, atol=1e-5)
    assert torch.equal(active, dense[:, features] > 0)


def test_gradient_flows_through_active_features_alone(device: str) -> None:
    x, W, b = problem(50, 16, 300, device=device)
    features = torch.arange(0, 300, 11, device=device)
    x.requires_grad_()
    acts, active = feature_rank(x, W, b, 60, features)
    weights = torch.linspace(-1, 1, acts.numel(), device=device).view_as(acts)
    (acts * weights).sum().backward()
    torch.testing.assert_close(x.grad, (weights * active) @ W[features], rtol=1e-5, atol=1e-5)
    assert not active.requires_grad


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    use("torch", monkeypatch)
    x, W, b = (t.double() for t in problem(5, 6, 40))
    features = torch.tensor([3, 8, 20])
    assert torch.autograd.gradcheck(lambda x: feature_rank(x, W, b, 12, features).acts, (x.requires_grad_(),))


def test_operation_passes_opcheck(device: str) -> None:
    x, W, b = problem(30, 16, 300, device=device)
    features = torch.tensor([3, 8, 20], device=device)
    torch.library.opcheck(torch.ops.qscope_trl.feature_rank.default, (x.requires_grad_(), W, b, 60, features))


def test_compiled_code_holds_it_in_one_graph(device: str) -> None:
    x, W, b = problem(9, 16, 300, device=device)
    features = torch.tensor([3, 8, 20], device=device)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return feature_rank(x * 2, W, b, 60, features).acts.square().sum()

    loss(x.requires_grad_()).backward()
    eager = x.detach().clone().requires_grad_()
    feature_rank(eager * 2, W, b, 60, features).acts.square().sum().backward()
    torch.testing.assert_close(x.grad, eager.grad)


def test_work_stops_once_every_token_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    use("cpu", monkeypatch)
    monkeypatch.setattr(encoder, "_SLAB", {"cpu": 4096})
    monkeypatch.setattr(encoder, "_CHUNK_FEATURES", {"cpu": 128})
    x, W, b = problem(50, 16, 4000)
    features = torch.tensor([1, 2, 3])
    assert feature_rank(x, W, b, 8, features).acts.shape == (50, 3)
    off = b.clone()
    off[features] = -1000.0
    assert count_above("cpu", x, W, off, 8, features)[2] == 50 * 3
    rare = count_above("cpu", x, W, b, 8, features)[2]
    assert 50 * 3 < rare < 50 * 4000 / 4
    # Far above all others: every other feature has to be seen.
    on = b.clone()
    on[features] = 1000.0
    assert count_above("cpu", x, W, on, 8, features)[2] == 50 * 3 + 50 * 4000


def test_features_of_another_kind_are_refused() -> None:
    x, W, b = problem(3, 4, 20)
    with pytest.raises(ConfigError, match=r"`features` is torch.float32 \(2,\); expected int64 indices"):
        feature_rank(x, W, b, 2, torch.tensor([1.0, 2.0]))
    for index in (-1, 20):
        with pytest.raises(ConfigError, match=rf"Feature {index} does not exist; the encoder has features 0 to 19"):
            feature_rank(x, W, b, 2, torch.tensor([3, index]))
    with pytest.raises(ConfigError, match=r"`k=21` is outside 1 to `d_sae=20`"):
        module.feature_rank(x, W, b, 21, torch.tensor([1]))
