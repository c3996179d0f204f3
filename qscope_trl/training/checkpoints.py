"""Telling a whole checkpoint from one that was being written when the run was killed.

The trainer writes a checkpoint file by file into its final folder, and on resuming takes the folder with the highest
number; missing files are partly passed over there (optimizer, random numbers). So a checkpoint is unfinished by a file
of that name from before its first byte until every process has written its part; then that file becomes its mark, with
the size of every other file. Left out: checksums; a file that kept its size and lost its content is not noticed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl.errors import CheckpointError, QScopeWarning
from qscope_trl.files import write_whole
from qscope_trl.training.stack import calling_trainer, resumed_folder

MARK_FILE = "checkpoint_complete.json"
"""File in each whole checkpoint: the size in bytes of every other file."""

UNFINISHED_FILE = "checkpoint_unfinished.json"
"""File in a checkpoint while it is written."""

_FOLDER = re.compile(r"checkpoint-(\d+)")
_TRAINER_STATE = "trainer_state.json"
_METHODS = ("_save_checkpoint", "_push_from_checkpoint")


class CompleteCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks every checkpoint when all processes have written it, and only then deletes older ones and uploads it.

    `qscope sft` and `qscope grpo` use it, and a penalty brings one along (without the deleting) where the trainer has
    none. Training that resumes from a half-written checkpoint, or from different ones on different processes, is
    stopped before its first step, on all of them.

    Args:
        save_total_limit: Whole checkpoints to keep beside the best one; None keeps all. Use it instead of the
            trainer's own setting, which deletes the last whole checkpoint while the next may be unfinished.
    """

    def __init__(self, save_total_limit: int | None = None) -> None:
        self.save_total_limit = save_total_limit
        self.writers: list[Callable[[Path], None]] = []
        """Called on every process with the checkpoint's folder, before it is marked."""
        self._trainer: Any = None
        self._originals: dict[str, Any] = {}
        self._pending: list[Callable[[], Any]] = []

    @classmethod
    def of(cls, trainer: Any) -> CompleteCheckpoints:
        """The one in a trainer's list of callbacks, at work; added if there is none."""
        found = next((item for item in trainer.callback_handler.callbacks if isinstance(item, cls)), None)
        if found is None:
            found = cls()
            trainer.add_callback(found)
        found.join(trainer)
        return found

    def join(self, trainer: Any) -> None:
        """Watch a trainer write its checkpoints; a second call does nothing."""
        if self._trainer is trainer:
            return
        self._unwrap()
        self._trainer = trainer
        for name, wrapper in zip(_METHODS, (self._wrap_save, self._wrap_push), strict=True):
            self._originals[name] = trainer.__dict__.get(name)
            setattr(trainer, name, wrapper(getattr(trainer, name)))

    def leave(self, trainer: Any) -> None:
        """Take the wrappers off, and itself out of the trainer's callbacks; a second call does nothing."""
        self._unwrap()
        handler = trainer.callback_handler
        # A new list: the trainer may be going through the present one, and would skip the callback after this.
        handler.callbacks = [item for item in handler.callbacks if item is not self]

    def _unwrap(self) -> None:
        if self._trainer is None:
            return
        for name, original in self._originals.items():
            if original is None:
                self._trainer.__dict__.pop(name, None)
            else:
                setattr(self._trainer, name, original)
        self._trainer = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Join the trainer that is being built."""
        trainer = calling_trainer(self)
        if trainer is not None:
            self.join(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to go on from a half-written checkpoint, or from several.

        Raises:
            CheckpointError: If any process would.
        """
        trainer = calling_trainer(self)
        if trainer is not None:
            self.join(trainer)
        folder = resumed_folder() if state.global_step > 0 else None
        fault = None if folder is None else find_fault(folder)
        message = None if fault is None else f"'{folder}' cannot be resumed from: {fault}"
        refuse_disagreement(state.global_step, message)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the wrappers off; a next training puts them on again."""
        self._unwrap()

    # --- writing -------------------------------------------------------------------------------------------------

    def _wrap_save(self, original: Any) -> Any:
        @functools.wraps(original)
        def save_checkpoint(model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
            trainer = self._trainer
            writes = trainer.args.should_save
            folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
            if writes:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / UNFINISHED_FILE, "{}")
                (folder / MARK_FILE).unlink(missing_ok=True)
            # No process writes before the folder is known to be unfinished, and none marks before all have written.
            PartialState().wait_for_everyone()
            self._pending = []
            result = original(model, trial, *args, **kwargs)
            for write in self.writers:
                write(folder)
            PartialState().wait_for_everyone()
            if writes:
                sizes = {name: size for name, size in _sizes(folder).items() if name != UNFINISHED_FILE}
                write_whole(folder / UNFINISHED_FILE, json.dumps({"files": sizes}, indent=2))
                os.replace(folder / UNFINISHED_FILE, folder / MARK_FILE)
                if self.save_total_limit:
                    delete_older(folder, self.save_total_limit, trainer.state.best_model_checkpoint)
            for push in self._pending:
                push()
            self._pending = []
            return result

        return save_checkpoint

    def _wrap_push(self, original: Any) -> Any:
        """Upload a checkpoint after it is marked, so that what others download is marked too."""

        @functools.wraps(original)
        def push_from_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._pending.append(functools.partial(original, *args, **kwargs))

        return push_from_checkpoint


def delete_older(newest: Path, limit: int, best: str | None) -> None:
    """Delete whole checkpoints beside `newest` beyond the `limit` that were written last, but for the best one.

    Half-written ones, and those of other programs, neither count nor are touched.
    """
    marked = {
        folder: (folder / MARK_FILE).stat().st_mtime_ns
        for _, folder in _folders(newest.parent)
        if folder.name != newest.name and (folder / MARK_FILE).is_file() and find_fault(folder) is None
    }
    kept_best = None if best is None else Path(best).name
    for folder in sorted(marked, key=marked.__getitem__)[: len(marked) - (limit - 1)]:
        if folder.name != kept_best:
            # Without its mark it is no checkpoint, also if the deleting is cut short.
            os.replace(folder / MARK_FILE, folder / UNFINISHED_FILE)
            shutil.rmtree(folder, ignore_errors=True)


# --- reading ---------------------------------------------------------------------------------------------------------


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in a folder that was written to its end, for `trainer.train(resume_from_checkpoint=...)`.

    Half-written ones above it are named in a warning and left where they are. Once several processes are joined (after
    the training arguments were made), every process must call this: the first one looks and all get its answer.

    Args:
        output_dir: The trainer's `output_dir`.

    Returns:
        Its path, or None if there is none.
    """
    if not _is_joined():
        return _last_complete(Path(output_dir))
    found: list[str | None] = [_last_complete(Path(output_dir)) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as part of a sentence; None if nothing is.

    One that another program wrote carries no mark and is let through, as long as it has the trainer's state.
    """
    if (folder / UNFINISHED_FILE).is_file():
        return "it was not written to its end"
    mark = _read_mapping(folder / MARK_FILE)
    if mark is None:
        if _read_mapping(folder / _TRAINER_STATE) is None:
            return f"it has no whole `{_TRAINER_STATE}`, so it was not written to its end"
        return None
    sizes = _sizes(folder)
    for name, size in mark.get("files", {}).items():
        if sizes.get(name) != size:
            found = f"has {sizes[name]} bytes instead of {size}" if name in sizes else "is missing"
            return f"`{name}` {found} (delete `{MARK_FILE}` there if that is meant to be so)"
    return None


def refuse_disagreement(step: int, fault: str | None) -> None:
    """Raise on every process if any names a fault, or if they are at different steps.

    Raises:
        CheckpointError: If so.
    """
    seen = [(step, fault)]
    if _is_joined():
        seen = [(0, None)] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(seen, (step, fault))
    for rank, (_, other) in enumerate(seen):
        if other is not None:
            who = f" (process {rank})" if len(seen) > 1 else ""
            raise CheckpointError(
                f"{other}{who}. `qscope_trl.last_complete_checkpoint(output_dir)` names the last whole one."
            )
    if len({at for at, _ in seen}) > 1:
        raise CheckpointError(
            f"The processes go on from different steps: {', '.join(str(at) for at, _ in seen)}, by process. Give all "
            f"of them the same checkpoint, on a disk that all can read."
        )


def _last_complete(output_dir: Path) -> str | None:
    for _, folder in sorted(_folders(output_dir), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return str(folder)
        warnings.warn(f"'{folder}' is passed over: {fault}.", QScopeWarning, stacklevel=3)
    return None


def _is_joined() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def _folders(output_dir: Path) -> list[tuple[int, Path]]:
    found = output_dir.iterdir() if output_dir.is_dir() else ()
    matches = ((_FOLDER.fullmatch(folder.name), folder) for folder in found)
    return [(int(match[1]), folder) for match, folder in matches if match is not None and folder.is_dir()]


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _read_mapping(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
