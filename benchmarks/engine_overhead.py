"""Step time of SFT with a penalty against plain TRL, under each engine over two processes on the CPU.

The model of `step_overhead.py`, 512 tokens a process and step. One trainer per engine, started with the configuration
file that is shipped for the engine; the penalty is attached to it and taken off step by step, in an order shuffled
anew each round, and ratios are taken within the round. "plain again" is a second plain step: how far its ratio is from
1 is the error of the measurement.

    python benchmarks/engine_overhead.py [--engines ddp fsdp2 zero1 zero2 zero3] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reporting import RESULTS, environment, median_interval, write
from step_overhead import FEATURES, WARM_UP, build

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
VARIANTS = ("plain", "preact_hinge", "plain again")


def measure(engine: str, rounds: int, folder: Path) -> None:
    """One process of two: seconds a step per variant, written by the first."""
    from transformers import TrainerCallback

    from qscope_trl import attach

    sys.path.insert(0, str(ROOT))
    from tests.distributed.train_engine import use_engine

    def prepare(args: Any) -> None:
        assert args.device.type == "cpu"
        args.logging_steps = 10**6
        if engine != "ddp":
            use_engine(engine, args)

    order: list[str] = []
    shuffle = random.Random(0).shuffle
    for _ in range(rounds + WARM_UP):
        turn = list(VARIANTS)
        shuffle(turn)
        order += turn
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}

    class Turns(TrainerCallback):
        trainer: Any = None
        attached: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.attached is not None:
                self.attached.detach()
                self.attached = None
            if order[state.global_step] == "preact_hinge":
                self.attached = attach(self.trainer, folder / "saes", FEATURES, sae_k=50, penalty_weight=0.1)
            self.trainer.accelerator.wait_for_everyone()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.accelerator.wait_for_everyone()
            seconds[order[state.global_step - 1]].append(time.perf_counter() - self.start)

    trainer = build("plain", folder, 2 * len(order), prepare=prepare)
    trainer.args.max_steps = len(order)
    turns = Turns()
    turns.trainer = trainer
    trainer.add_callback(turns)
    trainer.train()
    if trainer.is_world_process_zero():
        kinds = [kind.__name__ for kind in type(trainer.model_wrapped).__mro__]
        found = {"seconds": {v: s[WARM_UP:] for v, s in seconds.items()}, "wrapper": kinds}
        (folder / f"{engine}.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    # Without any teardown (pytorch/pytorch#190489).
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.rounds, options.folder)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build("plain", folder, 1)
        for engine in options.engines:
            config = ROOT / "configs" / "accelerate" / f"{engine.replace('zero1', 'zero2')}.yaml"
            command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--main_process_port", "0"]
            command += ["--config_file", str(config), *(["--zero_stage", "1"] if engine == "zero1" else [])]
            command += [__file__, "--measure", engine, "--rounds", str(options.rounds), "--folder", str(folder)]
            variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
            subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
            found = json.loads((folder / f"{engine}.json").read_text())
            seconds = found["seconds"]
            for variant in VARIANTS[1:]:
                ratios = [a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)]
                rows.append(
                    {
                        "engine": engine,
                        "wrapper": found["wrapper"],
                        "variant": variant,
                        "plain_seconds_median": statistics.median(seconds["plain"]),
                        "time_ratio_median": statistics.median(ratios),
                        "time_ratio_interval": median_interval(ratios),
                    }
                )
    report = {
        "what": "SFT step with 2 layers x 10 features against plain TRL over two processes of one thread, Qwen3 of "
        f"about 100M parameters, 512 tokens a process; {options.rounds} rounds.",
        "environment": environment("transformers", "trl", "accelerate", "deepspeed"),
        "rows": rows,
    }
    cells = [
        [
            r["engine"],
            r["variant"],
            f"{r['plain_seconds_median']:.2f}",
            f"{r['time_ratio_median']:.3f} ({r['time_ratio_interval'][0]:.3f} to {r['time_ratio_interval'][1]:.3f})",
        ]
        for r in rows
    ]
    header = ["engine", "variant", "plain step, s", "time ratio (95 %)"]
    print(write(options.output, "engine_overhead", report, header, cells))


if __name__ == "__main__":
    main()
