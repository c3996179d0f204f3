"""What the audit measured and what it concludes; plain data, ready for JSON.

Rows are flat, `base_low` beside `base`, so that a report can show them as tables. Left out: how anything is measured
(`reading`, `detectors`, `collateral`) and judged (`verdict`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from qscope_trl.analysis.doctor.result import TunedFit
from qscope_trl.files import json_values


@dataclass(frozen=True, kw_only=True)
class DetectorRow:
    """How well one detector tells positive from negative texts on each model: AUROC with 95 % interval.

    Args:
        kind: `old` (the features trained on, or the monitors), `probe`, `new feature`, `words` or `shuffled labels`.
        name: Which one.
        layer: Layer it reads; None for several or none.
        base: On the base model.
        base_low: Lower end.
        base_high: Upper end.
        tuned: On the tuned model.
        tuned_low: Lower end.
        tuned_high: Upper end.
    """

    kind: str
    name: str
    layer: int | None
    base: float
    base_low: float
    base_high: float
    tuned: float
    tuned_low: float
    tuned_high: float


@dataclass(frozen=True, kw_only=True)
class ActivityRow:
    """How active a set of features is: the weighted sum of its activations, mean over tokens.

    Args:
        kind: `trained on` or `monitors`.
        where: Which tokens.
        num_texts_base: Texts of the base model's side.
        num_texts_tuned: Texts of the tuned model's side.
        base: Of the base model.
        tuned: Of the tuned model.
        left: Tuned over base.
        left_low: Lower end of its 95 % interval.
        left_high: Upper end.
    """

    kind: str
    where: str
    num_texts_base: int
    num_texts_tuned: int
    base: float
    tuned: float
    left: float
    left_low: float
    left_high: float


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """One feature on both models.

    Args:
        feature: Its name.
        kind: `trained on` or `monitors`.
        label: What it stands for.
        rate_base: Share of the positive texts' tokens at which it is active.
        rate_tuned: The same on the tuned model.
        rate_negative_base: Share of the negative texts' tokens.
        rate_negative_tuned: The same on the tuned model.
        mean_base: Mean activation on positive texts.
        mean_tuned: The same on the tuned model.
        auroc_base: Of its largest activation in each text.
        auroc_tuned: The same on the tuned model.
    """

    feature: str
    kind: str
    label: str
    rate_base: float
    rate_tuned: float
    rate_negative_base: float
    rate_negative_tuned: float
    mean_base: float
    mean_tuned: float
    auroc_base: float
    auroc_tuned: float


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What a detector that reads text found in generations of both models from the same prompts.

    Args:
        detector: The detector.
        num_prompts: Generations of each model.
        base: Share that shows it.
        base_low: Lower end of Wilson's 95 % interval.
        base_high: Upper end.
        tuned: The same of the tuned model.
        tuned_low: Lower end.
        tuned_high: Upper end.
        difference: Tuned minus base.
        difference_low: Lower end of the bootstrap over prompts.
        difference_high: Upper end.
        left: Tuned over base.
        left_low: Lower end.
        left_high: Upper end.
        parts_name: What `parts_base` is the share of, if the detector counts any.
        parts_base: Such as Chinese among all letters.
        parts_tuned: The same of the tuned model.
    """

    detector: str
    num_prompts: int
    base: float
    base_low: float
    base_high: float
    tuned: float
    tuned_low: float
    tuned_high: float
    difference: float
    difference_low: float
    difference_high: float
    left: float
    left_low: float
    left_high: float
    parts_name: str = ""
    parts_base: float = math.nan
    parts_tuned: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Collateral:
    """What else changed, on neutral texts.

    Args:
        source: Where the texts are from.
        num_texts: Texts.
        num_tokens: Tokens predicted.
        perplexity_base: Of the base model.
        perplexity_tuned: Of the tuned model.
        loss_difference: Nats a token, tuned minus base.
        loss_difference_low: Lower end of its 95 % interval.
        loss_difference_high: Upper end.
        kl: KL(base || tuned) of next-token distributions, nats a token; NaN with vocabularies of different size.
    """

    source: str
    num_texts: int
    num_tokens: int
    perplexity_base: float
    perplexity_tuned: float
    loss_difference: float
    loss_difference_low: float
    loss_difference_high: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What both models wrote from one prompt.

    Args:
        prompt: The prompt.
        base: The base model's text.
        tuned: The tuned model's text.
        base_shows: Whether the detector finds the behaviour in it.
        tuned_shows: The same of the tuned model's.
    """

    prompt: str
    base: str
    tuned: str
    base_shows: bool
    tuned_shows: bool


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One audit.

    Args:
        verdict: In a few words; `audit.verdict` has them all.
        reason: The figures that decide it, in sentences.
        model: The base model.
        tuned: The tuned model.
        saes: The SAEs.
        num_positive: Texts that show the behaviour.
        num_negative: Texts that do not.
        num_heldout: Of both, texts that retrained detectors were tested on.
        behaviour: Text-level rates, if there were prompts.
        activity: How active the features are, by place.
        detectors: Who still tells the texts apart.
        features: The features one by one.
        collateral: Perplexity and KL on neutral texts.
        fits: The SAEs on both models, by layer.
        samples: A few generations.
        notes: What to mind.
        settings: What was asked for.
    """

    verdict: str
    reason: str
    model: str
    tuned: str
    saes: str
    num_positive: int
    num_negative: int
    num_heldout: int
    behaviour: Behaviour | None
    activity: list[ActivityRow]
    detectors: list[DetectorRow]
    features: list[FeatureRow]
    collateral: Collateral
    fits: list[TunedFit]
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, what is not a number as null."""
        plain: dict[str, Any] = json_values(asdict(self))
        return plain
