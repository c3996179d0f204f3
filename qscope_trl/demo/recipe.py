"""Every setting of the demo in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the demo; all arms share everything but the penalty.

    Args:
        layers: Layers whose features are penalised.
        top: Features per layer.
        rank_by: How `find_features` ranks them.
        monitor_layers: Layers of the features that are only watched.
        penalty_weight: Of the SAE arms.
        token_weight: Of the arm that penalises the probability of Chinese tokens.
        steps: Optimizer steps.
        batch_size: Samples a step.
        learning_rate: Peak, with linear decay.
        max_length: Tokens of a sample.
        find_texts: Texts of each language that features are found on.
        generations: Texts generated per arm and seed.
        new_tokens: Tokens of each generation.
        temperature: Of sampling.
    """

    layers: tuple[int, ...] = (4, 5)
    top: int = 5
    rank_by: str = "mean_difference"
    monitor_layers: tuple[int, ...] = (3,)
    penalty_weight: float = 0.05
    token_weight: float = 10.0
    steps: int = 60
    batch_size: int = 16
    learning_rate: float = 5e-4
    max_length: int = 128
    find_texts: int = 256
    generations: int = 512
    new_tokens: int = 48
    temperature: float = 1.0


RECIPE = Recipe()
