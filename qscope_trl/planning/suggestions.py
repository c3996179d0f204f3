"""What would make a run that does not fit fit: other settings, each planned anew, the most effective ones named.

Left out: smaller models, and settings whose effect on the result nobody asked for (features, layers, the data).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qscope_trl.config.plan import PlanConfig
from qscope_trl.errors import QScopeError
from qscope_trl.planning.engines import Engine, read_engine
from qscope_trl.planning.run import Plan, plan
from qscope_trl.planning.settings import settings_of

_LEAST_GAIN = 0.02


class Suggestion(NamedTuple):
    """A change of settings and what it does."""

    flags: str
    total: int
    fits: bool


def suggest(found: Plan, options: PlanConfig, overrides: Sequence[str] = (), *, most: int = 3) -> list[Suggestion]:
    """The changes that save most memory, the best first; none where the plan fits.

    Args:
        found: The plan.
        options: What was planned.
        overrides: Flags of the training command.
        most: Number of changes to name.
    """
    if found.fits:
        return []
    engine = read_engine(options.accelerate_config, options.num_processes)
    tried = []
    for flags, argv, other in _changes(found, engine):
        on = other or engine
        try:
            settings = settings_of(found.method, options, [*overrides, *argv], num_processes=on.num_processes)
            changed = plan(settings, found.method, options, on)
        except QScopeError:
            continue
        if changed.total < (1 - _LEAST_GAIN) * found.total:
            tried.append(Suggestion(flags, changed.total, changed.fits))
    return sorted(tried, key=lambda item: item.total)[:most]


def _changes(found: Plan, engine: Engine) -> Iterator[tuple[str, list[str], Engine | None]]:
    """Flags as shown, flags to plan with, and another engine."""
    settings = found.settings

    def flag(name: str, value: Any, more: str = "") -> tuple[str, list[str], None]:
        return f"--{name} {value}{more}", [f"--{name}", str(value)], None

    if not settings["gradient_checkpointing"]:
        yield flag("gradient_checkpointing", "true")
    if settings["dtype"] == "float32":
        yield flag("dtype", "bfloat16")
    if settings["batch"] > 1:
        half, twice = settings["batch"] // 2, 2 * settings["gradient_accumulation_steps"]
        argv = ["--per_device_train_batch_size", str(half), "--gradient_accumulation_steps", str(twice)]
        yield " ".join(argv), argv, None
    length = "max_length" if found.method == "sft" else "max_completion_length"
    if settings[length] and settings[length] > 1024:
        yield flag(length, settings[length] // 2)
    if not settings["use_peft"]:
        yield "--use_peft true --lora_r 32", ["--use_peft", "true", "--lora_r", "32"], None
        if "8bit" not in settings["optim"]:
            yield flag("optim", "adamw_8bit")
    elif not settings["quantised"] and engine.name in ("single", "ddp"):
        yield flag("load_in_4bit", "true")
    if found.method == "grpo" and found.moments[0].parts["generation"]:
        yield flag("vllm_enable_sleep_mode", "true")
    if found.saes is not None and found.saes.whole_encoders and found.method == "sft":
        yield flag("penalty_kind", "preact_hinge")
    if engine.name != "fsdp2":
        number = max(8, engine.num_processes)
        yield f"FSDP2 on {number} GPUs", [], Engine("fsdp2", number)
    else:
        number = 2 * engine.num_processes
        yield f"--num_processes {number}", [], engine._replace(num_processes=number)
