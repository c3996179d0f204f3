"""Settings of `qscope rules`: what does not fit together is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qscope_trl.config.rules import RulesEvaluateConfig, RulesExplainConfig, RulesLearnConfig
from qscope_trl.errors import ConfigError

LEARN: dict[str, Any] = {"model": "m", "saes": "s", "data": "d", "label_column": "y", "output": "o"}
EVALUATE: dict[str, Any] = {"model": "m", "saes": "s", "data": "d", "label_column": "y", "rule": "L1F1"}
EXPLAIN: dict[str, Any] = {"model": "m", "saes": "s", "rule": "L1F1", "text": ["a"]}


@pytest.mark.parametrize(
    ("kind", "base", "changes", "message"),
    [
        (RulesLearnConfig, LEARN, {"positive": "p"}, "Give the texts in exactly one way"),
        (RulesLearnConfig, LEARN, {"data": None, "label_column": None, "positive": "p"}, "in exactly one way"),
        (RulesLearnConfig, LEARN, {"label_column": None}, "`--data` and `--label-column` come together"),
        (RulesLearnConfig, LEARN, {"max_rows": 1}, "max_rows"),
        (RulesLearnConfig, LEARN, {"folds": 2}, "folds"),
        (RulesLearnConfig, LEARN, {"random_draws": -1}, "random_draws"),
        (RulesLearnConfig, LEARN, {"metric": "f3"}, "metric"),
        (RulesLearnConfig, LEARN, {"search": "wide"}, "search"),
        (RulesLearnConfig, LEARN, {"form": ["xor"]}, "form"),
        (RulesLearnConfig, LEARN, {"aggregation": ["sum"]}, "aggregation"),
        (RulesLearnConfig, LEARN, {"test_share": 1.0}, "`test_share` is 1.0; it is a share between 0 and 1"),
        (RulesLearnConfig, LEARN, {"test_split": "x"}, "`--test-split` is a split of `--test-data`"),
        (RulesLearnConfig, LEARN, {"store": "x", "test_data": "t"}, "it does not go with `--test-data`"),
        (
            RulesLearnConfig,
            {**LEARN, "data": None, "label_column": None, "positive": "p", "negative": "n"},
            {"test_data": "t"},
            "`--test-data` has the columns of `--data`",
        ),
        (
            RulesLearnConfig,
            {**LEARN, "data": None, "label_column": None, "positive": "p", "negative": "n"},
            {"group_column": "g"},
            "`--group-column` is a column of `--data`",
        ),
        (RulesEvaluateConfig, EVALUATE, {"fit_split": "x"}, "`--fit-split` is a split of `--fit-data`"),
        (RulesEvaluateConfig, EVALUATE, {"fit_split": "x", "layers": "1"}, "`--fit-split` is a split of"),
        (RulesEvaluateConfig, EVALUATE, {"layers": "one"}, "layers"),
        (RulesEvaluateConfig, EVALUATE, {"max_fit_rows": 9}, "`--max-fit-rows` is of `--fit-data`"),
        (RulesEvaluateConfig, {**EVALUATE, "fit_data": "f"}, {"max_fit_rows": 1}, "max_fit_rows"),
        (
            RulesEvaluateConfig,
            {**EVALUATE, "data": None, "label_column": None, "positive": "p", "negative": "n"},
            {"store": "x"},
            "`--store` is of one data set, `--data`; it does not go with `--positive`",
        ),
        (
            RulesEvaluateConfig,
            {**EVALUATE, "data": None, "label_column": None, "positive": "p", "negative": "n"},
            {"fit_data": "t"},
            "`--fit-data` has the columns of `--data`",
        ),
        (RulesExplainConfig, EXPLAIN, {"data": "d"}, "Give texts in one way"),
        (RulesExplainConfig, EXPLAIN, {"text": [], "data": "d", "rows": "4-1"}, "which names no row"),
        (RulesExplainConfig, EXPLAIN, {"text": [], "data": "d", "rows": "a"}, "write it as `3,17` or `0-4`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    kind: Callable[..., Any], base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    kind(**base)
    with pytest.raises(ConfigError, match=message):
        kind(**{**base, **changes})


def test_chosen_rows_are_each_once_and_ascending() -> None:
    assert RulesExplainConfig(**{**EXPLAIN, "rows": "5, 1-3,2"}).chosen_rows == (1, 2, 3, 5)
