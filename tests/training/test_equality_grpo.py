"""The equality table, third part: the penalty in GRPO and RLOO, over loss types, accumulation and LoRA.

As in the second part, the task's gradient is taken from a run without the callback on the same rollouts, and the
penalty's from autograd without any trainer, rollout by rollout and without padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RLOOConfig, RLOOTrainer

from qscope_trl import SAEPenaltyCallback, SAESuite
from tests.tiny import largest_relative_difference, tiny_model
from tests.training.harness import GradientRecorder, train
from tests.training.reference import gradients, run
from tests.training.rollout_harness import grpo_trainer, parity
from tests.training.test_equality import LAYERS, TOLERANCE, WEIGHT, feature_set, lora, reference_penalty, suite

__all__ = ["suite"]  # a fixture

CASES: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")},
    "accumulation": {"gradient_accumulation_steps": 2},
    "several generations a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "several steps a generation": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "reference model, LoRA": {"beta": 0.1, "use_lora": True},
    "iterations": {"num_iterations": 2},
    "RLOO": {"kind": RLOOTrainer, "config": RLOOConfig, "gradient_accumulation_steps": 2},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def record_inputs(trainer: Any) -> list[dict[str, Any]]:
    """What the loss is computed on, micro-batch by micro-batch."""
    seen: list[dict[str, Any]] = []
    original = trainer._prepare_inputs

    def recording(batch: Any) -> Any:
        inputs = original(batch)
        seen.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
        return inputs

    trainer._prepare_inputs = recording
    return seen


def penalty_gradients(trainer: Any, model: Any, window: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Sum over completion tokens, each micro-batch divided as TRL divides its DAPO loss; RLOO: means of means."""
    steps, penalty, total = trainer.args.gradient_accumulation_steps, reference_penalty(), 0.0
    for batch in window:
        sums, tokens = 0.0, 0
        for row in range(batch["prompt_ids"].shape[0]):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            _, residuals = run(model, {"input_ids": torch.tensor([prompt + completion])}, LAYERS)
            per_token = penalty.per_token(residuals)[0]
            sums = sums + per_token[max(1, len(prompt) - 1) : len(prompt) + len(completion) - 1].sum()
            tokens += len(completion)
        if "num_items_in_batch" in batch:
            divisor = float(batch["num_items_in_batch"]) * steps / trainer.args.steps_per_generation
        else:
            divisor = tokens * steps
        total = total + sums / divisor
    return gradients(model, WEIGHT * total)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_task_plus_autograd(case: str, suite: SAESuite, tmp_path: Path) -> None:
    changes = dict(CASES[case])
    make = (lambda: lora(tiny_model())) if changes.pop("use_lora", False) else tiny_model
    steps = changes.get("gradient_accumulation_steps", 1)
    recorders, batches = [GradientRecorder(), GradientRecorder()], []
    for callbacks in ([recorders[0]], [SAEPenaltyCallback(suite, feature_set(), WEIGHT), recorders[1]]):
        torch.manual_seed(0)
        try:
            trainer = grpo_trainer(tmp_path, [parity], model=make(), callbacks=callbacks, **changes)
            batches = record_inputs(trainer)
            train(trainer)
        except ValueError as err:
            if "loss type" not in str(err):
                raise
            pytest.skip(f"this TRL has fewer: {err}")
    model = make()
    assert len(recorders[0].steps) == len(recorders[1].steps) == 2
    for n, (before, found) in enumerate(zip(recorders[0].steps, recorders[1].steps, strict=True)):
        penalty = penalty_gradients(trainer, model, batches[n * steps : (n + 1) * steps])
        # TRL may add a frozen copy of the adapters; only what both models train is compared.
        wanted = {name: before[name] + penalty[name] for name in penalty}
        assert largest_relative_difference({name: found[name] for name in penalty}, wanted) < TOLERANCE
        assert largest_relative_difference({name: before[name] for name in penalty}, wanted) > 0.05
