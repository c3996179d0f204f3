"""Drift over a run: limits, resuming, when probes are made and what they cost, other processes, and refusals."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from qscope_trl.errors import AttachError, ConfigError, DataError, QScopeWarning
from qscope_trl.monitor.drift import load_reference, save_reference
from qscope_trl.training import drift, drift_measure, drift_probe, opening
from qscope_trl.training.drift import DriftMonitor, Pace
from qscope_trl.training.drift_measure import REFERENCE_FILE
from tests.tiny import tiny_model, write_saes
from tests.training.drift_harness import NO_LIMITS, make, monitor, rows, texts
from tests.training.harness import tokenized_rows, train

__all__ = ["texts"]  # a fixture


# --- limits ------------------------------------------------------------------------------------------------------


def test_each_limit_is_spoken_of_once(saes: Path, texts: list[str], tmp_path: Path) -> None:
    limits = replace(NO_LIMITS, min_jaccard=0.97, max_kl=1e-6)
    trainer = make(tmp_path, [monitor(texts, saes, every=1, limits=limits)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if one.category is QScopeWarning]
    assert len(said) == 2
    assert "Step 1: the probe texts cross `min_jaccard`, which is 0.97 (" in said[0]
    assert "other features are active at the same tokens than on the frozen model, so the SAE may no longer" in said[0]
    assert "`max_kl`, which is 1e-06" in said[1]
    assert "next-token distributions are others than the frozen one's. Look at `sae/drift/`" in said[1]
    assert [row["action"] for row in rows(tmp_path)] == [None, *["warn"] * 4]
    assert {"L1/min_jaccard", "L2/min_jaccard", "max_kl"} >= set(rows(tmp_path)[-1]["crossed"]) > {"max_kl"}
    assert trainer.state.global_step == 4


def test_drift_stops_the_training_where_that_is_asked_for(saes: Path, texts: list[str], tmp_path: Path) -> None:
    limits = replace(NO_LIMITS, max_kl=1e-6)
    trainer = make(tmp_path, [monitor(texts, saes, every=2, limits=limits, on_drift="stop")], max_steps=8)
    with pytest.warns(QScopeWarning, match=r"Step 2: .*`max_kl`.* Training stops here: go back to an earlier"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [(row["step"], row["action"]) for row in rows(tmp_path)] == [(0, None), (2, "stop")]


class Reporter(TrainerCallback):
    """As trackio and MLflow do, it closes when training ends; what is logged then opens another run."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.is_closed = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert not self.is_closed
        self.steps += [state.global_step] if "sae/drift/kl" in logs else []

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.is_closed = True


