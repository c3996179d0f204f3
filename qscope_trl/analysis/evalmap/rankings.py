"""What scores of models say of the sets: do subsets rank the models alike, do sets that share features agree.

For a user's own score matrix; the rest of the map needs no scores. Left out: how the scores were made.

Shape legend: `M` models, `N` samples of a set, `B` sets.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.errors import DataError

Floats = NDArray[np.float64]

_PAIRS = 20_000


@dataclass(frozen=True)
class Scores:
    """Scores of models on sets.

    Args:
        models: Names of the models.
        by_set: Score of each model on a set as a whole, `(M,)`.
        by_sample: Where known, score of each model on each sample, `(M, N)`, in the order of the set's rows.
    """

    models: tuple[str, ...]
    by_set: Mapping[str, Floats]
    by_sample: Mapping[str, Floats]


def read_scores(path: str | os.PathLike[str], sizes: Mapping[str, int]) -> Scores:
    """Read a CSV of scores: a row per model, its name in the first column.

    Other columns are sets, by name, or samples, as `gsm8k/0`, `gsm8k/1`, ...: the set and the number of its sample. Of
    a set whose samples are there the score is their mean, and a column of the set as a whole is refused.

    Args:
        path: The file.
        sizes: Samples of each set, by name.

    Raises:
        DataError: If it cannot be read, has no column of scores, names an unknown set or row or one twice, lacks a
            sample, or holds something else than numbers.
    """
    name = Path(path)
    try:
        with name.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise DataError(f"The scores '{name}' cannot be read: {err}") from err
    if len(rows) < 3:
        raise DataError(f"'{name}' holds {max(0, len(rows) - 1)} models; rankings need two or more, and a header.")
    header, body = rows[0][1:], rows[1:]
    if not header:
        raise DataError(
            f"'{name}' has one column only, `{rows[0][0][:60]}`, and no scores. Write the models in the first "
            f"column and their scores in the next ones, with commas between."
        )
    models = tuple(row[0] for row in body)
    if len(set(models)) < len(models):
        twice = sorted({model for model in models if models.count(model) > 1})
        raise DataError(f"'{name}' names a model twice: {', '.join(twice)}. Give each model one row.")
    values = _numbers(name, header, body)
    by_set: dict[str, Floats] = {}
    by_sample: dict[str, Floats] = {}
    places: dict[str, dict[int, int]] = {}
    for column, title in enumerate(header):
        known, _, row = title.rpartition("/")
        number = int(row) if row.isdecimal() else -1
        if title in by_set or number in places.get(known, ()):
            raise DataError(f"'{name}' has scores of `{title}` twice. Leave one of the columns out.")
        if title in sizes:
            by_set[title] = values[:, column]
        elif known in sizes and 0 <= number < sizes[known]:
            places.setdefault(known, {})[number] = column
        else:
            raise DataError(
                f"'{name}' has the column `{title}`, which is neither a set ({', '.join(sizes)}) nor a row of one, as "
                f"in `{next(iter(sizes))}/0`."
            )
    for known, columns in places.items():
        if known in by_set:
            raise DataError(
                f"'{name}' has scores of `{known}` as a whole and of its samples; the set's score is the mean of "
                f"those. Leave the column `{known}` out."
            )
        missing = [row for row in range(sizes[known]) if row not in columns]
        if missing:
            raise DataError(
                f"'{name}' lacks {len(missing)} of the {sizes[known]} rows of `{known}`, such as "
                f"`{known}/{missing[0]}`."
            )
        by_sample[known] = values[:, [columns[row] for row in range(sizes[known])]]
        by_set[known] = by_sample[known].mean(1)
    return Scores(models, by_set, by_sample)


def _numbers(name: Path, header: Sequence[str], body: Sequence[Sequence[str]]) -> Floats:
    found = np.empty((len(body), len(header)))
    for place, row in enumerate(body):
        if len(row) != len(header) + 1:
            raise DataError(f"'{name}': the row of `{row[0]}` has {len(row) - 1} scores, the header {len(header)}.")
        for column, cell in enumerate(row[1:]):
            try:
                found[place, column] = float(cell)
            except ValueError:
                found[place, column] = np.nan
            if not np.isfinite(found[place, column]):
                raise DataError(f"'{name}': the score of `{row[0]}` on `{header[column]}` is {cell!r}, not a number.")
    return found


def kendall(first: Floats, second: Floats) -> float:
    """Kendall's tau-b of two rankings of the models; NaN if one of them ranks none above another."""
    from scipy.stats import kendalltau

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(kendalltau(first, second).statistic)


