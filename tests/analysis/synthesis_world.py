"""A tiny model with SAEs, texts, and features of which some do not fire in them: what synthesis tests share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qscope_trl import SAESuite
from qscope_trl.analysis.synthesis.report import Synthesis
from qscope_trl.analysis.synthesis.run import JOURNAL
from qscope_trl.config.synthesize import SynthesizeConfig
from qscope_trl.features import Feature, FeatureId, FeatureSet
from qscope_trl.sae.topk_sae import TopKSAE
from tests.analysis.dense import dense
from tests.tiny import K, sentence, tiny_model, tiny_tokenizer, write_saes

LAYERS = (1, 2)
MIN_ACTIVATION = 0.3


@dataclass
class World:
    """Everything, in memory and in files."""

    folder: Path
    model: Any
    tokenizer: Any
    saes: dict[int, TopKSAE]
    data: list[str]
    others: list[str]
    missing: list[FeatureId]
    present: list[FeatureId]

    @property
    def targets(self) -> list[FeatureId]:
        return [*self.missing, *self.present]

    def flags(self, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(self.folder / "model"),
            "saes": str(self.folder / "saes"),
            "sae_k": K,
            "features": str(self.folder / "features.json"),
            "data": str(self.folder / "data.jsonl"),
            "min_activation": MIN_ACTIVATION,
            "weak_below": 1,
            "max_new_tokens": 12,
            "control_requests": 4,
            "accept": 2,
            "attempts": 6,
            **changes,
        }

    def config(self, output: Path, **changes: Any) -> SynthesizeConfig:
        return SynthesizeConfig(output=str(output), **self.flags(**changes))

    def largest(self, texts: Sequence[str], start: int = 1) -> np.ndarray:
        """Largest activation of each target over the tokens from `start` on. Shape `(texts, targets)`."""
        return np.array([self.acts(text)[start:].max(0, initial=0) for text in texts])

    def acts(self, text: str, features: Sequence[FeatureId] | None = None) -> np.ndarray:
        """Activations at every token `(tokens, features)`, by numpy alone beyond the model."""
        x = residuals(self.model, self.tokenizer, text)
        layers = {layer: dense(sae, x[layer]) for layer, sae in self.saes.items()}
        chosen = self.targets if features is None else features
        return np.stack([layers[one.layer][:, one.index] for one in chosen], axis=1)


def residuals(model: Any, tokenizer: Any, text: str) -> dict[int, torch.Tensor]:
    """Outputs of the layers, which are not the last one: `hidden_states` has them."""
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return {layer: states[layer + 1][0] for layer in LAYERS}


def texts(count: int, seed: int, length: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [sentence(generator, length) for _ in range(count)]


def make_world(folder: Path) -> World:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} w2 {% endfor %}"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    suite = SAESuite.from_pretrained(write_saes(folder / "saes"), k=K)
    saes = {layer: suite.load(layer) for layer in LAYERS}
    data, others = texts(6, seed=1), texts(60, seed=2, length=20)
    missing, present = [], []
    for layer, sae in saes.items():

        def fires(text: str, start: int, layer: int = layer, sae: TopKSAE = sae) -> np.ndarray:
            return (dense(sae, residuals(model, tokenizer, text)[layer])[start : start + 12] > MIN_ACTIVATION).any(0)

        counts = np.sum([fires(text, 1) for text in data], axis=0)
        # Late in a text, where responses stand.
        rate = np.mean([fires(text, 6) for text in others], axis=0)
        usual = np.flatnonzero((rate > 0.15) & (rate < 0.6))
        missing += [FeatureId(layer, int(index)) for index in usual if counts[index] == 0][:2]
        present += [FeatureId(layer, int(index)) for index in usual if counts[index] > 1][:1]
    world = World(folder, model, tokenizer, saes, data, others, missing, present)
    write_rows(folder / "data.jsonl", [{"text": text} for text in data])
    write_rows(folder / "others.jsonl", [{"text": text} for text in others])
    features = [Feature(layer=one.layer, index=one.index, label=f"what {one} stands for") for one in world.targets]
    FeatureSet(features=tuple(features)).save(folder / "features.json")
    return world


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def fired(world: World, rows: Sequence[Any], between: str = "") -> np.ndarray:
    """Which targets fire in the response of each row, by numpy. Shape `(rows, targets)`."""
    return np.array(
        [
            world.largest([row["prompt"] + between + row["response"]], len(row["prompt"].split()))[0] > MIN_ACTIVATION
            for row in rows
        ]
    )


def same(one: Synthesis, other: Synthesis) -> None:
    assert list(one.rows) == list(other.rows)
    assert one.after == other.after
    assert one.is_finished
    figures = [[{**vars(filled), "requests": 0} for filled in result.filled] for result in (one, other)]
    assert figures[0] == figures[1]


def asked_twice(folder: Path) -> Counter[str]:
    """Keys asked more than once, after checking that none was asked again when it had its answer."""
    answered: set[str] = set()
    times: Counter[str] = Counter()
    for record in records(folder):
        if record["record"] == "answer":
            assert record["key"] not in answered
            answered.add(record["key"])
        elif record["record"] == "ask":
            assert record["key"] not in answered
            times[record["key"]] += 1
    return Counter({key: count for key, count in times.items() if count > 1})
