"""Running a trainer with the callback and recording what it trained on and which gradients came out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny import prompt_completion_rows, tiny_tokenizer

Gradients = dict[str, torch.Tensor]


class GradientRecorder(TrainerCallback):
    """Copies every parameter's gradient just before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )


def arguments(kind: type = TrainingArguments, **changes: Any) -> Any:
    """Arguments under which weights never move, nothing is clipped and nothing is written."""
    values = {
        "output_dir": "unused",
        "learning_rate": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        **changes,
    }
    with warnings.catch_warnings():
        # transformers renamed `gradient_checkpointing`; the old name works on every version tested.
        warnings.simplefilter("ignore", FutureWarning)
        return kind(**values)


def record_batches(trainer: Trainer) -> list[dict[str, Any]]:
    """Batches as the collator makes them from now on, in training order."""
    batches: list[dict[str, Any]] = []
    collate: Callable[..., Any] = trainer.data_collator

    def recording(examples: list[Any]) -> Any:
        batch = collate(examples)
        batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        return batch

    trainer.data_collator = recording
    return batches


def train(trainer: Trainer) -> None:
    with warnings.catch_warnings():
        # torch's reentrant checkpointing and TRL's own deprecations speak up in every run; they are not ours.
        warnings.simplefilter("ignore")
        trainer.train()


def sft_dataset(count: int = 10, seed: int = 0) -> Dataset:
    return Dataset.from_list(prompt_completion_rows(count, seed))


def tokenized_rows(count: int = 10, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows for the plain Trainer: prompt tokens carry label -100."""
    tokenizer = tiny_tokenizer()
    rows = []
    for row in prompt_completion_rows(count, seed):
        prompt, completion = (tokenizer(row[key]).input_ids for key in ("prompt", "completion"))
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return rows


def pad_collate(examples: list[dict[str, list[int]]], *, left: bool = False) -> dict[str, torch.Tensor]:
    """Pads ids with 0, labels with -100."""
    longest = max(len(example["input_ids"]) for example in examples)

    def pad(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (longest - len(values))
        return gap + values if left else values + gap

    return {
        "input_ids": torch.tensor([pad(e["input_ids"], 0) for e in examples]),
        "attention_mask": torch.tensor([pad([1] * len(e["input_ids"]), 0) for e in examples]),
        "labels": torch.tensor([pad(e["labels"], -100) for e in examples]),
    }
