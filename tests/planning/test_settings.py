from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.cli import main
from qscope_trl.config.plan import PlanConfig
from qscope_trl.errors import ConfigError
from qscope_trl.planning.run import run
from qscope_trl.planning.settings import settings_of
from qscope_trl.planning.suggestions import suggest
from tests.planning import backbone_plans
from tests.planning.runs import planned, write

GRPO: dict[str, Any] = {
    "max_length": None, "sae_features": None, "penalty_weight": None, "reward_functions": ["m.f"],
    "num_generations": 8, "max_completion_length": 128, "gradient_accumulation_steps": 1,
}  # fmt: skip
FSDP2 = str(backbone_plans.ROOT / "configs" / "accelerate" / "fsdp2.yaml")


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "batch", "steps"),
    [
        ({"per_device_train_batch_size": 2}, 16, 1),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 512}, 512, 8),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 2}, 16, 2),
    ],
    ids=["neither", "batch", "steps"],
)
def test_grpo_is_parsed_with_the_processes_of_its_launch(
    changes: dict[str, Any], batch: int, steps: int, tmp_path: Path, small: Path
) -> None:
    options = PlanConfig(config=write(tmp_path, small, **GRPO, **changes), num_processes=8)
    args = settings_of("grpo", options, num_processes=8).training
    assert (args.generation_batch_size, args.steps_per_generation) == (batch, steps)
    generation = next(moment for moment in run(options).moments if moment.name == "generation")
    rows = changes["per_device_train_batch_size"] * steps
    cache = rows * (options.prompt_length + 128) * 23 * 2 * 8 * 128 * 2
    # The cache of this GPU's rows, one layer's once more, and the logits of a token in four copies.
    assert generation.parts["generation"] == cache + cache // 23 + 4 * 4 * rows * 151936


def test_what_one_process_would_refuse_is_refused_for_one(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_batch_size \(2\) must be divisible by num_generations \(8\)"):
        planned(tmp_path, small, per_device_train_batch_size=2, **GRPO)
    with pytest.raises(ConfigError, match=r"generation_batch_size \(12\) must be divisible by num_generations \(8\)"):
        planned(tmp_path, small, options={"num_processes": 6}, per_device_train_batch_size=2, **GRPO)


def test_nothing_remains_of_the_launch_that_was_assumed(tmp_path: Path, small: Path) -> None:
    import trl

    before = trl.SFTConfig, trl.GRPOConfig
    options = PlanConfig(config=write(tmp_path, small, per_device_train_batch_size=2, **GRPO))
    assert settings_of("grpo", options, num_processes=8).training.world_size == 8
    with pytest.raises(ConfigError, match="Unknown flag"):
        settings_of("grpo", options, ["--nothing"], num_processes=8)
    assert (trl.SFTConfig, trl.GRPOConfig) == before
    assert trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).world_size == 1


def test_a_suggested_engine_is_planned_with_its_own_processes(tmp_path: Path, small: Path) -> None:
    changes = {**GRPO, "per_device_train_batch_size": 8, "generation_batch_size": 512}
    options = PlanConfig(config=write(tmp_path, small, **changes), gpu_memory=8)
    better = next(item for item in suggest(run(options), options, most=9) if item.flags == "FSDP2 on 8 GPUs")
    there = PlanConfig(config=options.config, gpu_memory=8, accelerate_config=FSDP2, num_processes=8)
    assert better.total == run(there).total


# --- engines of the training settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--deepspeed", "ds.json"], "`deepspeed` is 'ds.json'"),
        (["--deepspeed=ds.json"], "`deepspeed` is 'ds.json'"),
        (["--fsdp", "full_shard"], "`fsdp` is 'full_shard'"),
        (["--fsdp"], "`fsdp` is True"),
    ],
)
def test_engines_of_the_training_settings_are_refused(
    flags: list[str], shown: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    message = f"{shown} in the training settings.*name the engine by `--accelerate_config FILE`"
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, small, *flags)
    name, value = flags[0].lstrip("-").split("=")[0], shown.split(" is ")[1].strip("'")
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, small, **{name: value if value != "True" else True})


def test_an_engine_that_is_switched_off_is_none(tmp_path: Path, small: Path) -> None:
    assert planned(tmp_path, small, fsdp="", deepspeed="").engine.name == "single"


# --- what is no configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--num_generations", "8"], ["--max_length", "512"], ["--method", "grpo"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No configuration file at '.*'. Examples are in `configs/`"),
        ("", "holds a NoneType, not a mapping from setting to value"),
        ("- 1", "holds a list, not a mapping from setting to value"),
        ("1: 2", "holds a dict, not a mapping from setting to value"),
        ("a: [", "is not YAML"),
    ],
    ids=["missing", "empty", "list", "numbers", "broken"],
)
def test_a_file_that_is_no_configuration_is_refused_as_the_training_commands_do(
    text: str | None, message: str, flags: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    method = flags[1] if "--method" in flags else None
    with pytest.raises(ConfigError, match=message):
        run(PlanConfig(config=str(file), method=method), [] if method else flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "0"], "`max_length` is 0; it is 1 or more"),
        (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size` is 0; it is 1 or more"),
        (["--gradient_accumulation_steps", "-1"], "`gradient_accumulation_steps` is -1; it is 1 or more"),
        (["--gpu_memory", "inf"], "`gpu_memory` is inf; it is a number of GiB above 0"),
        (["--gpu_memory", "1e308"], r"`gpu_memory` is 1e+308; it is a number of GiB above 0"),
    ],
)
def test_sizes_that_are_none_end_the_command_without_a_traceback(
    flags: list[str], message: str, tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", write(tmp_path, small), *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0; it is 1 or more"),
        (
            {"per_device_train_batch_size": 0, "generation_batch_size": 8},
            "`per_device_train_batch_size` or `num_generations` is 0; both are 1 or more",
        ),
        ({"num_generations": 0}, "`per_device_train_batch_size` or `num_generations` is 0; both are 1 or more"),
        ({"max_completion_length": 0}, "`max_completion_length` is 0; it is 1 or more"),
        (
            {"max_completion_length": "null"},
            "`max_completion_length` is null, so completions are as long as the model",
        ),
    ],
)
def test_grpo_sizes_that_are_none_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, small: Path
) -> None:
    file = Path(write(tmp_path, small, **{**GRPO, "per_device_train_batch_size": 8, **changes}))
    file.write_text(file.read_text().replace("'null'", "null"))
    with pytest.raises(ConfigError, match=message):
        run(PlanConfig(config=str(file)))
