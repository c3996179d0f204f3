"""The alarm in a trainer: it reads the log, speaks once, is the same after resuming, and changes no training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from qscope_trl import Feature, FeatureSet, SAEPenaltyCallback
from qscope_trl.demo import assets
from qscope_trl.errors import QScopeWarning
from qscope_trl.monitor.alarm import MONITORS, PENALISED, TEXT, Alarm, AlarmLimits
from qscope_trl.training import alarm as alarm_module
from qscope_trl.training.alarm import KEY, AlarmWatch
from qscope_trl.training.callback import STATE_FILE
from tests.training.harness import arguments, train
from tests.training.penalty_harness import callback, make_trainer

LOOSE = AlarmLimits(fallen=0.9, stayed=0.9, patience=1)
# Features of Chinese text that `qscope find` ranks first in two layers of the bundled model, and their mean
# pre-activations on English text.
GAMED = FeatureSet(features=(Feature(layer=0, index=124, threshold=-3.58),))
_MEANS = {740: -4.93, 1073: -4.09, 1010: -4.71, 169: -3.77, 839: -4.87}
HELD_OUT = FeatureSet(features=tuple(Feature(layer=3, index=n, threshold=mean) for n, mean in _MEANS.items()))


def fake_trainer(history: list[dict[str, Any]] | None = None, **changes: Any) -> Any:
    state = SimpleNamespace(global_step=0, log_history=history or [])
    found = {
        "state": state, "args": SimpleNamespace(report_to=[]), "is_world_process_zero": lambda: True,
        "callback_handler": SimpleNamespace(callbacks=[]), **changes,
    }  # fmt: skip
    return SimpleNamespace(**found)


def log(watch: AlarmWatch, trainer: Any, step: int, **values: float) -> dict[str, float]:
    """One event through the trainer's log, as `Trainer.log` keeps it."""
    trainer.state.global_step = step
    logs = {"loss": 1.0, **{{"penalised": PENALISED, "monitors": MONITORS}[name]: v for name, v in values.items()}}
    watch.see(logs, trainer)
    trainer.state.log_history.append({**logs, "step": step})
    return logs


def test_the_log_tells_when_the_features_are_silent_and_the_monitors_are_not() -> None:
    watch, trainer = AlarmWatch(LOOSE), fake_trainer()
    assert log(watch, trainer, 1, penalised=10.0, monitors=5.0)[KEY] == 0.0
    with pytest.warns(QScopeWarning, match="At step 2 the penalised features are at 10 % of their first value"):
        assert log(watch, trainer, 2, penalised=1.0, monitors=5.0)[KEY] == 1.0
    # It goes on, and was said.
    assert log(watch, trainer, 3, penalised=1.0, monitors=5.0)[KEY] == 1.0
    assert log(watch, trainer, 4, penalised=1.0, monitors=1.0)[KEY] == 0.0


def test_rates_that_others_log_between_events_are_read() -> None:
    watch, trainer = AlarmWatch(LOOSE), fake_trainer([{TEXT: 0.3, "step": 0}])
    log(watch, trainer, 1, penalised=10.0)
    log(watch, trainer, 2, penalised=1.0)
    trainer.state.log_history.append({TEXT: 0.29, "step": 2})
    with pytest.warns(QScopeWarning, match="`sae/text/rate` at 29 % after 30 %"):
        log(watch, trainer, 3, penalised=1.0)


@pytest.mark.parametrize("logs", [{"eval_loss": 1.0, "eval_runtime": 1.0}, {"train_loss": 1.0, "train_runtime": 1.0}])
def test_an_event_that_is_not_of_a_training_step_gains_no_alarm(logs: dict[str, float]) -> None:
    watch, trainer = AlarmWatch(LOOSE), fake_trainer()
    log(watch, trainer, 1, penalised=10.0, monitors=5.0)
    before = dict(logs)
    watch.see(logs, trainer)
    assert logs == before


def test_without_anything_that_could_stay_nothing_is_said() -> None:
    watch, trainer = AlarmWatch(LOOSE), fake_trainer()
    assert all(KEY not in log(watch, trainer, n, penalised=value) for n, value in enumerate((9.0, 1.0, 1.0), 1))


def test_a_resumed_run_is_followed_from_its_beginning_and_not_told_again() -> None:
    watch, trainer = AlarmWatch(LOOSE), fake_trainer()
    log(watch, trainer, 1, penalised=10.0, monitors=5.0)
    with pytest.warns(QScopeWarning, match="At step 2"):
        log(watch, trainer, 2, penalised=1.0, monitors=5.0)
    resumed = AlarmWatch(LOOSE)
    heard: list[Alarm] = []
    resumed.listeners.append(heard.append)
    logs = log(resumed, fake_trainer(list(trainer.state.log_history)), 3, penalised=1.0, monitors=5.0)
    assert logs[KEY] == 1.0
    assert heard == []


def test_a_rule_that_is_a_reward_is_not_held_out_also_in_the_history_of_a_resumed_run() -> None:
    """TRL adds rewards' metrics to a training event as it is logged; a `RuleMonitor`'s come in events of their own."""
    reward, monitor = {"sae/rule/reward": 0.5, "loss": 1.0}, {"sae/rule/monitor": 0.5}
    values = {PENALISED: 10.0}, {PENALISED: 1.0}
    for rule, wanted in ((reward, None), (monitor, 1.0)):
        history = [{**event, "step": n} for n, own in enumerate(values, 1) for event in (rule, {"loss": 1.0, **own})]
        history = [{**history[0], **history[1]}, {**history[2], **history[3]}] if rule is reward else history
        watch, trainer = AlarmWatch(LOOSE), fake_trainer([*history, {**rule, "step": 2}])
        assert log(watch, trainer, 3, penalised=1.0).get(KEY) == wanted


