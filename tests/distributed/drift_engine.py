"""Run by `test_drift_engines.py` in two processes: training with and without `DriftMonitor`, under one engine.

Each process writes what it logged to `rank{rank}.json`; the record is in `with/sae_record`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from trl import SFTConfig, SFTTrainer

from qscope_trl import SAEPenaltyCallback, SAESuite
from qscope_trl.training.drift import DriftMonitor
from qscope_trl.training.drift_probe import is_spread
from tests.distributed.setting import TOP_K, WEIGHT, feature_set
from tests.distributed.train_engine import use_engine
from tests.tiny import sentence, tiny_model, tiny_tokenizer
from tests.training.drift_harness import NO_LIMITS
from tests.training.harness import arguments, sft_dataset, train


def probe_texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return [sentence(generator, 30) for _ in range(8)]


def run_once(engine: str, model: Any, saes: str, folder: Path, callbacks: list[Any], batch: int = 1) -> Any:
    """Two steps on two samples each, over all processes."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    args = arguments(
        SFTConfig, output_dir=str(folder), per_device_train_batch_size=batch, max_steps=3, learning_rate=0.2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    # The arguments start accelerate's state anew when they first name their device.
    assert args.device.type == "cpu"
    if engine not in ("ddp", "one"):
        use_engine(engine, args)
    penalty = SAEPenaltyCallback(SAESuite.from_pretrained(saes, k=TOP_K), feature_set(), WEIGHT)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer(),
        callbacks=[penalty, *callbacks],
    )  # fmt: skip
    train(trainer)
    return trainer


def main() -> None:
    engine, saes, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    # Before any arguments: once they name ZeRO-3, models are made in shards, with other random numbers.
    models = [tiny_model(), tiny_model()]
    watched = DriftMonitor(probe_texts(), every=1, limits=NO_LIMITS, on_drift="stop")
    found = {}
    for name, model, callbacks in (("with", models[0], [watched]), ("without", models[1], [])):
        trainer = run_once(engine, model, saes, output / name, callbacks)
        found[name] = trainer.state.log_history
        found["spread"] = is_spread(trainer)
        rank = trainer.accelerator.process_index
    (output / f"rank{rank}.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
