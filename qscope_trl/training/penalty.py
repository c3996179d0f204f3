"""Penalties on SAE features, as pure functions of residuals.

Shape legend: `B` rows, `T` positions, `D` d_model, `S` chosen features of a layer, `G` groups. Left out on purpose:
masks over tokens, normalisation and weights over training steps; those belong to the attachment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.features import Feature, FeatureId
from qscope_trl.ops.chosen import pre_activations
from qscope_trl.ops.feature_rank import feature_rank
from qscope_trl.sae.chosen import thresholded
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE


class LayerFeatures(NamedTuple):
    """Chosen features of one layer, as tensors."""

    ids: tuple[FeatureId, ...]
    """Addresses, in the order of the columns."""

    W_SD: Tensor
    """Selected rows of `W_enc`."""

    b_S: Tensor
    """Selected entries of `b_enc`."""

    thresholds_GS: Tensor
    """Hinge thresholds; row 0 is the default, row g the g-th named group."""

    weights_S: Tensor
    """Factor of each feature."""

    jump_S: Tensor | None
    """Thresholds of a JumpReLU SAE."""

    sae: TopKSAE | None
    """Whole encoder of a TopK SAE, where a penalty needs it."""

    sae_dtype: torch.dtype | None = None
    """Dtype of the whole encoder's matrix; None is that of the residuals it reads. The chosen rows stay fp32."""

    stored: TopKSAE | None = None
    """What `sae` was cast from: rounding twice would change it."""

    def for_residual(self, residual: Tensor) -> LayerFeatures:
        """The same features on a residual's device, a whole encoder also in its dtype; itself if they are already."""
        device, sae = residual.device, self.sae
        if sae is not None:
            dtype = self.sae_dtype or residual.dtype
            if sae.W_enc.device != device or sae.W_enc.dtype != dtype:
                sae = (self.stored or sae).copy_to(device, dtype)
        if self.W_SD.device == device and sae is self.sae:
            return self
        return LayerFeatures(
            self.ids,
            self.W_SD.to(device),
            self.b_S.to(device),
            self.thresholds_GS.to(device),
            self.weights_S.to(device),
            None if self.jump_S is None else self.jump_S.to(device),
            sae,
            self.sae_dtype,
            self.stored or self.sae,
        )


class PenaltyTerms(NamedTuple):
    """What a penalty gives for each token."""

    penalty_BT: Tensor
    """Weighted sum over features; differentiable with respect to the residual."""

    values_BTS: Tensor
    """Value of each feature that the metrics average: pre-activation, or activation after TopK. No gradient."""

    active_BTS: Tensor
    """Whether each feature counts as firing at each token."""


def open_layer(
    suite: SAESuite, layer: int, features: Sequence[Feature], groups: Sequence[str], kind: str
) -> LayerFeatures:
    """Read the rows of the chosen features of one layer; the whole encoder only for `topk_act` on a TopK SAE.

    A whole encoder stays in its file, mapped into memory, until it is used on another device or in another dtype: the
    processes of a node share it, and each GPU gets one copy.
    """
    whole_encoder = kind == "topk_act" and suite.spec(layer).activation == "topk"
    indices = [feature.index for feature in features]
    rows = suite.encoder_rows(layer, indices)
    thresholds = [[f.threshold_for(group) for f in features] for group in (None, *groups)]
    return LayerFeatures(
        ids=tuple(feature.id for feature in features),
        W_SD=rows.W,
        b_S=rows.b,
        thresholds_GS=torch.tensor(thresholds, dtype=torch.float32),
        weights_S=torch.tensor([f.weight for f in features], dtype=torch.float32),
        jump_S=rows.jump,
        sae=suite.load(layer, decoder=False, mmap=True) if whole_encoder else None,
        sae_dtype=suite.dtype,
    )


def preact_hinge(x_BTD: Tensor, features: LayerFeatures, group_BT: Tensor | None = None) -> PenaltyTerms:
    """SASFT's penalty: `sum_s weight_s * relu(f_s(x) - threshold_s)` per token, `f` before TopK and ReLU.

    Computed in fp32 also under autocast. The gradient reaches `x` wherever a pre-activation is above its threshold,
    whether or not the feature is among the top k.

    Args:
        x_BTD: Residuals.
        features: The layer's chosen features.
        group_BT: Row of `thresholds_GS` for each token; None means row 0 everywhere.

    Returns:
        Per-token terms. Reduction over tokens is the caller's.

    References:
        SASFT, arXiv:2507.14894, the loss of section 4; Qwen-Scope, arXiv:2605.11887, section 7.
        Deviation: SASFT's released code divides by the number of features and sums over 32 accumulation steps; here
        features are summed with their weights and the caller averages over the tokens of the whole optimizer step.
    """
    f_BTS = pre_activations(x_BTD, features.W_SD, features.b_S)
    thresholds = features.thresholds_GS[0] if group_BT is None else features.thresholds_GS[group_BT]
    above = f_BTS - thresholds
    return PenaltyTerms((above.relu() * features.weights_S).sum(-1), f_BTS.detach(), above.detach() > 0)


def topk_act(x_BTD: Tensor, features: LayerFeatures, group_BT: Tensor | None = None) -> PenaltyTerms:
    """Penalty on what the SAE really shows: `sum_s weight_s * a_s(x)` per token, `a` after TopK and ReLU.

    Which features are active is decided by the whole encoder (`ops.feature_rank`), without a graph; the gradient flows
    through the active features' own rows only, as it does through TopK. Thresholds are not used. For ReLU and JumpReLU
    SAEs "active" means above zero or above the SAE's own threshold.

    Args:
        x_BTD: Residuals.
        features: The layer's chosen features, opened for `topk_act`.
        group_BT: Ignored; groups only choose thresholds.

    Returns:
        Per-token terms. Reduction over tokens is the caller's.
    """
    del group_BT
    if features.sae is not None:
        sae = features.sae
        indices = torch.tensor([i.index for i in features.ids], device=x_BTD.device)
        acts_BTS, active_BTS = feature_rank(x_BTD, sae.W_enc, sae.b_enc, sae.k or 0, indices)
    else:
        acts_BTS, active_BTS = thresholded(pre_activations(x_BTD, features.W_SD, features.b_S), features.jump_S)
    return PenaltyTerms((acts_BTS * features.weights_S).sum(-1), acts_BTS.detach(), active_BTS)


PENALTIES = {"preact_hinge": preact_hinge, "topk_act": topk_act}
"""Penalty functions by the name used in configs."""

VALUE_NAMES = {"preact_hinge": "mean_pre_act", "topk_act": "mean_act"}
"""Name of each penalty's per-feature mean in the metrics."""
