"""Run by `test_two_processes.py` in two processes: a penalised run that is resumed between two log events.

Also python -m torch.distributed.run --nproc_per_node N two_processes_penalty.py SAES OUTPUT resume
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from qscope_trl.training.callback import STATE_FILE
from tests.training.harness import train
from tests.training.penalty_harness import callback, make_trainer


def logged(trainer: Any) -> dict[str, float]:
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    return {key: value for key, value in entry.items() if key.startswith("sae/")}


def main() -> None:
    saes, output, _ = sys.argv[1:4]
    settings: dict[str, Any] = {
        "learning_rate": 0.0, "max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2,
        # transformers 4.57 cannot load an optimizer's state on two CPU processes.
        "save_only_model": True,
    }  # fmt: skip
    local: list[torch.Tensor] = []
    cb = callback(saes, monitor_features=["L3F9"])
    original = cb.attachment.metrics.state_dict

    def state_dict(trainer: Any) -> Any:
        if trainer.state.global_step == 2:
            local.append(cb.attachment.metrics.statistics["train"][0]._sums.clone())
        return original(trainer)

    cb.attachment.metrics.state_dict = state_dict
    whole = make_trainer(Path(output), [cb], **settings)
    train(whole)
    state = json.loads((Path(output) / "checkpoint-2" / STATE_FILE).read_text())
    resumed = make_trainer(Path(output), [callback(saes, monitor_features=["L3F9"])], **settings)
    resumed.train(resume_from_checkpoint=str(Path(output) / "checkpoint-2"))
    seen = {
        "whole": logged(whole),
        "resumed": logged(resumed),
        "saved": state["statistics"][0],
        "expected": whole.accelerator.reduce(local[0], reduction="sum").tolist(),
    }
    (Path(output) / f"rank{whole.accelerator.process_index}.json").write_text(json.dumps(seen))
    whole.accelerator.end_training()
    sys.stdout.flush()
    sys.stderr.flush()
    # As in `two_processes.py`: without any teardown (pytorch/pytorch#190489).
    os._exit(0)


main()
