"""Run by `test_checkpoints.py`: a penalised run that kills itself at a chosen place, or resumes.

python killed_run.py SAES OUTPUT KILL RESUME, also under torchrun

KILL is `never`, or a place and a step: `step:3` as step 3 ends, `save_file:4` before the weights of checkpoint 4 are
written, `half_weights:4`, `half_optimizer:4` and `half_random:4` when half of that file is on the disk, `state:4`
before the trainer's state, `mark:4` before the mark; `apart:0` resumes each process from another checkpoint. With two
processes the second is the one that is killed, but for the parts that only the first writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback, TrainerState

from qscope_trl import last_complete_checkpoint
from qscope_trl.errors import CheckpointError
from qscope_trl.training import checkpoints
from tests.training.harness import train
from tests.training.penalty_harness import callback, make_trainer

SETTINGS: dict[str, Any] = {
    "max_steps": 5, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear",
}  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


def plan_kill(place: str, step: int) -> list[TrainerCallback]:
    """Make this process kill itself there; returns callbacks that the trainer needs for it."""
    here = f"checkpoint-{step}"
    if place == "step":
        return [KillsAt(step)]
    if place in ("save_file", "half_weights"):
        write = safetensors.torch.save_file

        def save_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if here in str(path) and place == "save_file":
                die()
            write(tensors, path, *args, **kwargs)
            if here in str(path):
                cut(path)
                die()

        for module in [m for m in list(sys.modules.values()) if getattr(m, "safe_save_file", None) is write]:
            module.safe_save_file = save_file
        import transformers.modeling_utils as modeling

        assert modeling.safe_save_file is save_file
    if place in ("half_optimizer", "half_random"):
        part = {"half_optimizer": "optimizer.pt", "half_random": "rng_state"}[place]
        save = torch.save

        def torch_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(content, path, *args, **kwargs)
            if here in str(path) and part in str(path):
                cut(path)
                die()

        torch.save = torch_save
    if place == "state":
        to_json = TrainerState.save_to_json

        def save_to_json(self: Any, path: str) -> None:
            if here in path:
                die()
            to_json(self, path)

        TrainerState.save_to_json = save_to_json
    if place == "mark":
        write_mark = checkpoints.write_whole

        def write_whole(path: Path, text: str) -> None:
            if here in str(path) and "files" in text:
                die()
            write_mark(path, text)

        checkpoints.write_whole = write_whole
    return []


def cut(path: Any) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def run(saes: str, output: Path, resume: bool, extra: list[TrainerCallback] | None = None, apart: bool = False) -> Any:
    """Train to the end and write down how it ended."""
    penalty = callback(
        saes, monitor_features=["L3F9"], penalty_schedule="warmup_decay", penalty_schedule_steps=2, weight=0.5
    )
    trainer = make_trainer(output, [penalty, *(extra or [])], **SETTINGS)
    folder = last_complete_checkpoint(output) if resume else None
    if apart:
        rank = trainer.accelerator.process_index
        try:
            trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{(2, 4)[rank]}"))
        except CheckpointError as error:
            (output / f"apart{rank}.txt").write_text(str(error))
            raise
    if resume:
        trainer.train(resume_from_checkpoint=folder)
    else:
        train(trainer)
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), output / "weights.pt")
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))
        (output / "resumed.json").write_text(json.dumps(folder))
    return trainer


def main() -> None:
    saes, output, kill, resume = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1"
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    extra: list[TrainerCallback] = []
    if kill != "never" and not kill.startswith("apart"):
        place, step = kill.split(":")
        if world == 1 or rank == (1 if place in ("step", "half_random") else 0):
            extra = plan_kill(place, int(step))
    trainer = run(saes, output, resume, extra, apart=kill.startswith("apart"))
    if world > 1:
        trainer.accelerator.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        # Without any teardown (pytorch/pytorch#190489).
        os._exit(0)


if __name__ == "__main__":
    main()
