"""Only checkpoints that were written to their end are resumed from, and a killed run goes on as if it were not.

The kills are real ones: another process, SIGKILL, between checkpoints and inside each step of writing one.
"""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from qscope_trl import (
    CompleteCheckpoints,
    FeatureReward,
    QScopeWarning,
    SAEGRPOTrainer,
    attach,
    last_complete_checkpoint,
)
from qscope_trl.errors import CheckpointError
from qscope_trl.training.checkpoints import MARK_FILE, UNFINISHED_FILE, find_fault
from qscope_trl.training.metrics import STATE_FILE
from tests.forked import run_forked
from tests.tiny import K
from tests.training import killed_run
from tests.training.harness import train
from tests.training.penalty_harness import NAMES, callback, make_trainer
from tests.training.rollout_harness import features, grpo_trainer, parity, policy

SAVING: dict[str, Any] = {"max_steps": 5, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}


def saved_run(saes: Path, folder: Path, **changes: Any) -> None:
    train(make_trainer(folder, [callback(saes)], **{**SAVING, **changes}))


def test_every_checkpoint_of_a_penalised_run_is_marked_with_the_size_of_every_file(saes: Path, tmp_path: Path) -> None:
    saved_run(saes, tmp_path)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    for step in (2, 4, 5):
        folder = tmp_path / f"checkpoint-{step}"
        marked = json.loads((folder / MARK_FILE).read_text())["files"]
        there = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        del there[MARK_FILE]
        assert marked == there
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "sae_penalty_state.json"} <= marked.keys()


def test_attach_marks_checkpoints_too_and_takes_its_mark_keeper_off(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], **SAVING)
    before = list(trainer.callback_handler.callbacks)
    with attach(trainer, saes, NAMES, sae_k=K, penalty_weight=0.5):
        train(trainer)
    assert trainer.callback_handler.callbacks == before
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


class AttachesLate(TrainerCallback):
    trainer: Any = None
    saes: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            attach(self.trainer, self.saes, NAMES, sae_k=K, penalty_weight=0.5)


