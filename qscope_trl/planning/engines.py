"""Which engine spreads a run over GPUs, read from accelerate's YAML, and what it keeps per parameter.

One process, DDP, FSDP2, or DeepSpeed ZeRO-1, 2, 3 by keys of accelerate's own YAML. Left out: FSDP1, tensor, context
and sequence parallelism, and DeepSpeed JSON files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from qscope_trl.errors import ConfigError
from qscope_trl.files import read_yaml_mapping

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


class Engine(NamedTuple):
    """How parameters, gradients and optimizer states lie on the GPUs."""

    name: str
    """One of `ENGINES`."""

    num_processes: int
    """Processes, one a GPU."""

    reshards: bool = True
    """FSDP2: whether a layer's gathered weights are freed after its forward."""

    offloads_optimizer: bool = False
    """Whether optimizer states lie in the host's memory."""

    offloads_weights: bool = False
    """Whether sharded weights lie in the host's memory."""

    checkpoints: bool = False
    """FSDP2: whether the engine itself checkpoints activations."""

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step."""
        return self.name.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether each GPU keeps a part of the weights."""
        return self.name in ("fsdp2", "zero3")

    @property
    def shards_gradients(self) -> bool:
        """Whether each GPU keeps a part of the gradients."""
        return self.name in ("fsdp2", "zero2", "zero3")

    @property
    def shards_optimizer(self) -> bool:
        """Whether each GPU keeps a part of the optimizer states."""
        return self.name == "fsdp2" or self.is_deepspeed


def read_engine(path: str | None, num_processes: int | None) -> Engine:
    """The engine that an accelerate configuration names.

    Args:
        path: The YAML file; None for one process, or for DDP where `num_processes` is above 1.
        num_processes: Overrides the file's number.

    Raises:
        ConfigError: If the file is missing, no mapping, or names something that is not planned here.
    """
    if path is None:
        number = num_processes or 1
        return Engine("single" if number == 1 else "ddp", number)
    data = read_yaml_mapping(Path(path), what="accelerate configuration", examples="configs/accelerate/")
    kind = str(data.get("distributed_type") or "NO")  # YAML reads a bare NO as false
    number = num_processes or _processes(path, data.get("num_processes"))
    if kind in ("NO", "MULTI_GPU"):
        return Engine("single" if number == 1 else "ddp", number)
    if kind == "FSDP":
        return _fsdp(path, _section(path, data, "fsdp_config"), number)
    if kind == "DEEPSPEED":
        return _deepspeed(path, _section(path, data, "deepspeed_config"), number)
    raise ConfigError(
        f"`distributed_type` in '{path}' is {kind!r}, which is not planned. Planned: NO, MULTI_GPU, FSDP, DEEPSPEED."
    )


def _fsdp(path: str, settings: dict[str, Any], number: int) -> Engine:
    version = settings.get("fsdp_version") or 1
    if str(version) != "2":
        raise ConfigError(
            f"`fsdp_version` in '{path}' is {version}, and only FSDP2 is planned. Set `fsdp_version: 2`; "
            f"`accelerate to-fsdp2` converts a file."
        )
    offloads = _switch(path, settings, "fsdp_offload_params", default=False)
    return Engine(
        "fsdp2",
        number,
        reshards=_switch(path, settings, "fsdp_reshard_after_forward", default=True),
        offloads_optimizer=offloads,
        offloads_weights=offloads,
        checkpoints=_switch(path, settings, "fsdp_activation_checkpointing", default=False),
    )


def _deepspeed(path: str, settings: dict[str, Any], number: int) -> Engine:
    value = settings.get("zero_stage")
    stage = str(value)
    if stage not in ("1", "2", "3"):
        raise ConfigError(
            f"`zero_stage` in '{path}' is {value!r}; 1, 2 and 3 are planned. A DeepSpeed JSON file is not read: write "
            f"`zero_stage` into the YAML."
        )

    def offloads(name: str) -> bool:
        return str(settings.get(name) or "none") not in ("none", "null")

    return Engine(
        f"zero{stage}",
        number,
        offloads_optimizer=offloads("offload_optimizer_device"),
        offloads_weights=stage == "3" and offloads("offload_param_device"),
    )


def _processes(path: str, value: Any) -> int:
    if value is None:
        return 1
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"`num_processes` in '{path}' is {value!r}; it is a whole number, 1 or more. `--num_processes` "
            f"overrides it."
        )
    return int(text)


def _section(path: str, data: dict[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"`{name}` in '{path}' is {section!r}; it is a mapping, as `accelerate config` writes it.")
    return section


def _switch(path: str, settings: dict[str, Any], name: str, *, default: bool) -> bool:
    """A boolean, also one in quotes; the words are those of accelerate's `str_to_bool`."""
    value = settings.get(name)
    text = str(default if value is None else value).lower()
    if text in ("y", "yes", "t", "true", "on", "1"):
        return True
    if text in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ConfigError(f"`{name}` in '{path}' is {value!r}; it is true or false.")
