"""Other readings of an SAE, chance, rounding and alignment against a dense computation in numpy, fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qscope_trl.analysis.doctor import alternatives as other
from qscope_trl.sae.topk_sae import TopKSAE
from tests.analysis.dense import N, decoded, dense, make_sae, residuals, unexplained
from tests.tiny import D_MODEL, D_SAE, K, random_sae


def test_every_other_reading_equals_its_dense_computation() -> None:
    sae, x = make_sae(b_dec=0.5 * residuals(9)[0]), residuals()
    found, _ = other.alternatives(sae, x)
    wide, b_dec = x.double().numpy(), sae.b_dec.double().numpy()
    size = np.linalg.norm(wide, axis=1, keepdims=True)
    mean, spread = wide.mean(1, keepdims=True), wide.std(1, keepdims=True)

    def inside(y: np.ndarray) -> np.ndarray:
        return decoded(sae, dense(sae, torch.from_numpy(y)))

    wanted = {
        other.AS_READ: inside(wide),
        other.HALF_K: decoded(sae, dense(sae, x, k=K // 2)),
        other.DOUBLE_K: decoded(sae, dense(sae, x, k=2 * K)),
        other.NO_RELU: decoded(sae, dense(sae, x, relu=False)),
        other.SUBTRACTED: decoded(sae, dense(sae, x, bias=-b_dec)),
        other.ADDED: decoded(sae, dense(sae, x, bias=b_dec)),
        other.UNIT_NORM: inside(wide / size) * size,
        other.LAYER_NORM: inside((wide - mean) / spread) * spread + mean,
    }
    for name, x_hat in wanted.items():
        assert found[name] == pytest.approx(unexplained(wide, x_hat), rel=1e-4), name
    assert other.read_as(sae, x) == pytest.approx(found[other.AS_READ], rel=1e-6)
    assert other.fvu(x, sae(x)) == pytest.approx(sae.fvu(x), rel=1e-6)


def orthonormal_sae(factor: float = 1.0) -> TopKSAE:
    """Reconstructs any input exactly: each direction and its opposite. With `factor` and b_enc, only at one scale."""
    eye = torch.eye(D_MODEL)
    W_enc = torch.cat([eye, -eye])
    # The bias takes 0.5 from each input and gives it back: right for inputs as they are, wrong for scaled ones.
    b_enc = torch.full((2 * D_MODEL,), -0.5)
    return TopKSAE(
        W_enc=factor * W_enc, b_enc=b_enc, k=D_MODEL, W_dec=W_enc.T.contiguous() / factor, b_dec=torch.zeros(D_MODEL)
    )


@pytest.mark.parametrize("factor", [3.0, 0.2])
def test_a_planted_scale_is_found(factor: float) -> None:
    # Inputs of absolute value 0.5 + 1 in every entry, of which the bias takes 0.5: fvu is a V around the right scale.
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(N, D_MODEL, generator=generator) < 0.5, 1.5, -1.5)
    sae = orthonormal_sae()
    sae.W_dec.mul_(1.5)  # 1.5 - 0.5 = 1 is decoded to 1.5
    found = other.alternatives(sae, x / factor)
    assert found.scale == pytest.approx(factor, rel=0.05)
    assert found.fvu[other.SCALED] < 0.01 < found.fvu[other.AS_READ]
    right = other.alternatives(sae, x)
    assert right.scale == 1.0
    assert other.SCALED not in right.fvu


def test_chance_is_of_noise_with_the_residuals_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(D_MODEL, D_MODEL, generator=generator) * torch.logspace(0, -1.5, D_MODEL)
    x = residuals(count=3000) @ mix
    sae = make_sae()
    wide = x.double().numpy()
    # An independent draw, by the covariance's square root instead of mixtures of tokens.
    draw = np.random.default_rng(0).multivariate_normal(wide.mean(0), np.cov(wide.T), size=3000)
    wanted = unexplained(draw, decoded(sae, dense(sae, torch.from_numpy(draw))))
    # 3000 draws each way: the two ratios differ by a few per cent at most.
    assert other.chance(sae, x, seed=0) == pytest.approx(wanted, rel=0.05)
    assert other.chance(sae, x, seed=0) == other.chance(sae, x, seed=0) != other.chance(sae, x, seed=1)


def test_rounding_is_that_of_the_matrices() -> None:
    sae, x = make_sae(), residuals()
    found = other.roundings(sae, x)
    assert list(found) == ["bfloat16", "float16"]
    exact = dense(sae, x)
    for name, rounding in found.items():
        rounded = make_sae(W_enc=sae.W_enc.to(getattr(torch, name)).float())
        acts = dense(rounded, x)
        both = (acts > 0) & (exact > 0)
        either = (acts > 0) | (exact > 0)
        assert rounding.jaccard == pytest.approx((both.sum(1) / either.sum(1)).mean(), rel=1e-9)
        assert rounding.value_error == pytest.approx((np.abs(acts - exact)[both] / exact[both]).mean(), rel=1e-3)
    assert found["bfloat16"].value_error > 4 * found["float16"].value_error
    assert found["bfloat16"].jaccard < found["float16"].jaccard


def test_chance_jaccard_is_that_of_tokens_half_the_sample_apart() -> None:
    sae, x = make_sae(), residuals()
    active = [set(np.flatnonzero(row)) for row in dense(sae, x)]
    wanted = [len(active[i] & active[i - N // 2]) / len(active[i] | active[i - N // 2]) for i in range(N)]
    assert other.chance_jaccard(sae, x) == pytest.approx(np.mean(wanted), rel=1e-9)


def test_alignment_tells_a_transposed_decoder_from_a_reshaped_one() -> None:
    sae = make_sae()
    W_enc, W_dec = sae.W_enc.double().numpy(), sae.W_dec.double().numpy()
    cosine = (W_enc * W_dec.T).sum(1) / np.linalg.norm(W_enc, axis=1) / np.linalg.norm(W_dec.T, axis=1)
    mean, reshaped = other.alignment(sae)
    assert mean == pytest.approx(cosine.mean(), rel=1e-5) == pytest.approx(1.0)
    assert math.isnan(reshaped)
    wrong = make_sae(W_dec=sae.W_dec.T.contiguous().reshape(D_MODEL, D_SAE))
    mean, reshaped = other.alignment(wrong)
    assert abs(mean) < 0.1
    assert reshaped == pytest.approx(1.0)
    unrelated = other.alignment(make_sae(W_dec=random_sae(8)["W_dec"]))
    assert max(map(abs, unrelated)) < 0.1
    assert all(math.isnan(value) for value in other.alignment(make_sae(W_dec=None, b_dec=None)))
