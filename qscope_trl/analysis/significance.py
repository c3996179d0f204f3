"""Could chance have done it? Permutation tests, false discovery rates, intervals, and stability under halving texts.

The unit is the text: tokens of one text are alike, so only whole texts change groups. A p-value says how often a
feature gets such a score on texts whose groups mean nothing; it says nothing about how large or useful an effect is,
and it is too small where texts are not independent of each other (near-duplicates, parts of one document).

Shape legend: `F` features, `X` texts of all groups, `P` partings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.analysis.text_scores import LEFT_OUT, TextScores
from qscope_trl.errors import ConfigError

# Features are dropped from further permutations between stages of this many, if by then chance has reached their score
# so often that their p-value is about 2 % or more.
_STAGE = 1000
_ENOUGH = 20
# Texts times permutations that are drawn at a time.
_DRAW_ELEMENTS = 2**22


class PermutationTest(NamedTuple):
    """One layer's features against shuffled groups."""

    p_value: Tensor
    """Share of partings under which this feature scores as high, `(F,)`, fp64; 1 for a feature that never fires."""

    best: Tensor
    """Score of the best feature under each parting of the first stage, `(P,)`."""

    is_tested: Tensor
    """Whether the feature fires in any text, `(F,)`: the family that corrections count."""


def permutation_p(exceeding: Tensor, permutations: Tensor | int) -> Tensor:
    """p-value of a score that random permutations reach so often: `(b + 1) / (m + 1)`, never 0.

    Args:
        exceeding: Permutations whose score is at least the observed one.
        permutations: Permutations drawn.

    References:
        Phipson and Smyth (2010), Permutation p-values should never be zero.
    """
    return (exceeding.double() + 1) / (torch.as_tensor(permutations) + 1)


