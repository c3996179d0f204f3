"""Near samples against every pair, one by one; planted copies; n-grams by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qscope_trl.analysis.evalmap import near
from qscope_trl.analysis.evalmap.footprints import Footprints, bitmap
from qscope_trl.analysis.evalmap.near import NearIndex, NearSets, keep_best, ngram_shares
from qscope_trl.analysis.evalmap.samples import TrainBlock

NAMES = ("a", "b", "c")
THRESHOLD = 0.6


def random_sets(seed: int) -> dict[str, list[set[int]]]:
    """Three sets of samples, some of them near copies of samples of the same or another set."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[set[int]]] = {}
    pool: list[set[int]] = []
    for name in NAMES:
        rows = []
        for _ in range(25):
            if pool and generator.random() < 0.4:
                row = set(pool[generator.integers(len(pool))])
                for _ in range(generator.integers(0, 4)):
                    row.discard(int(generator.choice(sorted(row))))
                    row.add(int(generator.integers(60)))
            else:
                row = set(generator.integers(0, 60, generator.integers(6, 14)).tolist())
            rows.append(row)
            pool.append(row)
        found[name] = rows
    return found


def prints(sets: dict[str, list[set[int]]]) -> Footprints:
    return Footprints({name: bitmap([sorted(row) for row in rows], 60) for name, rows in sets.items()}, {0: 60})


def texts_of(sets: dict[str, list[set[int]]]) -> dict[str, list[str]]:
    return {name: [str(sorted(row)) for row in rows] for name, rows in sets.items()}


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def wanted(sets: dict[str, list[set[int]]], name: str, other: str) -> list[tuple[int, int, float, bool]]:
    """The nearest of every sample, equal ones first, then by similarity, then the earlier one."""
    found = []
    for i, row in enumerate(sets[name]):
        pairs = [
            (-jaccard(row, their), j)
            for j, their in enumerate(sets[other])
            if jaccard(row, their) >= THRESHOLD and (name, i) != (other, j)
        ]
        if pairs:
            similarity, j = min(pairs)
            found.append((i, j, -similarity, row == sets[other][j]))
    return sorted(found, key=lambda pair: (-pair[2] - pair[3], pair[0], pair[1]))


def check(found: NearSets, pairs: list[tuple[int, int, float, bool]]) -> None:
    assert found.near == len(pairs)
    assert found.same_text == sum(pair[3] for pair in pairs)
    assert [tuple(pair) for pair in found.listed] == [
        (i, j, pytest.approx(similarity), same) for i, j, similarity, same in pairs
    ]


@pytest.mark.parametrize("seed", range(5))
def test_nearest_samples_are_those_of_all_pairs(seed: int) -> None:
    sets = random_sets(seed)
    found = NearIndex(prints(sets), texts_of(sets), THRESHOLD).between(show_progress=False)
    assert [(entry.name, entry.other) for entry in found] == [(a, b) for a in NAMES for b in NAMES]
    assert sum(entry.near for entry in found) > 20
    for entry in found:
        assert entry.looked_up == 25
        check(entry, wanted(sets, entry.name, entry.other))


def test_some_looked_up_are_some_of_all_and_do_not_depend_on_the_order() -> None:
    sets = random_sets(7)
    index = NearIndex(prints(sets), texts_of(sets), THRESHOLD)
    some = index.between(10, show_progress=False)
    full = {(entry.name, entry.other): set(entry.listed) for entry in index.between(show_progress=False)}
    assert all(set(entry.listed) <= full[entry.name, entry.other] for entry in some)
    assert {entry.looked_up for entry in some} == {10}
    assert 0 < sum(entry.near for entry in some) < sum(map(len, full.values()))
    turned = {name: rows[::-1] for name, rows in sets.items()}
    again = NearIndex(prints(turned), texts_of(turned), THRESHOLD).between(10, show_progress=False)
    assert [(e.name, e.other, e.near, e.same_text) for e in again] == [
        (e.name, e.other, e.near, e.same_text) for e in some
    ]


