"""Tokens whose residual is far larger than usual: attention sinks, which SAEs were not trained on.

Most are at position 0, which is left out anyway; some models make them elsewhere too, at line breaks or other tokens
of little meaning. One such token can have the largest activation of a text in any feature. What is far larger is
measured against the layer's median norm over a sample of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.activations.encode import Positions, residual_batches
from qscope_trl.errors import ConfigError
from qscope_trl.monitor.fit_sums import MAX_NORM_RATIO

# A thousand tokens or more: their median is within some percent of that of all.
_SAMPLE_TEXTS = 16


class NormLimits(NamedTuple):
    """Which tokens count, layer by layer."""

    median: dict[int, float]
    """Median L2 norm of the residuals of a layer, over a sample of texts."""

    ratio: float
    """Multiple of it above which a token is left out."""

    def within(self, layer: int, x_ND: Tensor) -> Tensor:
        """Whether each token's residual is within the limit. Shape `(N,)`, bool."""
        within_N: Tensor = x_ND.float().norm(dim=-1) <= self.ratio * self.median[layer]
        return within_N


@torch.no_grad()
def norm_limits(
    model: nn.Module,
    groups: Sequence[Sequence[Sequence[int]]],
    layers: Sequence[int],
    *,
    ratio: float | None = MAX_NORM_RATIO,
    positions: Positions = "all",
    batch_size: int = 8,
    show_progress: bool = True,
) -> NormLimits | None:
    """Measure the median norm of each layer over the first 16 texts of each group.

    Args:
        model: A transformers model, on its device.
        groups: Token ids per text, group by group, in an order that means nothing, as `prepare_group` gives them.
        layers: Layers to measure.
        ratio: Multiple of the median that a token may have; None or 0: no limit.
        positions: Which tokens will be looked at.
        batch_size: Texts in one forward.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        The limits, or None for none.

    Raises:
        ConfigError: If the ratio is not above 1.
        DataError: If no token is left, or a residual is not finite.
    """
    if not ratio:
        return None
    if not ratio > 1:
        raise ConfigError(
            f"`max_norm_ratio` is {ratio}; it is above 1, as half of all tokens exceed the median. 10 leaves out "
            f"attention sinks alone, 0 nothing."
        )
    sample = [ids for texts in groups for ids in texts[:_SAMPLE_TEXTS]]
    norms: Mapping[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in residual_batches(
        model,
        sample,
        layers,
        batch_size=batch_size,
        positions=positions,
        show_progress=show_progress,
        description="norms",
    ):
        for layer in layers:
            norms[layer].append(batch.residuals[layer].float().norm(dim=-1).cpu())
    return NormLimits({layer: float(torch.cat(found).median()) for layer, found in norms.items()}, float(ratio))
