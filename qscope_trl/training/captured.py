"""The penalty of captured forwards: over which tokens and features it is summed, and what is measured on the way.

Left out: capturing, and joining a trainer's loss; that is `attach`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.residual import Capture
from qscope_trl.training.checks import FiniteCheck, finite_tokens, raise_unknown_tokens
from qscope_trl.training.masks import GroupFn, runs_batch, token_groups, token_mask
from qscope_trl.training.metrics import PenaltyMetrics
from qscope_trl.training.penalty import PENALTIES, LayerFeatures


class CapturedPenalty:
    """The penalised features and the monitors as tensors, applied to captures.

    Args:
        config: The penalty's settings.
        chosen: The features, whose groups and target group count.
        group_fn: Names the group of a sequence from its token ids.
        metrics: Where everything that is seen is added.
    """

    def __init__(
        self, config: PenaltyConfig, chosen: FeatureSet, group_fn: GroupFn | None, metrics: PenaltyMetrics
    ) -> None:
        self._config, self._group_fn, self._target_group = config, group_fn, chosen.target_group
        self.groups = tuple(sorted({*chosen.groups, *filter(None, [chosen.target_group])}))
        """Names of groups, in the order of the thresholds' rows after the default."""
        self.metrics = metrics
        self.layers: dict[int, LayerFeatures] = {}
        """Penalised features by layer; empty until they are opened."""
        self.monitors: dict[int, LayerFeatures] = {}
        """Features that are only measured."""
        self.finite = FiniteCheck()
        """What was not finite in the optimizer step that runs."""

    @property
    def read_layers(self) -> set[int]:
        """Layers whose residuals are read."""
        return {*self.layers, *self.monitors}

    def sum(
        self, captures: Sequence[Capture], batch: Mapping[str, Any], groups: Any, mode: str
    ) -> tuple[Tensor, Tensor]:
        """Sum over penalised tokens, layers and features, and the number of penalised tokens.

        Args:
            captures: Forwards of one batch.
            batch: What the trainer gave to `compute_loss`.
            groups: Group of each sample, from a collator; or None.
            mode: `train` or `eval`.
        """
        function = PENALTIES[self._config.penalty_kind]
        totals: list[Tensor] = []
        counts: list[Tensor] = []
        for capture in captures:
            mask_BT = token_mask(capture, batch, self._config)
            if mask_BT is None:
                raise_unknown_tokens(batch, self._config.penalty_tokens)
            group_BT = token_groups(capture, self.groups, groups, self._group_fn)
            if group_BT is not None:
                group_BT = group_BT.to(mask_BT.device)
                if self._target_group is not None:
                    mask_BT = mask_BT & (group_BT != 1 + self.groups.index(self._target_group))
            counts.append(mask_BT.sum())
            bad_BT = torch.zeros_like(mask_BT)
            for layer, kind_of in ((n, store) for store in (self.layers, self.monitors) for n in store):
                residual = capture.residuals[layer]
                chosen = kind_of[layer] = kind_of[layer].for_residual(residual)
                mask = mask_BT.to(residual.device)
                group = None if group_BT is None else group_BT.to(residual.device)
                if kind_of is self.monitors:
                    with torch.no_grad():
                        terms = PENALTIES["preact_hinge"](residual, chosen, group)
                else:
                    terms = function(residual, chosen, group)
                if mode == "train":
                    # An evaluation shows NaN as NaN; a training step is stopped, or does without these tokens.
                    bad = mask & ~finite_tokens(residual, terms.values_BTS)
                    bad_BT |= bad.to(bad_BT.device)
                    mask = mask & ~bad
                if kind_of is not self.monitors:
                    totals.append(torch.where(mask, terms.penalty_BT, 0).sum().to(mask_BT.device))
                self.metrics.update(mode, layer, kind_of is self.monitors, terms, mask)
            if mode == "train":
                self.finite.see(bad_BT, capture.input_ids)
        return torch.stack(totals).sum(), torch.stack(counts).sum()

    def measure_evaluation(self, captures: Sequence[Capture], batch: Mapping[str, Any], groups: Any) -> None:
        """Measure the one forward of an evaluation step that ran the batch's own tokens, not a reference pass."""
        for capture in sorted(captures, key=lambda c: not runs_batch(c, batch)):
            if self.read_layers - capture.residuals.keys():
                continue
            if token_mask(capture, batch, self._config) is None:
                continue
            with torch.no_grad():
                self.sum([capture], batch, groups, "eval")
            return
