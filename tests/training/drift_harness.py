"""A trainer that drifts, a probe and a monitor, as the tests of drift use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from qscope_trl.monitor.drift import DriftLimits
from qscope_trl.training.drift import DriftMonitor
from tests.tiny import K, sentence, tiny_model, tiny_tokenizer
from tests.training.harness import arguments, pad_collate, tokenized_rows

LAYERS = [1, 2]
NO_LIMITS = DriftLimits(max_fvu_ratio=None, min_jaccard=None, min_residual_cosine=None, max_dead_rate=None)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return ["", *(sentence(generator, 25 + n % 9) for n in range(10))]


def make(tmp_path: Path, callbacks: list[Any], model: Any = None, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {"learning_rate": 1.0, "max_steps": 4, "max_grad_norm": 1.0, "output_dir": str(tmp_path), **changes}
    return Trainer(
        model=tiny_model(attention_dropout=0.1) if model is None else model,
        args=arguments(**settings),
        train_dataset=tokenized_rows(),
        data_collator=pad_collate,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sae_record" / "drift.jsonl").read_text().splitlines()]


def monitor(texts: list[str], saes: Any, **changes: Any) -> DriftMonitor:
    return DriftMonitor(texts, saes, **{"layers": LAYERS, "sae_k": K, "limits": NO_LIMITS, **changes})
