"""What a user's scores of models say of a map: whether its redundancy, overlaps and subsets agree with rankings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.analysis.evalmap.footprints import Footprints
from qscope_trl.analysis.evalmap.mapping import Map
from qscope_trl.analysis.evalmap.rankings import (
    Floats,
    Interval,
    PairAgreement,
    Scores,
    SubsetAgreement,
    kendall,
    mean_taus,
    model_weights,
    pair_agreement,
    percentiles,
    random_parts,
    rank_agreement,
    resampled_taus,
    subset_agreement,
)
from qscope_trl.errors import ConfigError

_RANDOM = 100
_RESAMPLES = 200


class SubsetRanking(NamedTuple):
    """How a subset ranks the models, against the whole set."""

    size: int
    """Samples."""

    greedy: Interval
    """Kendall tau of the greedy subset, with an interval over models drawn anew."""

    random: Interval
    """Mean Kendall tau of random subsets of that size, with an interval over the same models."""


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """What scores say. Sets without scores by sample are left out of the first two."""

    num_models: int
    performance: Mapping[str, SubsetAgreement]
    """`R_perf` and its curve."""

    rankings: Mapping[str, tuple[SubsetRanking, ...]]
    redundancy_agreement: Interval | None
    """Spearman correlation of `R` with `R_perf` over sets; `None` with fewer than three."""

    overlap_agreement: PairAgreement | None
    """Overlap against the correlation of scores, over pairs of sets."""

    given: str | None
    partial_agreement: PairAgreement | None
    """The same with the scores of `given` taken out."""


def check_given(given: str | None, scores: Scores) -> None:
    """Refuse a set to take out that has no scores.

    Raises:
        ConfigError: If it has none.
    """
    if given is not None and given not in scores.by_set:
        raise ConfigError(
            f"`given` is {given!r}, of which there are no scores; there are of {', '.join(scores.by_set)}."
        )


def compare_scores(
    found: Map,
    footprints: Footprints,
    scores: Scores,
    *,
    given: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> ScoreFigures:
    """Compare a map with scores.

    Args:
        found: The map.
        footprints: What it was made of; `row_ids` are the numbers of its samples.
        scores: The scores.
        given: A set whose scores are taken out.
        draws: Bootstrap resamples.
        seed: Decides them and the random subsets.

    Raises:
        ConfigError: If `given` has no scores.
    """
    check_given(given, scores)
    by_name = {entry.name: entry for entry in found.sets}
    performance, rankings = {}, {}
    for name, by_sample in scores.by_sample.items():
        performance[name] = subset_agreement(by_sample, resamples=min(draws, _RESAMPLES), seed=seed)
        chosen = footprints.row_ids[name][by_name[name].chosen.samples]
        rankings[name] = tuple(
            _ranking(by_sample, chosen[: subset.size], draws, seed) for subset in by_name[name].subsets
        )
    redundancies = {name: entry.redundancy for name, entry in by_name.items()}
    by_performance = {name: entry.performance_redundancy for name, entry in performance.items()}
    overlap = found.overlaps.of_row
    return ScoreFigures(
        num_models=len(scores.models),
        performance=performance,
        rankings=rankings,
        redundancy_agreement=rank_agreement(redundancies, by_performance, draws=draws, seed=seed),
        overlap_agreement=pair_agreement(overlap, found.names, scores, draws=draws, seed=seed),
        given=given,
        partial_agreement=None
        if given is None
        else pair_agreement(overlap, found.names, scores, given=given, draws=draws, seed=seed),
    )


def _ranking(by_sample: Floats, chosen: NDArray[np.int64], draws: int, seed: int) -> SubsetRanking:
    whole, part = by_sample.mean(1), by_sample[:, chosen].mean(1)
    weights = model_weights(whole.size, draws, seed)
    greedy = percentiles(kendall(whole, part), resampled_taus(whole, part[None], weights)[:, 0])
    parts = random_parts(by_sample, chosen.size, _RANDOM, np.random.default_rng(seed))
    value = float(np.nan_to_num(resampled_taus(whole, parts, np.ones((1, whole.size)))).mean())
    anew = mean_taus(whole, parts, weights[:_RESAMPLES])
    return SubsetRanking(int(chosen.size), greedy, percentiles(value, anew))
