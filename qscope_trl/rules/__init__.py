"""A small language of rules over SAE features: parsed, checked, evaluated, explained. Imports no torch, no numpy."""

from qscope_trl.rules.explain import Explanation
from qscope_trl.rules.rule import Rule, compile_rule, load_rule
from qscope_trl.rules.values import FeatureValues, TokenValues

__all__ = ["Explanation", "FeatureValues", "Rule", "TokenValues", "compile_rule", "load_rule"]
