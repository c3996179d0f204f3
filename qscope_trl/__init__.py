"""qscope_trl: fine-tune language models with sparse autoencoders.

Importing the package is free: public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qscope_trl._version import __version__

if TYPE_CHECKING:
    from qscope_trl.config.training import PenaltyConfig
    from qscope_trl.errors import QScopeError, QScopeWarning
    from qscope_trl.features import Feature, FeatureId, FeatureSet
    from qscope_trl.hooks.residual import ResidualHook
    from qscope_trl.sae.suite import SAESuite
    from qscope_trl.sae.topk_sae import TopKSAE
    from qscope_trl.training.attach import PenaltyAttachment, attach
    from qscope_trl.training.callback import SAEPenaltyCallback
    from qscope_trl.training.checkpoints import CompleteCheckpoints, last_complete_checkpoint
    from qscope_trl.training.collator import GroupCollator
    from qscope_trl.training.grpo import SAEGRPOMixin, SAEGRPOTrainer, SAERLOOTrainer
    from qscope_trl.training.rewards import FeatureReward
    from qscope_trl.training.rollouts import RolloutPolicy

_PUBLIC = {
    "CompleteCheckpoints": "qscope_trl.training.checkpoints",
    "Feature": "qscope_trl.features",
    "FeatureId": "qscope_trl.features",
    "FeatureReward": "qscope_trl.training.rewards",
    "FeatureSet": "qscope_trl.features",
    "GroupCollator": "qscope_trl.training.collator",
    "PenaltyAttachment": "qscope_trl.training.attach",
    "PenaltyConfig": "qscope_trl.config.training",
    "QScopeError": "qscope_trl.errors",
    "QScopeWarning": "qscope_trl.errors",
    "ResidualHook": "qscope_trl.hooks.residual",
    "RolloutPolicy": "qscope_trl.training.rollouts",
    "SAEGRPOMixin": "qscope_trl.training.grpo",
    "SAEGRPOTrainer": "qscope_trl.training.grpo",
    "SAEPenaltyCallback": "qscope_trl.training.callback",
    "SAERLOOTrainer": "qscope_trl.training.grpo",
    "SAESuite": "qscope_trl.sae.suite",
    "TopKSAE": "qscope_trl.sae.topk_sae",
    "attach": "qscope_trl.training.attach",
    "last_complete_checkpoint": "qscope_trl.training.checkpoints",
}

__all__ = [
    "CompleteCheckpoints",
    "Feature",
    "FeatureId",
    "FeatureReward",
    "FeatureSet",
    "GroupCollator",
    "PenaltyAttachment",
    "PenaltyConfig",
    "QScopeError",
    "QScopeWarning",
    "ResidualHook",
    "RolloutPolicy",
    "SAEGRPOMixin",
    "SAEGRPOTrainer",
    "SAEPenaltyCallback",
    "SAERLOOTrainer",
    "SAESuite",
    "TopKSAE",
    "__version__",
    "attach",
    "last_complete_checkpoint",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'qscope_trl' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
