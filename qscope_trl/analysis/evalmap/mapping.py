"""All figures of a map in one place: what each set is by itself, and beside the others.

Shape legend: `B` sets, `N` samples of a set, `F` features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.analysis.evalmap.coverage import GreedyCover, coverage_curve, greedy_cover, half_overlap, redundancy
from qscope_trl.analysis.evalmap.footprints import Footprints
from qscope_trl.analysis.evalmap.overlap import (
    Clusters,
    Marginal,
    Overlaps,
    clusters,
    marginal_coverage,
    overlaps,
    overlaps_at_size,
    own_features,
)
from qscope_trl.errors import ConfigError

SHARES = (0.01, 0.02, 0.05, 0.10)
"""Sizes of subsets, as shares of the set."""

UNLIKE = 0.5
"""A set is unlike all others if more than this share of its features is in none of them."""

_CURVE_POINTS = 60


class Subset(NamedTuple):
    """What so many samples cover: chosen greedily, and at random."""

    size: int
    """Samples."""

    greedy: float
    """Share of the set's footprint that the greedy choice covers."""

    random: float
    """Share that a random subset of that size covers in the mean, `c_n`."""


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """One set."""

    name: str
    num_samples: int
    num_features: int
    redundancy: float
    """`R`."""

    mean_coverage: float
    """`sum_n c_n / N`: `R` without the factor of the set's size, 0 to 1."""

    half_overlap: float
    """Overlap of two random halves of the set."""

    own: float
    """Share of its features that no other set has."""

    nearest: str | None
    """The set that covers most of it."""

    nearest_overlap: float
    """How much that is."""

    cluster: int
    """Number of its cluster, from 1."""

    curve_sizes: NDArray[np.int64]
    curve: NDArray[np.float64]
    chosen: GreedyCover
    """Samples of the greedy subset, and features that the first ones cover."""

    subsets: tuple[Subset, ...]

    @property
    def is_unlike(self) -> bool:
        """Whether it is unlike all others."""
        return self.nearest is not None and self.own > UNLIKE


@dataclass(frozen=True, kw_only=True)
class Map:
    """All sets."""

    sets: tuple[SetFigures, ...]
    overlaps: Overlaps
    equal_size: int
    """Samples of the smallest set."""

    equal_overlaps: NDArray[np.float64]
    """`overlap_min` of random subsets of that size, `(B, B)`."""

    marginal: tuple[Marginal, ...]
    clusters: Clusters | None
    """`None` of one set."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, in order."""
        return tuple(found.name for found in self.sets)


def make_map(footprints: Footprints, *, subset: int | None = None, cluster_overlap: float = 0.5) -> Map:
    """Compute everything that needs no text and no score.

    Args:
        footprints: The sets.
        subset: Samples to choose of each set; by default 10 % of it.
        cluster_overlap: See `clusters`.

    Raises:
        ConfigError: If `subset` is larger than a set, or `cluster_overlap` is out of range.
    """
    unions = footprints.unions()
    found = overlaps(unions)
    several = len(footprints.names) > 1
    joined = clusters(found, cluster_overlap) if several else None
    labels = _by_first(joined.labels) if joined is not None else np.ones(1, dtype=np.int64)
    own = own_features(unions) if several else np.ones(1)
    size = min(footprints.num_samples(name) for name in footprints.names)
    sets = []
    for place, name in enumerate(footprints.names):
        others = found.of_row[place].copy()
        others[place] = -1
        nearest = int(np.argmax(others)) if several else None
        sets.append(
            _figures(
                footprints,
                name,
                subset,
                own=float(own[place]),
                nearest=None if nearest is None else footprints.names[nearest],
                nearest_overlap=float("nan") if nearest is None else float(others[nearest]),
                cluster=int(labels[place]),
            )
        )
    return Map(
        sets=tuple(sets),
        overlaps=found,
        equal_size=size,
        equal_overlaps=overlaps_at_size(footprints, size),
        marginal=tuple(marginal_coverage(unions, footprints.names)),
        clusters=joined,
    )


def check_subset(subset: int | None, name: str, num_samples: int) -> None:
    """Refuse a subset larger than its set.

    Raises:
        ConfigError: If it is.
    """
    if subset is not None and subset > num_samples:
        raise ConfigError(f"`subset` is {subset}, but `{name}` has {num_samples} samples.")


def _figures(
    footprints: Footprints,
    name: str,
    subset: int | None,
    *,
    own: float,
    nearest: str | None,
    nearest_overlap: float,
    cluster: int,
) -> SetFigures:
    total, counts = footprints.num_samples(name), footprints.counts(name)
    check_subset(subset, name, total)
    features = int((counts > 0).sum())
    r = redundancy(counts, total)
    sizes = sorted({max(1, round(share * total)) for share in SHARES} | ({subset} if subset else set()))
    chosen = greedy_cover(footprints.bitmaps[name], sizes[-1])
    expected = coverage_curve(counts, total, sizes)
    points = np.unique(np.geomspace(1, total, _CURVE_POINTS).round().astype(np.int64))
    return SetFigures(
        name=name,
        num_samples=total,
        num_features=features,
        redundancy=r,
        mean_coverage=r * features / total,
        half_overlap=half_overlap(counts, total),
        own=own,
        nearest=nearest,
        nearest_overlap=nearest_overlap,
        cluster=cluster,
        curve_sizes=points,
        curve=coverage_curve(counts, total, points.tolist()),
        chosen=chosen,
        subsets=tuple(
            Subset(size, float(chosen.covered[size - 1] / features), float(random))
            for size, random in zip(sizes, expected, strict=True)
        ),
    )


def _by_first(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clusters numbered in the order of their first sets."""
    order: dict[int, int] = {}
    return np.array([order.setdefault(label, len(order) + 1) for label in labels.tolist()], dtype=np.int64)
