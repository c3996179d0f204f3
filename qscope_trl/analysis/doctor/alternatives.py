"""Other ways to read an SAE, tried on a sample of tokens: what reconstructs better than the stated way is a diagnosis.

The encoder is linear before its activation function, so every convention on the input (a bias subtracted, a scale, a
normalisation) is a function of one product `x @ W_enc.T`. Chance is measured beside them: noise with the mean and the
covariance of the residuals, on which an SAE that has learnt the model's residuals must do worse.

Shape legend: `P` tokens of the sample, `D` d_model, `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from qscope_trl.monitor.fit_sums import codes, jaccard, sparse, value_error
from qscope_trl.ops.reference import TopKActs, pre_activations, token_chunks
from qscope_trl.sae.topk_sae import TopKSAE

AS_READ = "as read"
HALF_K, DOUBLE_K, NO_RELU = "k / 2", "2 k", "no ReLU"
SUBTRACTED, ADDED = "b_dec subtracted", "b_dec added"
UNIT_NORM, LAYER_NORM, SCALED = "unit norm", "layer norm", "scaled"

# Factors by which a scale is refined around the best power of two, and the most steps of one factor.
_FINER = (2**0.5, 2**0.25, 2**0.125)
_MOST_STEPS = 20
_TINY = 1e-12


class Rounding(NamedTuple):
    """What another dtype of the SAE's matrices changes."""

    jaccard: float
    """Mean over tokens of the Jaccard index of active features, against fp32."""

    value_error: float
    """Mean relative difference of the activations of features active in both."""


def fvu(x_PD: Tensor, x_hat_PD: Tensor) -> float:
    """Fraction of variance unexplained of some tokens; NaN without any variance."""
    x_PD = x_PD.double()
    about = (x_PD - x_PD.mean(0)).square().sum()
    return float((x_PD - x_hat_PD.double()).square().sum() / about) if about > 0 else float("nan")


def read_as(sae: TopKSAE, x_PD: Tensor) -> float:
    """Fraction of variance unexplained of `x`, read as the SAE is."""
    return fvu(x_PD, sae(x_PD.float()))


class Alternatives(NamedTuple):
    """Fractions of variance unexplained of the same tokens under several conventions."""

    fvu: dict[str, float]
    """By name; see `alternatives`."""

    scale: float
    """The factor that `scaled` stands for."""


class _Convention(NamedTuple):
    """The SAE reads `(x - shift) / size + bias`; its output is multiplied by `size`, and `shift` added, afterwards."""

    size_P: Tensor
    shift_P: Tensor
    bias_D: Tensor | None = None
    k: int | None = None
    has_relu: bool = True


