"""A reward that truly reads activations: SAE features of the completion tokens, as a TRL reward function.

The scores come from `scores.RolloutScoring`; here they become one number per rollout. Left out: judging text. A
feature reward belongs beside a reward that reads the text, since a signal inside the model can be gamed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from qscope_trl.config.training import AGGREGATIONS, PENALTY_SCHEDULES, schedule_factor
from qscope_trl.errors import AttachError, ConfigError
from qscope_trl.features import FeatureSet
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.generations import RolloutActivations
from qscope_trl.training.reader import FeatureReader
from qscope_trl.training.scores import ACTIVATIONS_KEY, READERS_KEY, RolloutScoring

_MAX_LISTED = 12


def aggregate(activations: RolloutActivations, aggregation: str, last_k: int = 16) -> float | None:
    """One number for a rollout, from its per-token scores `s_1 ... s_C` over the tokens the model generated.

    * `mean`: mean of `s_t`;
    * `max`: largest `s_t`;
    * `last_k`: mean of the last k `s_t`;
    * `rate`: share of tokens at which any feature fires;
    * `first_hit`: `1 - (t - 1) / C` for the first firing token t: 1 at once, near 0 at the end; 0 if none fires.

    Returns:
        The number, or None if the model generated no token.
    """
    keep = activations.generated_C
    score_C, fired_C = activations.score_C[keep], activations.active_CS.any(-1)[keep]
    if score_C.numel() == 0:
        return None
    if aggregation == "mean":
        return float(score_C.mean())
    if aggregation == "max":
        return float(score_C.max())
    if aggregation == "last_k":
        return float(score_C[-last_k:].mean())
    if aggregation == "rate":
        return float(fired_C.float().mean())
    first = fired_C.nonzero()
    return 0.0 if first.numel() == 0 else 1 - float(first[0]) / fired_C.numel()


class FeatureReward(FeatureReader):
    """Rewards (or, by default, punishes) rollouts by their SAE features.

    ```python
    trainer = GRPOTrainer(
        model, reward_funcs=[correctness, FeatureReward("repetition.yaml", "Qwen/SAE-Res-...")], ...
    )
    ```

    The reward of a rollout is `sign * scale * schedule(step) * min(aggregate(scores), clip)`. It works in TRL's own
    `GRPOTrainer` and `RLOOTrainer`, which it finds when the trainer reads its name, and in `SAEGRPOTrainer`. Rows that
    cannot be scored get None: completions without a generated token, and truncated ones whose attention TRL masks
    (`mask_truncated_completions`).

    Logged: `sae/NAME/score`, and `sae/NAME/L12F345/mean_pre_act` (or `mean_act`) and `.../firing_rate` for every
    feature; the completions table gains `NAME_score` and `NAME_fired`: which feature fired at which tokens.

    Args:
        features: `FeatureSet` with weights and thresholds, path to one, or a list of names like `L12F345`.
        saes: Hub id, folder, file, or an open `SAESuite`.
        name: Name in logs; several rewards need different ones.
        kind: Per-token score: `preact_hinge`, the weighted sum of `relu(f - threshold)`, or `topk_act`.
        reader: `frozen` (the model before this training) or `policy`.
        aggregation: `mean`, `max`, `last_k`, `rate` or `first_hit`; see `aggregate`.
        last_k: Tokens of `last_k`.
        sign: -1 punishes firing features, +1 rewards them.
        scale: Factor; beside rewards of 0 and 1 a rollout's `scale * score` is best of that order. 0 only measures.
            With `multi_objective_aggregation="normalize_then_sum"` TRL divides it out again: use `reward_weights`.
        clip: Largest aggregated score that counts.
        schedule: Course of the scale over the run, as `PenaltyConfig.penalty_schedule`.
        schedule_steps: Its length, as `PenaltyConfig.penalty_schedule_steps`.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If a setting does not fit.
        FeatureSetError: If the feature file is unreadable.
    """

    def __init__(
        self,
        features: FeatureSet | str | os.PathLike[str] | Sequence[str],
        saes: SAESuite | str | os.PathLike[str],
        *,
        name: str = "feature_reward",
        kind: str = "preact_hinge",
        reader: str = "frozen",
        aggregation: str = "mean",
        last_k: int = 16,
        sign: int = -1,
        scale: float = 1.0,
        clip: float | None = None,
        schedule: str = "constant",
        schedule_steps: float = 0.1,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        super().__init__(features, saes, name=name, kind=kind, reader=reader, sae_revision=sae_revision, sae_k=sae_k)
        for setting, value, allowed in (
            ("aggregation", aggregation, AGGREGATIONS),
            ("schedule", schedule, PENALTY_SCHEDULES),
        ):
            if value not in allowed:
                raise ConfigError(f"`{setting}` is {value!r}; choose one of {', '.join(allowed)}.")
        if sign not in (-1, 1):
            raise ConfigError(f"`sign` is {sign!r}; it is -1 to punish the features or +1 to reward them.")
        if not math.isfinite(scale) or scale < 0:
            raise ConfigError(f"`scale` is {scale!r}; it is a finite number from 0, and `sign` says the direction.")
        if last_k < 1 or (clip is not None and not clip > 0) or not schedule_steps > 0:
            raise ConfigError(
                f"`last_k` is {last_k!r}, `clip` {clip!r} and `schedule_steps` {schedule_steps!r}; `last_k` is 1 or "
                f"more, the others are above 0."
            )
        self.aggregation = aggregation
        self.last_k = last_k
        self.sign = sign
        self.scale = scale
        self.clip = clip
        self.schedule = schedule
        self.schedule_steps = schedule_steps

    @property
    def __name__(self) -> str:
        """The name TRL logs the reward under. A trainer that reads it while it is built is scored from then on."""
        trainer = _trainer_under_construction()
        if trainer is not None:
            RolloutScoring.of(trainer).add(self)
        return self.name

    def score(self, activations: RolloutActivations | None) -> float | None:
        """Aggregated score of one rollout before sign, scale and schedule; None if it cannot be scored."""
        if activations is None:
            return None
        value = aggregate(activations, self.aggregation, self.last_k)
        return value if value is None or self.clip is None else min(value, self.clip)

    def __call__(
        self,
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Rewards of a batch of rollouts, as TRL calls it.

        Raises:
            AttachError: If the trainer that calls does not score rollouts, or not for this reward.
        """
        rows: Sequence[Mapping[str, RolloutActivations] | None] | None = kwargs.get(ACTIVATIONS_KEY)
        if rows is None:
            raise AttachError(
                f"`{self.name}` was called without activations: the trainer does not score rollouts. Give the "
                f"`FeatureReward` itself, not a function around it, to TRL's GRPOTrainer or RLOOTrainer when that is "
                f"built, or to `SAEGRPOTrainer`."
            )
        self._require_reader(rows, kwargs.get(READERS_KEY))
        mine = [None if row is None else row.get(self.name) for row in rows]
        scores = [self.score(activations) for activations in mine]
        factor = self.sign * self.scale
        if trainer_state is not None:
            factor *= schedule_factor(
                self.schedule, self.schedule_steps, trainer_state.global_step, trainer_state.max_steps
            )
        if log_extra is not None:
            log_extra(f"{self.name}_score", list(scores))
            log_extra(f"{self.name}_fired", [fired_tokens(activations) for activations in mine])
        if log_metric is not None:
            self._log(mine, scores, log_metric)
        if self.scale == 0:
            # A reward of 0 would make a row count that every other function left out.
            return [None] * len(rows)
        return [None if score is None else factor * score for score in scores]

    def _require_reader(self, rows: Sequence[Any], readers: Sequence[Sequence[FeatureReader]] | None) -> None:
        """Raise if the trainer reads its rollouts, but not for this reward, which would then reward nothing."""
        scored = [row for row in rows if row is not None]
        # A function around this one may pass on the activations alone; then their names tell.
        known = any(self.name in row for row in scored) or not scored
        if readers:
            known = any(reader is self for reader in readers[0])
        if not known:
            names = sorted({reader.name for reader in readers[0]} if readers else set().union(*scored))
            raise AttachError(
                f"The trainer reads no features for `{self.name}` (it reads {', '.join(names) or 'none'}), so every "
                f"rollout would go without this reward. Give the `FeatureReward` itself in `reward_funcs`, not a "
                f"function around it; `scale` and `sign` are settings of it."
            )

    def _log(
        self,
        rows: Sequence[RolloutActivations | None],
        scores: Sequence[float | None],
        log_metric: Callable[[str, float], None],
    ) -> None:
        """Means over all processes, so that each of them logs the same names."""
        num, known = len(self.features), [score for score in scores if score is not None]
        sums = torch.zeros(4 + 2 * num, dtype=torch.float64)
        sums[0], sums[1], sums[2] = sum(known), len(known), len(scores)
        for row in rows:
            if row is not None:
                keep = row.generated_C
                sums[3] += int(keep.sum())
                sums[4 : 4 + num] += row.values_CS[keep].sum(0).cpu()
                sums[4 + num :] += row.active_CS[keep].sum(0).cpu()
        total, scored, count, tokens, *features = over_processes(sums, log_metric).tolist()
        log_metric(f"sae/{self.name}/unscored", 1 - scored / max(1.0, count))
        if scored:
            log_metric(f"sae/{self.name}/score", total / scored)
        if tokens:
            mean = "mean_pre_act" if self.kind == "preact_hinge" else "mean_act"
            for place, feature in enumerate(self.features.ids):
                log_metric(f"sae/{self.name}/{feature}/{mean}", features[place] / tokens)
                log_metric(f"sae/{self.name}/{feature}/firing_rate", features[num + place] / tokens)


