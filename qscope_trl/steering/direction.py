"""What steering does to the residual at one layer: add directions, take features away, or hold them at a value.

Every edit is added to the residual. Nothing is replaced by the SAE's reconstruction, so what the SAE does not describe
stays as it is.

Shape legend: `B` rows, `T` positions, `S` chosen features of a layer, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qscope_trl.errors import SteeringError
from qscope_trl.features import Feature
from qscope_trl.sae.chosen import ChosenEncoder
from qscope_trl.sae.suite import SAESuite

MODES = ("add", "ablate", "clamp")
UNITS = ("raw", "norm")


class LayerDirection:
    """The chosen features of one layer, and the edit that a strength makes of them.

    Args:
        columns_DS: Their decoder columns, as in the checkpoint, fp32.
        weights_S: Their weights.
        mode: See `steer`.
        unit: See `steer`.
        encoder: What reads their activations; needed by `ablate` and `clamp`.
    """

    def __init__(
        self, columns_DS: Tensor, weights_S: Tensor, mode: str, unit: str, encoder: ChosenEncoder | None
    ) -> None:
        self.columns_DS, self.weights_S = columns_DS, weights_S
        self.mode, self.unit = mode, unit
        self.encoder = encoder
        self.vector_D = (columns_DS * weights_S).sum(1)
        self._added: tuple[object, Tensor] | None = None

    @classmethod
    def open(cls, suite: SAESuite, layer: int, features: Sequence[Feature], mode: str, unit: str) -> LayerDirection:
        """Read what the features of a layer need.

        Raises:
            SteeringError: If the weighted directions cancel, so that there is nothing to add.
            CheckpointError: If there is no SAE for the layer, or it is damaged.
            FeatureSetError: If an index is out of range.
        """
        indices = [feature.index for feature in features]
        made = cls(
            suite.decoder_columns(layer, indices),
            torch.tensor([feature.weight for feature in features], dtype=torch.float32),
            mode,
            unit,
            None if mode == "add" else ChosenEncoder.open(suite, layer, indices),
        )
        if mode == "add" and not made.vector_D.any():
            raise SteeringError(
                f"The weighted directions of {', '.join(str(feature.id) for feature in features)} add up to zero, so "
                f"nothing would be steered at layer {layer}. Change their weights."
            )
        return made

    def delta(self, x_BTD: Tensor, strength_B: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """What to add to the residual, in its dtype, and where a chosen feature is active (None for `add`).

        Args:
            x_BTD: Residuals.
            strength_B: One strength for all rows, or one for each, on the residuals' device.

        Returns:
            Something that adds to `(B, T, D)`, and a boolean `(B, T)`.
        """
        self._follow(x_BTD)
        if self.encoder is None and self.unit == "raw":
            return self._constant(x_BTD.dtype, strength_B), None
        strength = strength_B[:, None, None] if isinstance(strength_B, Tensor) else strength_B
        # Autocast would round the products.
        with torch.autocast(x_BTD.device.type, enabled=False):
            if self.encoder is None:
                norms_BT1 = x_BTD.float().norm(dim=-1, keepdim=True)
                return (strength * norms_BT1 * (self.vector_D / self.vector_D.norm())).to(x_BTD.dtype), None
            acts_BTS, active_BTS = self.encoder(x_BTD)
            if self.mode == "ablate":
                change_BTS = -strength * self.weights_S * acts_BTS
            else:
                change_BTS = strength * self.weights_S - acts_BTS
            return (change_BTS.float() @ self.columns_DS.T).to(x_BTD.dtype), active_BTS.any(-1)

    def _constant(self, dtype: torch.dtype, strength_B: Tensor | float) -> Tensor:
        """`strength * vector`, computed once in fp32 and rounded once."""
        if self._added is None or self._added[0] is not strength_B or self._added[1].dtype != dtype:
            strength = strength_B[:, None, None] if isinstance(strength_B, Tensor) else strength_B
            self._added = (strength_B, (strength * self.vector_D).to(dtype))
        return self._added[1]

    def _follow(self, x_BTD: Tensor) -> None:
        if self.vector_D.device != x_BTD.device:
            self.columns_DS, self.weights_S = self.columns_DS.to(x_BTD.device), self.weights_S.to(x_BTD.device)
            self.vector_D = self.vector_D.to(x_BTD.device)
            self._added = None
