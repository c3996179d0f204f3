"""A tiny model with SAEs, and texts whose label a feature decides: what the tests of `qscope rules` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from qscope_trl import SAESuite
from qscope_trl.activations.feature_table import encode_table
from qscope_trl.config.rules import RulesEvaluateConfig, RulesLearnConfig
from qscope_trl.features import FeatureId
from tests.tiny import D_SAE, K, sentence, tiny_model, tiny_tokenizer, write_saes

NUM = 160
LAYERS = (1, 2)


class World:
    """A model, SAEs, and texts that are toxic where one feature fires."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = tiny_model().eval()
        model.save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        saes = SAESuite.from_pretrained(write_saes(folder / "saes"), k=K)
        generator = torch.Generator().manual_seed(0)
        self.texts = [sentence(generator, 4 + i % 7) for i in range(NUM)]
        every = [FeatureId(layer, index) for layer in LAYERS for index in range(D_SAE)]
        self.table = encode_table(model, tiny_tokenizer(), saes, self.texts, every, show_progress=False)
        rates = (self.table.matrix("max") > 0).mean(0)
        self.feature = every[int(np.argmin(np.abs(rates - 0.4)))]
        self.labels = self.table.values(self.feature, "max") > 0
        rows = [{"text": t, "toxic": int(y), "page": i // 2} for i, (t, y) in enumerate(self.rows())]
        self.data = folder / "data.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        # The layout of `textdetox/multilingual_toxicity_dataset`: a Parquet file for each language.
        (folder / "toxicity" / "data").mkdir(parents=True)
        for language, part in (("en", rows[: NUM // 2]), ("de", rows[NUM // 2 :])):
            texts = [{"text": row["text"], "toxic": row["toxic"]} for row in part]
            Dataset.from_list(texts).to_parquet(folder / "toxicity" / "data" / f"{language}-00000-of-00001.parquet")

    def rows(self) -> list[tuple[str, bool]]:
        return list(zip(self.texts, self.labels.tolist(), strict=True))

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(self.folder / "model"), "saes": str(self.folder / "saes"), "sae_k": K, "batch_size": 32,
            "device": "cpu", "data": str(self.data), "label_column": "toxic", **changes,
        }  # fmt: skip

    def learn(self, output: Path, **changes: Any) -> RulesLearnConfig:
        few = {"candidates": 6, "thresholds": 2, "max_size": 3, "beam_width": 2, "folds": 3, "layers": "1,2"}
        return RulesLearnConfig(**self.settings(output=str(output), **{**few, **changes}))

    def flags(self, **changes: Any) -> list[str]:
        return [
            word
            for name, value in self.settings(**changes).items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def evaluation(self, **changes: Any) -> RulesEvaluateConfig:
        return RulesEvaluateConfig(**self.settings(rule=str(self.feature), **changes))
