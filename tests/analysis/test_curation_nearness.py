"""Nearness of active sets, near-duplicates and references: against plain Python over all pairs."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from qscope_trl.analysis.curation import leaders, references
from qscope_trl.analysis.curation.leaders import LeaderIndex, near_duplicates, rare_first
from qscope_trl.analysis.curation.references import near_references, similarity_to
from qscope_trl.analysis.curation.sets import MEASURES, ActiveSets, Nearness, inverse_document_frequency, join
from qscope_trl.errors import ConfigError

SIZES = (40, 25)  # features of two layers


def sets_from(dense: Any, sizes: tuple[int, ...] = SIZES) -> ActiveSets:
    matrix = sparse.csr_matrix(np.asarray(dense, dtype=np.float32))
    starts = tuple(int(n) for n in np.cumsum([0, *sizes]))
    return ActiveSets(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data, starts)


def documents(seed: int, count: int, *, density: float = 0.25) -> Any:
    """Random documents, some near copies of others, some empty, some equal; a few features are nearly everywhere."""
    generator = np.random.default_rng(seed)
    common = generator.random(sum(SIZES))
    frequency = np.where(common > 0.9, 0.95, density * common)
    dense = (generator.random((count, sum(SIZES))) < frequency) * generator.gamma(2.0, size=(count, sum(SIZES)))
    for row in range(count // 3, count):
        if generator.random() < 0.5:
            dense[row] = dense[generator.integers(row)]
            for feature in generator.integers(sum(SIZES), size=generator.integers(5)):
                dense[row, feature] = 0.0 if dense[row, feature] else generator.gamma(2.0)
    dense[generator.integers(count, size=2)] = 0
    return dense


def plain_similarity(measure: str, a: Any, b: Any, idf: Any) -> float:
    """One pair, from the definition."""
    first, second = set(np.flatnonzero(a).tolist()), set(np.flatnonzero(b).tolist())
    if not first or not second:
        return 0.0
    if measure == "jaccard":
        return float(Fraction(len(first & second), len(first | second)))
    if measure == "weighted_jaccard":
        both, either = (math.fsum(idf[f] for f in part) for part in (first & second, first | second))
        return both / either

    def unit(row: Any) -> Any:
        parts = [row[:40] * idf[:40], row[40:] * idf[40:]]
        scaled = [part / np.linalg.norm(part) if part.any() else part for part in parts]
        whole = np.concatenate(scaled)
        return whole / np.linalg.norm(whole)

    return float(unit(np.float32(a).astype(float)) @ unit(np.float32(b).astype(float)))


def plain_idf(dense: Any) -> Any:
    fires_in = (np.asarray(dense) > 0).sum(0)
    return np.array([math.log((len(dense) + 2) / (n + 1)) for n in fires_in])


def all_pairs(measure: str, first: Any, second: Any, idf: Any) -> Any:
    return np.array([[plain_similarity(measure, a, b, idf) for b in second] for a in first])


@functools.cache
def similarities(measure: str, seed: int, count: int) -> tuple[Any, Any]:
    """Documents, and their similarity pair by pair."""
    dense = documents(seed, count)
    return dense, all_pairs(measure, dense, dense, plain_idf(dense))


def plain_duplicates(similarity: Any, order: Any, threshold: float) -> dict[int, int]:
    """Each duplicate and the first kept document that it is near."""
    kept: list[int] = []
    found = {}
    for row in order:
        near = next((other for other in kept if similarity[row, other] >= threshold), None)
        if near is None:
            kept.append(row)
        else:
            found[row] = near
    return found


def test_jaccard_of_a_case_by_hand() -> None:
    dense = np.zeros((4, 65))
    dense[0, [1, 2, 3, 4]] = 1
    dense[1, [1, 2, 3, 50]] = 9  # shares 3 of 5 with the first
    dense[2, [1, 2, 3, 4, 50]] = 1  # shares 4 of 5 with both
    nearness = Nearness("jaccard", np.ones(65))
    found = near_duplicates(sets_from(dense), np.arange(4), nearness, 0.8, show_progress=False)
    assert (found.rows.tolist(), found.leader.tolist(), found.similarity.tolist()) == ([2], [0], [0.8])
    found = near_duplicates(sets_from(dense), np.array([2, 1, 0, 3]), nearness, 0.8, show_progress=False)
    assert (found.rows.tolist(), found.leader.tolist()) == ([1, 0], [2, 2])
    found = near_duplicates(sets_from(dense), np.arange(4), nearness, 0.6, show_progress=False)
    assert (found.rows.tolist(), found.leader.tolist(), found.similarity.tolist()) == ([1, 2], [0, 0], [0.6, 0.8])


def test_documents_without_a_feature_are_near_nothing() -> None:
    nearness = Nearness("jaccard", np.ones(65))
    found = near_duplicates(sets_from(np.zeros((5, 65))), np.arange(5), nearness, 0.1, show_progress=False)
    assert found.rows.size == 0


def test_a_chain_of_small_steps_does_not_join_its_ends() -> None:
    dense = np.zeros((6, 65))
    for row in range(6):
        dense[row, row : row + 10] = 1  # neighbours share 9 of 11, those two apart 8 of 12
    found = near_duplicates(
        sets_from(dense), np.arange(6), Nearness("jaccard", np.ones(65)), 0.75, show_progress=False
    )
    assert dict(zip(found.rows.tolist(), found.leader.tolist(), strict=True)) == {1: 0, 3: 2, 5: 4}


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_equals_its_definition(measure: str) -> None:
    dense = documents(0, 40)
    sets, idf = sets_from(dense), plain_idf(dense)
    np.testing.assert_allclose(inverse_document_frequency(sets), idf, rtol=1e-12)
    nearness = Nearness(measure, inverse_document_frequency(sets))
    rows = nearness.rows(sets)
    weights = nearness.weights(rows)
    shared = (rows @ rows.T).toarray()
    found = nearness.similarity(shared.ravel(), np.repeat(weights, 40), np.tile(weights, 40)).reshape(40, 40)
    np.testing.assert_allclose(found, all_pairs(measure, dense, dense, idf), atol=1e-6, rtol=0)
    is_empty = ~dense.any(1)
    np.testing.assert_array_equal(np.diag(found), np.where(is_empty, 0.0, 1.0))


# Batches far smaller than the data: leaders come from earlier batches, from earlier parts of one, and the same part.
@pytest.fixture(params=[(7, 3, 5), (64, 16, 2048), (2048, 256, 2048)], ids=["tiny", "small", "one"])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, sub_batch, chunk = request.param
    monkeypatch.setattr(leaders, "_BATCH", batch)
    monkeypatch.setattr(leaders, "_SUB_BATCH", sub_batch)
    monkeypatch.setattr(leaders, "_CHUNK", chunk)
    monkeypatch.setattr(leaders, "_VERIFY_ENTRIES", 200 if batch == 7 else 20_000_000)
    monkeypatch.setattr(references, "_BATCH", batch)
    monkeypatch.setattr(references, "_PRODUCT", 500 if batch == 7 else 20_000_000)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("measure", MEASURES)
def test_near_duplicates_are_those_of_all_pairs(measure: str) -> None:
    pairs = 0
    for seed in range(2):
        dense, similarity = similarities(measure, seed, 90)
        sets = sets_from(dense)
        idf = inverse_document_frequency(sets)
        order = np.random.default_rng(seed).permutation(90)[:80]
        for threshold in (0.1, 0.25, 0.5, 0.8, 0.93, 1.0):
            # Pairs within rounding of the threshold would depend on how sums are taken.
            if measure != "jaccard":
                similarity = np.where(np.abs(similarity - threshold) < 1e-9, threshold, similarity)
            wanted = plain_duplicates(similarity, order.tolist(), threshold)
            found = near_duplicates(sets, order, Nearness(measure, idf), threshold, show_progress=False)
            assert dict(zip(found.rows.tolist(), found.leader.tolist(), strict=True)) == wanted
            np.testing.assert_allclose(found.similarity, similarity[found.rows, found.leader], atol=1e-6)
            pairs += len(wanted)
    assert pairs > 150


@pytest.mark.parametrize("slack", [0.01, 0.15, 0.6])
@pytest.mark.parametrize("measure", MEASURES)
def test_no_pair_at_the_threshold_is_missed_whatever_the_prefixes(
    measure: str, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaders, "SLACK", slack)
    dense, similarity = similarities(measure, 7, 120)
    sets = sets_from(dense)
    idf = inverse_document_frequency(sets)
    values = np.unique(np.round(similarity[np.triu_indices(120, 1)], 12))
    # Thresholds that some pairs reach exactly.
    for threshold in values[values > 0.05][:: max(1, values.size // 8)].tolist():
        for rank in (rare_first(sets), np.arange(65)[::-1].copy()):
            index = LeaderIndex(sets, Nearness(measure, idf), threshold, rank)
            ready = index.prepare(sets)
            index.add(np.arange(120), ready)
            found = {
                (int(a), int(b)) for part in index.near(ready) for a, b in zip(part.query, part.leader, strict=True)
            }
            surely = np.argwhere(similarity >= threshold + (0 if measure == "jaccard" else 1e-7))
            surely_not = np.argwhere(similarity < threshold - (0 if measure == "jaccard" else 1e-7))
            assert found >= {(int(a), int(b)) for a, b in surely}
            assert not found & {(int(a), int(b)) for a, b in surely_not}


def test_pairs_reach_a_threshold_that_they_equal() -> None:
    """Ratios of small numbers, written as decimals: 4/5 is 0.8, 7/10 is 0.7."""
    for shared in range(1, 20):
        for either in range(shared, 21):
            dense = np.zeros((2, 65))
            dense[0, :shared] = 1
            dense[1, :either] = 1
            found = near_duplicates(
                sets_from(dense), np.arange(2), Nearness("jaccard", np.ones(65)), shared / either, show_progress=False
            )
            assert found.rows.size == 1, (shared, either)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("measure", MEASURES)
def test_near_references_are_the_nearest_of_all(measure: str) -> None:
    dense, other = documents(1, 80), documents(2, 30)
    other[5] = other[4] = dense[11]  # equally near: the first counts
    other[10:30] = np.where(np.random.default_rng(0).random((20, 65)) < 0.08, 0, dense[20:40])
    sets, idf = sets_from(dense), inverse_document_frequency(sets_from(dense))
    rows = np.arange(3, 80)
    similarity = all_pairs(measure, dense, other, idf)
    found = near_references(sets, rows, sets_from(other), Nearness(measure, idf), 0.4, show_progress=False)
    wanted = [row for row in rows if similarity[row].max() >= 0.4]
    assert found.rows.tolist() == wanted
    assert 5 < len(wanted) < 77
    np.testing.assert_allclose(found.similarity, similarity[wanted].max(1), atol=1e-6)
    assert found.reference.tolist() == [int(np.round(similarity[row], 9).argmax()) for row in wanted]
    assert found.reference[found.rows.tolist().index(11)] == 4


@pytest.mark.usefixtures("batches")
def test_similarity_to_references_is_the_mean_or_the_largest() -> None:
    dense, other = documents(3, 50), documents(4, 20)
    sets, idf = sets_from(dense), inverse_document_frequency(sets_from(dense))
    similarity = all_pairs("cosine", dense, other, idf)
    for by, wanted in (("mean", similarity.mean(1)), ("max", similarity.max(1))):
        found = similarity_to(sets, sets_from(other), Nearness("cosine", idf), by, show_progress=False)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_joined_and_taken_sets_are_the_rows() -> None:
    dense = documents(5, 30)
    whole = sets_from(dense)
    joined = join([sets_from(dense[:11]), sets_from(dense[11:11]), sets_from(dense[11:])])
    for name in ("offsets", "features", "values"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    rows = np.array([4, 29, 4, 0])
    taken, wanted = whole.take(rows), sets_from(dense[rows])
    for name in ("offsets", "features", "values"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(wanted, name))
    np.testing.assert_array_equal(whole.document_frequency(), (dense > 0).sum(0))


def test_cosine_without_activations_is_refused() -> None:
    whole = sets_from(documents(0, 5))
    bare = ActiveSets(whole.offsets, whole.features, None, whole.starts)
    with pytest.raises(ConfigError, match="`cosine` needs the activations of the sets"):
        Nearness("cosine", np.ones(65)).rows(bare)