def permutation_test(texts: TextScores, *, permutations: int = 1000, seed: int = 0) -> PermutationTest:
    """Compare every feature's score with what it is when the texts' groups are shuffled.

    One-sided: how often a shuffled score is at least the observed one. Groups keep their sizes. For `delta` and
    `log_odds`, which depend on a count alone, p-values are exact and need no permutations: Fisher's. All permutations
    run for features that look better than chance; others stop after a thousand or more, once 20 permutations have
    reached their score, which leaves the test valid (a feature stops only where its p-value is above what continuing
    could have made significant). Equal seeds give equal permutations, so layers of the same texts can be compared.

    Args:
        texts: A layer's texts.
        permutations: How many; p-values are at least `1 / (permutations + 1)`.
        seed: Decides them.

    Raises:
        ConfigError: If `permutations` is below 1.
    """
    if permutations < 1:
        raise ConfigError(f"`permutations` is {permutations}; a permutation test needs 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    observed_F = texts.observed()
    least_F = observed_F - texts.rounding()
    tested_F = texts.fires_F > 0
    exact_F = fisher_p(texts) if texts.rank_by in ("delta", "log_odds") else None
    exceeding_F = torch.zeros(texts.num_features, dtype=torch.int64)
    drawn_F = torch.zeros(texts.num_features, dtype=torch.int64)
    best: list[Tensor] = []
    # Where p-values are exact, the first stage still serves the search as a whole.
    for stage in range(0, permutations if exact_F is None else min(permutations, _STAGE), _STAGE):
        running = (tested_F & (exceeding_F < _ENOUGH) if stage else tested_F).nonzero()[:, 0]
        if not running.numel():
            break
        part, least = texts.select(running), least_F[running, None]
        for count in _columns(min(_STAGE, permutations - stage), texts.group_X.numel()):
            highest = torch.full((count,), -torch.inf, dtype=torch.float64)
            for rows, scores in part.under(_shuffled(texts.group_X, count, generator)):
                exceeding_F[running[rows]] += (scores >= least[rows]).sum(1)
                highest = torch.maximum(highest, scores.amax(0))
            drawn_F[running] += count
            if stage == 0:
                best.append(highest)
    p_value_F = permutation_p(exceeding_F, drawn_F) if exact_F is None else exact_F
    p_value_F = p_value_F.masked_fill(~tested_F, 1.0)
    return PermutationTest(p_value_F, torch.cat(best) if best else torch.empty(0, dtype=torch.float64), tested_F)


def familywise_p(scores: Tensor, best: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """How often the best of all features, under shuffled groups, scores as high as each of these does.

    This is the p-value that having searched through all features calls for. It holds for all of them at once
    (family-wise error, single-step maxT), and its resolution does not shrink with the number of features.

    Args:
        scores: Observed scores.
        best: `PermutationTest.best`; of several layers their elementwise maximum.
        rounding: How far equal scores may seem apart.

    References:
        Westfall and Young (1993), Resampling-Based Multiple Testing.
    """
    reached = (best[None, :] >= (scores - rounding)[:, None]).sum(1)
    return permutation_p(reached, best.numel())


def benjamini_hochberg(p_values: Tensor) -> Tensor:
    """Adjusted p-values ("q"): choosing all features with q up to 0.05 keeps the expected share of false ones at 5 %.

    Args:
        p_values: Of every feature that was searched, not only of the chosen ones. Shape `(M,)`.

    References:
        Benjamini and Hochberg (1995). It holds for independent and for positively dependent tests.
    """
    count = p_values.numel()
    order = p_values.argsort(descending=True, stable=True)
    place = torch.arange(count, 0, -1, dtype=torch.float64)
    adjusted = (p_values.double()[order] * count / place).cummin(0).values.clamp(max=1.0)
    return torch.empty_like(adjusted).index_put_((order,), adjusted)


def fisher_p(texts: TextScores) -> Tensor:
    """Chance that of the texts in which a feature fires as many or more fall to the target, exact. Shape `(F,)`.

    The distribution over all ways to part the texts is hypergeometric: Fisher's exact test, one-sided.
    """
    here_X = texts.tokens_X > 0
    drawn = int(((texts.group_X == 0) & here_X).sum())
    return hypergeometric_tail(texts.target_fires_F, texts.fires_F, drawn, int(here_X.sum()))


def hypergeometric_tail(hits: Tensor, fires: Tensor, drawn: int, total: int) -> Tensor:
    """`P(H >= hits)` where `drawn` of `total` texts are taken at random and `fires` of the total have the mark.

    Args:
        hits: Marked texts among those taken, a possible number. Shape `(F,)`.
        fires: Marked texts in all. Shape `(F,)`.
        drawn: Texts taken.
        total: Texts in all.
    """
    log_factorial = torch.lgamma(torch.arange(total + 1, dtype=torch.float64) + 1)

    def log_choose(n: int, k: Tensor) -> Tensor:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    whole = log_choose(total, torch.tensor(drawn))
    tails = torch.empty(hits.numel(), dtype=torch.float64)
    for marked in torch.unique(fires).tolist():
        here = fires == marked
        least, most = max(0, drawn + marked - total), min(marked, drawn)
        possible = torch.arange(least, most + 1)
        chances = (log_choose(marked, possible) + log_choose(total - marked, drawn - possible) - whole).exp()
        # Summed from the far end, so that small tails keep their digits.
        tails[here] = chances.flip(0).cumsum(0).flip(0)[hits[here] - least].clamp(max=1.0)
    return tails


class Interval(NamedTuple):
    """Where a figure lies, with a chance that was asked for."""

    low: Tensor
    high: Tensor


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor],
    group_X: Tensor,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How far a figure would move with other texts of the same kind: the percentile bootstrap, over texts.

    Each resample draws as many texts of each group as there are, with repeats. Too narrow for groups of few texts (up
    to 20 or so) and near the end of a scale: from texts that are told apart without an error it gives no width at all.

    Args:
        statistic: From how often each text was drawn, `(R, X)` fp64, to one figure or several of each resample, `(R,)`
            or `(R, S)`. Called block by block. Figures that are NaN, such as a rate of nothing, are left out.
        group_X: Number of the group of each text, from 0; texts are drawn within their group.
        resamples: How many; 1000 suffice for two digits of an end.
        confidence: Share of resamples inside, between 0 and 1.
        seed: Decides them. Equal seeds and groups give equal resamples, so figures can be compared pairwise.

    Raises:
        ConfigError: If `resamples` is below 2 or `confidence` is not between 0 and 1.

    References:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, 13.3; stratified, as group sizes are a choice.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise ConfigError(
            f"`resamples` is {resamples} and `confidence` is {confidence}; give 2 or more, and a share above 0 and "
            f"below 1."
        )
    generator = torch.Generator().manual_seed(seed)
    group_X = group_X.cpu()
    found = [
        statistic(_resampled(group_X, count, generator)).double().cpu()
        for count in _columns(resamples, group_X.numel())
    ]
    tail = (1 - confidence) / 2
    ends = torch.nanquantile(torch.cat(found), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return Interval(ends[0], ends[1])


def _resampled(group_X: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """How often each text is in each of `count` samples with repeats, drawn group by group. Shape `(count, X)`."""
    times_RX = torch.zeros(count, group_X.numel(), dtype=torch.float64)
    for group in torch.unique(group_X):
        texts = (group_X == group).nonzero()[:, 0]
        drawn = texts[torch.randint(texts.numel(), (count, texts.numel()), generator=generator)]
        times_RX.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return times_RX


class SplitHalf(NamedTuple):
    """How far one half of the texts tells the same as the other."""

    rank_correlation: Tensor
    """Spearman's correlation of the two halves' scores, over features that fire in any text. One per split."""

    top_overlap: Tensor
    """Jaccard index of the two halves' best features: those in both over those in either. One per split."""

    selected: Tensor
    """Share of halves in which each feature is among the best, `(F,)`."""


def split_half(texts: TextScores, *, top: int = 10, splits: int = 10, seed: int = 0) -> SplitHalf | None:
    """Rank the features on one half of the texts and on the other, again and again.

    Args:
        texts: A layer's texts. Each group is halved.
        top: Best features to compare; those whose score does not favour the target do not count.
        splits: How many times.
        seed: Decides the halves.

    Returns:
        The figures, or None if a group has fewer than two texts.

    References:
        The last: stability selection, Meinshausen and Buehlmann (2010), which draws halves in the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = [_halves(texts.group_X, generator) for _ in range(splits)]
    groups_XP = torch.cat(halves, dim=1) if halves else torch.empty(0)
    if not halves or int(torch.bincount(texts.group_X).min()) < 2:
        return None
    tested = (texts.fires_F > 0).nonzero()[:, 0]
    scores_FP = torch.cat([scores for _, scores in texts.select(tested).under(groups_XP)])
    neutral = 0.5 if texts.rank_by == "auroc" else 0.0
    best_FP = torch.zeros_like(scores_FP, dtype=torch.bool)
    leading = scores_FP.sort(dim=0, descending=True, stable=True).indices[:top]
    best_FP.scatter_(0, leading, True)
    best_FP &= scores_FP > neutral
    either = (best_FP[:, ::2] | best_FP[:, 1::2]).sum(0)
    both = (best_FP[:, ::2] & best_FP[:, 1::2]).sum(0)
    selected_F = torch.zeros(texts.num_features, dtype=torch.float64)
    selected_F[tested] = best_FP.double().mean(1)
    correlations = [spearman(scores_FP[:, p], scores_FP[:, p + 1]) for p in range(0, 2 * splits, 2)]
    return SplitHalf(torch.stack(correlations), both.double() / either.clamp(min=1), selected_F)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the ranks of two rows of numbers, ties by midranks; NaN if one of them is constant."""
    return torch.corrcoef(torch.stack([midranks(a), midranks(b)]))[0, 1]


def midranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values having the mean of theirs, fp64."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    return ranks


def _halves(group_X: Tensor, generator: torch.Generator) -> Tensor:
    """Two partings `(X, 2)`: half of each group at random, and the other half; an odd text is in neither."""
    columns = torch.full((group_X.numel(), 2), LEFT_OUT)
    for group in range(int(group_X.max()) + 1):
        texts = (group_X == group).nonzero()[:, 0]
        texts = texts[torch.randperm(texts.numel(), generator=generator)]
        half = texts.numel() // 2
        columns[texts[:half], 0] = group
        columns[texts[half : 2 * half], 1] = group
    return columns


def _columns(wanted: int, num_texts: int) -> list[int]:
    """`wanted` in portions that fit into memory."""
    most = max(1, min(wanted, _DRAW_ELEMENTS // max(1, num_texts)))
    return [min(most, wanted - start) for start in range(0, wanted, most)]


def _shuffled(group_X: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The groups of the texts shuffled `count` times. Shape `(X, count)`."""
    order = torch.rand(group_X.numel(), count, generator=generator, dtype=torch.float64).argsort(dim=0)
    return group_X[order]
