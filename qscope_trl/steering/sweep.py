"""A sweep: how often a behaviour shows, and how likely the text stays, at each of some strengths, with controls.

The controls: strength 0; strengths of the other sign; and random features of the same layers that fire about as often,
with the same weights, in mode `add` scaled so that each layer is shifted as far.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from qscope_trl.activations.feature_table import TableEncoder
from qscope_trl.activations.matching import draw_matched, token_rates
from qscope_trl.activations.sampling import Generation, Sampling, generate, perplexity
from qscope_trl.errors import DataError, QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.detectors import Detector, rate_interval, ratio, ratio_interval, text_detector
from qscope_trl.rules import load_rule
from qscope_trl.sae.suite import SAESuite

Behaviour = Callable[[Sequence[str]], list[bool]]
Steered = Callable[[FeatureSet, float], AbstractContextManager[Any]]
"""From features and strength to a block in which the model is steered."""

FEATURES = "features"
"""Name of the arm that is no control."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one arm shows at one strength."""

    arm: str
    """`features`, or `random 1` and so on."""

    strength: float
    """As given to `steer`."""

    rate: float
    """Share of generations that show the behaviour."""

    rate_interval: tuple[float, float]
    """Its 95 % interval, generations taken as independent (Wilson)."""

    share: float | None
    """Share of the text that shows it, such as Chinese among all letters, where the detector counts it."""

    share_interval: tuple[float, float] | None
    """Its 95 % bootstrap interval over generations."""

    perplexity: float
    """Of the generated tokens under the unsteered model."""

    num_texts: int
    """Generations."""


class Sweep(NamedTuple):
    """All points, and what they were taken with."""

    points: list[Point]
    detector: Detector
    controls: list[FeatureSet]
    warned: dict[str, list[str]]
    """What steering warned of, by message: arms and strengths, such as `random 1 at -4`."""

    def of(self, arm: str) -> list[Point]:
        """Points of one arm by strength; strength 0 is the same for all."""
        return sorted((p for p in self.points if p.arm == arm or p.strength == 0), key=lambda p: p.strength)


def open_behaviour(
    name: str, model: Any, tokenizer: Any, saes: SAESuite, *, max_length: int, batch_size: int
) -> tuple[Detector, Behaviour]:
    """The detector that a name stands for, and what applies it to texts.

    Args:
        name: As of `text_detector`, or `rule:RULE`: a rule over the features that the unsteered model has on the text.
        model: The model; a rule runs it.
        tokenizer: Its tokenizer.
        saes: SAEs of a rule.
        max_length: Tokens read of each text, for a rule.
        batch_size: Texts in one forward, for a rule.
    """
    if not name.startswith("rule:"):
        detector = text_detector(name)
        return detector, lambda texts: [detector.is_shown(text) for text in texts]
    rule = load_rule(name.removeprefix("rule:"))
    rule.check(saes)
    encode = TableEncoder(
        model, tokenizer, saes, rule.features, max_length=max_length, batch_size=batch_size, show_progress=False
    )

    def holds(texts: Sequence[str]) -> list[bool]:
        return [bool(one) for one in rule.evaluate(encode(texts))]

    return Detector(name, lambda text: holds([text])[0]), holds


