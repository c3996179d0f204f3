"""Tiny GRPO trainers with and without rollout policies, and an independent reading of their rollouts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

from qscope_trl import FeatureSet, RolloutPolicy, SAEGRPOTrainer
from qscope_trl.features import Feature
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer
from tests.training.harness import arguments, train
from tests.training.reference import run

FEATURES = [(2, 40, 0.5, -0.2), (1, 3, 1.0, 0.1), (2, 7, 2.0, 0.0)]
"""(layer, index, weight, threshold); not in the order of the layers, as a set need not be"""
GROUP = 4
LENGTH = 6
PER_TOKEN = pytest.mark.skipif(Version(trl.__version__) < Version("1.0"), reason="one advantage per rollout only")


def features() -> FeatureSet:
    return FeatureSet(features=[Feature(layer=a, index=i, weight=w, threshold=t) for a, i, w, t in FEATURES])


def prompts(count: int = 4) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    return Dataset.from_list([{"prompt": sentence(generator, 2 + n % 3), "number": n} for n in range(count)])


def parity(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
    """A reward that varies inside every group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


class Recorder:
    """A reward function that gives 0 and keeps what it was called with."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **kwargs: Any) -> list[float]:
        self.calls.append(kwargs)
        return [0.0] * len(kwargs["completion_ids"])


def grpo_trainer(
    tmp_path: Path, rewards: Sequence[Any], *, kind: type = GRPOTrainer, model: Any = None, **changes: Any
) -> Any:
    ours = {key: changes.pop(key) for key in ("rollout_policy", "callbacks", "peft_config") if key in changes}
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": GROUP,
        "num_generations": GROUP,
        "max_completion_length": LENGTH,
        "max_steps": 2,
        "beta": 0.0,
        **changes,
    }
    config = settings.pop("config", GRPOConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            model=tiny_model() if model is None else model,
            reward_funcs=list(rewards),
            args=arguments(config, **settings),
            train_dataset=prompts(),
            processing_class=tiny_tokenizer(),
            **ours,
        )


def fresh_values(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Pre-activations `(C, S)` of one rollout, run alone and unpadded, with autograd-free plain code."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        _, residuals = run(model, {"input_ids": ids}, sorted({a for a, *_ in FEATURES}))
    columns = []
    for layer, index, _, _ in FEATURES:
        sae = random_sae(100 + layer)
        columns.append(residuals[layer][0] @ sae["W_enc"][index] + sae["b_enc"][index])
    return torch.stack(columns, dim=-1)[len(prompt) :]


def token_scores(values_CS: torch.Tensor) -> torch.Tensor:
    """The hinge of each token, feature by feature."""
    total = torch.zeros(values_CS.shape[0])
    for column, (_, _, weight, threshold) in enumerate(FEATURES):
        total += weight * torch.clamp(values_CS[:, column] - threshold, min=0)
    return total


def policy(saes: Path, kind: str, **settings: Any) -> RolloutPolicy:
    return RolloutPolicy(kind, features(), saes, sae_k=K, **{"reader": "policy", **settings})


class Watching:
    """Keeps what the trainer will train on, generation by generation."""

    def __init__(self, trainer: Any) -> None:
        self.outputs: list[dict[str, Any]] = []
        original = trainer._generate_and_score_completions

        def watch(inputs: Any) -> Any:
            output = original(inputs)
            self.outputs.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()})
            return output

        trainer._generate_and_score_completions = watch


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """TRL's default: minus the group's mean, over its standard deviation plus 1e-4."""
    grouped = rewards.view(-1, GROUP)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def run_policy(tmp_path: Path, rewards: list[Any], chosen: RolloutPolicy, **changes: Any) -> tuple[Any, Watching]:
    torch.manual_seed(0)
    trainer = grpo_trainer(tmp_path, rewards, kind=SAEGRPOTrainer, rollout_policy=chosen, max_steps=1, **changes)
    watching = Watching(trainer)
    train(trainer)
    return trainer, watching


def parity_advantages(watching: Watching) -> torch.Tensor:
    output = watching.outputs[0]
    ids = [
        row[keep.bool()].tolist()
        for row, keep in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    return group_advantages(torch.tensor(parity(ids)))
