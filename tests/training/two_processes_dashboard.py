"""Run by `test_dashboard.py` in two processes: trains with a dashboard and without, and writes what both saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from qscope_trl.training.dashboard import FeatureDashboard
from tests.training.harness import train
from tests.training.test_dashboard import PROMPTS, SETTINGS, make, penalty


def main() -> None:
    saes, output = Path(sys.argv[1]), Path(sys.argv[2])
    seen = {}
    for name in ("with", "without"):
        more = [FeatureDashboard(PROMPTS, ["w3 w4 w5 w6 w7", "w8 w9 w10"], **SETTINGS)] if name == "with" else []
        trainer = make(output / name, [penalty(saes), *more], learning_rate=0.05, ddp_backend="gloo")
        train(trainer)
        seen[name] = {
            "rates": {e["step"]: e["sae/text/rate"] for e in trainer.state.log_history if "sae/text/rate" in e},
            "weights": [float(p.double().abs().sum()) for p in trainer.model.parameters()],
            "processes": trainer.accelerator.num_processes,
        }
    rank = trainer.accelerator.process_index
    (output / f"rank{rank}.json").write_text(json.dumps(seen))
    trainer.accelerator.end_training()
    sys.stdout.flush()
    sys.stderr.flush()
    # As in `two_processes.py`: without any teardown.
    os._exit(0)


main()