def run_sweep(
    model: Any,
    tokenizer: Any,
    saes: SAESuite,
    features: FeatureSet,
    prompts: Sequence[str],
    strengths: Sequence[float],
    behaviour: str,
    steered: Steered,
    sampling: Sampling,
    *,
    control_draws: int = 3,
    same_length: bool = True,
    show_progress: bool = True,
) -> Sweep:
    """Generate from all prompts at every strength, and count.

    Args:
        model: A transformers model on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs.
        features: Features to steer along.
        prompts: The prompts; one generation of each at each strength, and the same seed at each.
        strengths: Strengths, 0 among them.
        behaviour: As of `open_behaviour`.
        steered: Makes the steered block.
        sampling: How to generate.
        control_draws: Sets of random features.
        same_length: Whether a control's weights are scaled so that it adds vectors of the same length.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        DataError: If there is no prompt.
        ConfigError: If the behaviour is unknown.
        RuleError: If a rule cannot be read.
    """
    if not prompts:
        raise DataError("No prompt is given, so there is nothing to steer.")
    detector, shows = open_behaviour(
        behaviour, model, tokenizer, saes, max_length=sampling.max_length, batch_size=sampling.batch_size
    )

    def point(arm: str, strength: float, made: Sequence[Generation]) -> Point:
        texts = [one.text for one in made]
        hits = sum(shows(texts))
        parts = None if detector.parts is None else [detector.parts(text) for text in texts]
        return Point(
            arm=arm,
            strength=strength,
            rate=hits / len(texts),
            rate_interval=rate_interval(hits, len(texts)),
            share=None if parts is None else ratio(parts),
            share_interval=None if parts is None else ratio_interval(parts, sampling.seed),
            perplexity=perplexity(model, made, sampling.batch_size),
            num_texts=len(texts),
        )

    warned: dict[str, list[str]] = {}

    def run(arm: str, chosen: FeatureSet, strength: float) -> list[Generation]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", QScopeWarning)
            with steered(chosen, strength) if strength else nullcontext():
                made = generate(model, tokenizer, prompts, sampling)
        for one in caught:
            if issubclass(one.category, QScopeWarning):
                warned.setdefault(str(one.message), []).append(f"{arm} at {strength:g}")
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return made

    others = [strength for strength in strengths if strength]
    with tqdm(
        total=1 + len(others) * (1 + control_draws),
        desc="sweep",
        unit="strength",
        disable=not show_progress,
        leave=False,
    ) as bar:
        plain = run(FEATURES, features, 0.0)
        points = [point(FEATURES, 0.0, plain)]
        bar.update()
        texts = [prompt + one.text for prompt, one in zip(prompts, plain, strict=True)]
        controls = draw_controls(
            model, tokenizer, saes, features, texts, control_draws, sampling, same_length=same_length
        )
        arms = {FEATURES: features, **{f"random {n + 1}": control for n, control in enumerate(controls)}}
        for arm, chosen in arms.items():
            for strength in others:
                points.append(point(arm, strength, run(arm, chosen, strength)))
                bar.update()
    return Sweep(points, detector, controls, warned)


def draw_controls(
    model: Any,
    tokenizer: Any,
    saes: SAESuite,
    features: FeatureSet,
    texts: Sequence[str],
    draws: int,
    sampling: Sampling,
    *,
    same_length: bool,
) -> list[FeatureSet]:
    """Sets of random features, each matched one by one to the given ones by firing rate on some texts.

    Args:
        model: A transformers model on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs.
        features: The set to match; none of its features is drawn.
        texts: Texts on which firing rates are compared.
        draws: Number of sets.
        sampling: Its seed decides the draw; tokens kept of each text, and texts in one forward.
        same_length: Whether weights are scaled, layer by layer, so that the summed directions are as long.

    Raises:
        ConfigError: If more than half of a layer's features are chosen.
    """
    if not draws:
        return []
    rates = token_rates(
        model,
        tokenizer,
        saes,
        features.layers,
        texts,
        max_length=sampling.max_length,
        batch_size=sampling.batch_size,
        show_progress=False,
    )
    generator = torch.Generator().manual_seed(sampling.seed)
    found = []
    for _ in range(draws):
        drawn = []
        for layer in features.layers:
            own = features.for_layer(layer)
            indices = draw_matched(rates[layer], [feature.index for feature in own], generator)
            weights = torch.tensor([feature.weight for feature in own], dtype=torch.float32)
            scale = 1.0
            if same_length:
                wanted = saes.decoder_columns(layer, [feature.index for feature in own]) @ weights
                scale = float(wanted.norm() / (saes.decoder_columns(layer, indices) @ weights).norm())
            drawn += [
                replace(
                    feature,
                    index=index,
                    weight=feature.weight * scale,
                    label=f"random, matched to {feature.id}",
                    evidence={"token_rate": float(rates[layer][index])},
                )
                for feature, index in zip(own, indices, strict=True)
            ]
        found.append(features.with_features(drawn))
    return found
