"""What becomes of flagged rollouts: policies on rewards, advantages and generation of a GRPO group.

Formulas first, as pure functions; `RolloutPolicy` chooses one and applies it where TRL keeps rewards and advantages.
Left out: vLLM and continuous batching for steered negatives, which generate outside the hooked model.

Shape legend: `B` local rows, `T` completion positions, `G` rollouts of a group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qscope_trl.config.training import CREDITS, POLICIES, RATIOS
from qscope_trl.errors import AttachError, ConfigError, PenaltySelfCheckError
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.edit import ResidualAdd
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.generations import RolloutActivations, log_metric, mend_logged_advantages
from qscope_trl.training.opening import on_every_process, open_features
from qscope_trl.training.rewards import FeatureReward
from qscope_trl.training.scores import RolloutScoring
from qscope_trl.training.steered import (
    completion_logps,
    muted_tokens,
    refuse_foreign_generation,
    steered_rows,
    steering_vectors,
    truncated_ratio,
)

Scores = Sequence[Mapping[str, RolloutActivations] | None]


def amplified(advantages: Tensor, scores: Tensor, strength: float, max_factor: float) -> Tensor:
    """`A * min(1 + strength * s, max_factor)` where `A < 0`, else `A`.

    Args:
        advantages: `(B,)`, or `(B, 1)` with scores `(B, T)`.
        scores: Non-negative; 0 leaves the advantage.
        strength: Growth per unit of score.
        max_factor: Largest factor.
    """
    factor = (1 + strength * scores.clamp(min=0)).clamp(max=max_factor)
    return torch.where(advantages < 0, advantages * factor, advantages)


def zeroed(advantages: Tensor, scores: Tensor, cutoff: float) -> Tensor:
    """`0` where `s > cutoff`, else `A`: the flagged rollout (or token) teaches nothing, its group's baseline stays."""
    return torch.where(scores > cutoff, torch.zeros_like(advantages), advantages)


def screened(rewards_BF: Tensor, scores_B: Tensor, cutoff: float) -> Tensor:
    """Every reward of a rollout with `s > cutoff` becomes NaN: TRL leaves it out of the baseline and of the loss."""
    return torch.where((scores_B > cutoff)[:, None], torch.full_like(rewards_BF, math.nan), rewards_BF)


_DEFAULTS = {
    "aggregation": "mean",
    "last_k": 16,
    "kind": "preact_hinge",
    "reader": "frozen",
    "sae_revision": None,
    "sae_k": None,
}


