from __future__ import annotations

import pytest
import torch

from qscope_trl.errors import CheckpointError, ConfigError
from qscope_trl.ops.reference import TopKActs
from qscope_trl.sae.topk_sae import TopKSAE
from tests.sae.sae_files import D_MODEL, D_SAE, K, Weights, random_weights, residuals, topk_relu


def make(weights: Weights, **changes: object) -> TopKSAE:
    return TopKSAE(**({**weights.four(), "k": K} | changes))


def fp64_acts(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    w = weights.to(torch.float64)
    return topk_relu(x.double() @ w.W_enc.T + w.b_enc, K)


# fp32 sums of 12 to 1024 products against fp64: a few units in the seventh digit of the largest term.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}


def test_feature_acts_follow_the_definition() -> None:
    weights, x = random_weights(), residuals()
    acts = make(weights).feature_acts(x)
    assert torch.equal(acts > 0, fp64_acts(weights, x) > 0)
    torch.testing.assert_close(acts.double(), fp64_acts(weights, x), **TOLERANCE)


def test_encode_holds_the_same_activations_as_feature_acts() -> None:
    sae, x = make(random_weights()), residuals()
    acts, indices = sae.encode(x)
    dense = sae.feature_acts(x)
    assert torch.equal(dense.gather(1, indices), acts)
    assert int(dense.count_nonzero()) == int(acts.count_nonzero())
    assert bool((acts[:, :-1] >= acts[:, 1:]).all())


def test_decoding_sparse_and_dense_activations_gives_the_fp64_reconstruction() -> None:
    weights, x = random_weights(), residuals()
    sae, w = make(weights), weights.to(torch.float64)
    expected = fp64_acts(weights, x) @ w.W_dec.T + w.b_dec
    for x_hat in (sae.decode(sae.encode(x)), sae.decode(sae.feature_acts(x)), sae(x)):
        torch.testing.assert_close(x_hat.double(), expected, **TOLERANCE)


def test_few_positive_pre_activations_mean_fewer_than_k_active_features() -> None:
    weights = random_weights()
    b_enc = torch.full((D_SAE,), -1000.0)
    b_enc[:3] = 1000.0
    acts = make(weights, b_enc=b_enc).encode(residuals()).top_acts
    assert torch.equal((acts > 0).sum(1), torch.full((40,), 3))


def test_leading_dimensions_are_kept() -> None:
    sae, x = make(random_weights()), residuals(24)
    flat = sae.encode(x)
    for shape in [(2, 3, 4), (24,), (1, 24)]:
        acts = sae.encode(x.reshape(*shape, D_MODEL))
        assert torch.equal(acts.top_indices, flat.top_indices.reshape(*shape, K))
        assert torch.equal(sae(x.reshape(*shape, D_MODEL)), sae(x).reshape(*shape, D_MODEL))
    one = sae.encode(x[0])
    assert torch.equal(one.top_indices, flat.top_indices[0])
    torch.testing.assert_close(sae.decode(one), sae(x)[0], **TOLERANCE)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_no_tokens_give_empty_results(activation: str) -> None:
    weights = random_weights()
    changes = {
        "k": K if activation == "topk" else None,
        "jump": weights.threshold if activation == "jumprelu" else None,
    }
    sae, x = make(weights, activation=activation, **changes), torch.zeros(0, D_MODEL)
    assert sae(x).shape == (0, D_MODEL)
    assert sae.feature_acts(x).shape == (0, D_SAE)


def test_relu_and_jumprelu_follow_their_definitions() -> None:
    weights, x = random_weights(), residuals()
    w = weights.to(torch.float64)
    f = x.double() @ w.W_enc.T + w.b_enc
    relu = make(weights, k=None, activation="relu")
    jump = make(weights, k=None, activation="jumprelu", jump=weights.threshold)
    for sae, acts in [(relu, f.relu()), (jump, f.relu() * (f > w.threshold))]:
        torch.testing.assert_close(sae.feature_acts(x).double(), acts, **TOLERANCE)
        torch.testing.assert_close(sae(x).double(), acts @ w.W_dec.T + w.b_dec, rtol=1e-4, atol=1e-3)


def test_nothing_is_trainable_and_nothing_tracks_the_given_tensors() -> None:
    weights = random_weights()
    W_enc = weights.W_enc.clone().requires_grad_()
    sae = make(weights, W_enc=W_enc)
    assert list(sae.parameters()) == []
    assert not any(buffer.requires_grad for buffer in sae.buffers())


def test_pre_acts_and_decode_are_differentiable() -> None:
    weights = random_weights(d_model=3, d_sae=7).to(torch.float64)
    sae = make(weights, k=2)
    x = residuals(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(sae.pre_acts, (x,))
    indices = sae.encode(x).top_indices
    acts = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sae.decode(TopKActs(a, indices)), (acts,))


def test_autocast_does_not_round_activations_or_reconstruction() -> None:
    sae, x = make(random_weights()), residuals()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae.encode(x).top_acts, make(random_weights()).encode(x).top_acts)
        x_hat = sae.decode(sae.encode(x))
    assert torch.equal(x_hat, sae(x))