@pytest.mark.parametrize("stops", [False, True])
def test_the_last_step_is_measured_before_reporters_close(
    stops: bool, saes: Path, texts: list[str], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or (stops and state.global_step == 3)

    reporter = Reporter()
    trainer = make(tmp_path, [reporter, Stop(), monitor(texts, saes, every=50)])
    train(trainer)
    assert reporter.steps == [0, 3 if stops else 4]
    # Its row of the record's log is there as well, though the record ends with the training.
    logged = [json.loads(line) for line in (tmp_path / "sae_record" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "sae/drift/kl" in row] == reporter.steps


def test_an_end_that_was_not_foreseen_is_measured_as_well(saes: Path, texts: list[str], tmp_path: Path) -> None:
    class StopAfterEvaluation(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer = make(tmp_path, [StopAfterEvaluation(), monitor(texts, saes, every=50)])
    trainer.eval_dataset = tokenized_rows(2)
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 2
    train(trainer)
    assert [row["step"] for row in rows(tmp_path)] == [0, 2]


# --- resuming ----------------------------------------------------------------------------------------------------


def train_from(trainer: Trainer, checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=QScopeWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_resumed_run_compares_with_the_model_it_began_with(saes: Path, texts: list[str], tmp_path: Path) -> None:
    def resumable(**changes: Any) -> Trainer:
        return make(
            tmp_path, [monitor(texts, saes, every=1, **changes)], tiny_model(), save_strategy="steps", save_steps=2
        )

    train(resumable())
    whole = rows(tmp_path)
    train_from(resumable(), tmp_path / "checkpoint-2")
    again = rows(tmp_path)
    assert [row["step"] for row in again] == [0, 1, 2, 2, 3, 4]
    for mine, theirs in zip([again[2], *again[3:]], whole[2:3] + whole[2:], strict=True):
        assert mine["layers"] == theirs["layers"]
        assert mine["kl"] == theirs["kl"] > 0

    with pytest.raises(ConfigError, match=r"has other texts or `max_tokens` than .* delete that file"):
        resumable(max_tokens=220).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = resumable()
    other.callback_handler.callbacks = [c for c in other.callback_handler.callbacks if type(c) is not DriftMonitor]
    other.add_callback(monitor(texts, saes, layers=[1]))
    with pytest.raises(ConfigError, match=r"has other layers than"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    # Into another folder: the reference is looked for beside the checkpoint, and written again.
    elsewhere = resumable()
    elsewhere.args.output_dir = str(tmp_path / "elsewhere")
    train_from(elsewhere, tmp_path / "checkpoint-2")
    assert rows(tmp_path / "elsewhere")[-1]["layers"] == whole[-1]["layers"]
    assert (tmp_path / "elsewhere" / "sae_record" / REFERENCE_FILE).is_file()

    # What another run has left in that folder is none of this one's.
    other = load_reference(tmp_path / "sae_record" / REFERENCE_FILE)
    foreign = {n: one._replace(residuals_ND=-one.residuals_ND) for n, one in other.layers.items()}
    save_reference(tmp_path / "elsewhere" / "sae_record" / REFERENCE_FILE, other._replace(layers=foreign))
    again_elsewhere = resumable()
    again_elsewhere.args.output_dir = str(tmp_path / "elsewhere")
    train_from(again_elsewhere, tmp_path / "checkpoint-2")
    assert rows(tmp_path / "elsewhere")[-1]["layers"] == whole[-1]["layers"]

    (tmp_path / "sae_record" / REFERENCE_FILE).unlink()
    anew = resumable()
    with pytest.warns(QScopeWarning, match=r"resumes at step 2, and the run's record holds no drift reference"):
        anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["kl"] for row in rows(tmp_path) if row["step"] == 2][-1] == 0


# --- cost --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(drift, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_the_interval_keeps_probes_below_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace()
    pace.see_probe(0.5, counts=False)

    def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            pace.begin_step()
            clock.now += seconds
            pace.end_step()
            clock.now += 7.0  # evaluation, saving, loading: none of it is the steps'

    steps(1, 30.0)  # the first, which compiles
    steps(3, 0.1)
    assert not pace.is_known
    assert pace.interval() is None
    assert pace.share is None
    steps(1, 0.1)
    interval = pace.interval()
    assert interval == 334  # 0.5 s at 1.5 % of 0.1 s a step
    steps(interval - 4, 0.1)
    pace.see_probe(0.5, counts=True)
    assert 0.014 < pace.share < drift.MAX_SHARE
    # Steps that have become slower are seen at the next choice, and a slower probe too, which has to be made up for.
    steps(50, 1.0)
    pace.see_probe(2.0, counts=True)
    assert pace.share == pytest.approx(2.5 / (334 * 0.1 + 50))
    assert pace.share > drift.MAX_SHARE
    assert pace.interval() == 217
    steps(217, 1.0)
    pace.see_probe(2.0, counts=True)
    assert pace.share < drift.MAX_SHARE


def test_probes_are_paid_for_where_the_first_steps_were_much_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the latest steps alone the share would still be 2.5 % at step 1000."""
    clock, pace, left = Clock(monkeypatch), Pace(), 4
    pace.see_probe(0.5, counts=False)
    shares = []
    for step in range(1500):
        pace.begin_step()
        clock.now += 10.0 if step < 5 else 0.1
        pace.end_step()
        left -= 1
        if left <= 0 and pace.is_known:
            pace.see_probe(0.5, counts=True)
            left = pace.interval()
        shares.append(pace.share or 0.0)
    assert 0.01 < max(shares[700:]) < drift.MAX_SHARE


def test_probes_come_at_the_interval_that_was_chosen(
    saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    class Ticks(TrainerCallback):
        """A step takes a second; the probe 0.044, for which 1.5 % needs three steps."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 1.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 90.0  # what others do at a step's end, such as generating, is none of its time

    watcher = monitor(texts, saes)
    original = drift.DriftProbe.measure

    def measure(self: Any) -> Any:
        clock.now += 0.044
        return original(self)

    monkeypatch.setattr(drift.DriftProbe, "measure", measure)
    trainer = make(tmp_path, [Ticks(), watcher], max_steps=12)
    train(trainer)
    found = rows(tmp_path)
    # Known after five steps, the first of which is not timed.
    assert [row["step"] for row in found] == [0, 5, 8, 11, 12]
    shares = {e["step"]: e["sae/drift/cost_share"] for e in trainer.state.log_history if "sae/drift/cost_share" in e}
    assert shares[5] == pytest.approx(0.044 / 4)
    assert shares[8] == pytest.approx(2 * 0.044 / 7)
    assert all(row["seconds"] == pytest.approx(0.044) for row in found)


def test_seconds_of_probes_are_in_the_overhead(saes: Path, texts: list[str], tmp_path: Path) -> None:
    train(make(tmp_path, [monitor(texts, saes, every=2)]))
    lines = (tmp_path / "sae_record" / "overhead.jsonl").read_text().splitlines()
    parts = sum(json.loads(line)["parts"].get("drift", 0.0) for line in lines)
    probes = sum(row["seconds"] for row in rows(tmp_path) if row["step"])
    assert parts == pytest.approx(probes, rel=0.2)


# --- other processes, and errors ---------------------------------------------------------------------------------


def test_only_the_main_process_runs_the_probe_unless_the_weights_are_spread() -> None:
    trainer = make(Path("unused"), [])
    assert not drift_probe.is_spread(trainer)
    assert drift_probe.has_logits(trainer)
    trainer.is_fsdp_enabled = True
    assert drift_probe.is_spread(trainer)
    trainer.is_fsdp_enabled = False
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    assert drift_probe.is_spread(trainer)
    assert not drift_probe.has_logits(trainer)


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("when", ["the reference", "the figures"])
def test_what_fails_on_the_main_process_ends_all_of_them(
    is_main: bool, when: str, saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for what the main process tells them, so it tells them that too."""
    probe = drift.DriftProbe(make(tmp_path, []), monitor(texts, saes)._settings)
    told: list[Any] = []

    def broadcast(found: list[Any]) -> None:
        told.append(list(found))
        if not is_main:
            found[:] = [None, "OutOfMemoryError: no memory"]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(opening, "broadcast_object_list", broadcast)
    monkeypatch.setattr(drift_measure, "run_probe", fail)
    probe.trainer = SimpleNamespace(
        model=probe.trainer.model, accelerator=SimpleNamespace(num_processes=2, state=None), args=probe.trainer.args,
        is_world_process_zero=lambda: is_main,
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError if is_main else AttachError, match="no memory"):
        probe.take_reference(0, stored=False) if when == "the reference" else probe.measure()
    assert told == [[None, "OutOfMemoryError: no memory" if is_main else None]]


def test_without_a_record_nothing_is_written(saes: Path, texts: list[str], tmp_path: Path) -> None:
    trainer = make(tmp_path, [monitor(texts, saes, record=False)])
    train(trainer)
    assert not (tmp_path / "sae_record").exists()
    assert any("sae/drift/kl" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("setting", ["every", "max_length", "max_tokens", "batch_size", "kl_top"])
def test_numbers_that_cannot_be_are_refused(setting: str, saes: Path, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"`{setting}` of `DriftMonitor` is -1; it is a whole number from"):
        DriftMonitor(texts, saes, **{setting: -1})


def test_wrong_use_is_refused(saes: Path, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`on_drift` is 'halt'; choose `warn` or `stop`"):
        DriftMonitor(texts, saes, on_drift="halt")  # type: ignore[arg-type]
    for wrong in (["", " "], "one text"):
        with pytest.raises(DataError, match="`texts` of `DriftMonitor` holds no text"):
            DriftMonitor(wrong, saes)
    with pytest.raises(AttachError, match=r"found no trainer .*`callbacks`"):
        monitor(texts, saes).on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    for error, message, watcher in (
        (AttachError, "was given no SAEs, and the trainer has neither", DriftMonitor(texts)),
        (ConfigError, "was given SAEs without `layers`", DriftMonitor(texts, saes)),
        (AttachError, r"is to watch layer 7, but the model has layers 0-3", monitor(texts, saes, layers=[7])),
        (DataError, "has a token after position 0", monitor(["w3", "w4"], saes)),
    ):
        with pytest.raises(error, match=message):
            train(make(tmp_path, [watcher]))
    with pytest.warns(QScopeWarning, match="has 24 tokens; below 200 its figures are rough"):
        make(tmp_path, [monitor(texts[:2], saes)], max_steps=1).train()
    trainer = make(tmp_path, [monitor(texts, saes)])
    trainer.processing_class = None
    with pytest.raises(AttachError, match="`DriftMonitor` needs the trainer's tokenizer"):
        train(trainer)
    narrow = write_saes(tmp_path / "narrow", d_model=16)
    with pytest.raises(AttachError, match=r"reads residuals of width 16, but .* has `hidden_size=32`"):
        train(make(tmp_path, [monitor(texts, narrow)]))