class RolloutPolicy:
    """What `SAEGRPOTrainer` does with rollouts in which the features fire.

    With the rollout's score `s` (aggregated as in `FeatureReward`), advantage `A` and `a = strength`:

    * `penalise`: the reward becomes `r - a s`. Works in groups in which all rewards are equal, where advantages are 0.
    * `amplify_negative`: `A (1 + a s)` where `A < 0`, at most `max_factor * A`. Our extension of the published idea of
      making negative rollouts count more; no published numbers. Does nothing in a group without variance.
    * `zero_advantage`: `A = 0` where `s > cutoff`.
    * `screen`: rollouts with `s > cutoff` leave their group, and the baseline is that of the others.
    * `steered_negative`: the published method. Of each group, the last rollout is generated with `h + a d` at every
      decode step, where `d` is the sum of the features' decoder directions with their weights; rewards and advantages
      are the group's usual ones, and old log-probabilities those of the unsteered policy.

    Args:
        kind: One of the above.
        features: `FeatureSet`, path to one, or names. Default: those of the only `FeatureReward`.
        saes: Hub id, folder, file, or an open `SAESuite`. Default: likewise.
        strength: `a`. For `steered_negative` in units of the residual: as large as the feature's usual activation.
        cutoff: Score above which a rollout is flagged.
        max_factor: Largest factor of `amplify_negative`.
        credit: `rollout`: one factor for all tokens. `token`: each token's own score instead, so that the change sits
            on the tokens that fired; for `amplify_negative` and `zero_advantage`. Needs TRL 1.0 or newer.
        ratio: Importance ratio of steered tokens. `one` (default): none, the rollout counts as the policy's own.
            `truncated`: the advantage is multiplied by `min(pi / pi_steered, max_ratio)`. `exact`: the old
            log-probabilities are those of the steered policy; losses that clip then mute just the steered tokens (the
            share is logged), so choose it with `loss_type` `cispo` or `vespo`.
        max_ratio: Bound of `truncated`.
        max_steered_tokens: Tokens of a steered rollout that enter the loss; a long loop would outweigh its group.
            Rewards see the whole rollout.
        aggregation: As `FeatureReward`.
        last_k: As `FeatureReward`.
        feature_kind: Per-token score, as `FeatureReward.kind`.
        reader: `frozen` or `policy`, as `FeatureReward`.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If a setting does not fit.
        FeatureSetError: If the feature file is unreadable.

    References:
        Qwen-Scope, arXiv:2605.11887, section 8 (`steered_negative`; strength, group size and layers are not given).
    """

    def __init__(
        self,
        kind: str,
        features: FeatureSet | str | os.PathLike[str] | Sequence[str] | None = None,
        saes: SAESuite | str | os.PathLike[str] | None = None,
        *,
        strength: float = 1.0,
        cutoff: float = 0.0,
        max_factor: float = 5.0,
        credit: str = "rollout",
        ratio: str = "one",
        max_ratio: float = 1.0,
        max_steered_tokens: int | None = None,
        aggregation: str = "mean",
        last_k: int = 16,
        feature_kind: str = "preact_hinge",
        reader: str = "frozen",
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        for setting, value, allowed in (
            ("kind", kind, POLICIES),
            ("credit", credit, CREDITS),
            ("ratio", ratio, RATIOS),
        ):
            if value not in allowed:
                raise ConfigError(f"`{setting}` is {value!r}; choose one of {', '.join(allowed)}.")
        if (features is None) is not (saes is None):
            raise ConfigError("`features` and `saes` of a rollout policy come together; got one of them.")
        if not math.isfinite(strength) or strength < 0:
            raise ConfigError(f"`strength` is {strength!r}; it is a finite number from 0.")
        if math.isnan(cutoff):
            raise ConfigError("`cutoff` is nan, above which no score is; it is a number.")
        if not max_factor >= 1 or not max_ratio > 0 or (max_steered_tokens is not None and max_steered_tokens < 1):
            raise ConfigError(
                f"`max_factor` is {max_factor!r} (1 or more), `max_ratio` {max_ratio!r} (above 0), "
                f"`max_steered_tokens` {max_steered_tokens!r} (1 or more, or None)."
            )
        if credit == "token" and kind not in ("amplify_negative", "zero_advantage"):
            raise ConfigError(f"`credit='token'` has no meaning for `{kind}`, which acts on whole rollouts.")
        if ratio != "one" and kind != "steered_negative":
            raise ConfigError(f"`ratio={ratio!r}` is for `steered_negative`; `{kind}` steers nothing.")
        self.kind = kind
        self.strength = strength
        self.cutoff = cutoff
        self.max_factor = max_factor
        self.credit = credit
        self.ratio = ratio
        self.max_ratio = max_ratio
        self.max_steered_tokens = max_steered_tokens
        self._source = (features, saes)
        self._settings: dict[str, Any] = {
            "aggregation": aggregation,
            "last_k": last_k,
            "kind": feature_kind,
            "reader": reader,
            "sae_revision": sae_revision,
            "sae_k": sae_k,
        }
        self._score: FeatureReward | None = None
        self._vectors: dict[int, Tensor] = {}
        self._steered_B: Tensor | None = None

    @property
    def reader(self) -> FeatureReward | None:
        """What scores, or directions to steer along, are taken from; None before a trainer is built with it."""
        return self._score

    # --- before the trainer is built, and after ------------------------------------------------------------------

    def reward(self, reward_funcs: Sequence[Any]) -> FeatureReward:
        """The reward function whose scores the policy uses: its own, or the only `FeatureReward` there is.

        Raises:
            ConfigError: If no features were given and there is not exactly one `FeatureReward`.
        """
        features, saes = self._source
        if features is None or saes is None:
            found = [reward for reward in reward_funcs if isinstance(reward, FeatureReward)]
            if self.kind == "penalise":
                raise ConfigError(
                    "`penalise` needs `features` and `saes` of its own; a `FeatureReward` in `reward_funcs` penalises "
                    "already."
                )
            if len(found) != 1:
                raise ConfigError(
                    f"The rollout policy names no features, and there are {len(found)} `FeatureReward`s to take them "
                    f"from. Pass `features` and `saes` to `RolloutPolicy`."
                )
            changed = [name for name, value in self._settings.items() if value != _DEFAULTS[name]]
            if changed:
                raise ConfigError(
                    f"The rollout policy takes the features and scores of `{found[0].name}`, so its own "
                    f"`{'`, `'.join(changed)}` would change nothing. Set them there, or give the policy `features` "
                    f"and `saes`."
                )
            self._score = found[0]
        else:
            self._score = FeatureReward(features, saes, name="rollout_policy", scale=self.strength, **self._settings)
        return self._score

    def bind(self, trainer: Any, scoring: RolloutScoring) -> None:
        """Check that the trainer can carry the policy, and open what steering needs.

        Raises:
            AttachError: If it cannot; the message says why and what to change.
        """
        score = self._score
        if score is None:
            raise AttachError("`RolloutPolicy.reward` comes before `bind`.")
        import trl
        from packaging.version import Version

        version = Version(trl.__version__)
        is_rloo = not hasattr(trainer, "loss_type")
        if self.credit == "token" or self.ratio == "truncated":
            if is_rloo:
                raise AttachError(
                    "RLOO has one advantage per rollout, so there is no credit or ratio per token. Use GRPO."
                )
            if version < Version("1.0"):
                raise AttachError(
                    f"TRL {version} takes one advantage per rollout only; per-token needs TRL 1.0 or newer."
                )
            if (
                getattr(trainer, "loss_type", None) == "vespo"
                and trainer.accelerator.num_processes > 1
                and version < Version("1.12")
            ):
                raise AttachError(
                    f"TRL {version} gathers the weights of the `vespo` loss over processes, which fails per token. "
                    f"Use TRL 1.12 or newer, or another `loss_type`."
                )
        if self.kind == "penalise" and getattr(trainer, "multi_objective_aggregation", None) == "normalize_then_sum":
            raise AttachError(
                "`multi_objective_aggregation='normalize_then_sum'` divides every reward by its own spread, so the "
                "strength of `penalise` would change nothing. Pass a `FeatureReward` and set `reward_weights`."
            )
        if self.kind == "screen" and version < Version("1.7"):
            raise AttachError(
                f"TRL {version} counts a rollout without rewards as reward 0 instead of leaving it out. Use TRL 1.7 "
                f"or newer, or `zero_advantage`."
            )
        if self.kind == "steered_negative":
            refuse_foreign_generation(trainer, is_rloo)

            def open_directions() -> dict[int, Tensor]:
                open_features(trainer.model, score.suite(), score.features, (), "preact_hinge")
                return steering_vectors(score, self.strength)

            self._vectors = on_every_process(open_directions)
        else:
            scoring.add(score)

    # --- while rollouts are made ---------------------------------------------------------------------------------

    @contextmanager
    def generating(self, trainer: Any, num_rows: int) -> Iterator[None]:
        """Steer the last rollout of each group while the training batch is generated.

        Raises:
            PenaltySelfCheckError: If nothing was steered.
        """
        self._steered_B = None
        if self.kind != "steered_negative" or not trainer.model.training:
            yield
            return
        rows = steered_rows(trainer.accelerator.process_index, num_rows, trainer.num_generations)
        self._steered_B = rows
        if not bool(rows.any()):
            yield
            return
        with ResidualAdd(trainer.model, self._vectors, rows) as edit:
            yield
        if edit.num_edits == 0:
            raise PenaltySelfCheckError(
                "Rollouts were to be steered, but generation never ran the hooked model. Generate with the trainer's "
                "own model: no vLLM, no continuous batching, no `rollout_func`."
            )

    def after_rewards(self, trainer: Any, rewards_BF: Tensor, scores: Scores) -> Tensor:
        """`screen`: the gathered rewards, with those of flagged rollouts of all processes left out."""
        if self.kind != "screen" or not trainer.model.training:
            return rewards_BF
        local = self._rollout_scores(scores, rewards_BF.device)
        flagged = trainer.accelerator.gather(local)
        log_metric(trainer, "sae/rollouts/screened", (flagged > self.cutoff).float().mean())
        return screened(rewards_BF, flagged, self.cutoff)

    def after_scoring(self, trainer: Any, output: dict[str, Any], scores: Scores) -> None:
        """Change advantages, and for steered rollouts masks and ratios, in what TRL will train on."""
        if not trainer.model.training:
            return
        before = output["advantages"]
        if self.kind in ("amplify_negative", "zero_advantage"):
            output["advantages"] = self._reweighted(before, output, scores)
        elif self.kind == "steered_negative" and self._steered_B is not None:
            self._settle_steered(trainer, output, self._steered_B.to(before.device))
        after = output["advantages"]
        mask = output["completion_mask"]
        if self.kind in ("amplify_negative", "zero_advantage"):
            wide = before[:, None] if after.dim() == 2 else before
            changed = (after != wide).reshape(before.numel(), -1).any(-1)
            log_metric(trainer, "sae/rollouts/reweighted", trainer.accelerator.gather(changed.float()).mean())
        if after is not before:
            rows = (after * mask).sum(-1) / mask.sum(-1).clamp(min=1) if after.dim() == 2 else after
            mend_logged_advantages(trainer, rows)

    @property
    def steered_B(self) -> Tensor | None:
        """Which rollouts of this process were steered in the last generation, or None."""
        return self._steered_B

    # --- details -------------------------------------------------------------------------------------------------

    def _rollout_scores(self, scores: Scores, device: torch.device) -> Tensor:
        reward = self._score
        values = []
        for row in scores:
            score = None if reward is None or row is None else reward.score(row.get(reward.name))
            values.append(0.0 if score is None else score)
        return torch.tensor(values, device=device)

    def _token_scores(self, scores: Scores, like_BT: Tensor) -> Tensor:
        result = torch.zeros(like_BT.shape, device=like_BT.device)
        for number, row in enumerate(scores):
            found = None if self._score is None or row is None else row.get(self._score.name)
            if found is not None:
                tokens = torch.where(found.generated_C, found.score_C, 0)
                result[number, : tokens.numel()] = tokens.to(result.device)
        return result

    def _reweighted(self, advantages: Tensor, output: Mapping[str, Any], scores: Scores) -> Tensor:
        if self.credit == "token":
            values = self._token_scores(scores, output["completion_mask"])
            wide = advantages[:, None].expand_as(values)
        else:
            values, wide = self._rollout_scores(scores, advantages.device), advantages
        if self.kind == "zero_advantage":
            return zeroed(wide, values, self.cutoff)
        return amplified(wide, values, self.strength, self.max_factor)

    def _settle_steered(self, trainer: Any, output: dict[str, Any], rows_B: Tensor) -> None:
        mask = output["completion_mask"]
        if self.max_steered_tokens is not None:
            mask = mask.clone()
            mask[rows_B, self.max_steered_tokens :] = 0
            output["completion_mask"] = mask
            if "num_items_in_batch" in output:
                trained = mask * output["tool_mask"] if "tool_mask" in output else mask
                output["num_items_in_batch"] = trainer.accelerator.gather(trained.sum()).sum()
        # Every process comes here, also one whose part of the groups holds no steered rollout.
        advantages = output["advantages"]
        sums = torch.stack([advantages[rows_B].sum(), rows_B.sum().to(advantages.dtype)])
        totals = trainer.accelerator.reduce(sums, reduction="sum")
        log_metric(trainer, "sae/rollouts/steered_advantage", totals[0] / totals[1].clamp(min=1))
        if self.ratio == "one":
            return
        with torch.no_grad():
            policy = output.get("old_per_token_logps")
            if policy is None:
                policy = completion_logps(trainer, output, {}, rows_B)
            steered = completion_logps(trainer, output, self._vectors, rows_B)
        ratio = torch.where(rows_B[:, None], (policy - steered).exp(), 1.0)
        wide = output["advantages"][:, None].expand_as(ratio)
        if self.ratio == "truncated":
            weight = torch.where(rows_B[:, None], truncated_ratio(policy, steered, self.max_ratio), 1.0)
            output["advantages"] = wide * weight
            return
        output["old_per_token_logps"] = torch.where(rows_B[:, None], steered, policy)
        counted = mask.bool() & rows_B[:, None]
        muted = muted_tokens(wide, ratio, counted, trainer.epsilon_low)
        totals = trainer.accelerator.reduce(torch.stack([muted.sum(), counted.sum()]).float(), reduction="sum")
        log_metric(trainer, "sae/rollouts/muted_tokens", totals[0] / totals[1].clamp(min=1))
