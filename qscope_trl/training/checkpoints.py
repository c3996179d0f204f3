"""Telling a whole checkpoint from one that was being written when the run was killed.

The trainer writes a checkpoint file by file into its final folder, and on resuming takes the folder with the highest
number; missing files are partly passed over there (optimizer, random numbers). So each checkpoint gets a mark once
every process has written its part, with the size of every file, and only marked ones are resumed from. Left out:
checksums; a file that kept its size and lost its content is not noticed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.state import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from qscope_trl.errors import CheckpointError, QScopeWarning

MARK_FILE = "checkpoint_complete.json"
"""File in each whole checkpoint: the size in bytes of every other file."""

_FOLDER = re.compile(r"checkpoint-(\d+)")
_TRAINER_STATE = "trainer_state.json"


class CompleteCheckpoints(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Marks every checkpoint when all processes have written it, and only then deletes older ones.

    `qscope sft` and `qscope grpo` use it, and a penalty brings one along (without the deleting) where the trainer has
    none. It must come after callbacks that write into the checkpoint. Training that resumes from a half-written
    checkpoint is stopped before its first step.

    Args:
        save_total_limit: Whole checkpoints to keep beside the best one; None keeps all. Use it instead of the
            trainer's own setting, which deletes the last whole checkpoint while the next may be unfinished.
    """

    def __init__(self, save_total_limit: int | None = None) -> None:
        self.save_total_limit = save_total_limit

    @classmethod
    def of(cls, trainer: Any) -> CompleteCheckpoints:
        """The one in a trainer's list of callbacks; added if there is none."""
        for item in trainer.callback_handler.callbacks:
            if isinstance(item, cls):
                return item
        marks = cls()
        trainer.add_callback(marks)
        return marks

    def state(self) -> dict[str, Any]:
        """What the trainer's state keeps: that this run marks its checkpoints."""
        return {"args": {"save_total_limit": self.save_total_limit}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a half-written checkpoint.

        Raises:
            CheckpointError: If training resumes from one.
        """
        self._register(state)
        if state.global_step > 0:
            refuse_incomplete(resumed_folder(args, state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be known to the trainer's state also where training had begun before this joined."""
        self._register(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written."""
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not args.should_save or not folder.is_dir():
            return
        sizes = {name: size for name, size in _sizes(folder).items() if name != MARK_FILE}
        write_whole(folder / MARK_FILE, json.dumps({"files": sizes}, indent=2))
        if self.save_total_limit is not None and self.save_total_limit > 0:
            self._delete_older(Path(args.output_dir), state.best_model_checkpoint)

    def _register(self, state: TrainerState) -> None:
        # The trainer looks every callback with a state up in here when it saves, without a default.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def _delete_older(self, output_dir: Path, best: str | None) -> None:
        keep = None if best is None else Path(best).name
        folders = sorted(_folders(output_dir))
        for _, folder in folders[: -(self.save_total_limit or len(folders))]:
            if folder.name != keep:
                # Without its mark it is no checkpoint, also if the deleting is cut short.
                (folder / MARK_FILE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in a folder that was written to its end, for `trainer.train(resume_from_checkpoint=...)`.

    Half-written ones above it are named in a warning and left where they are.

    Args:
        output_dir: The trainer's `output_dir`.

    Returns:
        Its path, or None if there is none.
    """
    for _, folder in sorted(_folders(Path(output_dir)), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return str(folder)
        warnings.warn(f"'{folder}' is passed over: {fault}.", QScopeWarning, stacklevel=2)
    return None


def refuse_incomplete(folder: str | os.PathLike[str]) -> None:
    """Raise if a checkpoint is known to be half-written.

    One that another program wrote carries no mark and is let through, as long as it has the trainer's state.

    Raises:
        CheckpointError: If it is.
    """
    fault = find_fault(Path(folder))
    if fault is not None:
        earlier = "`qscope_trl.last_complete_checkpoint(output_dir)` names the last whole one"
        raise CheckpointError(f"'{folder}' cannot be resumed from: {fault}. {earlier[0].upper()}{earlier[1:]}.")


def resumed_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that the trainer up the call stack resumes from; callbacks are not told."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        chosen = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(chosen, str):
            return Path(chosen)
        frame = frame.f_back
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as part of a sentence; None if nothing is."""
    mark = _read_mapping(folder / MARK_FILE)
    if mark is None:
        state = _read_mapping(folder / _TRAINER_STATE)
        if state is None:
            return f"it has no readable `{_TRAINER_STATE}`, so it was not written to its end"
        if CompleteCheckpoints.__name__ in state.get("stateful_callbacks", {}):
            return f"its run marks whole checkpoints by `{MARK_FILE}`, and this one has none"
        return None
    sizes = _sizes(folder)
    for name, size in mark.get("files", {}).items():
        if name not in sizes:
            return f"`{name}` is missing"
        if sizes[name] != size:
            return f"`{name}` has {sizes[name]} bytes instead of {size}"
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it, and rename it: it is there whole, or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
