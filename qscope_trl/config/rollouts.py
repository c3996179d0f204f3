"""Settings of rewards and rollouts, in the manner of `config`: `RewardConfig` and `RolloutConfig` of `qscope grpo`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.training import (
    AGGREGATIONS,
    CREDITS,
    PENALTY_KINDS,
    PENALTY_SCHEDULES,
    POLICIES,
    RATIOS,
    READERS,
)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Rewards of a GRPO run: functions by name, and one that reads features."""

    _argument_group_name = "rewards"

    reward_functions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions as dotted paths, such as `my_rewards.correct` or "
            "`trl.rewards.think_format_reward`; the current folder is searched too."
        },
    )
    reward_features: list[str] | None = field(
        default=None,
        metadata={"help": "Features of a `FeatureReward`: a feature file or names such as L12F345."},
    )
    reward_sign: int = field(
        default=-1, metadata={"help": "-1 punishes rollouts in which the features fire, 1 rewards them."}
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Factor of the feature reward."})
    reward_clip: float | None = field(default=None, metadata={"help": "Largest score of a rollout that counts."})
    reward_aggregation: str = field(
        default="mean",
        metadata={
            "help": "From tokens to one score: `mean`, `max`, `last_k` (mean of the last ones), `rate` (share of "
            "tokens at which a feature fires) or `first_hit` (1 if the first token fires, less the later).",
            "choices": list(AGGREGATIONS),
        },
    )
    reward_last_k: int = field(default=16, metadata={"help": "Tokens of `last_k`."})
    reward_kind: str = field(
        default="preact_hinge",
        metadata={
            "help": "Score of a token: `preact_hinge` (how far pre-activations are above their thresholds) or "
            "`topk_act` (activations after TopK).",
            "choices": list(PENALTY_KINDS),
        },
    )
    reward_reader: str = field(
        default="frozen",
        metadata={
            "help": "Model that is read: `frozen` (before this training: LoRA with adapters off, or the reference "
            "model that `beta` above 0 keeps) or `policy`.",
            "choices": list(READERS),
        },
    )
    reward_schedule: str = field(
        default="constant",
        metadata={
            "help": "Course of the scale over optimizer steps, as `penalty_schedule`.",
            "choices": list(PENALTY_SCHEDULES),
        },
    )
    reward_schedule_steps: float = field(default=0.1, metadata={"help": "Its length, as `penalty_schedule_steps`."})


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What happens to rollouts in which features fire."""

    _argument_group_name = "rollout policy"

    rollout_policy: str | None = field(
        default=None,
        metadata={
            "help": "`penalise`, `amplify_negative`, `zero_advantage`, `screen` or `steered_negative`. Without one, "
            "rollouts are left as they are.",
            "choices": list(POLICIES),
        },
    )
    rollout_features: list[str] | None = field(
        default=None, metadata={"help": "Features of the policy. Default: those of the feature reward."}
    )
    rollout_strength: float = field(
        default=1.0,
        metadata={
            "help": "Growth per unit of score; for `steered_negative` the length of what is added to the residual, "
            "per unit of the features' decoder directions."
        },
    )
    rollout_cutoff: float = field(
        default=0.0, metadata={"help": "Score above which `zero_advantage` and `screen` act."}
    )
    rollout_max_factor: float = field(default=5.0, metadata={"help": "Largest factor of `amplify_negative`."})
    rollout_credit: str = field(
        default="rollout",
        metadata={"help": "One factor per `rollout`, or one per `token`.", "choices": list(CREDITS)},
    )
    rollout_ratio: str = field(
        default="one",
        metadata={
            "help": "Importance ratio of steered tokens: `one`, `truncated`, or `exact` (with `loss_type` cispo or "
            "vespo).",
            "choices": list(RATIOS),
        },
    )
    rollout_max_ratio: float = field(default=1.0, metadata={"help": "Bound of the truncated ratio."})
    rollout_max_steered_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a steered rollout that enter the loss. None: all."}
    )
