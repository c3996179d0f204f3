"""Chosen features, and sets of them as files and on the Hub. Imports neither torch nor transformers."""

from qscope_trl.features.feature import Feature, FeatureId
from qscope_trl.features.feature_set import FORMAT_VERSION, Features, FeatureSet

__all__ = ["FORMAT_VERSION", "Feature", "FeatureId", "FeatureSet", "Features"]
