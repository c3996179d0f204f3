"""The training settings that are planned: parsed by the command they are for, as its launch on several GPUs would.

Flags that are not `plan`'s own override the file, as they do there. Left out: engines that the training configuration
itself names; `engines` reads accelerate's.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
import yaml

from qscope_trl.config.plan import PlanConfig
from qscope_trl.config.rollouts import RewardConfig, RolloutConfig
from qscope_trl.errors import ConfigError
from qscope_trl.parsing import refuse
from qscope_trl.training import grpo_run, sft

# Counts that the plan multiplies by; the training commands leave some of them to fail later.
_COUNTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations",
    "max_length", "max_completion_length",
)  # fmt: skip
_ENGINE_KEYS = ("deepspeed", "fsdp")


def settings_of(method: str, options: PlanConfig, overrides: Sequence[str] = (), *, num_processes: int = 1) -> Any:
    """The training settings, parsed by the command they are for.

    Args:
        method: `sft` or `grpo`.
        options: Names the configuration.
        overrides: Flags of the training command.
        num_processes: Processes of the launch; GRPO's generation batch is spread over them.

    Raises:
        ConfigError: If that command would refuse them, or a count is below 1.
    """
    trl: Any = importlib.import_module("trl")
    module: Any = {"sft": sft, "grpo": grpo_run}[method]
    kind = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[method]
    # Sees a launch of so many processes; accelerate's state, which knows of none, stays as it is.
    launched = type(kind.__name__, (kind,), {"world_size": property(lambda _: num_processes)})
    # transformers refuses bf16 where there is no GPU; a plan for GPUs may be made anywhere.
    anywhere = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]
    try:
        with quiet():
            settings = module.parse(["--config", options.config, *overrides, *anywhere], launched)
    except ConfigError as err:
        _refuse_misspelt_own(overrides, err)
        raise
    except ZeroDivisionError as err:
        raise ConfigError("`per_device_train_batch_size` or `num_generations` is 0; both are 1 or more.") from err
    for name in _COUNTS:
        value = getattr(settings.training, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` is {value}; it is 1 or more.")
    return settings


def detect_method(options: PlanConfig, overrides: Sequence[str] = ()) -> str:
    """`sft` or `grpo`: as asked for, or by keys that only one of the two commands knows.

    A file that cannot be read is left to the parser of either command, which says what is wrong with it.

    Raises:
        ConfigError: If keys of both are there, or of neither.
    """
    if options.method is not None:
        return options.method
    trl: Any = importlib.import_module("trl")
    known = {
        "sft": {item.name for item in fields(trl.SFTConfig)} | {"penalty_group_column"},
        "grpo": {item.name for kind in (trl.GRPOConfig, RewardConfig, RolloutConfig) for item in fields(kind)},
    }
    data = _mapping(options.config)
    given = [*(data or ()), *(word[2:].split("=")[0].replace("-", "_") for word in overrides if word[:2] == "--")]
    only = {
        name: [key for key in given if key in known[name] and key not in known[other]]
        for name, other in (("sft", "grpo"), ("grpo", "sft"))
    }
    if data is None:
        return "grpo" if only["grpo"] else "sft"
    if bool(only["sft"]) is bool(only["grpo"]):
        why = (
            f"it has keys of both: `{only['sft'][0]}` is of SFT, `{only['grpo'][0]}` of GRPO"
            if only["sft"]
            else "none of its keys is of one of them alone"
        )
        raise ConfigError(
            f"'{options.config}' may be for `qscope sft` or `qscope grpo`: {why}. Say which by `--method sft` or "
            f"`--method grpo`."
        )
    return "sft" if only["sft"] else "grpo"


def refuse_engine_of_training(options: PlanConfig, overrides: Sequence[str] = ()) -> None:
    """Raise for an engine that the training configuration names; parsing it would start that engine, too.

    Raises:
        ConfigError: If `deepspeed` or `fsdp` is set there.
    """
    data = _mapping(options.config) or {}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _ENGINE_KEYS:
        parser.add_argument(f"--{name}", nargs="?", const=True, default=data.get(name))
    parser.error = refuse  # type: ignore[method-assign]
    for name, value in vars(parser.parse_known_args(overrides)[0]).items():
        if value:
            raise ConfigError(
                f"`{name}` is {value!r} in the training settings, and engines are planned from accelerate's YAML "
                f"alone. Leave `{name}` out and name the engine by `--accelerate_config FILE`; examples are in "
                f"`configs/accelerate/`."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Building a model of no data gives advice that fits only real ones."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _refuse_misspelt_own(overrides: Sequence[str], err: ConfigError) -> None:
    """A flag that the training command does not know may be a misspelt one of `plan`'s own."""
    own = [f"--{item.name}" for item in fields(PlanConfig)]
    for name in (word.split("=", 1)[0] for word in overrides if word.startswith("--")):
        close = get_close_matches(name, own, n=1, cutoff=0.8)
        if close and str(err).startswith(f"Unknown flag `{name}`"):
            raise ConfigError(f"Unknown flag `{name}`. Did you mean `{close[0]}`?") from err


def _mapping(path: str) -> dict[str, Any] | None:
    """What a file holds, or None for one that the training commands' parser refuses."""
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return data if isinstance(data, dict) and all(isinstance(key, str) for key in data) else None
