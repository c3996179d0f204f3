"""The equality table, second part: preference trainers, mixed precision, loss scaling, torch.compile.

The task's gradient is taken from a run without the callback (the gradient of a sum is the sum of the gradients); the
penalty's comes from autograd without any trainer, row by row and without padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from qscope_trl import SAEPenaltyCallback, SAESuite
from tests.tiny import largest_relative_difference, sentence, tiny_config, tiny_model, tiny_tokenizer
from tests.training.harness import GradientRecorder, arguments, record_batches, sft_dataset, train
from tests.training.reference import (
    cross_entropy_sum,
    gradients,
    penalised_positions,
    penalty_sum,
    run,
)
from tests.training.test_equality import (
    LAYERS,
    TOLERANCE,
    WEIGHT,
    feature_set,
    lora,
    reference_penalty,
    suite,
)

__all__ = ["suite"]  # a fixture

Row = tuple[list[int], int]
"""Token ids of one sequence, and how many of them are prompt."""


def preference_dataset(count: int = 6) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    return Dataset.from_list(
        [
            {
                "prompt": sentence(generator, 2 + n % 3),
                "chosen": " " + sentence(generator, 1 + n),
                "rejected": " " + sentence(generator, 7 - n),
            }
            for n in range(count)
        ]
    )


def unpaired_dataset(count: int = 8) -> Dataset:
    generator = torch.Generator().manual_seed(2)
    return Dataset.from_list(
        [
            {
                "prompt": sentence(generator, 2 + n % 3),
                "completion": " " + sentence(generator, 1 + n),
                "label": n % 3 > 0,
            }
            for n in range(count)
        ]
    )


def masked_rows(batch: dict[str, Any], prefix: str = "") -> list[Row]:
    """Sequences of a padded batch with their prompt lengths, from a completion mask or from labels."""
    ids, keep = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    labels, completion = batch.get(f"{prefix}labels"), batch.get("completion_mask")
    trained = completion.bool() if completion is not None else labels != -100
    rows = []
    for row in range(ids.shape[0]):
        inside = keep[row].bool()
        rows.append((ids[row][inside].tolist(), int((~trained[row][inside]).sum())))
    return rows


def joined_rows(batch: dict[str, Any]) -> list[Row]:
    """Sequences of a batch that keeps prompt, chosen and rejected apart (older DPO trainers)."""
    rows = []
    for kind in ("chosen", "rejected"):
        for row in range(batch["prompt_input_ids"].shape[0]):
            prompt, completion = (
                batch[f"{part}_input_ids"][row][batch[f"{part}_attention_mask"][row].bool()].tolist()
                for part in ("prompt", kind)
            )
            rows.append((prompt + completion, len(prompt)))
    return rows


def rows_of(batch: dict[str, Any]) -> list[Row]:
    if "prompt_input_ids" in batch and "chosen_input_ids" in batch:
        return joined_rows(batch)
    if "completion_input_ids" in batch:
        return masked_rows(batch, "completion_")
    if "input_ids_chosen" in batch:
        return [
            (ids[keep.bool()].tolist(), 0)
            for kind in ("chosen", "rejected")
            for ids, keep in zip(batch[f"input_ids_{kind}"], batch[f"attention_mask_{kind}"], strict=True)
        ]
    if "completion_mask" in batch:
        return masked_rows(batch)
    return [
        (ids[keep.bool()].tolist(), 0) for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def penalty_gradients(model: Any, batches: list[dict[str, Any]], tokens: str) -> dict[str, torch.Tensor]:
    """Mean over micro-batches of the mean over penalised tokens, each sequence run alone and unpadded."""
    penalty, total = reference_penalty(), 0.0
    for batch in batches:
        sums, count = [], 0
        for ids, prompt in rows_of(batch):
            _, residuals = run(model, {"input_ids": torch.tensor([ids])}, LAYERS)
            per_token = penalty.per_token(residuals)[0]
            places = range(1, len(ids)) if tokens == "all" else range(max(1, prompt - 1), len(ids) - 1)
            sums += [per_token[place] for place in places]
            count += len(places)
        total = total + torch.stack(sums).sum() / count / len(batches)
    return gradients(model, WEIGHT * total)


def build(kind: str, model: Any, steps: int, callbacks: list[Any], output_dir: Path) -> Any:
    shared = {"gradient_accumulation_steps": steps, "output_dir": str(output_dir)}
    if kind.startswith("dpo"):
        config, trainer, data = DPOConfig, DPOTrainer, preference_dataset()
    elif kind == "kto":
        config, trainer, data = KTOConfig, KTOTrainer, unpaired_dataset()
    else:
        config, trainer, data = RewardConfig, RewardTrainer, preference_dataset()
    reference = {} if kind in ("reward", "dpo-lora") else {"ref_model": tiny_model(seed=8)}
    return trainer(
        model,
        **reference,
        args=arguments(config, **shared),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def make_model(kind: str) -> Any:
    if kind == "reward":
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(tiny_config(initializer_range=0.1, num_labels=1)).float()
    return lora(tiny_model()) if kind.endswith("lora") else tiny_model()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["dpo", "dpo-lora", "kto", "reward"])
def test_preference_gradients_equal_task_plus_autograd(kind: str, steps: int, suite: SAESuite, tmp_path: Path) -> None:
    tokens = "all" if kind == "reward" else "labels"
    recorders = [GradientRecorder(), GradientRecorder()]
    callback = SAEPenaltyCallback(suite, feature_set(), WEIGHT, penalty_tokens=tokens)
    plain = build(kind, make_model(kind), steps, [recorders[0]], tmp_path)
    train(plain)
    penalised = build(kind, make_model(kind), steps, [callback, recorders[1]], tmp_path)
    batches = record_batches(penalised)
    train(penalised)
    model = make_model(kind)
    assert len(recorders[0].steps) == len(recorders[1].steps) >= 2
    for n, (task, found) in enumerate(zip(recorders[0].steps, recorders[1].steps, strict=True)):
        penalty = penalty_gradients(model, batches[n * steps : (n + 1) * steps], tokens)
        wanted = {name: task[name] + penalty[name] for name in task}
        assert largest_relative_difference(found, wanted) < TOLERANCE
        assert largest_relative_difference(task, wanted) > 0.05


def sft(model: Any, callbacks: list[Any], tmp_path: Path, **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        model,
        args=arguments(SFTConfig, output_dir=str(tmp_path), gradient_accumulation_steps=4, **changes),
        train_dataset=sft_dataset(),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def sft_reference(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Gradient of task and penalty in one backward, so that sums round in the trainer's order."""
    trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    penalty, sums = reference_penalty(), {}
    for batch in batches:
        output, residuals = run(model, batch, LAYERS)
        positions = penalised_positions(batch, batch["labels"] != -100)
        loss = cross_entropy_sum(output.logits, batch["labels"]) + WEIGHT * penalty_sum(
            penalty.per_token(residuals), positions
        )
        for name, gradient in gradients(model, loss / trained).items():
            sums[name] = sums.get(name, 0) + gradient
    return sums


