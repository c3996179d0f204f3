"""What a classifier of texts reaches: precision, recall, F1, AUROC, the precision-recall curve and calibration.

Every classifier, rule or probe, gives a score by which texts are ranked and a decision; both are judged. Intervals
come from the bootstrap over groups of texts, since texts of one page are not independent. Left out: costs, and more
than two classes.

Shape legend: `X` texts, `R` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qscope_trl.analysis.contrast import weighted_auroc
from qscope_trl.errors import DataError

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]

_BINS = 10
_CURVE_POINTS = 200
_CHUNK_ELEMENTS = 4_000_000
_NEWTON_STEPS = 100


class CurvePoint(NamedTuple):
    """One point of a precision-recall curve: texts with a score of at least `threshold` are told positive."""

    threshold: float
    precision: float
    recall: float


class Bin(NamedTuple):
    """Texts whose probability is in one tenth of the range from 0 to 1."""

    texts: int
    mean_probability: float
    share_positive: float


class Calibration(NamedTuple):
    """How far stated probabilities are from what occurs."""

    brier: float
    """Mean squared difference of probability and label; stating the base rate `b` for every text gives `b (1 - b)`."""

    error: float
    """Expected calibration error: mean over texts of how far their bin's probability is from its share."""

    bins: tuple[Bin, ...]
    """Bins that are not empty, ascending."""


@dataclass(frozen=True)
class Figures:
    """What a classifier reaches on some texts.

    Args:
        texts: Number of texts.
        positive: Those that are positive.
        told: Those that are told positive.
        precision: Share of the told ones that are positive; NaN if none is told.
        recall: Share of the positive ones that are told.
        f1: Harmonic mean of both; 0 if no positive text is told.
        accuracy: Share of texts told rightly.
        auroc: Probability that a positive text's score exceeds a negative one's, ties half.
        average_precision: Area under the precision-recall curve, as a step function.
        curve: The precision-recall curve, by falling threshold.
        calibration: Of its probabilities, if there are any.
        f1_interval: 95 % bootstrap interval of F1.
        auroc_interval: The same of AUROC.
    """

    texts: int
    positive: int
    told: int
    precision: float
    recall: float
    f1: float
    accuracy: float
    auroc: float
    average_precision: float
    curve: tuple[CurvePoint, ...]
    calibration: Calibration | None = None
    f1_interval: tuple[float, float] | None = None
    auroc_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON; a figure that does not exist is None."""
        found: dict[str, Any] = {
            name: _plain(getattr(self, name))
            for name in ("texts", "positive", "told", "precision", "recall", "f1", "accuracy", "auroc")
        }
        found["average_precision"] = self.average_precision
        for name in ("f1_interval", "auroc_interval"):
            interval = getattr(self, name)
            if interval is not None:
                found[name] = list(interval)
        if self.calibration is not None:
            found["calibration"] = {
                "brier": self.calibration.brier,
                "error": self.calibration.error,
                "bins": [one._asdict() for one in self.calibration.bins],
            }
        found["curve"] = [point._asdict() for point in self.curve]
        return found


def figures(
    scores: Floats,
    decisions: Bits,
    labels: Bits,
    *,
    probabilities: Floats | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Figures:
    """Judge a classifier.

    Args:
        scores: One number per text, higher for the positive class, `(X,)`.
        decisions: Whether each text is told positive.
        labels: Whether it is.
        probabilities: Probability that it is, if the classifier states one.
        groups: What is drawn as a whole by the bootstrap; without, no intervals.
        resamples: Bootstrap samples.
        seed: Decides them.

    Raises:
        DataError: If a class is missing, or a score is not finite.
    """
    if labels.all() or not labels.any():
        raise DataError(f"All {len(labels)} texts are of one class; precision, recall and AUROC need both.")
    if not np.isfinite(scores).all():
        raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite.")
    hits, told, positive = int((decisions & labels).sum()), int(decisions.sum()), int(labels.sum())
    curve, average = precision_recall(scores, labels)
    once = np.ones((1, len(labels)))
    f1_interval = auroc_interval = None
    if groups is not None and resamples:
        f1_interval, auroc_interval = _intervals(scores, decisions, labels, groups, resamples, seed)
    return Figures(
        texts=len(labels),
        positive=positive,
        told=told,
        precision=hits / told if told else math.nan,
        recall=hits / positive,
        f1=2 * hits / (told + positive),
        accuracy=float((decisions == labels).mean()),
        auroc=float(_auroc(scores, labels, once)[0]),
        average_precision=average,
        curve=curve,
        calibration=None if probabilities is None else calibration(probabilities, labels),
        f1_interval=f1_interval,
        auroc_interval=auroc_interval,
    )


def precision_recall(scores: Floats, labels: Bits) -> tuple[tuple[CurvePoint, ...], float]:
    """The precision-recall curve, a point per score that occurs (200 of them if there are more), and its area.

    The area, average precision, is the sum over all points of precision times the step in recall; it is not
    interpolated.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, truth = scores[order], labels[order]
    ends = np.append(np.flatnonzero(ranked[1:] < ranked[:-1]), len(ranked) - 1)
    hits = np.cumsum(truth)[ends]
    precision, recall = hits / (ends + 1), hits / truth.sum()
    average = float((np.diff(recall, prepend=0) * precision).sum())
    shown = np.unique(np.linspace(0, len(ends) - 1, min(len(ends), _CURVE_POINTS)).round().astype(np.int64))
    points = [CurvePoint(float(ranked[ends[i]]), float(precision[i]), float(recall[i])) for i in shown]
    return tuple(points), average


