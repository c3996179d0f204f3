"""Closed forms against all subsets, one by one, and against sampling; greedy choice against the best one."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.sparse as sp

from qscope_trl.analysis.evalmap.coverage import active_chance, coverage_curve, greedy_cover, half_overlap, redundancy
from qscope_trl.analysis.evalmap.footprints import Footprints, bitmap, side_by_side
from qscope_trl.analysis.evalmap.overlap import (
    clusters,
    marginal_coverage,
    overlaps,
    overlaps_at_size,
    own_features,
)
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureId


def random_bitmap(samples: int, features: int, density: float, seed: int) -> sp.csr_matrix:
    generator = np.random.default_rng(seed)
    # Features differ in how often they are active, as an SAE's do.
    rates = density * generator.exponential(size=features)
    return bitmap([np.flatnonzero(generator.random(features) < rates) for _ in range(samples)], features)


def counts_of(found: sp.csr_matrix) -> np.ndarray:
    return np.bincount(found.indices, minlength=found.shape[1])


@pytest.mark.parametrize("seed", range(6))
def test_curve_and_redundancy_equal_the_mean_over_all_subsets(seed: int) -> None:
    samples = 7 + seed % 3
    found = random_bitmap(samples, 40, 0.15, seed)
    dense = found.toarray() > 0
    total = dense.any(0).sum()
    curve = [
        np.mean([dense[list(rows)].any(0).sum() / total for rows in combinations(range(samples), n)])
        for n in range(1, samples + 1)
    ]
    assert np.allclose(coverage_curve(counts_of(found), samples), curve, rtol=1e-12)
    assert redundancy(counts_of(found), samples) == pytest.approx(sum(curve) / total, rel=1e-12)
    assert coverage_curve(counts_of(found), samples, [0, 3, samples]) == pytest.approx([0, curve[2], 1])


def test_a_large_curve_equals_sampled_subsets() -> None:
    found = random_bitmap(3000, 500, 0.004, 1)
    generator = np.random.default_rng(2)
    total = (counts_of(found) > 0).sum()
    for size in (10, 100, 1000):
        drawn = [
            np.unique(found[generator.choice(3000, size, replace=False)].indices).size / total for _ in range(200)
        ]
        error = np.std(drawn) / np.sqrt(200)
        assert abs(coverage_curve(counts_of(found), 3000, [size])[0] - np.mean(drawn)) < 4 * error
    assert redundancy(counts_of(found), 3000) == pytest.approx(
        coverage_curve(counts_of(found), 3000).sum() / total, rel=1e-9
    )


def test_the_order_of_samples_and_features_changes_nothing() -> None:
    found = random_bitmap(50, 60, 0.1, 3)
    generator = np.random.default_rng(0)
    mixed = found[generator.permutation(50)][:, generator.permutation(60)]
    assert np.allclose(coverage_curve(counts_of(mixed), 50), coverage_curve(counts_of(found), 50), rtol=1e-13)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_equals_plain_greedy_and_keeps_its_guarantee(seed: int) -> None:
    found = random_bitmap(9, 30, 0.2, seed)
    dense = found.toarray() > 0
    chosen = greedy_cover(found, 9)
    is_covered, left, wanted = np.zeros(30, dtype=bool), list(range(9)), []
    for _ in range(9):
        gains = [int((dense[row] & ~is_covered).sum()) for row in left]
        row = left.pop(int(np.argmax(gains)))
        is_covered |= dense[row]
        wanted.append((row, int(is_covered.sum())))
    assert list(zip(chosen.samples.tolist(), chosen.covered.tolist(), strict=True)) == wanted
    for n in range(1, 10):
        best = max(int(dense[list(rows)].any(0).sum()) for rows in combinations(range(9), n))
        assert (1 - 1 / np.e) * best <= chosen.covered[n - 1] <= best


def test_greedy_beats_the_mean_of_random_subsets() -> None:
    found = random_bitmap(400, 300, 0.01, 5)
    total = (counts_of(found) > 0).sum()
    assert greedy_cover(found, 20).covered[-1] / total > coverage_curve(counts_of(found), 400, [20])[0]
    for size in (0, 401):
        with pytest.raises(ConfigError, match=rf"A subset of {size} samples was asked for; the set has 400"):
            greedy_cover(found, size)


def unions_of(found: sp.csr_matrix, size: int) -> list[set[int]]:
    """Footprint of every subset of a size."""
    rows = [set(found[i].indices.tolist()) for i in range(found.shape[0])]
    return [set().union(*(rows[i] for i in chosen)) for chosen in combinations(range(len(rows)), size)]


@pytest.mark.parametrize("samples", [6, 7])
def test_halves_share_what_all_pairs_of_halves_share(samples: int) -> None:
    found = random_bitmap(samples, 30, 0.2, samples)
    here, there = unions_of(found, samples // 2), unions_of(found, samples - samples // 2)
    # The complement of the i-th combination is the i-th from the end.
    shared = [len(a & b) for a, b in zip(here, there[::-1], strict=True)]
    assert half_overlap(counts_of(found), samples) == pytest.approx(sum(shared) / sum(map(len, here)))
    assert np.isnan(half_overlap(np.array([1, 1]), 1))


def test_overlaps_at_a_size_equal_the_mean_over_all_pairs_of_subsets() -> None:
    bitmaps = {"a": random_bitmap(6, 25, 0.2, 1), "b": random_bitmap(8, 25, 0.3, 2)}
    found = overlaps_at_size(Footprints(bitmaps, {0: 25}), 3)
    first, second = unions_of(bitmaps["a"], 3), unions_of(bitmaps["b"], 3)
    shared = np.mean([len(x & y) for x in first for y in second])
    smaller = min(np.mean(list(map(len, first))), np.mean(list(map(len, second))))
    assert found[0, 1] == found[1, 0] == pytest.approx(shared / smaller)
    chances = active_chance(counts_of(bitmaps["a"]), 6, 3)
    assert chances == pytest.approx([np.mean([j in union for union in first]) for j in range(25)])


def sets() -> Footprints:
    active = {
        "a": [[0, 1, 2], [2, 3]],
        "b": [[0, 1], [1, 2, 3, 4, 5]],
        "c": [[4, 5]],
        "d": [[8], [9], [8, 9, 10]],
    }
    return Footprints({name: bitmap(rows, 12) for name, rows in active.items()}, {3: 8, 7: 4})


def test_overlaps_of_hand_made_sets() -> None:
    prints = sets()
    assert prints.names == ("a", "b", "c", "d")
    assert prints.num_samples("d") == 3
    assert [prints.feature(c) for c in (0, 7, 8, 11)] == [
        FeatureId(3, 0),
        FeatureId(3, 7),
        FeatureId(7, 0),
        FeatureId(7, 3),
    ]
    found = overlaps(prints.unions())
    assert found.shared.tolist() == [[4, 4, 0, 0], [4, 6, 2, 0], [0, 2, 2, 0], [0, 0, 0, 3]]
    assert found.of_row[0].tolist() == [1, 1, 0, 0]
    assert found.of_row[1].tolist() == pytest.approx([4 / 6, 1, 2 / 6, 0])
    assert found.of_smaller[1].tolist() == [1, 1, 1, 0]
    assert own_features(prints.unions()).tolist() == [0, 0, 0, 1]
    order = marginal_coverage(prints.unions(), prints.names)
    assert [(step.name, step.added, step.total) for step in order] == [
        ("b", 6, 6),
        ("d", 3, 9),
        ("a", 0, 9),
        ("c", 0, 9),
    ]
    labels = clusters(found, 0.5).labels
    assert labels[0] == labels[1] == labels[2] != labels[3]
    assert len(set(clusters(found, 0.6).labels)) == 3
    with pytest.raises(ConfigError, match=r"`cluster_overlap` is 2; it is a share, 0 to 1"):
        clusters(found, 2)


def test_layers_stand_side_by_side() -> None:
    first, second = sp.csr_matrix([[0.0, 2.0], [0.0, 0.0]]), sp.csr_matrix([[0.5], [3.0]])
    assert side_by_side([first, second]).toarray().tolist() == [[False, True, True], [False, False, True]]


def test_footprints_that_say_nothing_are_refused() -> None:
    with pytest.raises(DataError, match=r"No feature is active in any sample of `x`"):
        Footprints({"x": bitmap([[], []], 4)}, {0: 4})
    with pytest.raises(DataError, match=r"The footprint of `x` has 4 columns; the layers have 5"):
        Footprints({"x": bitmap([[1]], 4)}, {0: 5})