class Interval(NamedTuple):
    """An estimate with its bootstrap interval."""

    value: float
    """The estimate."""

    low: float
    """Lower end."""

    high: float
    """Upper end."""


class SubsetAgreement(NamedTuple):
    """Whether subsets rank the models as the whole set does."""

    sizes: NDArray[np.int64]
    """Sizes of the subsets."""

    tau: Floats
    """Mean Kendall tau over random subsets of each size."""

    error: Floats
    """Its standard error, from the number of subsets drawn."""

    performance_redundancy: float
    """`R_perf`: the mean over the sizes, which are evenly spaced from 1 to N."""

    interval: Interval
    """`R_perf` with an interval over models drawn anew; the subsets stay."""


def subset_agreement(
    by_sample: Floats, *, num_sizes: int = 20, draws: int = 100, resamples: int = 200, seed: int = 0
) -> SubsetAgreement:
    """Kendall tau of the ranking by random subsets against the ranking by all samples.

    A subset on which all models score alike ranks none and counts as tau 0.

    Args:
        by_sample: Scores `(M, N)`.
        num_sizes: Sizes to try, evenly spaced.
        draws: Subsets of each size.
        resamples: Of the models, for the interval.
        seed: Decides them and the subsets.

    References:
        Qwen-Scope, arXiv:2605.11887, section 4: `R_perf`, over all sizes; here over `num_sizes` of them.
    """
    generator = np.random.default_rng(seed)
    total = by_sample.shape[1]
    sizes = np.unique(np.linspace(1, total, min(num_sizes, total)).round().astype(np.int64))
    whole, weights = by_sample.mean(1), model_weights(by_sample.shape[0], resamples, seed)
    found = np.zeros((sizes.size, draws))
    anew = np.zeros(resamples)
    for place, size in enumerate(sizes.tolist()):
        parts = random_parts(by_sample, size, 1 if size == total else draws, generator)
        found[place] = np.nan_to_num(resampled_taus(whole, parts, np.ones((1, whole.size)))[0])
        anew += mean_taus(whole, parts, weights) / sizes.size
    tau = found.mean(1)
    error = found.std(1, ddof=1) / np.sqrt(draws)
    value = float(tau.mean())
    return SubsetAgreement(sizes, tau, error, value, percentiles(value, anew))


def random_parts(by_sample: Floats, size: int, draws: int, generator: np.random.Generator) -> Floats:
    """Scores of the models on random subsets, `(draws, M)`."""
    total = by_sample.shape[1]
    return np.stack([by_sample[:, generator.choice(total, size, replace=False)].mean(1) for _ in range(draws)])


def model_weights(count: int, resamples: int, seed: int) -> Floats:
    """How often each model is in each resample of the models, `(resamples, M)`."""
    generator = np.random.default_rng(seed)
    drawn = (np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(resamples))
    return np.stack(list(drawn)).astype(np.float64)


def resampled_taus(whole: Floats, parts: Floats, weights: Floats) -> Floats:
    """Kendall's tau-b of rankings with one ranking, over resamples of the models: `kendall` for all of them at once.

    Args:
        whole: Scores that give the one ranking, `(M,)`.
        parts: Scores that give the others, `(K, M)`.
        weights: How often each model is in each resample, `(W, M)`.

    Returns:
        `(W, K)`; NaN where one of the two ranks none above another.
    """
    first, second = np.triu_indices(whole.size, 1)
    both, of_whole, of_part = (np.zeros((weights.shape[0], parts.shape[0])) for _ in range(3))
    for start in range(0, first.size, _PAIRS):
        i, j = first[start : start + _PAIRS], second[start : start + _PAIRS]
        sign, signs = np.sign(whole[i] - whole[j]), np.sign(parts[:, i] - parts[:, j])
        pairs = weights[:, i] * weights[:, j]
        both += pairs @ (signs * sign).T
        of_whole += (pairs @ np.abs(sign))[:, None]
        of_part += pairs @ np.abs(signs).T
    scale = np.sqrt(of_whole * of_part)
    taus: Floats = np.divide(both, scale, out=np.full_like(both, np.nan), where=scale > 0)
    return taus