def test_another_training_of_the_same_trainer_begins_anew() -> None:
    watch, trainer = AlarmWatch(LOOSE), fake_trainer()
    log(watch, trainer, 1, penalised=10.0, monitors=5.0)
    trainer.state = SimpleNamespace(global_step=0, log_history=[])
    assert log(watch, trainer, 1, penalised=1.0, monitors=5.0)[KEY] == 0.0


def test_only_the_main_process_speaks_and_every_process_logs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(alarm_module.dashboard_wandb, "alert", lambda title, message: sent.append(message))
    logged = []
    for is_main in (True, False):
        args = SimpleNamespace(report_to=["wandb"])
        trainer = fake_trainer(args=args, is_world_process_zero=lambda is_main=is_main: is_main)
        watch = AlarmWatch(LOOSE)
        heard: list[Alarm] = []
        watch.listeners.append(heard.append)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            logged.append([log(watch, trainer, n, penalised=v, monitors=5.0) for n, v in enumerate((9.0, 1.0))])
        assert len(told) == is_main
        assert [alarm.kind for alarm in heard] == ["monitors"]
    assert logged[0] == logged[1]
    assert len(sent) == 1
    assert "the held-out monitors at 100 % of theirs" in sent[0]


# --- in a trainer --------------------------------------------------------------------------------------------------


def test_first_values_are_those_of_the_first_step_whatever_is_logged_when(saes: Path, tmp_path: Path) -> None:
    found = []
    for logging_steps in (1, 3):
        cb = callback(saes, monitor_features=["L3F9"])
        trainer = make_trainer(tmp_path, [cb], logging_steps=logging_steps)
        train(trainer)
        found.append(cb.attachment.metrics.alarm.first)
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert found[0] == found[1]
    assert set(found[0]) == {PENALISED, MONITORS}
    assert first[PENALISED] != found[0][PENALISED]  # a mean over three steps, two of them after an update


def test_training_is_the_same_with_and_without_the_alarm(saes: Path, tmp_path: Path) -> None:
    ends = []
    for limits in (AlarmLimits(), None):
        cb = callback(saes, monitor_features=["L3F9"], alarm=limits)
        trainer = make_trainer(tmp_path, [cb])
        train(trainer)
        history = [{k: v for k, v in e.items() if k != KEY and "_per_second" not in k and "runtime" not in k}
                   for e in trainer.state.log_history]  # fmt: skip
        ends.append((trainer.model.state_dict(), history, torch.get_rng_state()))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1] == ends[1][1]
    assert torch.equal(ends[0][2], ends[1][2])


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"alarm": None}], ids=["nothing is penalised", "switched off"])
def test_no_alarm_where(saes: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, [callback(saes, monitor_features=["L3F9"], **settings)])
    train(trainer)
    assert all(KEY not in entry for entry in trainer.state.log_history)


def test_checkpoints_keep_the_first_values(saes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    cb = callback(saes, monitor_features=["L3F9"])
    whole = make_trainer(tmp_path, [cb], **settings)
    train(whole)
    first = cb.attachment.metrics.alarm.first
    assert json.loads((tmp_path / "checkpoint-3" / STATE_FILE).read_text())["first"] == first
    again = callback(saes, monitor_features=["L3F9"])
    resumed = make_trainer(tmp_path, [again], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.attachment.metrics.alarm.first == first
    alarms = [[e[KEY] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert alarms[0] == alarms[1]


def test_a_run_without_monitors_says_that_nothing_is_held_out(
    saes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="qscope_trl"):
        make_trainer(tmp_path, [callback(saes, monitor_features=["L3F9"])])
        assert "held out" not in caplog.text
        make_trainer(tmp_path, [callback(saes, weight=0.0)])
        assert "held out" not in caplog.text
        make_trainer(tmp_path, [callback(saes)])
    assert "no feature is held out: `monitor_features` is empty" in caplog.text


def bundled_trainer(tmp_path: Path, callbacks: list[Any], steps: int) -> Trainer:
    return SFTTrainer(
        str(assets.MODEL),
        args=arguments(
            SFTConfig, output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, max_length=64,
            learning_rate=5e-4, optim="adamw_torch", model_init_kwargs={"dtype": torch.float32},
        ),
        train_dataset=Dataset.from_list(assets.rows("sft_train")[:128]),
        callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.pinned  # what older ones make of the data leads elsewhere
def test_a_gamed_penalty_raises_the_alarm_and_a_row_is_kept(tmp_path: Path) -> None:
    cb = SAEPenaltyCallback(assets.saes(), GAMED, 5.0, monitor_features=HELD_OUT)
    trainer = bundled_trainer(tmp_path, [cb], 10)
    with pytest.warns(QScopeWarning, match="the held-out monitors at .* % of theirs"):
        trainer.train()
    course = [entry[KEY] for entry in trainer.state.log_history if "loss" in entry]
    assert course[0] == 0.0
    assert course[-1] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "sae_record" / "alarms.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["monitors"]
    assert rows[0]["step"] == course.index(1.0) + 1
    assert rows[0]["shares"][PENALISED] < 0.5
    assert rows[0]["shares"][MONITORS] > 0.8
