"""The drop-in: it finds its trainer, resumes, and never stands beside another penalty."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.trainer_callback import ExportableState

from qscope_trl import SAEPenaltyCallback, attach
from qscope_trl.errors import AttachError, QScopeWarning
from qscope_trl.training.callback import STATE_FILE
from tests.tiny import K, tiny_model
from tests.training.harness import train
from tests.training.penalty_harness import NAMES, callback, hook_count, make_trainer, sae_callbacks


def test_a_second_train_call_attaches_again(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes)])
    train(trainer)
    first = len([e for e in trainer.state.log_history if "sae/penalty" in e])
    train(trainer)
    assert len([e for e in trainer.state.log_history if "sae/penalty" in e]) == first == 5


def test_a_callback_added_later_attaches_at_train_begin(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    trainer.add_callback(callback(saes))
    train(trainer)
    assert all("sae/penalty" in e for e in trainer.state.log_history if "loss" in e)


def test_schedule_is_logged_and_reaches_its_ends(saes: Path, tmp_path: Path) -> None:
    cb = callback(saes, weight=1.0, penalty_schedule="warmup", penalty_schedule_steps=4)
    trainer = make_trainer(tmp_path, [cb])
    train(trainer)
    assert [e["sae/penalty_weight"] for e in trainer.state.log_history if "loss" in e] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_resumed_run_equals_uninterrupted_run(saes: Path, tmp_path: Path, logging_steps: int) -> None:
    settings: dict[str, Any] = {
        "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": logging_steps,
    }  # fmt: skip
    penalty = {"weight": 1.0, "penalty_schedule": "decay", "penalty_schedule_steps": 8}
    whole = make_trainer(tmp_path / "whole", [callback(saes, **penalty)], **settings)
    train(whole)
    resumed = make_trainer(tmp_path / "whole", [callback(saes, **penalty)], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    keys = ["sae/penalty_weight", "sae/penalty", "sae/L1F3/mean_pre_act"]
    histories = [
        [[e[key] for key in keys] for e in trainer.state.log_history if "loss" in e] for trainer in (whole, resumed)
    ]
    assert histories[0] == [pytest.approx(entry) for entry in histories[1]]


def test_resuming_with_other_settings_warns(saes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    train(make_trainer(tmp_path, [callback(saes)], **settings))
    resumed = make_trainer(tmp_path, [callback(saes, weight=0.25)], **settings)
    with pytest.warns(QScopeWarning, match=r"`penalty_weight=0.5`, this run says 0.25"):
        resumed.train(resume_from_checkpoint=True)


def test_resuming_a_run_that_had_no_penalty_warns(saes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    train(make_trainer(tmp_path, [], **settings))
    resumed = make_trainer(tmp_path, [callback(saes)], **settings)
    with pytest.warns(QScopeWarning, match=rf"resumes from '.*checkpoint-3', which holds no `{STATE_FILE}`"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class Restorable(SAEPenaltyCallback, ExportableState):
    """A callback of a user's own that `restore_callback_states_from_checkpoint` builds anew."""

    def state(self) -> dict[str, Any]:
        saes, _, k = self.attachment._source
        args = {"saes": str(saes), "features": NAMES, "penalty_weight": 0.5, "sae_k": k}
        return {"args": args, "attributes": {}}


def test_a_restored_callback_takes_the_place_of_the_old_one(saes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = make_trainer(tmp_path, [Restorable(saes, NAMES, 0.5, sae_k=K)], **settings)
    train(whole)
    old = Restorable(saes, NAMES, 0.5, sae_k=K)
    resumed = make_trainer(tmp_path, [old], restore_callback_states_from_checkpoint=True, **settings)
    assert old.attachment.is_attached
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert old not in resumed.callback_handler.callbacks
    assert not old.attachment.is_attached
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    logged = [[e["sae/penalty"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert logged[0] == pytest.approx(logged[1])
    assert hook_count(resumed.model) == 0
    assert "compute_loss" not in vars(resumed)
    assert not sae_callbacks(resumed)


def test_a_callback_that_was_removed_makes_room_for_another(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [first := callback(saes, weight=9.0)])
    trainer.remove_callback(first)
    trainer.add_callback(callback(saes, weight=0.5))
    train(trainer)
    alone = make_trainer(tmp_path, [callback(saes, weight=0.5)])
    train(alone)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert hook_count(trainer.model) == 0


# --- one penalty a trainer -------------------------------------------------------------------------------------------

SECOND = r"A penalty on L1F3, L2F40 is attached .* all features into one FeatureSet, each with its own `weight`"


def test_two_callbacks_are_refused_and_nothing_remains(saes: Path, tmp_path: Path) -> None:
    model, first = tiny_model(), callback(saes)
    before = hook_count(model)
    with pytest.raises(AttachError, match=SECOND):
        make_trainer(tmp_path, [first, callback(saes, ["L3F9"])], model)
    assert not first.attachment.is_attached
    assert hook_count(model) == before


def test_a_callback_added_beside_another_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes)])
    trainer.add_callback(second := callback(saes, ["L3F9"]))
    with pytest.raises(AttachError, match=SECOND):
        train(trainer)
    assert hook_count(trainer.model) == 0
    assert "compute_loss" not in vars(trainer)
    assert not sae_callbacks(trainer)
    trainer.remove_callback(second)
    train(trainer)
    assert all("sae/penalty" in e for e in trainer.state.log_history if "loss" in e)


def test_attach_beside_another_is_refused_and_leaves_the_first(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    with attach(trainer, saes, NAMES, penalty_weight=0.5, sae_k=K) as first:
        with pytest.raises(AttachError, match=SECOND):
            attach(trainer, saes, ["L3F9"], penalty_weight=0.5, sae_k=K)
        assert first.is_attached
        assert first.attach(trainer) is first
        train(trainer)
    with attach(trainer, saes, ["L3F9"], penalty_weight=0.5, sae_k=K) as second:
        assert second.is_attached
    assert hook_count(trainer.model) == 0


def test_callback_outside_any_trainer_names_attach(saes: Path) -> None:
    with pytest.raises(AttachError, match=r"Call `callback.attach\(trainer\)`"):
        callback(saes).on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), SimpleNamespace())