def calibration(probabilities: Floats, labels: Bits) -> Calibration:
    """Brier score, expected calibration error and the table behind it, over ten bins of equal width."""
    place = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    bins, error = [], 0.0
    for index in range(_BINS):
        inside = place == index
        if inside.any():
            found = Bin(int(inside.sum()), float(probabilities[inside].mean()), float(labels[inside].mean()))
            bins.append(found)
            error += found.texts * abs(found.mean_probability - found.share_positive) / len(labels)
    return Calibration(float(((probabilities - labels) ** 2).mean()), error, tuple(bins))


class PlattScaling:
    """From scores to probabilities by a logistic curve of one input.

    Fitted to targets that are drawn in a little from 0 and 1, so that classes which are told apart without an error
    still get a curve of finite slope.

    Args:
        scores: Scores of texts that the classifier was not fitted on.
        labels: Whether each is positive; both classes occur.

    References:
        Platt (1999), Probabilistic outputs for support vector machines; Lin, Lin and Weng (2007).
    """

    def __init__(self, scores: Floats, labels: Bits) -> None:
        # In units of the spread: a curve on raw activations would start far from its end.
        self._middle, self._spread = float(scores.mean()), float(scores.std()) or 1.0
        positive, negative = float(labels.sum()), float((~labels).sum())
        target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
        inputs = np.stack([(scores - self._middle) / self._spread, np.ones_like(scores)], axis=1)
        weights = np.array([0.0, math.log((positive + 1) / (negative + 1))])
        loss = _cross_entropy(inputs @ weights, target)
        for _ in range(_NEWTON_STEPS):
            found = _sigmoid(inputs @ weights)
            gradient = inputs.T @ (found - target)
            # The ridge keeps the system solvable where all scores are equal; it changes steps, not the end.
            hessian = (inputs * (found * (1 - found))[:, None]).T @ inputs + 1e-10 * np.eye(2)
            step = np.linalg.solve(hessian, gradient)
            size = 1.0
            while size > 1e-10:
                tried = weights - size * step
                now = _cross_entropy(inputs @ tried, target)
                if now <= loss:
                    break
                size /= 2
            else:
                break
            weights, gained, loss = tried, loss - now, now
            if gained < 1e-12 * max(1.0, abs(loss)):
                break
        self.slope, self.offset = float(weights[0]), float(weights[1])

    def __call__(self, scores: Floats) -> Floats:
        """Probability of the positive class, `(X,)`."""
        return _sigmoid(self.slope * (scores - self._middle) / self._spread + self.offset)


def _intervals(
    scores: Floats, decisions: Bits, labels: Bits, groups: Sequence[str], resamples: int, seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Percentile bootstrap of F1 and AUROC; resamples that lack a class are left out."""
    numbers: dict[str, int] = {}
    member_X = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    generator = np.random.default_rng(seed)
    f1, auroc = [], []
    per_chunk = max(1, _CHUNK_ELEMENTS // len(labels))
    for start in range(0, resamples, per_chunk):
        count = min(per_chunk, resamples - start)
        drawn = generator.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=count)
        times_RX = drawn[:, member_X].astype(np.float64)
        has_both = (times_RX[:, labels].sum(1) > 0) & (times_RX[:, ~labels].sum(1) > 0)
        times_RX = times_RX[has_both]
        hits, told = times_RX @ (decisions & labels), times_RX @ decisions.astype(np.float64)
        f1.append(2 * hits / (told + times_RX @ labels))
        auroc.append(_auroc(scores, labels, times_RX))
    low_high = [np.quantile(np.concatenate(values), [0.025, 0.975]) for values in (f1, auroc)]
    return (float(low_high[0][0]), float(low_high[0][1])), (float(low_high[1][0]), float(low_high[1][1]))


def _auroc(scores: Floats, labels: Bits, times_RX: Floats) -> Floats:
    statistic = weighted_auroc(torch.from_numpy(scores.copy())[:, None], torch.from_numpy(labels.copy()))
    found: Floats = statistic(torch.from_numpy(times_RX))[:, 0].numpy()
    return found


def _sigmoid(values: Floats) -> Floats:
    found: Floats = 0.5 * (1 + np.tanh(values / 2))
    return found


def _cross_entropy(logits: Floats, target: Floats) -> float:
    return float((np.logaddexp(0, logits) - target * logits).sum())


def _plain(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value
