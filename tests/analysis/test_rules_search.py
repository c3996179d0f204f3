"""The search for rules against exhaustive enumeration, and what it finds against compiled rules."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.analysis.rules.learning import best_of_layers, learn, parts_of_fold, top_by_delta
from qscope_trl.analysis.rules.metrics import metric
from qscope_trl.analysis.rules.search import Found, Literal, Search, literal_bits, make_literals
from qscope_trl.analysis.rules.statistics import Candidate, Candidates
from qscope_trl.config.rules import RulesLearnConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.rules import compile_rule
from qscope_trl.rules.tree import to_text

FEATURES = tuple(FeatureId(layer, index) for layer in (1, 2) for index in range(4))
NUM = 300


@pytest.fixture(scope="module")
def table() -> FeatureTable:
    generator = np.random.default_rng(0)
    values = np.maximum(generator.normal(size=(NUM, len(FEATURES))), 0).astype(np.float32)
    return FeatureTable(FEATURES, {"max": values, "mean": values / 2})


@pytest.fixture(scope="module")
def labels(table: FeatureTable) -> np.ndarray:
    noise = np.random.default_rng(1).random(NUM) < 0.1
    held = compile_rule("atleast(2, L1: 0, 1, 2 > 0.2) and not L2F3 > 0.5").evaluate(table)
    return np.asarray(held ^ noise)


def plain(features: tuple[FeatureId, ...]) -> list[Literal]:
    return [Literal(feature, "max", 0.0) for feature in features]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["f1", "mcc"])
def test_a_wide_beam_finds_the_best_of_all_sets(
    table: FeatureTable, labels: np.ndarray, count: int, name: str
) -> None:
    literals = plain(FEATURES)
    bits = literal_bits(table, literals)
    found = Search(name, labels, 1000).members(literals, bits, count, 4)
    assert [len(rule.members) for rule in found] == [1, 2, 3, 4]
    for size, rule in enumerate(found, start=1):
        best = max(
            metric(name, bits[list(chosen)].sum(0) >= min(count, size), labels)
            for chosen in combinations(range(len(literals)), size)
        )
        assert rule.value == pytest.approx(best)
        assert metric(name, rule.holds(table), labels) == pytest.approx(best)


def test_greedy_search_adds_the_best_comparison_in_each_step(table: FeatureTable, labels: np.ndarray) -> None:
    literals = plain(FEATURES)
    bits = literal_bits(table, literals)
    found = Search("f1", labels, 1).members(literals, bits, 1, 3)
    state: list[int] = []
    for rule in found:
        rest = [i for i in range(len(literals)) if i not in state]
        state.append(max(rest, key=lambda i: metric("f1", bits[[*state, i]].any(0), labels)))
        assert rule.value == pytest.approx(metric("f1", bits[state].any(0), labels))


def test_exceptions_are_the_best_and_end_where_nothing_is_gained(table: FeatureTable, labels: np.ndarray) -> None:
    base = Found(tuple(plain(FEATURES[:3])), 2)
    held = base.holds(table)
    literals = make_literals(table, [Candidate(f, "max") for f in FEATURES[3:]], 4)
    bits = literal_bits(table, literals)
    found = Search("f1", labels, 1000).exceptions(base, held, literals, bits, 3)
    best_one = max(metric("f1", held & ~row, labels) for row in bits)
    assert found[0].value == pytest.approx(best_one)
    assert all(later.value > earlier.value for earlier, later in pairwise(found))
    assert Search("f1", labels, 4).exceptions(base, labels, literals, bits, 3) == []


def test_a_feature_is_used_with_one_threshold_only(table: FeatureTable, labels: np.ndarray) -> None:
    literals = make_literals(table, [Candidate(f, "max") for f in FEATURES[:3]], 6)
    (*_, largest) = Search("f1", labels, 8).members(literals, literal_bits(table, literals), 1, 10)
    assert len({literal.feature for literal in largest.members}) == len(largest.members) == 3


def test_what_was_found_is_what_its_text_says(table: FeatureTable) -> None:
    literals = make_literals(table, [Candidate(f, a) for f in FEATURES for a in ("max", "mean")], 3)
    generator = np.random.default_rng(2)
    for _ in range(50):
        drawn = [literals[i] for i in generator.choice(len(literals), size=6, replace=False)]
        keys = {literal[:2]: literal for literal in drawn}
        chosen = tuple(keys.values())
        cut = int(generator.integers(1, len(chosen) + 1))
        found = Found(chosen[:cut], int(generator.integers(1, cut + 1)), chosen[cut:])
        rule = compile_rule(to_text(found.tree()))
        np.testing.assert_array_equal(rule.evaluate(table), found.holds(table))


def test_forms_are_told_apart() -> None:
    one, two, three = plain(FEATURES[:3])
    assert Found((one,), 1).form == "or"
    assert Found((one, two), 2).form == "and"
    assert Found((one, two, three), 2).form == "atleast"
    assert Found((one,), 1, (two,)).form == "except"
    assert Found((), 0, (two,)).form == "none"


def config(**changes: object) -> RulesLearnConfig:
    return RulesLearnConfig(  # type: ignore[arg-type]
        **{
            "model": "m", "saes": "s", "data": "d", "label_column": "label", "output": "o.yaml", "search": "beam",
            **changes,
        }
    )  # fmt: skip


def candidates() -> Candidates:
    positive = tuple(Candidate(feature, "max") for feature in FEATURES[:4])
    negative = tuple(Candidate(feature, "max") for feature in FEATURES[4:])
    return Candidates(positive, negative, tuple(FEATURES))


def test_learning_finds_the_planted_rule_and_uses_no_other_text(table: FeatureTable, labels: np.ndarray) -> None:
    train, development = np.arange(NUM) % 3 == 0, np.arange(NUM) % 3 == 1
    learned = learn(table, labels, train, development, candidates(), config())
    assert learned.development > 0.75
    flipped = np.where(train | development, labels, ~labels)
    assert learn(table, flipped, train, development, candidates(), config()) == learned


@pytest.mark.parametrize("form", ["or", "and", "atleast", "except", "none"])
def test_only_the_forms_asked_for_are_searched(table: FeatureTable, labels: np.ndarray, form: str) -> None:
    every = np.ones(NUM, dtype=bool)
    truth = ~(table.values(FEATURES[5], "max") > 0.5) if form == "none" else labels
    found = learn(table, truth, every, every, candidates(), config(form=[form], max_size=4)).found
    assert found.form == form or (form in ("and", "atleast") and len(found.members) == 1)


def test_candidates_that_never_fire_make_no_rule(labels: np.ndarray) -> None:
    silent = FeatureTable(FEATURES, {"max": np.zeros((NUM, len(FEATURES)))})
    every = np.ones(NUM, dtype=bool)
    with pytest.raises(DataError, match="none of the candidates fires in the training texts"):
        learn(silent, labels, every, every, candidates(), config())


def test_published_rules_are_prefixes_chosen_on_development_texts(table: FeatureTable, labels: np.ndarray) -> None:
    every = np.ones(NUM, dtype=bool)
    found = top_by_delta(table, labels, every, FEATURES, "f1")
    assert found is not None
    values = {k: metric("f1", table.matrix("max", FEATURES[:k]).any(1), labels) for k in (1, 2, 5)}
    assert len(found.members) == max(values, key=lambda k: values[k])
    layers = best_of_layers(table, labels, every, FEATURES, "f1")
    assert layers is not None
    assert {literal.feature for literal in layers.members} <= {FeatureId(1, 0), FeatureId(2, 0)}
    assert top_by_delta(table, labels, every, (), "f1") is None


def test_every_fold_is_held_out_and_never_chosen_by() -> None:
    for fold in range(5):
        train, development = parts_of_fold(fold, 5)
        assert sorted([*train, development, fold]) == [0, 1, 2, 3, 4]
