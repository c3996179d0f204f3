"""Figures with their 95 % intervals: how well a score tells texts apart, shares, and what is left of a sum.

Shape legend: `X` texts, `R` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.analysis.contrast import weighted_auroc
from qscope_trl.analysis.significance import bootstrap_interval
from qscope_trl.monitor.detectors import rate_interval


class Estimate(NamedTuple):
    """A figure and the ends of its 95 % interval; NaN where it cannot be had."""

    value: float
    low: float
    high: float


NOTHING = Estimate(math.nan, math.nan, math.nan)


def auroc(score_X: Tensor, group_X: Tensor, *, resamples: int, seed: int) -> Estimate:
    """Probability that a positive text (group 0) scores above a negative one (group 1), ties half.

    The interval is the bootstrap's over texts. It has no width where the texts are told apart without an error, or all
    wrongly; there it is Wilson's for as many texts as the smaller group has, since the variance of an AUROC `A` is at
    most `A (1 - A) / min(m, n)`.

    Args:
        score_X: A score per text.
        group_X: Group of each text.
        resamples: How many.
        seed: Decides them.

    References:
        The bound: Birnbaum and Klose (1957), Annals of Mathematical Statistics 28(4).
    """
    statistic = weighted_auroc(score_X[:, None].double(), group_X == 0)
    value = float(statistic(torch.ones(1, group_X.numel(), dtype=torch.float64)))
    if value in (0.0, 1.0):
        fewest = int(torch.bincount(group_X, minlength=2).min())
        return Estimate(value, *rate_interval(round(value) * fewest, fewest))
    low, high = bootstrap_interval(lambda times: statistic(times)[:, 0], group_X, resamples=resamples, seed=seed)
    return Estimate(value, float(low), float(high))


class Activity(NamedTuple):
    """A score summed over the tokens of each of some texts."""

    sum_X: Tensor
    tokens_X: Tensor

    @property
    def mean(self) -> float:
        """Mean over all tokens; NaN without any."""
        tokens = int(self.tokens_X.sum())
        return float(self.sum_X.sum()) / tokens if tokens else math.nan


def share_left(base: Activity, tuned: Activity, *, is_paired: bool, resamples: int, seed: int) -> Estimate:
    """Mean over the tuned model's tokens over that of the base's, with its bootstrap interval.

    Args:
        base: The base model's.
        tuned: The tuned model's.
        is_paired: Whether text n is the same for both, or goes on from the same prompt; then both are drawn together.
        resamples: How many.
        seed: Decides them.

    Returns:
        `NOTHING` if the base's mean is not positive, or either has no token.
    """
    if not base.mean > 0 or math.isnan(tuned.mean):
        return NOTHING
    ends = [(one.sum_X.double(), one.tokens_X.double()) for one in (base, tuned)]
    sizes = [total_X.numel() for total_X, _ in ends]
    group_X = torch.zeros(sizes[0]) if is_paired else torch.cat([torch.zeros(sizes[0]), torch.ones(sizes[1])])

    def statistic(times_RX: Tensor) -> Tensor:
        parts = (times_RX, times_RX) if is_paired else (times_RX[:, : sizes[0]], times_RX[:, sizes[0] :])
        means = [times @ total_X / (times @ tokens_X) for times, (total_X, tokens_X) in zip(parts, ends, strict=True)]
        return means[1] / means[0]

    low, high = bootstrap_interval(statistic, group_X.long(), resamples=resamples, seed=seed)
    return Estimate(tuned.mean / base.mean, float(low), float(high))


class Rates(NamedTuple):
    """How often each model's texts show something, and how the two compare; generations are paired by prompt."""

    base: Estimate
    tuned: Estimate
    difference: Estimate
    """Tuned minus base."""

    left: Estimate
    """Tuned over base; its upper end is not below that of `tuned` over the base's rate."""


def rates(base: Sequence[bool], tuned: Sequence[bool], *, resamples: int, seed: int) -> Rates:
    """Shares with Wilson's intervals; their difference and ratio with those of the bootstrap over prompts.

    A bootstrap of no case at all gives no width, so the ratio's upper end also minds that of the tuned rate.

    Args:
        base: Whether the base model's text shows it, by prompt.
        tuned: The same of the tuned model.
        resamples: How many.
        seed: Decides them.
    """
    count = len(base)
    single = [Estimate(sum(shown) / count, *rate_interval(sum(shown), count)) for shown in (base, tuned)]
    shown_2X = torch.tensor([list(base), list(tuned)], dtype=torch.float64)

    def statistic(times_RX: Tensor) -> Tensor:
        of_R2 = times_RX @ shown_2X.T / count
        # Where a resample has no case of the base there is no ratio.
        ratio_R = torch.where(of_R2[:, 0] > 0, of_R2[:, 1] / of_R2[:, 0], math.nan)
        return torch.stack([of_R2[:, 1] - of_R2[:, 0], ratio_R], dim=1)

    low, high = bootstrap_interval(statistic, torch.zeros(count, dtype=torch.int64), resamples=resamples, seed=seed)
    difference = Estimate(single[1].value - single[0].value, float(low[0]), float(high[0]))
    left = NOTHING
    if single[0].value:
        upper = max(float(high[1]), single[1].high / single[0].value)
        left = Estimate(single[1].value / single[0].value, float(low[1]), upper)
    return Rates(single[0], single[1], difference, left)


def mean_difference(base: Activity, tuned: Activity, *, resamples: int, seed: int) -> Estimate:
    """Mean over tokens, tuned minus base, of the same texts; bootstrap over texts, which are drawn together."""

    def statistic(times_RX: Tensor) -> Tensor:
        return (times_RX @ (tuned.sum_X - base.sum_X).double()) / (times_RX @ base.tokens_X.double())

    low, high = bootstrap_interval(
        statistic, torch.zeros(base.sum_X.numel(), dtype=torch.int64), resamples=resamples, seed=seed
    )
    return Estimate(tuned.mean - base.mean, float(low), float(high))
