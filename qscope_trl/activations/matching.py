"""Random features that fire as often as given ones: what every control compares with.

Shape legend: `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import residual_batches, tokenize
from qscope_trl.activations.opening import load_encoders
from qscope_trl.errors import ConfigError
from qscope_trl.sae.suite import SAESuite

_NEAREST = 20


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
    encoders = load_encoders(model, saes, layers)
    counts = {layer: torch.zeros(sae.d_sae, dtype=torch.float64) for layer, sae in encoders.items()}
    num_tokens = 0
    ids = tokenize(tokenizer, texts, max_length=max_length)
    for batch in residual_batches(
        model, ids, layers, batch_size=batch_size, show_progress=show_progress, description="firing rates"
    ):
        num_tokens += batch.text_index.numel()
        for layer, sae in encoders.items():
            for part in active_features(sae, batch.residuals[layer]):
                counts[layer] += part.feature.bincount(minlength=sae.d_sae).cpu()
    return {layer: count / num_tokens for layer, count in counts.items()}


def draw_matched(rate_F: Tensor, chosen: Sequence[int], generator: torch.Generator) -> list[int]:
    """For each chosen feature another one, drawn of the 20 whose rate is nearest; none twice, none of the chosen.

    Args:
        rate_F: Firing rate of every feature of a layer, on the CPU.
        chosen: Indices of the chosen features, at most half of all.
        generator: Decides the draw.

    Raises:
        ConfigError: If more than half of the features are chosen.
    """
    if 2 * len(chosen) > rate_F.numel():
        raise ConfigError(
            f"{len(chosen)} of {rate_F.numel()} features are chosen, so not as many others are left to match them. "
            f"Choose fewer."
        )
    taken = torch.zeros_like(rate_F, dtype=torch.bool)
    taken[list(chosen)] = True
    drawn = []
    for own in chosen:
        distance = (rate_F - rate_F[own]).abs().masked_fill(taken, torch.inf)
        nearest = distance.argsort(stable=True)[: min(_NEAREST, int((~taken).sum()))]
        index = int(nearest[int(torch.randint(nearest.numel(), (1,), generator=generator))])
        taken[index] = True
        drawn.append(index)
    return drawn
