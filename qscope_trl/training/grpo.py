"""GRPO and RLOO with rollout policies: TRL's trainers, with one argument more.

Feature rewards alone need nothing from here; they work in TRL's own trainers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import trl

from qscope_trl.errors import ConfigError
from qscope_trl.training.rewards import FeatureReward
from qscope_trl.training.rollouts import RolloutPolicy
from qscope_trl.training.scores import RolloutScoring


class SAEGRPOMixin:
    """Adds `rollout_policy` to a GRPO or RLOO trainer: `class MyTrainer(SAEGRPOMixin, MyGRPOTrainer)`.

    SAEs, features, trainer and policy are checked when the trainer is built.

    Args:
        *args: As the trainer's own.
        rollout_policy: What happens to rollouts in which the features fire, or None.
        **kwargs: As the trainer's own.

    Raises:
        ConfigError: If the policy names no features and none can be taken from the rewards.
        AttachError: If the trainer cannot score rollouts or carry the policy.
        FeatureSetError: If features belong to another model or SAE.
        CheckpointError: If SAEs cannot be read.
    """

    def __init__(self, *args: Any, rollout_policy: RolloutPolicy | None = None, **kwargs: Any) -> None:
        if rollout_policy is not None:
            if "reward_funcs" not in kwargs and len(args) > 1:
                args, kwargs = (args[0], *args[2:]), {**kwargs, "reward_funcs": args[1]}
                if len(args) > 1:
                    raise ConfigError("With `rollout_policy`, pass everything after `model` by name.")
            self._prepare(rollout_policy, kwargs)
        super().__init__(*args, **kwargs)
        scoring = RolloutScoring.of(self)
        if rollout_policy is not None:
            rollout_policy.bind(self, scoring)
            scoring.policy = rollout_policy
        scoring.open()

    @staticmethod
    def _prepare(policy: RolloutPolicy, kwargs: dict[str, Any]) -> None:
        funcs = kwargs.get("reward_funcs")
        rewards = list(funcs) if isinstance(funcs, Sequence) and not isinstance(funcs, str) else [funcs]
        score = policy.reward([reward for reward in rewards if reward is not None])
        if policy.kind == "penalise" and score not in rewards:
            kwargs["reward_funcs"] = [*(reward for reward in rewards if reward is not None), score]
            weights = getattr(kwargs.get("args"), "reward_weights", None)
            if weights is not None:
                kwargs["args"] = copy.copy(kwargs["args"])
                kwargs["args"].reward_weights = [*weights, 1.0]
            if isinstance(kwargs.get("reward_processing_classes"), Sequence):
                kwargs["reward_processing_classes"] = [*kwargs["reward_processing_classes"], None]

    @property
    def rollout_scoring(self) -> RolloutScoring:
        """What reads the features: its readers, scores of the last generation and count of own forwards."""
        return RolloutScoring.of(self)


class SAEGRPOTrainer(SAEGRPOMixin, trl.GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` with `rollout_policy`.

    ```python
    trainer = SAEGRPOTrainer(
        model="Qwen/Qwen3-1.7B",
        reward_funcs=[correctness, FeatureReward("repetition.yaml", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")],
        rollout_policy=RolloutPolicy("amplify_negative"),
        args=GRPOConfig(...), train_dataset=dataset, peft_config=LoraConfig(),
    )
    ```
    """


class SAERLOOTrainer(SAEGRPOMixin, trl.RLOOTrainer):  # type: ignore[misc]
    """`trl.RLOOTrainer` with `rollout_policy`; per-token credit and steered negatives need GRPO."""


__all__ = ["FeatureReward", "RolloutPolicy", "SAEGRPOMixin", "SAEGRPOTrainer", "SAERLOOTrainer"]
