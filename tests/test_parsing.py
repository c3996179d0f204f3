from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trl

from qscope_trl.config.training import DataConfig, MonitorConfig, PenaltyConfig, SAEConfig
from qscope_trl.errors import ConfigError
from qscope_trl.parsing import add_flags, parse_flags, parse_training, suggestion

CLASSES = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, SAEConfig, PenaltyConfig, MonitorConfig, DataConfig)


def parse(argv: list[str], text: str | None = None, folder: Path | None = None) -> tuple[Any, ...]:
    if text is not None:
        assert folder is not None
        (folder / "run.yaml").write_text(text)
        argv = ["--config", str(folder / "run.yaml"), *argv]
    return parse_training(["--bf16", "false", *argv], CLASSES, prog="qscope sft", description="")


def test_a_flag_overrides_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    text = "penalty_weight: 0.5\nlearning_rate: 2e-5\nsae_path: here\nlora_r: 4\n"
    _, training, model, sae, penalty, _, _ = parse(["--penalty-weight=2", "--lora_r", "8"], text, tmp_path)
    assert (penalty.penalty_weight, training.learning_rate, sae.sae_path, model.lora_r) == (2.0, 2e-5, "here", 8)
    assert penalty == PenaltyConfig(penalty_weight=2.0)


def test_config_flag_takes_an_equals_sign_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("penalty_weight: 3\n")
    assert parse([f"--config={tmp_path / 'run.yaml'}"])[4].penalty_weight == 3


@pytest.mark.parametrize("text", ["sae_features: zh.yaml", "sae_features: [zh.yaml]"])
def test_one_string_stands_for_a_list_of_one(text: str, tmp_path: Path) -> None:
    assert parse([], text, tmp_path)[3].sae_features == ["zh.yaml"]
    assert parse(["--sae_features", "L1F2", "L3F4"])[3].sae_features == ["L1F2", "L3F4"]


def test_booleans_can_be_switched_off_by_flag() -> None:
    assert parse(["--no_penalty_shift"])[4].penalty_shift is False
    assert parse(["--penalty_shift", "false"])[4].penalty_shift is False


def test_environment_variables_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSCOPE_TEST", "before")
    parse([], "env:\n  QSCOPE_TEST: 5\n", tmp_path)
    assert os.environ["QSCOPE_TEST"] == "5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("penalty_wieght: 1", "Unknown key `penalty_wieght` in '.*run.yaml'. Did you mean `penalty_weight`?"),
        ("learning_rat: 1", "Did you mean `learning_rate`?"),
        ("zzzzzz: 1", "Unknown key `zzzzzz`.*`--help` lists what there is"),
        ("penalty_weight: abc", "`penalty_weight` in '.*' is 'abc'; a number is needed"),
        ("penalty_weight: [1]", r"`penalty_weight` in '.*' is \[1\]; a number is needed"),
        ("penalty_weight: true", "is True; a number is needed"),
        ("penalty_weight:", "is None; a number is needed"),
        ("penalty_shift: 3", "is 3; true or false is needed"),
        ("max_steps: 1.5", "is 1.5; a whole number is needed"),
        ("sae_features: [1]", r"is \[1\]; a list or null is needed"),
        ("sae_path: 3", "is 3; a string or null is needed"),
        ("penalty_kind: hinge", "is 'hinge'; choose one of preact_hinge, topk_act"),
        ("eval_strategy: no", "is False; a string is needed. YAML reads a bare no, yes, off or on as a boolean"),
        ("eval_strategy: sometimes", "is 'sometimes'; choose one of no, steps, epoch"),
        ("dtype: float8", "is 'float8'; choose one of"),
        ("env: 3", "`env` in '.*' is 3"),
        ("- a", "holds a list, not a mapping"),
        ("a: [", "is not YAML"),
        ("", "holds a NoneType, not a mapping"),
        ("penalty_weight: -1", "`penalty_weight` is -1"),
        ("load_in_8bit: true\nload_in_4bit: true", "The settings do not fit together"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([], text, tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--penalty_wieght", "1"], "Unknown flag `--penalty_wieght`. Did you mean `--penalty_weight`?"),
        (["--penalty-wieght=1"], "Unknown flag `--penalty-wieght`. Did you mean `--penalty-weight`?"),
        (["--penalty_w", "1"], "Unknown flag `--penalty_w`."),
        (["--penalty_weight", "abc"], "penalty_weight.*invalid float value: 'abc'"),
        (["--penalty_kind", "hinge"], "invalid choice: 'hinge'"),
        (["--penalty_weight"], "expected one argument"),
        (["stray"], "The settings do not fit together: .*stray"),
        (["--config", "none.yaml"], "No configuration file at 'none.yaml'"),
        (["--config", "a", "--config", "b"], "`--config` was given 2 times"),
        (["--config"], "expected one argument"),
    ],
)
def test_a_wrong_flag_says_what_is_wrong(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(argv)


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name in ("--config", "--sae_path", "--penalty_weight", "--learning_rate", "--use_peft", "--dataset_name"):
        assert name in shown


def test_resuming_takes_true_or_a_folder(tmp_path: Path) -> None:
    assert parse([], "resume_from_checkpoint: true", tmp_path)[1].resume_from_checkpoint is True
    assert parse([], "resume_from_checkpoint: out/checkpoint-3", tmp_path)[1].resume_from_checkpoint is not None


@dataclass(frozen=True, kw_only=True)
class Small:
    needed: str = field(metadata={"help": "Needed."})
    some_size: int | None = field(default=None, metadata={"help": "Size."})
    kind: str = field(default="a", metadata={"help": "Kind.", "choices": ["a", "b"]})
    many: list[str] = field(default_factory=list, metadata={"help": "Many."})


def test_flags_of_a_dataclass_make_the_dataclass() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Small)
    given = ["--needed", "x", "--some-size", "3", "--many", "p", "--many", "q"]
    assert Small(**vars(parser.parse_args(given))) == Small(needed="x", some_size=3, many=["p", "q"])
    assert Small(**vars(parser.parse_args(["--needed", "x", "--some_size=4"]))) == Small(needed="x", some_size=4)
    assert "Default: a." in parser.format_help()


@dataclass(frozen=True, kw_only=True)
class Placed:
    run_dir: str = field(metadata={"help": "A run.", "is_positional": True})
    size: int = field(default=2, metadata={"help": "Size."})


@pytest.mark.parametrize("argv", [["here", "--size", "3"], ["--size", "3", "here"]], ids=["first", "last"])
def test_a_positional_field_is_a_word_of_its_own(argv: list[str]) -> None:
    assert parse_flags(argv, Placed, prog="qscope x", description="") == Placed(run_dir="here", size=3)
    with pytest.raises(ConfigError, match="The following arguments are required: RUN_DIR"):
        parse_flags([], Placed, prog="qscope x", description="")


def test_suggestion_is_the_nearest_name() -> None:
    assert suggestion("sae_pth", ["sae_path", "sae_k"]) == " Did you mean `sae_path`?"