def test_fvu_is_zero_for_a_perfect_and_one_for_a_constant_reconstruction() -> None:
    x = residuals()
    identity = TopKSAE(
        W_enc=torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)]),
        b_enc=torch.zeros(2 * D_MODEL),
        k=2 * D_MODEL,
        W_dec=torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)], 1),
        b_dec=torch.zeros(D_MODEL),
    )
    assert identity.fvu(x) == 0
    mean = make(random_weights(), W_dec=torch.zeros(D_MODEL, D_SAE), b_dec=x.mean(0))
    assert mean.fvu(x) == pytest.approx(1)


def test_bf16_weights_compute_in_fp32() -> None:
    weights, x = random_weights(), residuals()
    rounded = weights.to(torch.bfloat16)
    sae = make(rounded)
    assert sae.encode(x).top_acts.dtype == torch.float32
    torch.testing.assert_close(sae.feature_acts(x).double(), fp64_acts(rounded, x), **TOLERANCE)


def test_repr_names_the_facts() -> None:
    assert f"d_model={D_MODEL}, d_sae={D_SAE}, k={K}, activation='topk'" in repr(make(random_weights()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "gelu"}, ConfigError, "`activation='gelu'` is unknown. Known: topk, relu, jumprelu"),
        ({"k": None}, ConfigError, "`k` belongs to activation `topk` alone, got `k=None`"),
        ({"activation": "relu"}, ConfigError, "`k` belongs to activation `topk` alone, got `k=8` with `relu`"),
        ({"activation": "jumprelu", "k": None}, ConfigError, "belong to activation `jumprelu` alone"),
        ({"b_dec": None}, ConfigError, "`W_dec` and `b_dec` come together"),
        ({"k": D_SAE + 1}, CheckpointError, "`k=1025` is outside 1 to `d_sae=1024`"),
        ({"k": 0}, CheckpointError, "`k=0` is outside 1 to `d_sae=1024`"),
        ({"W_enc": torch.zeros(3)}, CheckpointError, r"`W_enc` has the shape \(3,\)"),
        ({"W_dec": torch.zeros(D_SAE, D_MODEL)}, CheckpointError, r"`W_dec` has the shape \(1024, 12\)"),
        ({"b_enc": torch.zeros(3)}, CheckpointError, r"`b_enc` has the shape \(3,\), but `W_enc` is \(1024, 12\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(random_weights(), **changes)


def test_residuals_of_another_width_are_refused() -> None:
    with pytest.raises(CheckpointError, match="residuals are 13 wide, but the SAE reads `d_model=12`"):
        make(random_weights()).encode(torch.zeros(2, 13))


def test_encode_without_k_and_decode_without_decoder_are_refused() -> None:
    with pytest.raises(ConfigError, match="activation `relu` has no `k` active features"):
        make(random_weights(), k=None, activation="relu").encode(residuals())
    with pytest.raises(ConfigError, match="loaded without its decoder"):
        make(random_weights(), W_dec=None, b_dec=None)(residuals())
