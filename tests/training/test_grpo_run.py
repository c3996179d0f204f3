"""`qscope grpo`: the shipped configuration runs, and what cannot work is refused before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl
import yaml
from packaging.version import Version

import qscope_trl
from qscope_trl.cli import main
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.training import grpo_run
from qscope_trl.training.callback import SAEPenaltyCallback
from tests.tiny import prompt_completion_rows, tiny_model, tiny_tokenizer, write_saes

ROOT = Path(qscope_trl.__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "SAE-Res-Tiny-W1K-L0_8", [1, 2], d_sae=1024)
    rows = [{"prompt": row["prompt"]} for row in prompt_completion_rows(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "odd.jsonl").write_text('{"text": "w2"}\n')
    (folder / "my_rewards.py").write_text(
        "number = 3\n\n\n"
        "def parity(completion_ids, **kwargs):\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "sae_path": str(folder / "SAE-Res-Tiny-W1K-L0_8"),
        "reward_functions": ["my_rewards.parity"],
        "reward_features": ["L1F5", "L2F900"],
        "reward_scale": 0.5,
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "beta": 0.1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def build(assets: Path, *argv: str) -> Any:
    return grpo_run.build_trainer(grpo_run.parse(["--config", str(assets / "run.yaml"), *argv]))


def test_command_trains_and_saves(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(assets))
    assert main(["grpo", "--config", str(assets / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert f"Model saved to {tmp_path / 'out'}" in capsys.readouterr().out


def test_every_part_of_a_run_comes_from_the_settings(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(assets))
    trainer = build(
        assets,
        *["--rollout_policy", "amplify_negative", "--rollout_strength", "3", "--rollout_features", "L2F7"],
        *["--sae_features", "L1F9", "--penalty_weight", "0.1", "--monitor_features", "L1F11"],
    )
    assert trainer.reward_func_names == ["parity", "feature_reward", "monitor"]
    assert set(trainer.rollout_scoring.readers) == {"feature_reward", "monitor", "rollout_policy"}
    assert trainer.rollout_scoring.policy.strength == 3
    assert any(isinstance(c, SAEPenaltyCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"sae/penalty", "sae/rollouts/reweighted"} <= logged
    if Version(trl.__version__) >= Version("1.0"):  # before, reward functions had no way to log
        assert {"sae/feature_reward/score", "sae/monitor/score"} <= logged
    assert trainer.rollout_scoring.num_forwards == 0


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--sae_path", ""], ConfigError, "`sae_path` is missing"),
        (["--penalty_weight", "1"], ConfigError, "`penalty_weight` is set, but no `sae_features` to penalise"),
        (["--penalty_group_column", "lang"], ConfigError, "`penalty_group_column` is for `qscope sft`"),
        (["--data_eval_path", "x.json"], ConfigError, "`data_eval_path` is set, but `eval_strategy` is 'no'"),
        (["--reward_functions", "parity"], ConfigError, "Reward function `parity` is no dotted path"),
        (["--reward_functions", "no_such.parity"], ConfigError, "Module `no_such` of reward function .* cannot be"),
        (
            ["--reward_functions", "my_rewards.even"],
            ConfigError,
            "`my_rewards` has no function `even`. It has: parity",
        ),
        (["--reward_functions", "my_rewards.number"], ConfigError, "`my_rewards` has no function `number`"),
        (["--dataset_name", "{assets}/odd.jsonl"], DataError, "columns `text`, and no `prompt` to generate from"),
        (["--model_name_or_path", "{assets}/none"], ConfigError, "No trainer for '.*none' with these settings"),
        (
            ["--rollout_polcy", "screen"],
            ConfigError,
            "Unknown flag `--rollout_polcy`. Did you mean `--rollout_policy`",
        ),
    ],
)
def test_runs_that_cannot_work_are_refused(
    assets: Path, argv: list[str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(assets))
    with pytest.raises(error, match=message):
        build(assets, *[word.format(assets=assets) for word in argv])


def without(assets: Path, tmp_path: Path, *names: str, **changes: Any) -> Any:
    settings = yaml.safe_load((assets / "run.yaml").read_text())
    for name in names:
        del settings[name]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    return grpo_run.build_trainer(grpo_run.parse(["--config", str(tmp_path / "run.yaml")]))


def test_a_run_without_rewards_is_refused(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Nothing is rewarded: set `reward_functions`"):
        without(assets, tmp_path, "reward_functions", "reward_features")


def test_penalise_does_not_take_the_rewards_features(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(assets))
    with pytest.raises(ConfigError, match="`rollout_policy` is 'penalise', but no features are named"):
        without(assets, tmp_path, rollout_policy="penalise")


def test_a_policy_without_features_is_refused(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(assets))
    with pytest.raises(ConfigError, match="`rollout_policy` is 'screen', but no features are named"):
        without(assets, tmp_path, "reward_features", rollout_policy="screen")


@pytest.mark.skipif(Version(trl.__version__) < Version("1.0"), reason="one advantage per rollout only")
def test_the_shipped_configuration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = "configs/grpo_feature_reward.yaml"
    small = ["--output_dir", str(tmp_path), "--max_steps", "1", "--per_device_train_batch_size", "8"]
    trainer = grpo_run.build_trainer(
        grpo_run.parse(["--config", path, *small, "--max_completion_length", "12", "--dataloader_pin_memory", "false"])
    )
    trainer.train()
    assert any("sae/monitor/score" in entry for entry in trainer.state.log_history)
    # The commented block for a large model is a configuration too.
    block = [line[2:] for line in Path(path).read_text().split("# ---")[-1].splitlines()[1:]]
    large = yaml.safe_load("\n".join(block))
    known = {name for part in vars(grpo_run.parse(["--config", path])).values() for name in vars(part)}
    assert set(large) <= known