def test_bf16_autocast_gradients_equal_autograd(suite: SAESuite, tmp_path: Path) -> None:
    recorder, model = GradientRecorder(), tiny_model()
    trainer = sft(model, [SAEPenaltyCallback(suite, feature_set(), WEIGHT), recorder], tmp_path, bf16=True)
    batches = record_batches(trainer)
    train(trainer)
    # One rounding of a bf16 sum is 2^-9 of it; gradients pass four layers, each adding a handful of such sums.
    tolerance = 4 * 2**-8
    reference = tiny_model()
    for n, found in enumerate(recorder.steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = sft_reference(reference, batches[4 * n : 4 * n + 4])
        assert largest_relative_difference(found, wanted) < tolerance
        unpenalised = sft_reference_without_penalty(reference, batches[4 * n : 4 * n + 4])
        assert largest_relative_difference(unpenalised, wanted) > 5 * tolerance


def sft_reference_without_penalty(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    losses = [cross_entropy_sum(run(model, batch, LAYERS)[0].logits, batch["labels"]) for batch in batches]
    return gradients(model, torch.stack(losses).sum() / trained)


def test_loss_scaling_scales_the_penalty_too(suite: SAESuite, tmp_path: Path) -> None:
    """A loss scaler multiplies the loss and divides the gradients; a power of two leaves every bit in place."""
    recorder, scale = GradientRecorder(), 2.0**12
    trainer = sft(tiny_model(), [SAEPenaltyCallback(suite, feature_set(), WEIGHT), recorder], tmp_path)
    batches = record_batches(trainer)

    def scaled_backward(loss: torch.Tensor, **kwargs: Any) -> None:
        (scale * loss).backward()

    trainer.accelerator.backward = scaled_backward
    train(trainer)
    reference = tiny_model()
    for n, found in enumerate(recorder.steps):
        wanted = sft_reference(reference, batches[4 * n : 4 * n + 4])
        assert largest_relative_difference({k: v / scale for k, v in found.items()}, wanted) < TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile_gradients_equal_autograd(suite: SAESuite, tmp_path: Path) -> None:
    torch._dynamo.reset()
    recorder = GradientRecorder()
    callback = SAEPenaltyCallback(suite, feature_set(), WEIGHT)
    trainer = sft(tiny_model(), [callback, recorder], tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    batches = record_batches(trainer)
    train(trainer)
    reference = tiny_model()
    for n, found in enumerate(recorder.steps):
        found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
        wanted = sft_reference(reference, batches[4 * n : 4 * n + 4])
        assert largest_relative_difference(found, wanted) < TOLERANCE
    torch._dynamo.reset()
