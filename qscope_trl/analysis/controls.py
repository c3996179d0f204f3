"""Control features: random ones that fire as often as the chosen ones.

A penalty that helps whatever it is put on has shown nothing about the features. Matched random features are the arm to
compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qscope_trl.activations.encode import residual_batches, tokenize
from qscope_trl.activations.matching import draw_matched
from qscope_trl.analysis.evidence import GroupSums, collect
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.sae.suite import SAESuite


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
    loaded = {layer: saes.load(layer, decoder=False) for layer in chosen.layers}
    sums: list[dict[int, GroupSums]] = []
    for what in (texts, threshold_texts):
        sinks = {layer: GroupSums(sae) for layer, sae in loaded.items()}
        ids = tokenize(tokenizer, what, max_length=max_length)
        batches = residual_batches(
            model, ids, chosen.layers, batch_size=batch_size, show_progress=show_progress, description="matching"
        )
        collect(batches, sinks)
        sums.append(sinks)
    rates, negative = sums
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Feature] = []
    for layer in chosen.layers:
        rate = (rates[layer].token_count.double() / rates[layer].num_tokens).cpu()
        matched = draw_matched(rate, [feature.index for feature in chosen.for_layer(layer)], generator)
        for feature, index in zip(chosen.for_layer(layer), matched, strict=True):
            threshold = float(
                negative[layer].mean_pre_act(torch.tensor([index], device=loaded[layer].W_enc.device))[0]
            )
            drawn.append(
                Feature(
                    layer=layer,
                    index=index,
                    weight=feature.weight,
                    threshold=threshold,
                    label=f"random, matched to {feature.id}",
                    evidence={"token_rate": float(rate[index]), "matched_token_rate": float(rate[feature.index])},
                )
            )
    return chosen.with_features(drawn)
