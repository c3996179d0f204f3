"""A rule over features as a reward in GRPO and RLOO, and as a monitor of rollouts.

Rollouts are read as `FeatureReward` reads them; here a compiled rule decides each of them. Left out: texts other than
rollouts; a fixed set of those is watched by `rule_monitor`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch

from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureSet
from qscope_trl.rules import Rule, TokenValues, load_rule
from qscope_trl.rules.explain import OneDocument
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.generations import RolloutActivations
from qscope_trl.training.rewards import FeatureReward, over_processes

VALUES = ("holds", "margin")
"""What a rule makes of a rollout: 1 or 0, or `Rule.score`."""


class RuleReward(FeatureReward):
    """Rewards (or, by default, punishes) rollouts for which a rule holds.

    ```python
    trainer = GRPOTrainer(model, reward_funcs=[correctness, RuleReward("toxic.yaml", "Qwen/SAE-Res-...")], ...)
    ```

    The "document" is what the model generated itself: activations after TopK and ReLU at the completion's tokens,
    which have read the prompt. The reward is `sign * scale * schedule(step)` where the rule holds and 0 where it does
    not, or that factor times the rule's margin. With `scale=0` the rule only watches: it is logged, and counts for
    nothing. Everything else is as in `FeatureReward`: which models are read, rows that get None, trainers it works in,
    what is logged. `sae/NAME/score` is the mean of what the rule made of the rollouts, and `sae/rule/NAME` the share
    for which it holds. The whole encoder of each of its layers is in memory, since TopK needs it.

    Args:
        rule: `Rule`, rule file, or the text of a rule.
        saes: Hub id, folder, file, or an open `SAESuite`.
        name: Name in logs; several rewards need different ones.
        value: `holds` (1 or 0), or `margin`: see `Rule.score`.
        reader: `frozen` (the model before this training) or `policy`.
        sign: -1 punishes rollouts for which the rule holds, +1 rewards them.
        scale: Factor; 0 only measures.
        schedule: Course of the scale over the run, as `PenaltyConfig.penalty_schedule`.
        schedule_steps: Its length, as `PenaltyConfig.penalty_schedule_steps`.
        sets: FeatureSets by the name that the rule uses.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If a setting does not fit.
        RuleError: If the rule cannot be read. Features that are not there are refused when the trainer scores its
            first rollouts.
    """

    def __init__(
        self,
        rule: Rule | str | os.PathLike[str],
        saes: SAESuite | str | os.PathLike[str],
        *,
        name: str = "rule_reward",
        value: str = "holds",
        reader: str = "frozen",
        sign: int = -1,
        scale: float = 1.0,
        schedule: str = "constant",
        schedule_steps: float = 0.1,
        sets: Mapping[str, FeatureSet] | None = None,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        if value not in VALUES:
            raise ConfigError(f"`value` is {value!r}; choose one of {', '.join(VALUES)}.")
        self.rule = load_rule(rule, sets=sets)
        self.value = value
        super().__init__(
            FeatureSet.from_names(self.rule.features, sae=self.rule.sae),
            saes,
            name=name,
            kind="topk_act",
            reader=reader,
            sign=sign,
            scale=scale,
            schedule=schedule,
            schedule_steps=schedule_steps,
            sae_revision=sae_revision,
            sae_k=sae_k,
        )

    def suite(self) -> SAESuite:
        """The SAEs, opened for the rule's layers.

        Raises:
            RuleError: If the rule names a feature that is not there, or was made for other SAEs.
        """
        # Not narrowed before the check: its message lists the layers there are.
        whole = SAESuite.from_pretrained(self.saes, revision=self.sae_revision, k=self.sae_k)
        self.rule.check(whole)
        return SAESuite.from_pretrained(whole, layers=self.rule.layers)

    def holds(self, activations: RolloutActivations | None) -> bool | None:
        """Whether the rule holds for one rollout; None if it cannot be scored."""
        document = self._document(activations)
        return None if document is None else bool(self.rule.evaluate(document)[0])

    def score(self, activations: RolloutActivations | None) -> float | None:
        """What the rule makes of one rollout, before sign, scale and schedule; None if it cannot be scored."""
        if self.value == "holds":
            held = self.holds(activations)
            return None if held is None else float(held)
        document = self._document(activations)
        return None if document is None else float(self.rule.score(document)[0])

    def _document(self, activations: RolloutActivations | None) -> OneDocument | None:
        if activations is None:
            return None
        acts = activations.values_CS[activations.generated_C].double().cpu().numpy()
        return OneDocument(TokenValues(activations.ids, acts), len(acts) - 1) if len(acts) else None

    def _log(
        self,
        rows: Sequence[RolloutActivations | None],
        scores: Sequence[float | None],
        log_metric: Callable[[str, float], None],
    ) -> None:
        super()._log(rows, scores, log_metric)
        held = [value for value in map(self.holds, rows) if value is not None]
        share, count = over_processes(torch.tensor([float(sum(held)), float(len(held))]), log_metric).tolist()
        if count:
            log_metric(f"sae/rule/{self.name}", share / count)