def over_processes(sums: Tensor, log_metric: Callable[[str, float], None]) -> Tensor:
    """Sums over the processes of the trainer whose `log_metric` this is; every process must call this."""
    accelerator = getattr(getattr(log_metric, "__self__", None), "accelerator", None)
    if accelerator is None or accelerator.num_processes == 1:
        return sums
    reduced: Tensor = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").cpu()
    return reduced


def fired_tokens(activations: RolloutActivations | None) -> str:
    """Which features fired at which completion tokens, from 0: `L12F3@0-4,9 L20F7@2`; strongest feature first."""
    if activations is None:
        return ""
    keep = activations.generated_C
    active = (activations.active_CS & keep[:, None]).cpu()
    strength = torch.where(activations.active_CS, activations.values_CS, 0).sum(0).cpu()
    parts = []
    for column in strength.argsort(descending=True, stable=True).tolist():
        places = active[:, column].nonzero().flatten()
        if places.numel():
            parts.append(f"{activations.ids[column]}@{_runs(places)}")
    return " ".join(parts)


def _runs(places: Tensor) -> str:
    runs: list[list[int]] = []
    for place in places.tolist():
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:_MAX_LISTED]]
    return ",".join(shown) + (",..." if len(runs) > _MAX_LISTED else "")


def _trainer_under_construction() -> Any:
    """The nearest trainer up the call stack that is running its `__init__` and generates rollouts."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and hasattr(candidate, "_calculate_rewards"):
            return candidate
        frame = frame.f_back
    return None
