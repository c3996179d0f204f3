"""The record of a run: what it says, what resuming makes of it, which features are burnt, and the model card."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qscope_trl import FeatureReward, SAEGRPOTrainer, attach
from qscope_trl.errors import QScopeWarning
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.features.hub import LICENCE
from qscope_trl.monitor.model_card import BEGIN
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.training.checkpoints import MARK_FILE, find_fault
from qscope_trl.training.recording import RunRecorder
from qscope_trl.training.used_features import USED_FILE
from tests.tiny import K, tiny_model
from tests.training.harness import train
from tests.training.penalty_harness import NAMES, callback, make_trainer
from tests.training.rollout_harness import FEATURES, grpo_trainer, parity, policy


def recorders(trainer: Any) -> list[Any]:
    return [item for item in trainer.callback_handler.callbacks if isinstance(item, RunRecorder)]


def used(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((folder / USED_FILE).read_text(encoding="utf-8"))["features"]
    return found


def test_a_run_leaves_what_was_trained_on_its_log_its_seconds_and_its_end(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes, monitor_features=["L3F1"])], logging_steps=2)
    train(trainer)
    record = RunRecord(tmp_path)
    run = record.get("run")
    assert run is not None
    assert FeatureSet.from_dict(run["features"]).ids == FeatureSet.load(NAMES).ids
    assert FeatureSet.from_dict(run["monitors"]).ids == FeatureSet.load(["L3F1"]).ids
    assert (run["trainer"], run["num_processes"], run["penalty"]["penalty_weight"]) == ("SFTTrainer", 1, 0.5)
    assert run["sae"] == {"name": str(saes), "source": str(saes), "revision": None}
    assert run["uses"] == {"L1F3": ["penalty"], "L2F40": ["penalty"]}
    assert run["arguments"]["learning_rate"] == 1e-2
    # The trainer takes its count of operations out of what it tells callbacks.
    wanted = [{k: v for k, v in entry.items() if k != "total_flos"} for entry in trainer.state.log_history]
    assert record.rows("log") == wanted
    overhead = record.rows("overhead")
    assert sum(row["steps"] for row in overhead) == 5
    for row in overhead:
        assert 0 < row["parts"]["penalty"] < row["step_seconds"]
    end = record.get("end")
    assert end is not None
    assert end["step"] == 5
    assert recorders(trainer) == []


def test_used_features_lie_in_every_checkpoint_and_beside_the_model(saes: Path, tmp_path: Path) -> None:
    train(make_trainer(tmp_path, [callback(saes)], save_strategy="steps", save_steps=3))
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert used(folder) == {"L1F3": ["penalty"], "L2F40": ["penalty"]}
    marked = json.loads((tmp_path / "checkpoint-3" / MARK_FILE).read_text())["files"]
    assert USED_FILE in marked
    assert find_fault(tmp_path / "checkpoint-3") is None


def test_what_only_measures_uses_no_feature(saes: Path, tmp_path: Path) -> None:
    train(make_trainer(tmp_path, [callback(saes, weight=0.0)]))
    run = RunRecord(tmp_path).get("run")
    assert run is not None
    assert run["uses"] == {}
    assert not (tmp_path / USED_FILE).exists()


def test_monitors_that_were_trained_on_before_are_named_and_stay_used(saes: Path, tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "first", [callback(saes)])
    train(first)
    first.save_model()
    model = type(first.model).from_pretrained(tmp_path / "first").train()
    chained = [callback(saes, ["L1F9"], monitor_features=["L2F40", "L3F1"])]
    with pytest.warns(QScopeWarning, match=r"1 of the monitors are trained on, .*: L2F40 \(penalty\)"):
        second = make_trainer(tmp_path / "second", chained, model)
    train(second)
    assert used(tmp_path / "second") == {"L1F3": ["penalty"], "L1F9": ["penalty"], "L2F40": ["penalty"]}


@pytest.mark.parametrize("record", [True, False])
def test_a_monitor_that_this_run_penalises_is_named(record: bool, saes: Path, tmp_path: Path) -> None:
    both: dict[str, Any] = {"monitor_features": ["L2F40", "L3F1"], "record": record}
    with pytest.warns(QScopeWarning, match=r"1 of the monitors are trained on, in this run or before it: L2F40 \("):
        make_trainer(tmp_path, [callback(saes, **both)])
    make_trainer(tmp_path / "measured", [callback(saes, weight=0.0, **both)])


def test_a_damaged_list_of_used_features_is_said(saes: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.config._name_or_path = str(tmp_path)
    (tmp_path / USED_FILE).write_text('{"features": {"twelve": []}}')
    with pytest.warns(QScopeWarning, match="cannot be read"):
        make_trainer(tmp_path / "run", [callback(saes)], model)


def test_a_resumed_run_goes_on_in_the_same_record(saes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    train(make_trainer(tmp_path, [callback(saes)], **settings))
    before = [row for row in RunRecord(tmp_path).rows("log") if "loss" in row]
    resumed = make_trainer(tmp_path, [callback(saes)], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    after = [row for row in RunRecord(tmp_path).rows("log") if "loss" in row]
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5]
    assert after[:3] == before[:3]


def test_nothing_is_recorded_if_it_is_turned_off_or_no_training_begins(saes: Path, tmp_path: Path) -> None:
    train(make_trainer(tmp_path / "off", [callback(saes, record=False)]))
    assert list((tmp_path / "off").iterdir()) == []
    trainer = make_trainer(tmp_path / "only", [])
    callbacks, methods = list(trainer.callback_handler.callbacks), dict(trainer.__dict__)
    with attach(trainer, saes, NAMES, sae_k=K):
        assert len(recorders(trainer)) == 1
        trainer.evaluate()
    assert trainer.callback_handler.callbacks == callbacks
    assert {name for name in trainer.__dict__ if "card" in name} == {name for name in methods if "card" in name}
    assert not (tmp_path / "only" / "sae_record").exists()


def test_the_model_card_gains_one_section_that_a_later_card_replaces(saes: Path, tmp_path: Path) -> None:
    features = FeatureSet(
        features=[Feature(layer=1, index=3, label="a | b", evidence={"auroc": 0.91}), Feature(layer=2, index=40)]
    )
    trainer = make_trainer(tmp_path, [callback(saes, features, monitor_features=["L3F1"])], logging_steps=1)
    trainer.create_model_card(model_name="before")
    assert BEGIN not in (tmp_path / "README.md").read_text()
    train(trainer)
    for name in ("first", "second"):
        trainer.create_model_card(model_name=name)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == 1
    assert "second" in text
    assert "| L1F3 | a \\| b | 1 | 0 | 0.910 |" in text
    assert "### Held out features" in text
    rates = [entry["sae/monitor/L3F1/firing_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert f"| L3F1 | held out | {rates[0]:.3f} | {rates[-1]:.3f} |" in text
    assert LICENCE in text
    assert "- qscope_trl\n" in text.split("---")[1]


def test_grpo_records_rewards_and_policy_and_marks_their_features(saes: Path, tmp_path: Path) -> None:
    watched = FeatureReward(["L3F5"], saes, name="watched", scale=0.0, reader="policy", sae_k=K)
    trainer = grpo_trainer(
        tmp_path,
        [parity, watched],
        kind=SAEGRPOTrainer,
        rollout_policy=policy(saes, "amplify_negative", strength=2.0),
    )
    train(trainer)
    run = RunRecord(tmp_path).get("run")
    assert run is not None
    assert run["policy"] == {"kind": "amplify_negative", "strength": 2.0}
    assert {reward["name"]: reward["scale"] for reward in run["rewards"]} == {"watched": 0.0, "rollout_policy": 0.0}
    wanted = [f"L{layer}F{index}" for layer, index, *_ in sorted(FEATURES)]
    assert used(tmp_path) == {name: ["policy amplify_negative"] for name in wanted}
    assert [row["step"] for row in RunRecord(tmp_path).rows("log")][:2] == [1, 2]


def test_a_monitor_that_a_reward_reads_is_named_in_either_order(saes: Path, tmp_path: Path) -> None:
    watched = FeatureReward(["L1F3"], saes, name="watched", scale=0.0, reader="policy", sae_k=K)
    reward = FeatureReward(["L1F3"], saes, name="less", reader="policy", sae_k=K)
    trainer = grpo_trainer(tmp_path, [parity, watched, reward], max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if isinstance(one.message, QScopeWarning)]
    assert any("1 of the monitors are trained on" in words and "L1F3 (reward less)" in words for words in said)


def test_a_reward_in_trls_own_trainer_is_recorded(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(["L1F3"], saes, reader="policy", sae_k=K)
    train(grpo_trainer(tmp_path, [reward]))
    assert used(tmp_path) == {"L1F3": ["reward feature_reward"]}


def test_training_again_wraps_the_card_once(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes)], max_steps=1)
    for _ in range(3):
        train(trainer)
    assert trainer.create_model_card.__wrapped__ == type(trainer).create_model_card.__get__(trainer)
    trainer.create_model_card(model_name="x")
    assert BEGIN in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_list_of_used_features_that_cannot_be_written_ends_no_run(saes: Path, tmp_path: Path) -> None:
    (tmp_path / USED_FILE).mkdir()
    trainer = make_trainer(tmp_path, [callback(saes)], max_steps=1)
    with pytest.warns(QScopeWarning, match=rf"{USED_FILE}' cannot be written .*; training goes on"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_the_date_is_that_of_the_beginning(saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dates = iter(f"2026-01-0{day}" for day in range(1, 9))
    monkeypatch.setattr("qscope_trl.training.recording._now", lambda: next(dates))
    trainer = make_trainer(tmp_path, [callback(saes)], max_steps=1)
    recorder = recorders(trainer)[0]
    recorder.on_train_begin(trainer.args, trainer.state, trainer.control)
    recorder.describe(drift=None)
    run = RunRecord(tmp_path).get("run")
    assert run is not None
    assert run["started"] == "2026-01-01"
