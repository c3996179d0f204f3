"""What the processes of an engine train on, and the test computes a second time."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from qscope_trl import Feature, FeatureSet
from tests.tiny import random_sae
from tests.training.reference import ReferencePenalty

WEIGHT = 0.7
# Two layers, the last one among them; not in order; negative and positive thresholds; unequal weights.
FEATURES = [(3, 5, 2.0, -0.4), (1, 3, 1.0, -0.2), (1, 77, 0.5, 0.1), (3, 120, 1.0, 0.0)]
LAYERS = [1, 3]
TOP_K = 64


def feature_set() -> FeatureSet:
    return FeatureSet(features=tuple(Feature(layer=la, index=i, weight=w, threshold=t) for la, i, w, t in FEATURES))


def reference_penalty(kind: str = "preact_hinge") -> ReferencePenalty:
    return ReferencePenalty({layer: random_sae(100 + layer) for layer in LAYERS}, FEATURES, kind=kind, k=TOP_K)


def lora(model: Any) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave lora_A without gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return model
