"""Which rows of a group stay: exact counts, keys from content, reasons in words."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.analysis.curation.choosing import (
    Shortage,
    by_key,
    content_key,
    cut_to_quotas,
    cut_to_smallest,
    groups_by_tags,
    groups_by_values,
    nearest_rows,
    value_name,
)
from qscope_trl.analysis.curation.steps import in_words
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.rules import compile_rule


class Image:
    """Stands for one, as `datasets` decodes columns of images."""


LANGUAGES = ["en", "zh", "en", "de", "en", "zh", "en", "zh", "en"]
# Lowest first: rows 8, 7, ..., 0.
KEYS = np.arange(9, 0, -1).astype(np.uint64)


def test_keys_come_from_content_and_seed() -> None:
    row = {"text": "a", "n": 1, "nested": {"x": [1, None], "y": b"z"}}
    assert content_key(row, 0) == content_key(dict(reversed(row.items())), 0)
    others = [content_key({**row, "n": 2}, 0), content_key(row, 1), content_key({**row, "m": None}, 0)]
    assert len({content_key(row, 0), *others}) == 4
    content_key({"text": "\ud800"}, 0)  # half a surrogate pair
    assert 0 <= content_key(row, 0) < 2**64
    when = datetime(2024, 2, 3, 4, 5, 6)
    assert content_key({"when": when}, 0) != content_key({"when": when.replace(second=7)}, 0)


def test_values_that_have_no_text_of_their_own_are_refused() -> None:
    with pytest.raises(DataError, match="a value of the type `Image`, which cannot be compared and written"):
        content_key({"picture": Image()}, 0)


def test_equal_keys_keep_the_earlier_row() -> None:
    assert by_key(np.array([0, 1, 2, 3]), np.array([7, 5, 7, 5], dtype=np.uint64)).tolist() == [1, 3, 0, 2]


def test_quotas_keep_the_lowest_keys_and_name_what_is_short() -> None:
    groups = groups_by_values([LANGUAGES], 9)
    cuts, short = cut_to_quotas(groups, np.arange(9), KEYS, {"en": 2, "*": 3})
    assert [(cut.group, cut.rows.tolist(), cut.quota, cut.had) for cut in cuts] == [("en", [0, 2, 4], 2, 5)]
    assert short == [Shortage("de", 3, 1)]


def test_quotas_count_the_rows_that_are_left() -> None:
    groups = groups_by_values([LANGUAGES], 9)
    cuts, short = cut_to_quotas(groups, np.array([0, 1, 2, 4]), KEYS, {"en": 2, "zh": 1, "de": 0})
    assert [(cut.group, cut.rows.tolist()) for cut in cuts] == [("en", [0])]
    assert short == []


def test_a_smaller_quota_keeps_a_part_of_a_larger_one() -> None:
    groups = groups_by_values([LANGUAGES], 9)
    keys = np.random.default_rng(0).integers(2**63, size=9).astype(np.uint64)
    kept = []
    for quota in range(6):
        cuts, _ = cut_to_quotas(groups, np.arange(9), keys, {"en": quota})
        gone = {row for cut in cuts for row in cut.rows.tolist()}
        kept.append({row for row in range(9) if LANGUAGES[row] == "en"} - gone)
    assert [len(rows) for rows in kept] == [0, 1, 2, 3, 4, 5]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(kept))


def test_balance_cuts_to_the_smallest_group_that_has_rows() -> None:
    groups = groups_by_values([LANGUAGES, [True, False] * 4 + [True]], 9)
    assert sorted(groups.names) == ["de/false", "en/true", "zh/false"]
    cuts = cut_to_smallest(groups, np.array([0, 1, 2, 4, 5]), KEYS)  # none of `de/false` is left
    assert [(cut.group, cut.rows.tolist(), cut.quota, cut.had) for cut in cuts] == [("en/true", [0], 2, 3)]
    assert cut_to_smallest(groups, np.array([], dtype=np.int64), KEYS) == []


def test_a_row_belongs_to_its_first_tag() -> None:
    groups = groups_by_tags({"a": np.array([True, True, False, False]), "b": np.array([True, False, True, False])})
    assert groups.of.tolist() == [0, 0, 1, -1]


def test_the_nearest_stay_and_ties_go_by_key() -> None:
    similarity = np.array([0.5, 0.9, 0.5, 0.1, 0.5])
    keys = np.array([3, 9, 1, 0, 2], dtype=np.uint64)
    assert nearest_rows(similarity, np.arange(5), keys, 3).tolist() == [0, 3]
    assert nearest_rows(similarity, np.array([0, 3, 4]), keys, 1).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("value", "name"),
    [("zh", "zh"), (True, "true"), (np.bool_(False), "false"), (3, "3"), (None, "null"), (0.5, "0.5")],
)
def test_values_are_named_as_in_json(value: Any, name: str) -> None:
    assert value_name(value) == name


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("L1F1 > 2", "L1F1 > 2 holds at 3"),
        ("not L1F1 > 2", "L1F1 > 2 holds at 3"),
        ("L1F1 > 2 and L1F2", "does not hold: L1F2 does not hold at 0 (quiet)"),
        ("L1F1 > 9 or L1F2 or L1F3", "holds: L1F3 holds at 1.5"),
        # What decides is that L1F2 is silent, not that L1F1 fires.
        ("(L1F1 and L1F2 > 1) or not L1F2", "holds: L1F2 does not hold at 0 (quiet)"),
        ("atleast(2, L1: 1, 2, 3)", "holds: L1F1 holds at 3; L1F3 holds at 1.5"),
        ("any(L1: 4, 5, 6, 7, 8, 9, 10)", None),
    ],
)
def test_reasons_name_the_comparisons_that_decided(rule: str, words: str | None) -> None:
    features = tuple(FeatureId(1, index) for index in range(1, 11))
    values = np.array([[3, 0, 1.5, 0, 0, 0, 0, 0, 0, 0]])
    table = FeatureTable(features, {"max": values})
    labelled = FeatureSet.from_dict({"features": [{"layer": 1, "index": 2, "label": "quiet"}]})
    found = in_words(replace(compile_rule(rule), sets={"s": labelled}).explain(table, 0))
    if words is None:
        silent = [f"L1F{index} does not hold at 0" for index in range(4, 9)]
        assert found == f"does not hold: {'; '.join(silent)}; and 2 more"
    else:
        assert found == words
