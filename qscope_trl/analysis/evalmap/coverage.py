"""How much of a set's footprint a part of its samples covers: curves, redundancy, and the best small part.

Everything is in closed form or deterministic: nothing is sampled, so numbers depend neither on a seed nor on the order
of the samples (but for ties of the greedy choice, which go to the earlier sample).

Shape legend: `N` samples, `F` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.errors import ConfigError


def coverage_curve(
    counts_F: NDArray[Any], num_samples: int, sizes: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Expected share of the footprint that n samples cover, over all subsets of size n: `c_n`.

    Args:
        counts_F: In how many samples each feature is active; zeros do not count.
        num_samples: Samples of the set.
        sizes: Sizes n, 0 to `num_samples`; by default every one from 1.

    Returns:
        `c_n` for each size.

    References:
        Qwen-Scope, arXiv:2605.11887, section 4, defines it as an expectation over random subsets. The closed form
        `(1/|F|) sum_j [1 - C(N - m_j, n) / C(N, n)]` is that expectation, exactly.
    """
    m, weight = np.unique(np.asarray(counts_F)[np.asarray(counts_F) > 0], return_counts=True)
    n = np.arange(1, num_samples + 1) if sizes is None else np.asarray(sizes, dtype=np.int64)
    found = np.zeros(n.size)
    for count, features in zip(m, weight, strict=True):
        found += features * (1 - _missed(count, num_samples, n))
    covered: NDArray[np.float64] = found / weight.sum()
    return covered


def active_chance(counts_F: NDArray[Any], num_samples: int, size: int) -> NDArray[np.float64]:
    """Chance of each feature to be active in a random subset of `size` samples: its term of `c_n`, `(F,)`."""
    chance: NDArray[np.float64] = 1 - _missed(np.asarray(counts_F), num_samples, np.int64(size))
    return chance


def _missed(m: Any, num_samples: int, n: Any) -> NDArray[np.float64]:
    """Chance that n samples miss a feature of m: `C(N - m, n) / C(N, n) = (N - m)! (N - n)! / ((N - m - n)! N!)`."""
    from scipy.special import gammaln

    rest = num_samples - m - n
    logs = (
        gammaln(num_samples - m + 1)
        + gammaln(num_samples - n + 1)
        - gammaln(np.maximum(rest, 0) + 1)
        - gammaln(num_samples + 1)
    )
    return np.where(rest >= 0, np.exp(logs), 0.0)


def redundancy(counts_F: NDArray[Any], num_samples: int) -> float:
    """Feature redundancy `R = sum_n c_n / |F|` in closed form: `(N + 1) / |F|^2 * sum_j m_j / (m_j + 1)`.

    A set in which few samples already show every feature has a large `R`. Not a share: it grows with the number of
    samples over the number of features.

    Args:
        counts_F: In how many samples each feature is active; zeros do not count.
        num_samples: Samples of the set.

    References:
        Qwen-Scope, arXiv:2605.11887, section 4.
    """
    m = np.asarray(counts_F, dtype=np.float64)
    m = m[m > 0]
    return float((num_samples + 1) / m.size**2 * (m / (m + 1)).sum())


def half_overlap(counts_F: NDArray[Any], num_samples: int) -> float:
    """What share of one random half's footprint the other half has: expected shared features over expected features.

    The measure to hold overlaps between sets against: two sets of the same kind share no more. NaN for one sample.

    Args:
        counts_F: In how many samples each feature is active; zeros do not count.
        num_samples: Samples of the set.
    """
    if num_samples < 2:
        return float("nan")
    first = num_samples // 2
    here, there = coverage_curve(counts_F, num_samples, [first, num_samples - first])
    # A feature that one half lacks is in the other: shared = here + there - all.
    return float((here + there - 1) / here)


class GreedyCover(NamedTuple):
    """Samples in the order in which they are taken."""

    samples: NDArray[np.int64]
    """Their rows."""

    covered: NDArray[np.int64]
    """Features that the first one, the first two, ... cover."""


def greedy_cover(bitmap: Any, size: int) -> GreedyCover:
    """Samples that cover most features: each next one adds most, ties going to the earlier sample.

    For every n, the first n cover at least `1 - 1/e` (63 %) of what the best n samples cover (Nemhauser, Wolsey and
    Fisher, 1978). The choice is that of lazy greedy (Minoux, 1978). Here every sample's gain is kept up to date: a
    feature is covered once, and then taken off the gains of all samples that have it, so each entry is met once.

    Args:
        bitmap: `csr_matrix (N, F)`.
        size: How many to take, 1 to N.

    Raises:
        ConfigError: If the size is out of range.
    """
    total = bitmap.shape[0]
    if not 1 <= size <= total:
        raise ConfigError(f"A subset of {size} samples was asked for; the set has {total}.")
    indptr, indices = bitmap.indptr, bitmap.indices
    by_feature = bitmap.tocsc()
    starts, owners = by_feature.indptr, by_feature.indices
    is_covered = np.zeros(bitmap.shape[1], dtype=bool)
    gains = np.diff(indptr).astype(np.int64)
    samples = np.empty(size, dtype=np.int64)
    covered = np.empty(size, dtype=np.int64)
    count = 0
    for place in range(size):
        row = int(np.argmax(gains))
        columns = indices[indptr[row] : indptr[row + 1]]
        new = columns[~is_covered[columns]]
        is_covered[new] = True
        count += new.size
        for column in new.tolist():
            gains[owners[starts[column] : starts[column + 1]]] -= 1
        # Below any gain, 0 too: no sample is taken twice.
        gains[row] = -1
        samples[place], covered[place] = row, count
    return GreedyCover(samples, covered)
