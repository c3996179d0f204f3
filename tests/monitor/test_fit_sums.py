"""Every figure of an SAE's fit against a dense computation in numpy, fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from qscope_trl.monitor.fit_sums import FitSums, codes, jaccard, join, sparse, value_error
from qscope_trl.ops.reference import TopKActs
from qscope_trl.sae.topk_sae import TopKSAE
from tests.analysis.dense import N, decoded, dense, make_sae, residuals, unexplained
from tests.tiny import D_SAE, K, random_sae


def summed(sae: TopKSAE, x: torch.Tensor, pieces: int = 1) -> FitSums:
    sums = FitSums(sae)
    for part in x.chunk(pieces):
        acts = codes(sae, part)
        sums.update(part, acts, sae.decode(acts))
    return sums


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_sums_equal_the_dense_computation(activation: str, pieces: int) -> None:
    # A bias of -2.5 leaves many tokens with fewer than k positive pre-activations.
    changes: dict[str, Any] = {"b_enc": random_sae(3)["b_enc"] - 2.5, "activation": activation}
    if activation != "topk":
        changes["k"] = None
    if activation == "jumprelu":
        changes["jump"] = torch.full((D_SAE,), 0.3)
    sae, x = make_sae(**changes), residuals()
    sums = summed(sae, x, pieces)
    acts, wide = dense(sae, x), x.double().numpy()
    x_hat = decoded(sae, acts)
    norms, norms_hat = np.linalg.norm(wide, axis=1), np.linalg.norm(x_hat, axis=1)
    active = (acts > 0).sum(1)
    assert sums.num_tokens == N
    assert sums.fvu() == pytest.approx(unexplained(wide, x_hat), rel=1e-5)
    assert sums.cosine == pytest.approx(((wide * x_hat).sum(1) / norms / norms_hat).mean(), rel=1e-5)
    assert sums.l0 == pytest.approx(active.mean(), rel=1e-12)
    assert active.min() < active.max()
    assert sums.silent_share == pytest.approx((acts == 0).all(0).mean(), rel=1e-12)
    assert 0 < sums.silent_share < 1
    assert sums.norm_ratio == pytest.approx(norms_hat.mean() / norms.mean(), rel=1e-5)
    assert np.array_equal(sums.fired_F.numpy(), (acts > 0).sum(0))
    short = (active < K).mean() if activation == "topk" else 0.0
    assert sums.short_share == pytest.approx(short, rel=1e-12)
    assert (short > 0) == (activation == "topk")


def test_variance_is_taken_about_any_point_that_is_given() -> None:
    sae, x, point = make_sae(), residuals(), residuals(1)[0].double()
    x_hat = decoded(sae, dense(sae, x))
    wanted = unexplained(x.double().numpy(), x_hat, point.numpy())
    assert summed(sae, x).fvu(point) == pytest.approx(wanted, rel=1e-5)


def test_merged_sums_are_those_of_all_tokens() -> None:
    sae, x = make_sae(), residuals()
    both, whole = summed(sae, x[:9]).merged(summed(sae, x[9:])), summed(sae, x)
    for name in ("num_tokens", "cosine", "l0", "short_share", "silent_share", "norm_ratio"):
        assert getattr(both, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert both.fvu() == pytest.approx(whole.fvu(), rel=1e-9)
    assert torch.allclose(both.mean_D, x.double().mean(0))


def test_nothing_is_explained_where_nothing_varies() -> None:
    sae = make_sae()
    assert math.isnan(summed(sae, residuals(count=1).repeat(5, 1)).fvu())
    empty = FitSums(sae)
    assert all(math.isnan(value) for value in (empty.fvu(), empty.cosine, empty.l0, empty.norm_ratio))


def sets(*rows: dict[int, float], width: int = 4) -> TopKActs:
    """Codes from mappings of feature to activation; unused slots repeat feature 0 with activation 0."""
    padded = [[*row.items(), *[(0, 0.0)] * (width - len(row))] for row in rows]
    return TopKActs(
        torch.tensor([[value for _, value in row] for row in padded]),
        torch.tensor([[index for index, _ in row] for row in padded]),
    )


def test_jaccard_compares_sets_of_active_features() -> None:
    first = sets({1: 1.0, 2: 1.0, 3: 0.5}, {5: 1.0}, {}, {7: 2.0, 0: 1.0}, {})
    second = sets({3: 9.0, 2: 1.0, 8: 1.0}, {6: 1.0}, {}, {0: 3.0, 7: 1.0}, {4: 1.0}, width=3)
    assert jaccard(first, second).tolist() == [2 / 4, 0.0, 1.0, 1.0, 0.0]
    assert jaccard(second, first).tolist() == jaccard(first, second).tolist()


def test_jaccard_of_real_codes_equals_pythons_sets() -> None:
    sae, x = make_sae(), residuals()
    near = x + 0.3 * residuals(5)
    wanted = []
    for one, two in zip(dense(sae, x), dense(sae, near), strict=True):
        mine, theirs = set(np.flatnonzero(one)), set(np.flatnonzero(two))
        wanted.append(len(mine & theirs) / len(mine | theirs))
    assert jaccard(codes(sae, x), codes(sae, near)).tolist() == pytest.approx(wanted, rel=1e-12)
    assert 0.1 < np.mean(wanted) < 0.9


def test_value_error_is_relative_and_over_features_active_in_both() -> None:
    first, second = sets({1: 2.0, 2: 1.0}, {3: 4.0}), sets({1: 3.0, 5: 7.0}, {3: 3.0})
    assert value_error(first, second) == pytest.approx((0.5 + 0.25) / 2)
    assert math.isnan(value_error(sets({1: 1.0}), sets({2: 1.0})))


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_codes_of_other_activations_hold_exactly_the_active_features(activation: str) -> None:
    jump = torch.full((D_SAE,), 0.5) if activation == "jumprelu" else None
    sae = make_sae(k=None, activation=activation, jump=jump)
    acts, x = codes(sae, residuals()), residuals()
    spread = torch.zeros(N, D_SAE).scatter_add_(1, acts.top_indices, acts.top_acts)
    assert torch.equal(spread, sae.feature_acts(x))
    assert acts.top_acts.shape[1] == int((sae.feature_acts(x) > 0).sum(1).max())


def test_codes_of_unequal_width_are_joined() -> None:
    rows = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    joined = join([sparse(rows[:1]), sparse(rows[1:])])
    assert joined.top_acts.tolist() == [[2.0, 1.0], [3.0, 0.0], [0.0, 0.0]]
    assert joined.top_indices[0].tolist() == [2, 1]
