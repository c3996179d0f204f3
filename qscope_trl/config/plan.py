"""Settings of `qscope plan`, in the manner of `config`. What it plans is a training YAML with settings of its own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from qscope_trl.errors import ConfigError

METHODS = ("sft", "grpo")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `qscope plan` needs to know beyond the training configuration."""

    config: str = field(metadata={"help": "Training configuration (YAML) of `qscope sft` or `qscope grpo`."})
    method: str | None = field(
        default=None,
        metadata={
            "help": "Command the configuration is for. By default told by keys that only one of them knows.",
            "choices": list(METHODS),
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of `accelerate launch`, which names the engine: DDP, FSDP2 or DeepSpeed."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "Processes, one a GPU. By default what the accelerate configuration says, or 1. Without an "
            "accelerate configuration, more than one means DDP."
        },
    )
    gpu_memory: float = field(default=80.0, metadata={"help": "Memory of one GPU, in GiB."})
    layers: str | None = field(
        default=None,
        metadata={"help": "Layers of features that are not found yet: `26,27`, or a range such as `20-27`."},
    )
    num_features: int = field(default=10, metadata={"help": "With `--layers`: features a layer."})
    prompt_length: int = field(default=512, metadata={"help": "GRPO: tokens of the longest prompt."})
    json: str | None = field(default=None, metadata={"help": "File to write the plan to, for programs."})

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(f"`method` is {self.method!r}; choose one of {', '.join(METHODS)}.")
        for name, value in (
            ("num_processes", self.num_processes),
            ("num_features", self.num_features),
            ("prompt_length", self.prompt_length),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}; it is 1 or more.")
        if not (self.gpu_memory > 0 and math.isfinite(self.gpu_memory * 2**30)):
            raise ConfigError(f"`gpu_memory` is {self.gpu_memory!r}; it is a number of GiB above 0, such as 80.")
        if self.layers is not None:
            self.layer_list()

    def layer_list(self) -> tuple[int, ...]:
        """The layers that `layers` names, ascending.

        Raises:
            ConfigError: If `layers` is not of the documented form.
        """
        chosen: set[int] = set()
        for part in (self.layers or "").split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ConfigError(f"`layers` is {self.layers!r}; write it as `26,27` or `20-27`.")
            chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        return tuple(sorted(chosen))