def test_a_penalty_that_is_attached_in_the_middle_of_training_saves_and_marks(saes: Path, tmp_path: Path) -> None:
    late = AttachesLate()
    late.trainer, late.saes = make_trainer(tmp_path, [late], **SAVING), saes
    train(late.trainer)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "unfinished": (lambda f: (f / MARK_FILE).rename(f / UNFINISHED_FILE), "it was not written to its end"),
    "no-state": (
        lambda f: [(f / n).unlink() for n in (MARK_FILE, "trainer_state.json")],
        "it has no whole `trainer_state.json`",
    ),
    "file-missing": (lambda f: (f / "optimizer.pt").unlink(), "`optimizer.pt` is missing"),
    "file-short": (lambda f: shorten(f / "model.safetensors"), r"`model.safetensors` has \d+ bytes instead of \d+"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_refused(name: str, saes: Path, tmp_path: Path) -> None:
    saved_run(saes, tmp_path)
    damage, message = DAMAGE[name]
    damage(tmp_path / "checkpoint-5")
    with pytest.warns(QScopeWarning, match=rf"checkpoint-5' is passed over: .*{message}"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert find_fault(tmp_path / "checkpoint-4") is None


def test_the_trainers_own_choice_of_a_half_written_checkpoint_is_refused_before_the_first_step(
    saes: Path, tmp_path: Path
) -> None:
    """Without its optimizer, transformers would go on with a fresh one and say nothing."""
    saved_run(saes, tmp_path)
    (tmp_path / "checkpoint-4" / MARK_FILE).rename(tmp_path / "checkpoint-4" / UNFINISHED_FILE)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = make_trainer(tmp_path, [callback(saes)], **SAVING)
    before = {name: p.detach().clone() for name, p in resumed.model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"checkpoint-4' cannot be resumed from: it was not"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    loaded = dict(resumed.model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in loaded.items()), "it was not loaded at all"
    assert resumed.state.global_step == 4


def test_checkpoints_of_other_programs_are_let_through(tmp_path: Path) -> None:
    train(make_trainer(tmp_path, [], **SAVING))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_a_mark_that_is_deleted_by_hand_lets_a_checkpoint_through(saes: Path, tmp_path: Path) -> None:
    """Optimizers are deleted on purpose, to save space."""
    saved_run(saes, tmp_path)
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    assert "delete `checkpoint_complete.json` there" in str(find_fault(tmp_path / "checkpoint-5"))
    (tmp_path / "checkpoint-5" / MARK_FILE).unlink()
    assert find_fault(tmp_path / "checkpoint-5") is None


def test_checkpoints_after_the_penalty_was_taken_off_are_let_through(saes: Path, tmp_path: Path) -> None:
    cb = callback(saes)

    class Detaches(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                cb.detach()

    trainer = make_trainer(tmp_path, [cb, Detaches()], **SAVING)
    train(trainer)
    assert (tmp_path / "checkpoint-2" / MARK_FILE).is_file()
    assert not (tmp_path / "checkpoint-4" / MARK_FILE).is_file()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert "_save_checkpoint" not in trainer.__dict__


def test_a_checkpoint_is_uploaded_when_it_is_marked(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, bool] = {}

    def push(_trainer: Any, folder: str) -> None:
        uploaded[Path(folder).name] = (Path(folder) / MARK_FILE).is_file() and find_fault(Path(folder)) is None

    monkeypatch.setattr(SFTTrainer, "_push_from_checkpoint", push)
    trainer = make_trainer(tmp_path, [callback(saes)], **SAVING)
    trainer.args.push_to_hub = True
    train(trainer)
    assert uploaded == {"checkpoint-2": True, "checkpoint-4": True, "checkpoint-5": True}


def test_another_output_folder_of_the_trainers_is_marked_too(saes: Path, tmp_path: Path) -> None:
    """As in a hyperparameter search."""
    trainer = make_trainer(tmp_path, [callback(saes)], **SAVING)
    trainer._get_output_dir = lambda trial: str(tmp_path / "run-0")
    train(trainer)
    assert last_complete_checkpoint(tmp_path / "run-0") == str(tmp_path / "run-0" / "checkpoint-5")
    assert (tmp_path / "run-0" / "checkpoint-5" / STATE_FILE).is_file()
    assert last_complete_checkpoint(tmp_path) is None


def test_files_of_ours_can_be_read_by_whoever_can_read_the_trainers(saes: Path, tmp_path: Path) -> None:
    saved_run(saes, tmp_path)
    folder = tmp_path / "checkpoint-5"
    modes = {(folder / name).stat().st_mode for name in (MARK_FILE, STATE_FILE, "trainer_state.json")}
    assert len(modes) == 1


def test_a_path_object_is_resumed_from_and_from_another_folder(saes: Path, tmp_path: Path) -> None:
    saved_run(saes, tmp_path / "first")
    resumed = make_trainer(tmp_path / "second", [callback(saes)], **SAVING)
    resumed.train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-4")
    assert resumed.state.global_step == 5


@pytest.mark.parametrize(("limit", "left"), [(1, [5]), (2, [4, 5]), (None, [2, 4, 5])])
def test_older_checkpoints_are_deleted_after_the_new_one_is_whole(
    limit: int | None, left: list[int], tmp_path: Path
) -> None:
    train(make_trainer(tmp_path, [CompleteCheckpoints(limit)], **SAVING))
    assert sorted(int(f.name.split("-")[1]) for f in tmp_path.glob("checkpoint-*")) == left


def test_half_written_and_older_runs_checkpoints_do_not_push_whole_ones_out(saes: Path, tmp_path: Path) -> None:
    first = {**SAVING, "max_steps": 6}
    train(make_trainer(tmp_path, [CompleteCheckpoints()], **first))
    (tmp_path / "checkpoint-6" / MARK_FILE).rename(tmp_path / "checkpoint-6" / UNFINISHED_FILE)
    # A second run in the same folder, which saves under lower numbers.
    train(make_trainer(tmp_path, [CompleteCheckpoints(2)], **{**SAVING, "max_steps": 3, "save_steps": 3}))
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]
    assert find_fault(tmp_path / "checkpoint-3") is None


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The loss falls, so the first checkpoint is the best by this measure.
    changes |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, [CompleteCheckpoints(1)], **{**SAVING, "max_steps": 4, **changes})
    train(trainer)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


# --- killed and resumed ----------------------------------------------------------------------------------------------

# Where the run is killed, and the checkpoint it goes on from. `trainer.train` of the killed run saves at 2 and 4 of 5.
KILLS = {
    "between-checkpoints": ("step:3", 2),
    "before-the-weights": ("save_file:4", 2),
    "inside-the-weights": ("half_weights:4", 2),
    "inside-the-optimizer": ("half_optimizer:4", 2),
    "inside-the-random-numbers": ("half_random:4", 2),
    "before-the-trainers-state": ("state:4", 2),
    "before-the-mark": ("mark:4", 2),
    "after-the-mark": ("step:5", 4),
}


def run_killable(saes: Path, folder: Path, kill: str, resume: bool, processes: int = 1) -> int:
    """The exit code of the last process, which is the one that is killed; the other may end of itself before it is."""
    script = Path(__file__).with_name("killed_run.py")
    done = run_forked(script, str(saes), str(folder), kill, str(int(resume)), processes=processes)
    if kill == "never":
        assert done.returncode == 0, done.stderr[-3000:]
    return done.codes[-1]


def assert_same_end(found: Path, wanted: Path) -> None:
    """Weights, the course of the loss, and every metric of ours: as in a run that nothing happened to.

    But for times, and TRL's `num_tokens`, which it counts anew from each start.
    """
    ours, theirs = (torch.load(folder / "weights.pt") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [json.loads((folder / "log.json").read_text()) for folder in (found, wanted)]
    for log in logs:
        for entry in log:
            for key in [k for k in entry if k.endswith(("_runtime", "_per_second", "train_loss", "num_tokens"))]:
                del entry[key]
    assert logs[0] == logs[1]
    assert sum("sae/penalty_weight" in entry for entry in logs[0]) == 2


def end_in_this_process(saes: Path, folder: Path, resume: bool) -> None:
    with warnings.catch_warnings():
        # That half-written checkpoints are passed over is asserted above.
        warnings.simplefilter("ignore")
        killed_run.run(str(saes), folder, resume)


@pytest.fixture(scope="module")
def undisturbed(saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    end_in_this_process(saes, folder, False)
    return folder


@pytest.mark.pinned
def test_a_checkpoint_that_is_written_over_is_unfinished_from_its_first_byte(
    undisturbed: Path, saes: Path, tmp_path: Path
) -> None:
    """A second run in the same folder; the files it had not reached yet are the first run's, of the same size."""
    end_in_this_process(saes, tmp_path, False)
    shutil.rmtree(tmp_path / "checkpoint-5")
    (tmp_path / "weights.pt").unlink()
    assert run_killable(saes, tmp_path, "state:4", False) == -signal.SIGKILL
    assert find_fault(tmp_path / "checkpoint-4") is not None
    end_in_this_process(saes, tmp_path, True)
    assert json.loads((tmp_path / "resumed.json").read_text()) == str(tmp_path / "checkpoint-2")
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.pinned
@pytest.mark.parametrize("name", KILLS)
def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    name: str, undisturbed: Path, saes: Path, tmp_path: Path
) -> None:
    kill, goes_on_from = KILLS[name]
    assert run_killable(saes, tmp_path, kill, False) == -signal.SIGKILL
    assert not (tmp_path / "weights.pt").exists()
    end_in_this_process(saes, tmp_path, True)
    assert json.loads((tmp_path / "resumed.json").read_text()) == str(tmp_path / f"checkpoint-{goes_on_from}")
    assert_same_end(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def undisturbed_by_two(saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed_by_two")
    run_killable(saes, folder, "never", False, processes=2)
    return folder


@pytest.mark.distributed
def test_processes_that_resume_from_different_checkpoints_are_all_stopped(
    saes: Path, undisturbed_by_two: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(undisturbed_by_two, tmp_path / "copy")
    assert run_killable(saes, folder, "apart:0", True, processes=2) != 0
    for rank in range(2):
        message = (folder / f"apart{rank}.txt").read_text()
        assert message.startswith("The processes go on from different steps: 2, 4, by process.")


@pytest.mark.distributed
@pytest.mark.parametrize(
    # The second process dies while it writes its part, when the first has perhaps long written its own.
    "name",
    ["inside-the-random-numbers", pytest.param("between-checkpoints", marks=pytest.mark.slow)],
)
def test_two_processes_of_which_one_is_killed_end_as_if_it_were_not(
    saes: Path, undisturbed_by_two: Path, tmp_path: Path, name: str
) -> None:
    kill, goes_on_from = KILLS[name]
    assert run_killable(saes, tmp_path, kill, False, processes=2) == -signal.SIGKILL
    assert not (tmp_path / "weights.pt").exists()
    run_killable(saes, tmp_path, "never", True, processes=2)
    assert json.loads((tmp_path / "resumed.json").read_text()) == str(tmp_path / f"checkpoint-{goes_on_from}")
    assert_same_end(tmp_path, undisturbed_by_two)


@pytest.mark.pinned
def test_grpo_with_a_rollout_policy_resumes_to_the_same_end(saes: Path, tmp_path: Path) -> None:
    """Rollouts are drawn anew after the resume, from the random numbers that the checkpoint holds."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 2}

    def make() -> Any:
        return grpo_trainer(
            tmp_path, [parity, FeatureReward(features(), saes, sae_k=K, reader="policy", schedule="warmup")],
            kind=SAEGRPOTrainer, rollout_policy=policy(saes, "amplify_negative"),
            callbacks=[callback(saes)], **settings,
        )  # fmt: skip

    torch.manual_seed(0)
    whole = make()
    train(whole)
    resumed = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted = whole.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.model.state_dict().items())
    logs = [[e for e in t.state.log_history if "reward" in e][-1] for t in (whole, resumed)]
    for key in [k for k in logs[0] if k.startswith(("sae/", "rewards/", "loss"))]:
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-6), key
