"""Metrics of a yes-or-no decision, from counts: what a search makes as large as possible, for many rules at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def metric_of(name: str, tp: ArrayLike, fp: ArrayLike, positives: float, negatives: float) -> Floats:
    """One of the metrics of `config.rules.METRICS`, elementwise.

    `f1`, `f0.5`, `f2`: `(1 + b^2) P R / (b^2 P + R)` of precision and recall. `balanced_accuracy`: mean of the shares
    of both classes that are told rightly. `mcc`: Matthews' correlation. Where nothing is told positive, F and `mcc`
    are 0.

    Args:
        name: The metric.
        tp: Positives that are told positive.
        fp: Negatives that are told positive.
        positives: How many positives there are, at least one.
        negatives: How many negatives there are, at least one.
    """
    hits, alarms = np.asarray(tp, dtype=np.float64), np.asarray(fp, dtype=np.float64)
    misses, passed = positives - hits, negatives - alarms
    if name == "balanced_accuracy":
        return (hits / positives + passed / negatives) / 2
    if name == "mcc":
        spread = np.sqrt((hits + alarms) * (misses + passed) * positives * negatives)
        return np.divide(hits * passed - alarms * misses, spread, out=np.zeros_like(hits), where=spread > 0)
    weight = float(name[1:]) ** 2
    total = (1 + weight) * hits + weight * misses + alarms
    return (1 + weight) * hits / total


def metric(name: str, decisions: NDArray[np.bool_], labels: NDArray[np.bool_]) -> float:
    """The metric of one decision per text."""
    hits, alarms = int((decisions & labels).sum()), int((decisions & ~labels).sum())
    return float(metric_of(name, hits, alarms, int(labels.sum()), int((~labels).sum())))


def best_threshold(name: str, scores: Floats, labels: NDArray[np.bool_]) -> float:
    """The threshold at which "score above it" has the largest metric: half-way between two scores that occur.

    Of equal ones the highest, so that fewer texts are told positive. Below all scores if that is best.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, truth = scores[order], labels[order]
    ends = np.append(np.flatnonzero(ranked[1:] < ranked[:-1]), len(ranked) - 1)
    hits, alarms = np.cumsum(truth)[ends], np.cumsum(~truth)[ends]
    values = metric_of(name, hits, alarms, int(labels.sum()), int((~labels).sum()))
    end = int(ends[int(np.argmax(values))])
    if end == len(ranked) - 1:
        return float(np.nextafter(ranked[-1], -np.inf))
    return float((ranked[end] + ranked[end + 1]) / 2)
