"""What sets have in common: shared features of every pair, clusters, and what each set adds.

Shape legend: `B` sets, `F` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.analysis.evalmap.coverage import active_chance, greedy_cover
from qscope_trl.analysis.evalmap.footprints import Footprints
from qscope_trl.errors import ConfigError


class Overlaps(NamedTuple):
    """Shared features of every pair of sets."""

    shared: NDArray[np.int64]
    """Features in both footprints `(B, B)`; the diagonal holds the footprints' sizes."""

    of_row: NDArray[np.float64]
    """`overlap(i, j) = |Fi and Fj| / |Fi|`: how much of set i is covered by set j `(B, B)`."""

    of_smaller: NDArray[np.float64]
    """`overlap_min(i, j) = |Fi and Fj| / min(|Fi|, |Fj|)`, symmetric `(B, B)`."""


def overlaps(unions: Any) -> Overlaps:
    """Overlap of every pair.

    Args:
        unions: Footprints, `csr_matrix (B, F)` of ones.

    References:
        Qwen-Scope, arXiv:2605.11887, section 4.
    """
    shared = np.asarray((unions @ unions.T).todense(), dtype=np.int64)
    sizes = np.diag(shared)
    return Overlaps(shared, shared / sizes[:, None], shared / np.minimum(sizes[:, None], sizes[None]))


def overlaps_at_size(footprints: Footprints, size: int) -> NDArray[np.float64]:
    """`overlap_min` of random subsets of so many samples of every two sets: a large set gains nothing by its size.

    Expected shared features over the smaller expected number of features, in closed form as `coverage_curve`. Of a set
    with itself: two subsets drawn independently, which may have samples in common.

    Args:
        footprints: The sets.
        size: Samples of each subset, at most those of the smallest set.

    Returns:
        Shape `(B, B)`.
    """
    chances = np.stack(
        [active_chance(footprints.counts(name), footprints.num_samples(name), size) for name in footprints.names]
    )
    shared, expected = chances @ chances.T, chances.sum(1)
    found: NDArray[np.float64] = shared / np.minimum(expected[:, None], expected[None])
    return found


class Marginal(NamedTuple):
    """What one set adds when sets are taken one after the other, each time the one that adds most."""

    name: str
    """The set."""

    added: int
    """Features that no set before it has."""

    total: int
    """Features of all sets up to it."""


def marginal_coverage(unions: Any, names: Sequence[str]) -> list[Marginal]:
    """Sets in the order in which they add most new features; ties go to the earlier name."""
    found = greedy_cover(unions, unions.shape[0])
    before = np.concatenate([[0], found.covered[:-1]])
    return [
        Marginal(names[row], int(total - start), int(total))
        for row, total, start in zip(found.samples, found.covered, before, strict=True)
    ]


def own_features(unions: Any) -> NDArray[np.float64]:
    """Share of each set's footprint that no other set has, `(B,)`; near 1 is a set unlike all others."""
    in_sets = np.asarray(unions.sum(0)).ravel()
    alone = unions.multiply(in_sets[None] == 1)
    found: NDArray[np.float64] = np.asarray(alone.sum(1)).ravel() / np.diff(unions.indptr)
    return found


class Clusters(NamedTuple):
    """Sets joined step by step."""

    linkage: NDArray[np.float64]
    """SciPy's linkage matrix, average linkage over `1 - overlap_min`."""

    labels: NDArray[np.int64]
    """Cluster of each set at the given threshold, from 1."""


def clusters(found: Overlaps, threshold: float) -> Clusters:
    """Hierarchical clusters by average `1 - overlap_min`.

    Args:
        found: Overlaps of at least two sets.
        threshold: Sets are of one cluster while the mean overlap between its parts is at least this, 0 to 1.

    Raises:
        ConfigError: If the threshold is out of range.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if not 0 <= threshold <= 1:
        raise ConfigError(f"`cluster_overlap` is {threshold}; it is a share, 0 to 1.")
    distance = 1 - found.of_smaller
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform((distance + distance.T) / 2, checks=False), method="average")
    return Clusters(tree, fcluster(tree, t=1 - threshold + 1e-12, criterion="distance"))
