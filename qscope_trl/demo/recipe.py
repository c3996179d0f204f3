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


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(Recipe):
    """Settings of `qscope demo grpo`; what is named again differs from SFT's demo.

    Args:
        steps: Optimizer steps.
        batch_size: Rollouts a step.
        learning_rate: Constant.
        fast_factor: Learning rate of the arm `rule-fast` over that of the others.
        num_generations: Rollouts of a group.
        beta: Weight of the KL term; above 0, so that a frozen reference model exists.
        prompt_tokens: Last tokens of each prompt that are kept.
        strength: Of `amplify_negative`, per unit of a token's summed activation.
        steer_strength: Of `steered_negative`, per feature.
        generations: Texts of each evaluation.
        evaluate_every: Optimizer steps between evaluations.
    """

    steps: int = 40
    batch_size: int = 64
    learning_rate: float = 1e-4
    fast_factor: float = 2.0
    num_generations: int = 8
    beta: float = 0.05
    prompt_tokens: int = 48
    strength: float = 0.2
    steer_strength: float = 4.0
    generations: int = 256
    evaluate_every: int = 10


GRPO_RECIPE = GRPORecipe()
