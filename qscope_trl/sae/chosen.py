"""Activations of a few chosen features of one layer, without computing or holding those of all others.

Shape legend: `S` chosen features, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.ops.chosen import pre_activations
from qscope_trl.ops.feature_rank import feature_rank
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE


class ChosenActs(NamedTuple):
    """What chosen features show of residuals."""

    acts: Tensor
    """Activations after TopK and ReLU `(..., S)`, at least fp32."""

    active: Tensor
    """Whether each is active, boolean `(..., S)`."""


class ChosenEncoder:
    """Reads chosen features of one layer's SAE. Open one with `open`.

    A TopK SAE needs its whole encoder, since which features are active depends on all; of ReLU and JumpReLU SAEs only
    the chosen rows are read. Weights follow the residuals' device; a whole encoder follows their dtype too, unless the
    suite names one.

    Args:
        indices: Features, from 0.
        W_SD: Their encoder rows; not used with `sae`.
        b_S: Their biases; not used with `sae`.
        jump_S: Their thresholds, of a JumpReLU SAE.
        sae: The whole SAE, of a TopK SAE.
        dtype: Dtype of the whole encoder; by default that of the residuals.
    """

    def __init__(
        self,
        indices: Sequence[int],
        W_SD: Tensor,
        b_S: Tensor,
        jump_S: Tensor | None = None,
        sae: TopKSAE | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.indices = tuple(indices)
        self._index_S = torch.tensor(self.indices)
        self._W_SD, self._b_S, self._jump_S = W_SD, b_S, jump_S
        self._stored = self._sae = sae
        self._dtype = dtype

    @classmethod
    def open(cls, suite: SAESuite, layer: int, indices: Sequence[int]) -> ChosenEncoder:
        """Read what the chosen features of a layer need.

        Raises:
            CheckpointError: If there is no SAE for the layer, it is damaged, or `k` is stated nowhere.
            FeatureSetError: If an index is out of range.
        """
        rows = suite.encoder_rows(layer, indices)
        is_topk = suite.spec(layer).activation == "topk"
        sae = suite.load(layer, decoder=False, mmap=True) if is_topk else None
        return cls(indices, rows.W, rows.b, rows.jump, sae, suite.dtype)

    def __call__(self, x: Tensor) -> ChosenActs:
        """Activations of the chosen features; exact, by the definition in `ops.reference`.

        Args:
            x: Residuals `(..., d_model)`.
        """
        self._follow(x)
        if self._sae is not None:
            return ChosenActs(*feature_rank(x, self._sae.W_enc, self._sae.b_enc, self._sae.k or 0, self._index_S))
        return thresholded(pre_activations(x, self._W_SD, self._b_S), self._jump_S)

    def _follow(self, x: Tensor) -> None:
        if self._stored is not None and self._sae is not None:
            dtype = self._dtype or x.dtype
            if self._sae.W_enc.device != x.device or self._sae.W_enc.dtype != dtype:
                # From what the file holds: rounding twice would change it.
                self._sae = self._stored.copy_to(x.device, dtype)
            self._index_S = self._index_S.to(x.device)
        elif self._W_SD.device != x.device:
            self._W_SD, self._b_S = self._W_SD.to(x.device), self._b_S.to(x.device)
            self._jump_S = None if self._jump_S is None else self._jump_S.to(x.device)


def thresholded(f: Tensor, jump_S: Tensor | None) -> ChosenActs:
    """Activations of a ReLU or JumpReLU SAE from pre-activations; differentiable where a feature is active."""
    active = f.detach() > (0 if jump_S is None else jump_S)
    return ChosenActs(torch.where(active, f, 0), active)
