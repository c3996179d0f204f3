"""Which SAE files a run downloads, how much of them it reads, and what its features need on a GPU.

Sizes of Qwen-Scope repositories follow from their names; local files are opened, headers only. Left out: other Hub
repositories, whose sizes only a download would tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qscope_trl.config.plan import PlanConfig
from qscope_trl.errors import ConfigError, FeatureSetError
from qscope_trl.planning.memory import Scratch
from qscope_trl.planning.trace import trace_function
from qscope_trl.sae.loading import parse_qwen_scope_name
from qscope_trl.training.launch import load_features
from qscope_trl.training.penalty import LayerFeatures, preact_hinge

# The counting kernel of `ops.feature_rank` on a GPU: one slab of fp32 pre-activations, for chunks of so many features.
_SLAB_ELEMENTS, _CHUNK_FEATURES = 8 * 1024 * 1024, 4096


class SAEFacts(NamedTuple):
    """The SAE files of a run."""

    source: str
    is_local: bool
    layers: tuple[int, ...]
    d_model: int
    d_sae: int
    num_features: int
    """Chosen features of all layers: penalised, rewarded and monitored."""

    whole_encoders: bool

    @property
    def bytes_on_disk(self) -> int:
        """Files of all layers: four fp32 tensors each."""
        return len(self.layers) * 4 * (2 * self.d_sae * self.d_model + self.d_sae + self.d_model)

    @property
    def bytes_read(self) -> int:
        """Of them, what is read through the memory map: chosen rows and biases, or whole encoders."""
        rows = self.num_features * 4 * (self.d_model + 1)
        encoders = len(self.layers) * 4 * self.d_sae * (self.d_model + 1) if self.whole_encoders else 0
        return rows + encoders


def chosen_layers(entries: Sequence[str] | None, options: PlanConfig) -> dict[int, int]:
    """Features by layer, of a feature file or a list of names; `--layers` stands in for a file that is not there yet.

    Raises:
        ConfigError: If the file is missing and no layers are given.
        FeatureSetError: If the file is unreadable.
    """
    if not entries:
        return {}
    path = Path(entries[0])
    if len(entries) == 1 and path.suffix in (".yaml", ".yml", ".json") and not path.is_file():
        if options.layers is None:
            raise ConfigError(
                f"The feature file '{path}' is not there yet, so its layers are not known. Write it with `qscope "
                f"find`, or plan ahead with `--layers 20-22 --num_features 10`."
            )
        return dict.fromkeys(options.layer_list(), options.num_features)
    found = load_features(entries)
    return {layer: len(found.for_layer(layer)) for layer in found.layers}


def merged(choices: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Features by layer of several choices together."""
    total: dict[int, int] = {}
    for choice in choices:
        for layer, number in choice.items():
            total[layer] = total.get(layer, 0) + number
    return dict(sorted(total.items()))


def sae_facts(sae: Any, features: Mapping[int, int], d_model: int, num_layers: int, *, whole: bool) -> SAEFacts:
    """Sizes of the SAE files of some layers.

    Args:
        sae: `SAEConfig`.
        features: Number of chosen features by layer.
        d_model: Width of the model.
        num_layers: Decoder layers of the model.
        whole: Whether whole encoders are needed.

    Raises:
        ConfigError: If the width of the SAEs is not known without a download.
        FeatureSetError: If a layer does not exist.
        CheckpointError: If local files cannot be read.
    """
    layers, number = tuple(features), sum(features.values())
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise FeatureSetError(
            f"Features are chosen at layer {beyond[0]}, but the model has layers 0 to {num_layers - 1}. Choose layers "
            f"of this model."
        )
    source = str(sae.sae_path)
    if Path(source).exists():
        from qscope_trl.sae.suite import SAESuite

        spec = SAESuite.from_pretrained(source, layers=layers, k=sae.sae_k).spec(layers[0])
        if spec.d_model != d_model:
            raise ConfigError(
                f"The SAEs in '{source}' read residuals of width {spec.d_model}, but the model's have {d_model}. Use "
                f"the SAEs made for this model."
            )
        return SAEFacts(source, True, layers, d_model, spec.d_sae, number, whole and spec.activation == "topk")
    named = parse_qwen_scope_name(source)
    if named is None:
        raise ConfigError(
            f"The size of the SAEs '{source}' is not known: its name is not Qwen-Scope's, and nothing is downloaded "
            f"for a plan. Download them, and pass the folder as `--sae_path`."
        )
    return SAEFacts(source, False, layers, d_model, named[0], number, whole)


def penalty_scratch(
    features: Mapping[int, int], monitors: Mapping[int, int], shape: tuple[int, int, int], dtype: torch.dtype,
    encoder: SAEFacts | None, encoder_dtype: torch.dtype, *, has_gradient: bool,
) -> Scratch:  # fmt: skip
    """What the penalty needs, by running `preact_hinge` on tensors without data.

    Residuals themselves cost nothing: they are the layers' outputs, which the backward keeps in any case.

    Args:
        features: Penalised features by layer.
        monitors: Measured ones.
        shape: Rows, tokens and width of a micro-batch's residuals.
        dtype: Of the residuals.
        encoder: SAEs whose whole encoders are needed, or None.
        encoder_dtype: Of those on the GPU.
        has_gradient: Whether the penalty's weight is above 0.
    """
    together = merged([features, monitors])
    if not together:
        return Scratch()
    d_model = shape[-1]
    resident = sum(4 * number * (d_model + 4) for number in together.values())
    most = max(together.values())
    chosen = LayerFeatures(
        ids=(),
        W_SD=torch.empty(most, d_model),
        b_S=torch.empty(most),
        thresholds_GS=torch.empty(1, most),
        weights_S=torch.empty(most),
        jump_S=None,
        sae=None,
    )
    held, forward, backward = trace_function(lambda x: preact_hinge(x, chosen).penalty_BT, shape, dtype)
    if not has_gradient:
        held = backward = 0
    if encoder is not None:
        item = encoder_dtype.itemsize
        resident += len(features) * encoder.d_sae * (item * d_model + 4)
        forward = max(forward, held + _encoder_scratch(shape[0] * shape[1], d_model, dtype, encoder_dtype))
    layers = len(together)
    residual = shape[0] * shape[1] * d_model * dtype.itemsize
    return Scratch(
        resident=resident,
        held=layers * held,
        forward=(layers - 1) * held + forward,
        backward=(layers - 1) * held + backward + (len(features) - 1) * residual if has_gradient else 0,
        gradients=len(features) * residual if has_gradient else 0,
    )


def _encoder_scratch(tokens: int, d_model: int, dtype: torch.dtype, encoder_dtype: torch.dtype) -> int:
    """The slab, the residuals of undecided tokens; where dtypes differ, fp32 copies of a chunk and of residuals."""
    copies = tokens * d_model * dtype.itemsize
    if dtype != encoder_dtype:
        chunk = max(_CHUNK_FEATURES, _SLAB_ELEMENTS // tokens)
        copies = 4 * d_model * (chunk + 2 * tokens)
    return 4 * _SLAB_ELEMENTS + copies
