"""Settings of a training run with a penalty.

They are parsed together with TRL's and transformers' own argument classes into one flat set of keys, so each name
carries a prefix of ours (`sae_`, `penalty_`, `monitor_`, `data_`).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qscope_trl.config.values import DTYPES, one_of
from qscope_trl.errors import ConfigError

PENALTY_KINDS = ("preact_hinge", "topk_act")
PENALTY_TOKENS = ("labels", "completion", "all")
PENALTY_NONFINITE = ("raise", "skip")
PENALTY_CONTROLS = ("none", "random")
PENALTY_SCHEDULES = ("constant", "warmup", "decay", "warmup_decay")
DRIFT_ACTIONS = ("warn", "stop", "off")
READERS = ("frozen", "policy")
AGGREGATIONS = ("mean", "max", "last_k", "rate", "first_hit")
POLICIES = ("penalise", "amplify_negative", "zero_advantage", "screen", "steered_negative")
CREDITS = ("rollout", "token")
RATIOS = ("one", "truncated", "exact")

PREFIXES = ("sae_", "penalty_", "monitor_", "data_", "reward_", "rollout_", "steer_")
"""Every field that shares a command line with TRL's begins with one of these."""


def schedule_factor(schedule: str, length: float, step: int, max_steps: int) -> float:
    """Factor in [0, 1] of a schedule at an optimizer step.

    Args:
        schedule: One of `PENALTY_SCHEDULES`.
        length: Warm-up or decay: optimizer steps if 1 or more, else a share of all steps.
        step: Optimizer steps done so far, from 0.
        max_steps: Optimizer steps of the whole run.
    """
    span = max(1.0, length if length >= 1 else length * max_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "warmup":
        return min(1.0, (step + 1) / span)
    if schedule == "decay":
        return min(1.0, max(0.0, (max_steps - step) / span))
    down = max(1.0, max_steps - span)
    return min(1.0, (step + 1) / span, max(0.0, (max_steps - step) / down))


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """What the penalty measures, on which tokens, and how strongly it joins the loss.

    The total added to the loss of an optimizer step is `weight(step) * sum over layers of mean over masked tokens of
    sum over features`, where the mean runs over the tokens of the whole step, as the trainer averages its own loss.
    """

    _argument_group_name = "the penalty"

    penalty_weight: float = field(
        default=0.0,
        metadata={
            "help": "Factor of the penalty in the loss. 0 measures only and leaves training unchanged bit for bit. "
            "SASFT (arXiv:2507.14894) used 5e-4 to 1e-3 times 32 accumulation steps; here nothing multiplies it."
        },
    )
    penalty_kind: str = field(
        default="preact_hinge",
        metadata={
            "help": "`preact_hinge`: relu(pre-activation - threshold), needs only the chosen rows of the encoder. "
            "`topk_act`: the activation after TopK and ReLU, needs the whole encoder.",
            "choices": list(PENALTY_KINDS),
        },
    )
    penalty_tokens: str = field(
        default="labels",
        metadata={
            "help": "Tokens that are penalised: `labels` (trained positions), `completion` (the trainer's completion "
            "mask), or `all` (every token that is not padding).",
            "choices": list(PENALTY_TOKENS),
        },
    )
    penalty_shift: bool = field(
        default=True,
        metadata={
            "help": "Penalise the position that predicts a trained token (true), or the position of the trained token "
            "itself, as SASFT's released code does (false)."
        },
    )
    penalty_skip_first: bool = field(
        default=True,
        metadata={
            "help": "Leave out position 0 of every sequence. Its residual is an attention sink whose norm the SAEs "
            "were not trained on."
        },
    )
    penalty_schedule: str = field(
        default="constant",
        metadata={
            "help": "Course of the weight over optimizer steps: `constant`; `warmup` (linear from 0); `decay` (linear "
            "to 0); `warmup_decay` (up, then down to 0 at the end of training).",
            "choices": list(PENALTY_SCHEDULES),
        },
    )
    penalty_schedule_steps: float = field(
        default=0.1,
        metadata={
            "help": "Length of the warm-up or decay: optimizer steps if 1 or more, else a share of all steps. `decay` "
            "counts from the end of training, `warmup_decay` uses it for the warm-up."
        },
    )
    penalty_nonfinite: str = field(
        default="raise",
        metadata={
            "help": "Where activations at penalised tokens are NaN or infinite: `raise` stops before the optimizer "
            "step and names the batch; `skip` leaves those tokens out of the penalty, with a warning.",
            "choices": list(PENALTY_NONFINITE),
        },
    )
    penalty_control: str = field(
        default="none",
        metadata={
            "help": "A run to compare with: `random` puts the penalty on random features of the same layers that fire "
            "as often on texts of the training data, with the same weights, and only measures the chosen ones.",
            "choices": list(PENALTY_CONTROLS),
        },
    )

    def __post_init__(self) -> None:
        one_of("penalty_nonfinite", self.penalty_nonfinite, PENALTY_NONFINITE)
        one_of("penalty_control", self.penalty_control, PENALTY_CONTROLS)
        one_of("penalty_kind", self.penalty_kind, PENALTY_KINDS)
        one_of("penalty_tokens", self.penalty_tokens, PENALTY_TOKENS)
        one_of("penalty_schedule", self.penalty_schedule, PENALTY_SCHEDULES)
        if not math.isfinite(self.penalty_weight) or self.penalty_weight < 0:
            raise ConfigError(
                f"`penalty_weight` is {self.penalty_weight!r}; it is a finite number from 0. A negative weight would "
                f"reward the features."
            )
        if not math.isfinite(self.penalty_schedule_steps) or self.penalty_schedule_steps <= 0:
            raise ConfigError(
                f"`penalty_schedule_steps` is {self.penalty_schedule_steps!r}; give steps (1 or more) or a share of "
                f"all steps (between 0 and 1)."
            )

    @classmethod
    def from_settings(cls, config: PenaltyConfig | None = None, **settings: Any) -> PenaltyConfig:
        """A configuration, or the default one, with some fields replaced.

        Raises:
            ConfigError: If a setting is unknown; the nearest known name is suggested.
        """
        known = [item.name for item in fields(cls)]
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(known)}."
                raise ConfigError(f"Unknown setting `{name}`. {hint}")
        return replace(config or cls(), **settings)

    def weight_at(self, step: int, max_steps: int) -> float:
        """Weight of the penalty at an optimizer step.

        Args:
            step: Optimizer steps done so far, from 0.
            max_steps: Optimizer steps of the whole run.

        Returns:
            `penalty_weight` times the schedule's factor in [0, 1].
        """
        factor = schedule_factor(self.penalty_schedule, self.penalty_schedule_steps, step, max_steps)
        return self.penalty_weight * factor


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Which SAEs and which of their features a run uses."""

    _argument_group_name = "the SAEs and the features"

    sae_path: str | None = field(
        default=None,
        metadata={"help": "SAEs of the model: Hub id, folder or single file. Required."},
    )
    sae_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of the SAE's Hub repository."}
    )
    sae_k: int | None = field(
        default=None,
        metadata={"help": "Active features per token, where neither the SAE's name nor its configuration says."},
    )
    sae_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of whole encoders, which `topk_act` needs: `auto` is that of the layer that is read; "
            "`float32` keeps what the checkpoint says. Chosen rows are float32 in any case.",
            "choices": list(DTYPES),
        },
    )
    sae_features: list[str] | None = field(
        default=None,
        metadata={
            "help": "Features to penalise: a file that `qscope find` wrote, or names such as L12F345. Required."
        },
    )

    def __post_init__(self) -> None:
        one_of("sae_dtype", self.sae_dtype, DTYPES)
        if self.sae_k is not None and self.sae_k < 1:
            raise ConfigError(f"`sae_k` is {self.sae_k}; it is the number of active features per token, 1 or more.")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is measured and never trained on."""

    _argument_group_name = "monitors"

    monitor_features: list[str] | None = field(
        default=None,
        metadata={
            "help": "Features to log beside the penalised ones, never penalised: a feature file or names such as "
            "L12F345. The same SAEs are used."
        },
    )
    monitor_alarm: bool = field(
        default=True,
        metadata={
            "help": "Warn, once for each, when the penalised features have fallen below half of their first value and "
            "the monitors, the rate of a text detector or a rule have stayed above 0.8 of theirs."
        },
    )
    monitor_record: bool = field(
        default=True,
        metadata={
            "help": "Write the run's record into `output_dir/sae_record`, for `qscope report` and the model card, and "
            "`used_features.json` into checkpoints."
        },
    )
    monitor_texts: str | None = field(
        default=None,
        metadata={
            "help": "Fixed texts to watch the model on: file, folder, Hub dataset or demo:NAME. They turn on the "
            "drift panel, and the dashboard with features on tokens."
        },
    )
    monitor_text_column: str = field(default="text", metadata={"help": "Column of `monitor_texts`."})
    monitor_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Fixed prompts to generate from before, during and after training: file, folder, Hub dataset or "
            "demo:NAME. They turn on the dashboard."
        },
    )
    monitor_prompt_column: str = field(default="prompt", metadata={"help": "Column of `monitor_prompts`."})
    monitor_behaviour: str | None = field(
        default=None,
        metadata={
            "help": "Text-level detector on these generations: `chinese`, `repetition` or `regex:PATTERN`. It reads "
            "no feature, so it tells a silent feature from a behaviour that is gone."
        },
    )
    monitor_every: int | None = field(
        default=None,
        metadata={
            "help": "Steps between measurements. By default the drift panel takes less than a fiftieth of the steps' "
            "time, and the dashboard measures ten times a run."
        },
    )
    monitor_drift: str = field(
        default="warn",
        metadata={
            "help": "When the model drifts past a limit on `monitor_texts`: `warn`, `stop` the training, or `off`.",
            "choices": list(DRIFT_ACTIONS),
        },
    )

    def __post_init__(self) -> None:
        one_of("monitor_drift", self.monitor_drift, DRIFT_ACTIONS)
        if self.monitor_every is not None and self.monitor_every < 1:
            raise ConfigError(f"`monitor_every` is {self.monitor_every}; it is a number of steps from 1.")
        if self.monitor_drift == "stop" and self.monitor_texts is None:
            raise ConfigError(
                "`monitor_drift` is 'stop', but without `monitor_texts` no drift is measured. Name them."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What `trl.ScriptArguments` does not say about the data."""

    _argument_group_name = "more about the data"

    data_eval_path: str | None = field(
        default=None,
        metadata={
            "help": "Local evaluation file (JSON, JSONL, Parquet, CSV, also .gz) or folder. Without it, evaluation "
            "uses the split `dataset_test_split` of the training data."
        },
    )
    penalty_group_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column that names each sample's group, for example its language. Groups choose the "
            "features' thresholds, and the FeatureSet's target group is exempt from the penalty. Not with packing."
        },
    )
