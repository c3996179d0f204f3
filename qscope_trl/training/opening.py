"""From names of features to tensors that fit a model: every mismatch is refused here, before anything is hooked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qscope_trl.errors import AttachError
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.layers import d_model, find_layers
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.penalty import LayerFeatures, open_layer


def open_features(
    model: nn.Module, suite: SAESuite, chosen: FeatureSet, groups: Sequence[str], kind: str
) -> dict[int, LayerFeatures]:
    """The chosen features of each layer as tensors.

    Args:
        model: The model whose residuals will be read.
        suite: The SAEs.
        chosen: Features of these SAEs.
        groups: Names of groups, in the order of the thresholds' rows after the default.
        kind: `preact_hinge` reads only the chosen rows, `topk_act` the whole encoder.

    Returns:
        Features by layer.

    Raises:
        AttachError: If the SAEs read residuals of another width.
        FeatureSetError: If the features belong to another model or SAE.
        CheckpointError: If the SAEs cannot be read.
    """
    width, num_layers = d_model(model), len(find_layers(model))
    opened: dict[int, LayerFeatures] = {}
    for layer in chosen.layers:
        spec = suite.spec(layer)
        if spec.d_model != width:
            raise AttachError(
                f"The SAE of layer {layer} in '{suite.source}' reads residuals of width {spec.d_model}, but "
                f"`{type(model).__name__}` has `hidden_size={width}`. Use the SAEs made for this model."
            )
        fingerprints = {layer: suite.fingerprint(layer)} if layer in chosen.sae_fingerprints else None
        chosen.check_fits(
            d_model=width, num_layers=num_layers, d_sae=spec.d_sae, sae=suite.source, fingerprints=fingerprints
        )
        opened[layer] = open_layer(suite, layer, chosen.for_layer(layer), groups, kind)
    return opened
