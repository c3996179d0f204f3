"""Rollouts on the dashboard: what TRL trains on, what the policy changed, and training as it would be without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer

from qscope_trl import FeatureReward, SAEGRPOTrainer, SAEPenaltyCallback
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.training.dashboard import FeatureDashboard
from qscope_trl.training.scores import scoring_of
from tests.tiny import K, tiny_tokenizer
from tests.training.harness import train
from tests.training.rollout_harness import (
    FEATURES,
    Watching,
    features,
    fresh_values,
    grpo_trainer,
    parity,
    policy,
)

NAMES = [f"L{layer}F{index}" for layer, index, *_ in FEATURES]
SETTINGS: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 4, "top": 3, "every": 1, "behaviour": "regex:w1"}


def trained(folder: Path, rewards: list[Any], **changes: Any) -> tuple[Any, Watching]:
    torch.manual_seed(0)
    settings = {"callbacks": [FeatureDashboard(**SETTINGS)], "max_steps": 1, **changes}
    trainer = grpo_trainer(folder, rewards, **settings)
    watching = Watching(trainer)
    train(trainer)
    return trainer, watching


def ids_of(output: dict[str, Any], name: str) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(output[f"{name}_ids"], output[f"{name}_mask"], strict=True)]


def test_rollouts_are_shown_as_they_are_trained_on(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy", scale=0.5)
    torch.manual_seed(0)
    trainer = grpo_trainer(
        tmp_path, [parity, reward], callbacks=[FeatureDashboard(**SETTINGS)], max_steps=1, learning_rate=0.0
    )
    watching = Watching(trainer)
    train(trainer)
    output = watching.outputs[0]
    prompts, completions = ids_of(output, "prompt"), ids_of(output, "completion")
    rows = RunRecord(tmp_path).rows("rollouts")
    assert [row["step"] for row in rows] == [1] * SETTINGS["top"]
    for n, row in enumerate(rows):
        assert row["prompt"] == tiny_tokenizer().decode(prompts[n])
        assert "".join(row["tokens"]) == tiny_tokenizer().decode(completions[n], skip_special_tokens=False)
        assert row["advantage"] == row["advantage_before"] == pytest.approx(float(output["advantages"][n]))
        assert row["policy"] == ""
        values = fresh_values(trainer.model.eval(), prompts[n], completions[n])
        assert list(row["values"]) == NAMES
        for column, name in enumerate(NAMES):
            assert row["values"][name] == pytest.approx(values[:, column].tolist(), rel=2e-3, abs=1e-5)
        assert row["rewards"]["parity"] == parity([completions[n]])[0]
        assert row["rewards"]["feature_reward"] == pytest.approx(-0.5 * row["score"], rel=1e-5)


def test_the_policy_is_named_where_it_acted_with_advantages_before_and_after(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "amplify_negative", strength=3.0)
    _, watching = trained(tmp_path, [parity], kind=SAEGRPOTrainer, rollout_policy=chosen)
    after = watching.outputs[0]["advantages"]
    rows = RunRecord(tmp_path).rows("rollouts")
    assert [row["advantage"] for row in rows] == pytest.approx(after[: len(rows)].tolist())
    for row in rows:
        changed = row["advantage"] != row["advantage_before"]
        assert row["policy"] == ("amplified" if changed else "")
        if changed:
            assert row["advantage"] < row["advantage_before"] < 0
            assert row["score"] > 0
            factor = min(1 + 3.0 * row["score"], 5.0)
            assert row["advantage"] == pytest.approx(factor * row["advantage_before"], rel=1e-5)
    assert {row["policy"] for row in rows} >= {"amplified"}


@pytest.mark.skipif(Version(trl.__version__) < Version("1.7"), reason="screening needs TRL 1.7")
def test_screened_and_steered_rollouts_are_named(saes: Path, tmp_path: Path) -> None:
    trained(tmp_path / "screen", [parity], kind=SAEGRPOTrainer, rollout_policy=policy(saes, "screen", cutoff=1.0))
    rows = RunRecord(tmp_path / "screen").rows("rollouts")
    assert [row["policy"] for row in rows] == ["screened" if row["score"] > 1.0 else "" for row in rows]
    assert {row["policy"] for row in rows} == {"", "screened"}
    assert [row["rewards"]["parity"] is None for row in rows] == [row["policy"] == "screened" for row in rows]
    trained(
        tmp_path / "steer",
        [parity],
        kind=SAEGRPOTrainer,
        rollout_policy=policy(saes, "steered_negative", strength=2.0),
        callbacks=[FeatureDashboard(saes=saes, features=features(), sae_k=K, **{**SETTINGS, "top": 4})],
    )
    rows = RunRecord(tmp_path / "steer").rows("rollouts")
    assert [row["policy"] for row in rows] == ["", "", "", "steered"]


def test_with_a_penalty_alone_the_shown_rollouts_are_read_and_nothing_changes(saes: Path, tmp_path: Path) -> None:
    parameters, outputs = [], []
    for name, more in (("with", [FeatureDashboard(**SETTINGS)]), ("without", [])):
        penalty = SAEPenaltyCallback(saes, features(), 0.5, sae_k=K)
        trainer, watching = trained(
            tmp_path / name, [parity], callbacks=[penalty, *more], learning_rate=0.1, max_steps=2
        )
        parameters.append([p.clone() for p in trainer.model.parameters()])
        outputs.append([output["completion_ids"] for output in watching.outputs])
        assert type(trainer) is GRPOTrainer
        scoring = scoring_of(trainer)
        assert scoring is None or scoring.observers == []
    for mine, theirs in zip(parameters[0], parameters[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for ours, others in zip(outputs[0], outputs[1], strict=True):
        assert torch.equal(ours, others)
    record = RunRecord(tmp_path / "with")
    rows = record.rows("rollouts")
    assert {row["step"] for row in rows} == {1, 2}
    assert all(row["score"] is None for row in rows)
    assert all(len(row["values"][name]) == len(row["tokens"]) for row in rows for name in NAMES)
    # Without texts, features are read on the prompts, which are the data's own.
    assert {row["step"] for row in record.rows("histograms")} == {0, 1, 2}
    assert {row["prompt"] for row in record.rows("samples")} <= {row["prompt"] for row in trainer.train_dataset}
