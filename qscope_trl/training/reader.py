"""Which SAE features are read from rollouts, on which model, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qscope_trl.config.training import PENALTY_KINDS, READERS
from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureSet
from qscope_trl.sae.suite import SAESuite


class FeatureReader:
    """Which features are read from rollouts, and on which model.

    Args:
        features: `FeatureSet`, path to one, or a list of names like `L12F345`.
        saes: Hub id, folder, file, or an open `SAESuite`.
        name: What its scores are called in logs and for reward functions.
        kind: `preact_hinge` or `topk_act`, the per-token score, as in `PenaltyConfig.penalty_kind`.
        reader: `frozen` reads the model before this training (LoRA: adapters off; full fine-tuning: the reference
            model), `policy` the model in training. A frozen reader cannot be gamed by moving the representation.
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
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        for setting, value, allowed in (("kind", kind, PENALTY_KINDS), ("reader", reader, READERS)):
            if value not in allowed:
                raise ConfigError(f"`{setting}` is {value!r}; choose one of {', '.join(allowed)}.")
        self.features = FeatureSet.load(features)
        self.saes = saes
        self.name = name
        self.kind = kind
        self.reader = reader
        self.sae_revision = sae_revision
        self.sae_k = sae_k

    def suite(self) -> SAESuite:
        """The SAEs, opened for the features' layers."""
        return SAESuite.from_pretrained(
            self.saes, layers=self.features.layers, revision=self.sae_revision, k=self.sae_k
        )
