"""Random features that fire as often as given ones: what every control compares with.

A penalty that helps whatever it is put on has shown nothing about the features. Left out: matching by anything but the
firing rate.

Shape legend: `N` tokens of a batch, `D` d_model, `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import residual_batches, tokenize
from qscope_trl.activations.opening import load_encoders
from qscope_trl.errors import ConfigError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE

_NEAREST = 20


class TokenSums:
    """Of one layer: how often each feature is active, and the residuals' sum, over texts.

    Args:
        sae: The layer's SAE.
    """

    def __init__(self, sae: TopKSAE) -> None:
        self._sae = sae
        self._num_tokens = 0
        self._count_F = torch.zeros(sae.d_sae, dtype=torch.int64)
        self._x_D = torch.zeros(sae.d_model, dtype=torch.float64)

    def update(self, x_ND: Tensor) -> None:
        """Add the tokens of a batch."""
        self._num_tokens += x_ND.shape[0]
        self._x_D += x_ND.double().sum(0).cpu()
        for part in active_features(self._sae, x_ND):
            self._count_F += part.feature.bincount(minlength=self._sae.d_sae).cpu()

    @property
    def rate(self) -> Tensor:
        """Share of tokens at which each feature is active, fp64 `(F,)` on the CPU."""
        return self._count_F.double() / self._num_tokens

    def mean_pre_act(self, index: int) -> float:
        """Mean pre-activation of a feature over tokens: exact, as the encoder is linear before TopK."""
        row_D, bias = self._sae.W_enc[index].double().cpu(), float(self._sae.b_enc[index])
        return float(row_D @ (self._x_D / self._num_tokens)) + bias


def token_rates(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    show_progress: bool = True,
) -> dict[int, Tensor]:
    """Share of tokens at which each feature of some layers is active, fp64 `(F,)` on the CPU; position 0 left out.

    Args:
        model: A transformers model, wrapped or not, on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs.
        layers: Layers to read.
        texts: Texts to read.
        max_length: Tokens kept of each text.
        batch_size: Texts in one forward.
        show_progress: Whether to show a progress bar on stderr.

    Raises:
        DataError: If no token is left, or a residual is not finite.
    """
    ids = tokenize(tokenizer, texts, max_length=max_length)
    sums = token_sums(model, saes, layers, ids, batch_size=batch_size, show_progress=show_progress)
    return {layer: of.rate for layer, of in sums.items()}


def token_sums(
    model: nn.Module,
    saes: SAESuite,
    layers: Sequence[int],
    token_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    show_progress: bool = True,
) -> dict[int, TokenSums]:
    """Sums of some layers over texts; arguments and errors as `token_rates`, with token ids for texts."""
    sums = {layer: TokenSums(sae) for layer, sae in load_encoders(model, saes, layers).items()}
    for batch in residual_batches(
        model, token_ids, layers, batch_size=batch_size, show_progress=show_progress, description="firing rates"
    ):
        for layer, of in sums.items():
            of.update(batch.residuals[layer])
    return sums


def draw_matched(
    rate_F: Tensor, chosen: Sequence[int], generator: torch.Generator, avoid: Sequence[int] = ()
) -> list[int]:
    """For each chosen feature another one, drawn of the 20 whose rate is nearest; none twice, none of the chosen.

    Args:
        rate_F: Firing rate of every feature of a layer, on the CPU.
        chosen: Indices of the chosen features, at most half of all.
        generator: Decides the draw.
        avoid: Indices of others that are not drawn either.

    Raises:
        ConfigError: If more than half of the features are chosen or avoided.
    """
    barred = {*chosen, *avoid}
    if len(barred) + len(chosen) > rate_F.numel():
        raise ConfigError(
            f"{len(barred)} of {rate_F.numel()} features are chosen, so not as many others are left to match them. "
            f"Choose fewer."
        )
    taken = torch.zeros_like(rate_F, dtype=torch.bool)
    taken[list(barred)] = True
    drawn = []
    for own in chosen:
        distance = (rate_F - rate_F[own]).abs().masked_fill(taken, torch.inf)
        nearest = distance.argsort(stable=True)[: min(_NEAREST, int((~taken).sum()))]
        index = int(nearest[int(torch.randint(nearest.numel(), (1,), generator=generator))])
        taken[index] = True
        drawn.append(index)
    return drawn


def matched_random_features(
    chosen: FeatureSet,
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    texts: Sequence[str],
    threshold_texts: Sequence[str],
    *,
    seed: int = 0,
    max_length: int = 512,
    batch_size: int = 8,
    show_progress: bool = True,
) -> FeatureSet:
    """For each chosen feature one random other feature of its layer, with a like firing rate and the same weight.

    Args:
        chosen: The set to match; none of its features is drawn.
        model: The model the set was found on, on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs.
        texts: Texts on which firing rates are compared; each draw is among the 20 nearest rates.
        threshold_texts: Texts whose mean pre-activation becomes the threshold, as for the chosen features.
        seed: Decides the draw.
        max_length: Tokens kept of each text.
        batch_size: Texts in one forward.
        show_progress: Whether to show progress bars on stderr.

    Returns:
        As many features as `chosen` has, layer by layer. Evidence: `token_rate` and that of the matched feature.
    """
    rates, negative = (
        token_sums(
            model,
            saes,
            chosen.layers,
            tokenize(tokenizer, what, max_length=max_length),
            batch_size=batch_size,
            show_progress=show_progress,
        )
        for what in (texts, threshold_texts)
    )
    return matched_by(chosen, rates, negative, seed=seed)


def matched_by(
    chosen: FeatureSet,
    rates: Mapping[int, TokenSums],
    negative: Mapping[int, TokenSums],
    *,
    seed: int = 0,
    avoid: FeatureSet | None = None,
) -> FeatureSet:
    """As `matched_random_features`, of sums over its `texts` and `threshold_texts`; none of `avoid` is drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Feature] = []
    for layer in chosen.layers:
        rate, own = rates[layer].rate, chosen.for_layer(layer)
        others = [] if avoid is None else [feature.index for feature in avoid.for_layer(layer)]
        matched = draw_matched(rate, [feature.index for feature in own], generator, others)
        drawn += [
            Feature(
                layer=layer,
                index=index,
                weight=feature.weight,
                threshold=negative[layer].mean_pre_act(index),
                label=f"random, matched to {feature.id}",
                evidence={"token_rate": float(rate[index]), "matched_token_rate": float(rate[feature.index])},
            )
            for feature, index in zip(own, matched, strict=True)
        ]
    return chosen.with_features(drawn)
