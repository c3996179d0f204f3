"""Trainers with a penalty, as the tests of attaching, of the callback and of the self-check use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from qscope_trl import SAEPenaltyCallback
from qscope_trl.training.checks import FirstStepCheck
from tests.tiny import K, tiny_model, tiny_tokenizer
from tests.training.harness import arguments, pad_collate, sft_dataset, tokenized_rows

NAMES = ["L1F3", "L2F40"]


def make_trainer(tmp_path: Path, callbacks: list[Any], model: Any = None, **changes: Any) -> SFTTrainer:
    settings = {"learning_rate": 1e-2, "optim": "adamw_torch", "output_dir": str(tmp_path), **changes}
    return SFTTrainer(
        tiny_model() if model is None else model,
        args=arguments(SFTConfig, **settings),
        train_dataset=sft_dataset(),
        eval_dataset=sft_dataset(4, seed=9),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def callback(saes: Any, features: Any = NAMES, weight: float = 0.5, **settings: Any) -> SAEPenaltyCallback:
    return SAEPenaltyCallback(saes, features, weight, sae_k=K, **settings)


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def plain_trainer(
    kind: type[Trainer], tmp_path: Path, cb: TrainerCallback | None, model: Any = None, **changes: Any
) -> Trainer:
    return kind(
        tiny_model() if model is None else model,
        args=arguments(TrainingArguments, output_dir=str(tmp_path), remove_unused_columns=False, **changes),
        train_dataset=tokenized_rows(),
        eval_dataset=tokenized_rows(4, seed=3),
        data_collator=pad_collate,
        callbacks=[] if cb is None else [cb],
    )


def sae_callbacks(trainer: Trainer) -> list[TrainerCallback]:
    """What the package has put into the trainer's list of callbacks, the user's own `SAEPenaltyCallback`s aside."""
    return [item for item in trainer.callback_handler.callbacks if isinstance(item, FirstStepCheck)]
