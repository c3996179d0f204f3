"""The dashboard where things do not fit: another resumed run, models that cannot generate, too little memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qscope_trl.errors import ConfigError, QScopeWarning
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.training import dashboard as module
from qscope_trl.training.dashboard import FeatureDashboard
from qscope_trl.training.dashboard_reading import weights_are_spread
from tests.tiny import tiny_model
from tests.training.harness import train
from tests.training.test_dashboard import PROMPTS, SETTINGS, make, penalty


def settings(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "behaviour": None, "max_new_tokens": 2, **changes}


@pytest.mark.parametrize(("prompts", "count"), [(PROMPTS, 2), (["w8", "w9", "w10"], 5)], ids=["fewer", "others"])
def test_a_resumed_run_with_other_prompts_compares_with_its_own_first_generations(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str], count: int
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = FeatureDashboard(PROMPTS, ["w3 w4"], **settings(num_samples=5))
    train(make(tmp_path, [penalty(saes), first], **saving))
    compared: list[list[str]] = []

    def things(step: int, rows: Any, first: Any, penalised: Any) -> dict[str, Any]:
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in first]
        compared.append([row["step"] for row in first])
        return {}

    monkeypatch.setattr(module, "sample_things", things)
    second = FeatureDashboard(prompts, ["w3 w4"], **settings(num_samples=count))
    resumed = make(tmp_path, [penalty(saes), second], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert compared == [[4] * min(count, SETTINGS["top"])]


def test_a_model_that_cannot_generate_is_asked_for_no_generations(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny_model()), "can_generate", classmethod(lambda cls: False))
    for given in (settings(prompts=PROMPTS), settings(behaviour="regex:w1")):
        with pytest.raises(ConfigError, match="`Qwen3ForCausalLM` cannot generate"):
            train(make(tmp_path, [penalty(saes), FeatureDashboard(texts=["w3 w4"], **given)], max_steps=1))
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard(texts=["w3 w4"], **settings())], max_steps=1)
    trainer.train_dataset = [{**row, "prompt": "w9"} for row in trainer.train_dataset]
    train(trainer)
    record = RunRecord(tmp_path)
    assert record.rows("samples") == []
    assert record.rows("texts") != []


def test_too_little_memory_for_it_ends_no_training(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module.FeatureValues, "__call__", refuse)
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, ["w3 w4"], **settings())], max_steps=1)
    with pytest.warns(QScopeWarning, match=r"shows nothing at step \d: CUDA out of memory") as caught:
        trainer.train()
    assert len([one for one in caught if "shows nothing" in str(one.message)]) == 2
    assert trainer.state.global_step == 1


def test_weights_that_tensor_parallelism_spreads_are_told() -> None:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace()), model=tiny_model())
    assert not weights_are_spread(trainer)
    next(trainer.model.parameters()).placements = ()
    assert weights_are_spread(trainer)


def test_seconds_between_steps_lengthen_no_step(saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("qscope_trl.training.recording.time.perf_counter", lambda: now[0])

    def slow(self: Any, *_: Any) -> None:
        now[0] += 1000.0

    monkeypatch.setattr(FeatureDashboard, "_measure_here", slow)
    train(make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, ["w3 w4"], **settings(every=1))], max_steps=3))
    rows = RunRecord(tmp_path).rows("overhead")
    assert sum(row["parts"].get("dashboard", 0.0) for row in rows) == 4000.0
    assert sum(row["step_seconds"] for row in rows) == 0.0
