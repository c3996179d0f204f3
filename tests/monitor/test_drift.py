"""Every drift figure against a dense computation in numpy, fp64; limits; the reference as a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qscope_trl.errors import ConfigError, DataError
from qscope_trl.monitor import drift
from qscope_trl.monitor.divergence import divergence, top_log_probs
from qscope_trl.monitor.drift import Drift, DriftLimits, LayerDrift, Reference, activation_cosine, crossings
from qscope_trl.ops.reference import TopKActs
from qscope_trl.sae.topk_sae import TopKSAE
from tests.analysis.dense import decoded, dense, unexplained
from tests.tiny import D_MODEL, K, random_sae

N = 300
STILL = LayerDrift(0.2, 1.0, 8.0, 0.0, 1.0, 1.0, 1.0)


def make_sae(**changes: Any) -> TopKSAE:
    return TopKSAE(**{**random_sae(3), "k": K, **changes})


def residuals(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D_MODEL, generator=generator)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_figures_equal_the_dense_computation(activation: str) -> None:
    sae = make_sae() if activation == "topk" else make_sae(k=None, activation="relu", b_enc=-torch.ones(4 * D_MODEL))
    x, now = residuals(), residuals() * 0.9 + 0.4 * residuals(1)
    # Attention sinks of the frozen model count for nothing, then and now.
    x[[7, 60]] *= 40
    reference = drift.layer_reference(sae, x)
    found = drift.compare_layer(sae, reference, now)
    keep = np.ones(N, dtype=bool)
    keep[[7, 60]] = False
    assert reference.within_N.tolist() == keep.tolist()
    before, after = dense(sae, x)[keep], dense(sae, now)[keep]
    wide, wide_now = x.double().numpy()[keep], now.double().numpy()[keep]
    fvu = unexplained(wide, decoded(sae, before))
    alive = (before > 0).sum(0) >= drift.MIN_FIRINGS
    both, either = (before > 0) & (after > 0), (before > 0) | (after > 0)
    wanted = LayerDrift(
        fvu=unexplained(wide_now, decoded(sae, after)),
        fvu_ratio=unexplained(wide_now, decoded(sae, after)) / fvu,
        l0=(after > 0).sum(1).mean(),
        dead_rate=(after[:, alive] == 0).all(0).mean(),
        jaccard=(both.sum(1) / either.sum(1)).mean(),
        activation_cosine=cosines(before, after).mean(),
        residual_cosine=cosines(wide, wide_now).mean(),
    )
    assert reference.fvu == pytest.approx(fvu, rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert 0.2 < found.jaccard < 0.9


def test_features_that_are_silent_now_are_counted_of_those_that_were_alive() -> None:
    sae, x = make_sae(), residuals()
    before = dense(sae, x) > 0
    alive = np.flatnonzero(before.sum(0) >= drift.MIN_FIRINGS)
    # The first 20 tokens show a part of the features only; the rest of the probe repeats them.
    now = x[:20].repeat(N // 20, 1)
    silent = [feature for feature in alive if not before[:20, feature].any()]
    found = drift.compare_layer(sae, drift.layer_reference(sae, x), now)
    assert found.dead_rate == pytest.approx(len(silent) / len(alive))
    assert 0.02 < found.dead_rate < 0.9


def test_a_model_that_has_not_moved_shows_no_drift_at_all() -> None:
    sae, x = make_sae(), residuals().bfloat16()
    found = drift.compare_layer(sae, drift.layer_reference(sae, x), x)
    assert found._replace(fvu=0, l0=0) == LayerDrift(0, 1.0, 0, 0.0, 1.0, pytest.approx(1, abs=1e-12), 1.0)


def test_activations_are_compared_as_vectors_over_all_features() -> None:
    first = TopKActs(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([[5, 2], [0, 0], [1, 0]]))
    second = TopKActs(torch.tensor([[4.0, 2.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[2, 9], [7, 7], [3, 0]]))
    assert activation_cosine(first, second).tolist() == pytest.approx([16 / (5 * math.sqrt(20)), 1.0, 0.0])


def test_what_cannot_be_compared_with_is_refused() -> None:
    broken = residuals()
    broken[3, 4] = torch.inf
    with pytest.raises(DataError, match="NaN or infinite before the first step"):
        drift.layer_reference(make_sae(), broken)
    with pytest.raises(DataError, match="300 tokens of the probe texts are all alike"):
        drift.layer_reference(make_sae(), residuals()[:1].repeat(N, 1))


# --- divergence --------------------------------------------------------------------------------------------------


def logits(seed: int, vocabulary: int = 50) -> torch.Tensor:
    return 3 * torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(seed))


def exact_divergence(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    log_p, log_q = ((x := side.double().numpy()) - np.log(np.exp(x).sum(1, keepdims=True)) for side in (first, second))
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def test_divergence_is_exact_where_all_probabilities_are_kept() -> None:
    first, second = logits(0), logits(1)
    found = divergence(top_log_probs(first, 50), second)
    assert found.numpy() == pytest.approx(exact_divergence(first, second), rel=1e-5)
    assert torch.equal(divergence(top_log_probs(first, 1000), second), found)
    assert divergence(top_log_probs(first, 50), first).abs().max() == 0


def test_divergence_with_a_rest_is_that_of_the_coarser_distributions() -> None:
    first, second = logits(0), logits(1)
    order = first.argsort(dim=1, descending=True)
    lumped = []
    for side in (first, second):
        p = side.double().gather(1, order).softmax(1)
        lumped.append(torch.cat([p[:, :8], p[:, 8:].sum(1, keepdim=True)], dim=1).log())
    found = divergence(top_log_probs(first, 8), second)
    assert found.numpy() == pytest.approx(exact_divergence(*lumped), rel=1e-5)
    assert bool((found <= torch.from_numpy(exact_divergence(first, second))).all())


def test_tokens_that_a_model_rules_out() -> None:
    first, second = logits(0), logits(1)
    first[:, 3] = -torch.inf
    with_it = divergence(top_log_probs(first, 50), second)
    assert bool(with_it.isfinite().all())
    second[:, 4] = -torch.inf
    assert divergence(top_log_probs(first, 50), second).tolist() == [math.inf] * 40


# --- limits ------------------------------------------------------------------------------------------------------


def test_each_limit_is_crossed_by_its_own_figure() -> None:
    limits = DriftLimits(max_fvu_ratio=2, min_jaccard=0.5, min_residual_cosine=0.8, max_dead_rate=0.1, max_kl=0.3)
    within = LayerDrift(0.4, 2.0, 8.0, 0.1, 0.5, 0.0, 0.8)
    assert crossings(limits, Drift({1: within, 2: STILL}, 0.3)) == []
    beyond = {"fvu_ratio": 2.1, "jaccard": 0.49, "residual_cosine": 0.79, "dead_rate": 0.11}
    for name, value in beyond.items():
        [crossed] = crossings(limits, Drift({1: STILL, 2: within._replace(**{name: value})}, 0.0))
        assert (crossed.limit[4:], crossed.layer, crossed.value) == (name, 2, value)
        assert str(crossed) == f"L2/{crossed.limit}"
    [crossed] = crossings(limits, Drift({1: STILL}, 0.31))
    assert (str(crossed), crossed.layer, crossed.bound) == ("max_kl", None, 0.3)
    nothing = DriftLimits(max_fvu_ratio=None, min_jaccard=None, min_residual_cosine=None, max_dead_rate=None)
    assert crossings(nothing, Drift({1: within._replace(jaccard=0.0, fvu_ratio=9.0)}, 5.0)) == []


def test_a_figure_that_is_not_a_number_crosses_its_limit() -> None:
    broken = LayerDrift(*[math.nan] * 7)
    found = crossings(DriftLimits(max_kl=1.0), Drift({0: broken}, math.nan))
    assert [one.limit for one in found] == [
        "max_fvu_ratio", "min_jaccard", "min_residual_cosine", "max_dead_rate", "max_kl",
    ]  # fmt: skip
    assert crossings(DriftLimits(max_kl=1.0), Drift({0: STILL}, None)) == []


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [("max_fvu_ratio", 0.5, "1 to inf"), ("min_jaccard", 2, "0 to 1"), ("max_kl", "x", "0 to inf"),
     ("min_residual_cosine", -2, "-1 to 1"), ("max_dead_rate", True, "0 to 1")],
)  # fmt: skip
def test_limits_that_no_figure_can_have_are_refused(name: str, value: Any, range_: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is {value!r}; it is a number from {range_}, or None"):
        DriftLimits(**{name: value})


# --- the file ----------------------------------------------------------------------------------------------------


def make_reference(dtype: torch.dtype = torch.float32) -> Reference:
    layers = {layer: drift.layer_reference(make_sae(), residuals(layer).to(dtype)) for layer in (2, 11)}
    return Reference(layers, top_log_probs(logits(0), 8), {"texts": [[1, 2], [3]], "layers": [2, 11]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reference_is_read_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = make_reference(dtype)
    drift.save_reference(tmp_path / "x.safetensors", reference)
    found = drift.load_reference(tmp_path / "x.safetensors")
    assert found.identity == reference.identity
    for layer, one in reference.layers.items():
        other = found.layers[layer]
        assert other.residuals_ND.dtype == dtype
        assert torch.equal(other.residuals_ND, one.residuals_ND)
        assert torch.equal(other.within_N, one.within_N)
        assert all(torch.equal(a, b) for a, b in zip(other.acts, one.acts, strict=True))
        assert other.fvu == one.fvu
    assert all(torch.equal(a, b) for a, b in zip(found.log_probs, reference.log_probs, strict=True))
    per_token = 2 * (D_MODEL * dtype.itemsize + 8 * K + 1)
    assert reference.num_bytes == N * per_token + 40 * (8 * 8 + 4)


def test_a_reference_of_something_else_is_told_by_what_differs() -> None:
    reference = make_reference()
    assert reference.difference({"texts": [[1, 2], [3]], "layers": [2, 11]}) is None
    assert reference.difference({"texts": [[1, 2], [3]], "layers": [2]}) == "layers"


def test_a_damaged_reference_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    drift.save_reference(path, make_reference())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"drift reference '.*x.safetensors' is damaged .* Delete it"):
        drift.load_reference(path)
