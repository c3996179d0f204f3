"""Run by `test_two_processes.py` in two processes: trains one GRPO step and writes what each process saw.

Also python -m torch.distributed.run --nproc_per_node N two_processes.py SAES OUTPUT POLICY
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from qscope_trl import RolloutPolicy, SAEGRPOTrainer
from tests.tiny import K
from tests.training.harness import train
from tests.training.rollout_harness import features, grpo_trainer, parity


def main() -> None:
    saes, output, kind = sys.argv[1:4]
    size = int(os.environ["WORLD_SIZE"])
    settings = {
        "screen": {"cutoff": float(os.environ.get("CUTOFF", "0"))},
        "steered_negative": {"max_steered_tokens": 3},
    }.get(kind, {})
    is_lora = kind == "penalise"
    policy = RolloutPolicy(kind, features(), saes, sae_k=K, reader="frozen" if is_lora else "policy", **settings)
    trainer = grpo_trainer(
        Path(output),
        [parity],
        kind=SAEGRPOTrainer,
        rollout_policy=policy,
        max_steps=1,
        per_device_train_batch_size=8 // size,
        num_generations=8,
        **({"peft_config": LoraConfig()} if is_lora else {}),
    )
    rank = trainer.accelerator.process_index
    seen = {}
    original = trainer._generate_and_score_completions

    def watch(inputs: object) -> object:
        result = original(inputs)
        seen.update(
            ids=[
                i[m.bool()].tolist() for i, m in zip(result["completion_ids"], result["completion_mask"], strict=True)
            ],
            advantages=result["advantages"].tolist(),
            scores=[float(row["rollout_policy"].score_C.mean()) for row in trainer.rollout_scoring.scores]
            if kind != "steered_negative"
            else [],
            logged=list(trainer._logs["advantages"]),
            items=float(result["num_items_in_batch"]),
            width=result["completion_ids"].shape[1],
        )
        return result

    trainer._generate_and_score_completions = watch
    torch.manual_seed(100 + rank)
    train(trainer)
    log = next(e for e in trainer.state.log_history if "reward" in e)
    seen["log"] = {k: v for k, v in log.items() if k.startswith(("sae/rollouts", "sae/rollout_policy/score"))}
    (Path(output) / f"rank{rank}.json").write_text(json.dumps(seen))
    trainer.accelerator.end_training()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is on disk. Without any teardown, in which gloo's threads now and then abort the process although the process
    # group was destroyed (pytorch/pytorch#190489), or hang when the trainer is freed after its group.
    os._exit(0)


main()