def test_looking_up_ends_where_all_are_near_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {"a": [{0, 1, 2, 3, 4 + i % 9} for i in range(100)], "b": [{20 + i, 40 + i} for i in range(10)]}
    monkeypatch.setattr(near, "_MOST_PAIRS", 3000)
    index = NearIndex(prints(alike), {"a": None, "b": None}, 0.6)
    found = {(entry.name, entry.other): entry for entry in index.between(1000, show_progress=False)}
    # 16, then 32: each is near all of the other 99.
    assert [(e.looked_up, e.near) for e in found.values()] == [(48, 48), (48, 0), (10, 0), (10, 0)]
    assert index.between(show_progress=False)[0].near == 100


def test_no_more_are_listed_than_asked_for_and_all_are_counted() -> None:
    sets = random_sets(1)
    whole = NearIndex(prints(sets), texts_of(sets), THRESHOLD).between(show_progress=False)
    few = NearIndex(prints(sets), texts_of(sets), THRESHOLD, listed=2).between(show_progress=False)
    for some, everything in zip(few, whole, strict=True):
        assert some.near == everything.near
        assert some.listed == everything.listed[:2]


@pytest.mark.parametrize("size", [3, 25])
def test_training_texts_are_found_block_by_block(size: int) -> None:
    sets = random_sets(3)
    training = [*random_sets(4)["a"], *(set(row) for row in sets["b"][:5])]
    training[2] = set(sets["a"][0])
    texts = [str(sorted(row)) for row in training]
    blocks = [
        TrainBlock(i, bitmap([sorted(row) for row in training[i : i + size]], 60), texts[i : i + size])
        for i in range(0, len(training), size)
    ]
    found, kept = NearIndex(prints(sets), texts_of(sets), THRESHOLD).train("t", blocks)
    assert [(entry.name, entry.other, entry.looked_up) for entry in found] == [(name, "t", 25) for name in NAMES]
    for entry in found:
        check(entry, wanted({**sets, "t": training}, entry.name, "t"))
        assert all(kept[pair.other] == texts[pair.other] for pair in entry.listed)
    assert found[0].same_text >= 1
    assert found[1].same_text >= 5


def test_the_same_text_goes_before_one_that_is_as_near() -> None:
    same = Footprints({"a": bitmap([[1, 2]], 9), "b": bitmap([[1, 2], [1, 2]], 9)}, {0: 9})
    found = NearIndex(same, {"a": ["x"], "b": ["y", "x"]}, 0.5).between(show_progress=False)
    assert [tuple(pair) for pair in found[1].listed] == [(0, 1, 1.0, True)]
    unknown = NearIndex(same, {"a": None, "b": None}, 0.5).between(show_progress=False)
    assert [tuple(pair) for pair in unknown[1].listed] == [(0, 0, 1.0, False)]


def test_the_best_candidate_stays_whatever_comes_first() -> None:
    generator = np.random.default_rng(0)
    row, column, candidate = generator.integers(0, 3, (3, 60))
    candidate = np.arange(60)
    score = generator.integers(0, 5, 60) / 4
    for order in (np.arange(60), np.arange(60)[::-1], generator.permutation(60)):
        best, other = np.full((3, 3), -1.0), np.full((3, 3), -1)
        for part in np.array_split(order, 7):
            keep_best(best, other, row[part], column[part], candidate[part], score[part])
        for r, c in np.ndindex(3, 3):
            inside = [(-score[i], candidate[i]) for i in range(60) if (row[i], column[i]) == (r, c)]
            assert (-best[r, c], other[r, c]) == min(inside)


def test_ngram_shares_by_hand() -> None:
    assert ngram_shares([1, 2, 3, 4, 5], [9, 2, 3, 4, 8, 1, 2], 2) == (3 / 4, 3 / 6)
    assert ngram_shares([1, 2, 3], [0, 1, 2, 3, 4], 8) == (1.0, 1 / 3)
    assert ngram_shares([1, 2, 1, 2, 1], [1, 2], 2) == (1 / 2, 1.0)
    assert ngram_shares([1, 2], [2, 1], 8) == (0.0, 0.0)
    assert all(math.isnan(share) for share in ngram_shares([], [1], 8))
