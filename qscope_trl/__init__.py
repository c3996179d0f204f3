"""qscope_trl: fine-tune language models with sparse autoencoders.

Importing the package is free: public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qscope_trl._version import __version__

if TYPE_CHECKING:
    from qscope_trl.activations.rule_filter import RuleFilter
    from qscope_trl.activations.store import FeatureStore
    from qscope_trl.config.training import PenaltyConfig
    from qscope_trl.errors import QScopeError, QScopeWarning
    from qscope_trl.features import Feature, FeatureId, FeatureSet
    from qscope_trl.hooks.residual import ResidualHook
    from qscope_trl.monitor.alarm import AlarmLimits
    from qscope_trl.monitor.drift import DriftLimits
    from qscope_trl.rules.rule import Rule, compile_rule, load_rule
    from qscope_trl.sae.suite import SAESuite
    from qscope_trl.sae.topk_sae import TopKSAE
    from qscope_trl.steering.steer import steer
    from qscope_trl.training.attach import PenaltyAttachment, attach
    from qscope_trl.training.callback import SAEPenaltyCallback
    from qscope_trl.training.checkpoints import CompleteCheckpoints, last_complete_checkpoint
    from qscope_trl.training.collator import GroupCollator
    from qscope_trl.training.dashboard import FeatureDashboard
    from qscope_trl.training.drift import DriftMonitor
    from qscope_trl.training.grpo import SAEGRPOMixin, SAEGRPOTrainer, SAERLOOTrainer
    from qscope_trl.training.rewards import FeatureReward
    from qscope_trl.training.rollouts import RolloutPolicy
    from qscope_trl.training.rule_monitor import RuleMonitor
    from qscope_trl.training.rule_reward import RuleReward
    from qscope_trl.training.steering_callbacks import ConceptAblation, PreventativeSteering

_PUBLIC = {
    "AlarmLimits": "qscope_trl.monitor.alarm",
    "CompleteCheckpoints": "qscope_trl.training.checkpoints",
    "ConceptAblation": "qscope_trl.training.steering_callbacks",
    "DriftLimits": "qscope_trl.monitor.drift",
    "DriftMonitor": "qscope_trl.training.drift",
    "Feature": "qscope_trl.features",
    "FeatureDashboard": "qscope_trl.training.dashboard",
    "FeatureId": "qscope_trl.features",
    "FeatureReward": "qscope_trl.training.rewards",
    "FeatureSet": "qscope_trl.features",
    "FeatureStore": "qscope_trl.activations.store",
    "GroupCollator": "qscope_trl.training.collator",
    "PenaltyAttachment": "qscope_trl.training.attach",
    "PenaltyConfig": "qscope_trl.config.training",
    "PreventativeSteering": "qscope_trl.training.steering_callbacks",
    "QScopeError": "qscope_trl.errors",
    "QScopeWarning": "qscope_trl.errors",
    "ResidualHook": "qscope_trl.hooks.residual",
    "RolloutPolicy": "qscope_trl.training.rollouts",
    "Rule": "qscope_trl.rules.rule",
    "RuleFilter": "qscope_trl.activations.rule_filter",
    "RuleMonitor": "qscope_trl.training.rule_monitor",
    "RuleReward": "qscope_trl.training.rule_reward",
    "SAEGRPOMixin": "qscope_trl.training.grpo",
    "SAEGRPOTrainer": "qscope_trl.training.grpo",
    "SAEPenaltyCallback": "qscope_trl.training.callback",
    "SAERLOOTrainer": "qscope_trl.training.grpo",
    "SAESuite": "qscope_trl.sae.suite",
    "TopKSAE": "qscope_trl.sae.topk_sae",
    "attach": "qscope_trl.training.attach",
    "compile_rule": "qscope_trl.rules.rule",
    "last_complete_checkpoint": "qscope_trl.training.checkpoints",
    "load_rule": "qscope_trl.rules.rule",
    "steer": "qscope_trl.steering.steer",
}

__all__ = [
    "AlarmLimits",
    "CompleteCheckpoints",
    "ConceptAblation",
    "DriftLimits",
    "DriftMonitor",
    "Feature",
    "FeatureDashboard",
    "FeatureId",
    "FeatureReward",
    "FeatureSet",
    "FeatureStore",
    "GroupCollator",
    "PenaltyAttachment",
    "PenaltyConfig",
    "PreventativeSteering",
    "QScopeError",
    "QScopeWarning",
    "ResidualHook",
    "RolloutPolicy",
    "Rule",
    "RuleFilter",
    "RuleMonitor",
    "RuleReward",
    "SAEGRPOMixin",
    "SAEGRPOTrainer",
    "SAEPenaltyCallback",
    "SAERLOOTrainer",
    "SAESuite",
    "TopKSAE",
    "__version__",
    "attach",
    "compile_rule",
    "last_complete_checkpoint",
    "load_rule",
    "steer",
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