def alternatives(sae: TopKSAE, x_PD: Tensor) -> Alternatives:
    """Fraction of variance unexplained under other conventions than the stated one.

    By name: `as read`; `k / 2`, `2 k` and `no ReLU` (TopK alone); `b_dec subtracted` from the input; `b_dec added` to
    it (which undoes the subtraction of a format that has it); `unit norm` and `layer norm` of each token, undone after
    decoding; `scaled`: the best constant factor on the input, undone likewise, where one is better than 1. It is
    searched by powers of two from 1 and from the factors of two published conventions, then between them.

    Args:
        sae: The SAE, with its decoder.
        x_PD: Residuals of a sample of tokens.

    References:
        A mean norm of `sqrt(d_model)`: Anthropic, Circuits Updates April 2024, and SAELens'
        `expected_average_only_in`. Unit mean squared norm: `normalize_activations` of dictionary_learning.
    """
    x_PD = x_PD.float()
    ones, zeros = x_PD.new_ones(x_PD.shape[0]), x_PD.new_zeros(x_PD.shape[0])
    plain = _Convention(ones, zeros)
    ways = {AS_READ: plain}
    if sae.k is not None:
        ways[HALF_K] = plain._replace(k=max(1, sae.k // 2))
        ways[DOUBLE_K] = plain._replace(k=min(2 * sae.k, sae.d_sae))
        ways[NO_RELU] = plain._replace(has_relu=False)
    if sae.b_dec is not None and bool(sae.b_dec.any()):
        ways[SUBTRACTED] = plain._replace(bias_D=-sae.b_dec)
        ways[ADDED] = plain._replace(bias_D=sae.b_dec)
    ways[UNIT_NORM] = plain._replace(size_P=x_PD.norm(dim=1).clamp(min=_TINY))
    ways[LAYER_NORM] = plain._replace(size_P=x_PD.std(1, correction=0).clamp(min=_TINY), shift_P=x_PD.mean(1))
    root_mean_square = max(_TINY, float(x_PD.double().square().sum(1).mean().sqrt()))
    factors = {f"{factor}": factor for factor in (0.5, 2.0, sae.d_model**0.5 / root_mean_square, 1 / root_mean_square)}
    ways |= {name: plain._replace(size_P=ones / factor) for name, factor in factors.items()}
    found = _fvu_by_way(sae, x_PD, ways)
    tried = {1.0: found[AS_READ], **{factor: found.pop(name) for name, factor in factors.items()}}
    best = min(tried, key=lambda factor: tried[factor])
    if best == 1.0:
        return Alternatives(found, 1.0)

    def attempt(factor: float) -> float:
        if factor not in tried:
            tried[factor] = _fvu_by_way(sae, x_PD, {"": plain._replace(size_P=ones / factor)})[""]
        return tried[factor]

    for step in (2.0, *_FINER):
        best = _climb(attempt, best, step)
    return Alternatives({**found, SCALED: tried[best]}, best)


def _climb(attempt: Callable[[float], float], best: float, step: float) -> float:
    for factor in (step, 1 / step):
        for _ in range(_MOST_STEPS):
            if not attempt(best * factor) < attempt(best):
                break
            best *= factor
    return best


def chance(sae: TopKSAE, x_PD: Tensor, seed: int) -> float:
    """Fraction unexplained of Gaussian noise with the mean and the covariance of the residuals.

    The noise is random mixtures of the tokens' deviations from their mean, so no covariance matrix is formed.

    Args:
        sae: The SAE, with its decoder.
        x_PD: Residuals of a sample of tokens.
        seed: Decides the noise.
    """
    x_PD = x_PD.float()
    P = x_PD.shape[0]
    generator = torch.Generator().manual_seed(seed)
    mean_D = x_PD.mean(0)
    noise_PD = x_PD.new_empty(x_PD.shape)
    for rows in token_chunks(P, P):
        mix = torch.randn(rows.stop - rows.start, P, generator=generator).to(x_PD.device)
        noise_PD[rows] = mean_D + mix @ (x_PD - mean_D) / P**0.5
    return fvu(noise_PD, sae(noise_PD))


def roundings(sae: TopKSAE, x_PD: Tensor) -> dict[str, Rounding]:
    """What encoding with the matrices in bf16 and in fp16 changes, against fp32."""
    x_PD = x_PD.float()
    exact = codes(sae, x_PD)
    found = {}
    for name in ("bfloat16", "float16"):
        rounded = codes(_encoder(sae, getattr(torch, name)), x_PD)
        found[name] = Rounding(float(jaccard(exact, rounded).mean()), value_error(exact, rounded))
    return found


def chance_jaccard(sae: TopKSAE, x_PD: Tensor) -> float:
    """Mean Jaccard index between the active features of a token and those of another one of the sample."""
    acts = codes(sae, x_PD.float())
    half = x_PD.shape[0] // 2
    rolled = TopKActs(acts.top_acts.roll(half, 0), acts.top_indices.roll(half, 0))
    return float(jaccard(acts, rolled).mean())


def alignment(sae: TopKSAE) -> tuple[float, float]:
    """Mean cosine between the encoder's and the decoder's vector of a feature, and if the decoder had been reshaped.

    Near 0 the two are not of the same features. The second figure takes the numbers of `W_dec` in the order of the
    file as `(d_sae, d_model)`: it is high if a decoder was reshaped to the other shape instead of transposed. It is
    NaN unless the first is below 0.1.
    """
    if sae.W_dec is None:
        return float("nan"), float("nan")
    mean = _mean_cosine(sae.W_enc, sae.W_dec.T)
    if mean >= 0.1:
        return mean, float("nan")
    return mean, _mean_cosine(sae.W_enc, sae.W_dec.contiguous().reshape(sae.d_sae, sae.d_model))


def _mean_cosine(first: Tensor, second: Tensor) -> float:
    chunks = token_chunks(first.shape[0], first.shape[1])
    total = sum(float(cosine_similarity(first[rows].float(), second[rows].float()).double().sum()) for rows in chunks)
    return total / first.shape[0]


def _encoder(sae: TopKSAE, dtype: torch.dtype) -> TopKSAE:
    return TopKSAE(W_enc=sae.W_enc.to(dtype), b_enc=sae.b_enc, k=sae.k, activation=sae.activation, jump=sae.jump)


def _fvu_by_way(sae: TopKSAE, x_PD: Tensor, ways: Mapping[str, _Convention]) -> dict[str, float]:
    """Fraction unexplained under each convention, from one product with the encoder."""
    W_enc, b_enc = sae.W_enc.float(), sae.b_enc.float()
    row_sum_F = W_enc.sum(1)
    bias_F = {
        name: b_enc if way.bias_D is None else b_enc + linear(way.bias_D.float(), W_enc) for name, way in ways.items()
    }
    error = dict.fromkeys(ways, 0.0)
    for rows in token_chunks(x_PD.shape[0], sae.d_sae):
        x = x_PD[rows]
        product_PF = pre_activations(x, W_enc, torch.zeros_like(b_enc))
        for name, way in ways.items():
            shift, size = way.shift_P[rows, None], way.size_P[rows, None]
            f_PF = (product_PF - shift * row_sum_F) / size + bias_F[name]
            x_hat = sae.decode(_activate(sae, f_PF, way.k, way.has_relu)) * size + shift
            error[name] += float((x - x_hat).double().square().sum())
    about = float((x_PD.double() - x_PD.double().mean(0)).square().sum())
    return {name: value / about if about > 0 else float("nan") for name, value in error.items()}


def _activate(sae: TopKSAE, f_PF: Tensor, k: int | None, relu: bool) -> TopKActs:
    if sae.k is not None:
        values, indices = f_PF.topk(sae.k if k is None else k, dim=1)
        return TopKActs(values.relu() if relu else values, indices)
    return sparse(f_PF.relu() if sae.jump is None else f_PF.relu() * (f_PF > sae.jump))
