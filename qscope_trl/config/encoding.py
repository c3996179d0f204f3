"""Settings that every command shares which runs texts through a model and its SAEs."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.values import DTYPES, at_least, layer_list, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureSet


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """Which model and SAEs, and how texts are run through them.

    `demo` as `model` and as `saes` names what is bundled with the package (`qscope_trl.bundled`).
    """

    model: str = field(
        metadata={"help": "Model to encode with: Hub id, folder, or `demo`. Use the model before fine-tuning."}
    )
    saes: str = field(metadata={"help": "SAEs of that model: Hub id, folder, single file, or `demo`."})
    layers: str = field(
        metadata={"help": "Layers to use, from 0: `26,27`, `20-27`, or `all`. Each keeps its encoder in memory."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens kept of each text: its first ones."})
    batch_size: int = field(default=8, metadata={"help": "Texts in one forward."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the model; `auto` is the checkpoint's.", "choices": list(DTYPES)},
    )
    device: str | None = field(default=None, metadata={"help": "Device, such as `cuda:0`. Default: a GPU if any."})
    sae_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the SAEs."})
    sae_k: int | None = field(default=None, metadata={"help": "Active features per token, whatever the SAE says."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})

    def __post_init__(self) -> None:
        self._check_reading()
        if self.layers.strip() != "all":
            layer_list(self.layers, ())

    def _check_reading(self) -> None:
        """What is checked also by commands that can do without layers."""
        one_of("dtype", self.dtype, DTYPES)
        at_least("max_length", self.max_length, 2)
        at_least("batch_size", self.batch_size, 1)

    def layer_list(self, available: tuple[int, ...]) -> tuple[int, ...]:
        """The layers that `layers` names, ascending; `available` are those of `all`."""
        return layer_list(self.layers, available)

    def of_layers(self, found: FeatureSet) -> FeatureSet:
        """The features that are of the chosen layers.

        Raises:
            ConfigError: If there is none.
        """
        layers = self.layer_list(found.layers)
        kept = [feature for feature in found.features if feature.layer in layers]
        if not kept:
            raise ConfigError(
                f"`layers` is {self.layers!r}, and none of the features is of these layers: they are of "
                f"{', '.join(map(str, found.layers))}. Name some of those, or `all`."
            )
        return found.with_features(kept)