def mean_taus(whole: Floats, parts: Floats, weights: Floats) -> Floats:
    """Mean of `resampled_taus` over the parts, `(W,)`: 0 for one that ranks none, NaN where `whole` ranks none."""
    taus = resampled_taus(whole, np.vstack([parts, whole]), weights)
    found: Floats = np.nan_to_num(taus[:, :-1]).mean(1)
    found[np.isnan(taus[:, -1])] = np.nan
    return found


def bootstrap(
    estimate: Callable[[NDArray[np.int64]], float],
    count: int,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of an estimate over `count` units drawn with replacement; draws that give NaN are left out.

    Args:
        estimate: From indices of units to the estimate.
        count: Number of units, such as models.
        draws: Resamples.
        level: Coverage aimed at.
        seed: Decides them.
    """
    generator = np.random.default_rng(seed)
    drawn = np.array([estimate(generator.integers(0, count, count)) for _ in range(draws)])
    return percentiles(estimate(np.arange(count)), drawn, level)


def percentiles(value: float, drawn: Floats, level: float = 0.95) -> Interval:
    """An estimate with the percentile interval of its resamples; those that are NaN are left out."""
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def partial_correlation(first: Floats, second: Floats, given: Floats) -> float:
    """Pearson correlation of what is left of two variables after a linear fit on a third."""
    ab, ag, bg = (pearson(*pair) for pair in ((first, second), (first, given), (second, given)))
    scale = (1 - ag**2) * (1 - bg**2)
    return float((ab - ag * bg) / np.sqrt(scale)) if scale > 1e-12 else float("nan")


def pearson(first: Floats, second: Floats) -> float:
    """Pearson correlation; NaN if one of the two does not vary."""
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def spearman(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation; NaN if one of the two does not vary."""
    from scipy.stats import rankdata

    return pearson(rankdata(first), rankdata(second))


class PairAgreement(NamedTuple):
    """Whether sets that share features also rank the models alike."""

    pairs: tuple[tuple[str, str], ...]
    """The pairs of sets."""

    overlap: Floats
    """Overlap of each pair."""

    correlation: Floats
    """Correlation of the models' scores on the two."""

    agreement: Interval
    """Pearson correlation of the two columns over pairs, with an interval over models drawn anew."""


def pair_agreement(
    overlap: Floats,
    names: Sequence[str],
    scores: Scores,
    *,
    given: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> PairAgreement | None:
    """Overlap of sets against the correlation of the models' scores on them.

    Args:
        overlap: Overlap of every pair `(B, B)`; its mean over both directions counts.
        names: The sets.
        scores: Scores of the models.
        given: A set whose scores are taken out of both (partial correlation), such as one of general ability; pairs
            with it are left out.
        draws: Bootstrap resamples of the models.
        seed: Decides them.

    Returns:
        None with fewer than three pairs: a correlation over them would say nothing.

    References:
        Qwen-Scope, arXiv:2605.11887, section 4, with MMLU as the set that is given.
    """
    scored = [place for place, name in enumerate(names) if name in scores.by_set and name != given]
    pairs = [(i, j) for place, i in enumerate(scored) for j in scored[place + 1 :]]
    if len(pairs) < 3:
        return None
    shared = np.array([(overlap[i, j] + overlap[j, i]) / 2 for i, j in pairs])

    def correlations(models: NDArray[np.int64]) -> Floats:
        of = {place: scores.by_set[names[place]][models] for place in scored}
        if given is None:
            return np.array([pearson(of[i], of[j]) for i, j in pairs])
        control = scores.by_set[given][models]
        return np.array([partial_correlation(of[i], of[j], control) for i, j in pairs])

    def agreement(models: NDArray[np.int64]) -> float:
        found = correlations(models)
        known = np.isfinite(found)
        return pearson(shared[known], found[known]) if known.sum() > 2 else float("nan")

    count = len(scores.models)
    return PairAgreement(
        tuple((names[i], names[j]) for i, j in pairs),
        shared,
        correlations(np.arange(count)),
        bootstrap(agreement, count, draws=draws, seed=seed),
    )


def rank_agreement(feature: Mapping[str, float], performance: Mapping[str, float], **settings: Any) -> Interval | None:
    """Spearman correlation of feature redundancy with performance redundancy over sets, with an interval over sets.

    Returns:
        None with fewer than three sets in common.
    """
    names = [name for name in feature if name in performance]
    if len(names) < 3:
        return None
    first, second = (np.array([values[name] for name in names]) for values in (feature, performance))
    return bootstrap(lambda rows: spearman(first[rows], second[rows]), len(names), **settings)
