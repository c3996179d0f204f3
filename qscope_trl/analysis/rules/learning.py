"""Learning a rule: candidates and search on the training part, size and form and thresholds by the development part.

Larger rules fit better what they were found on and often worse what comes after, so how large a rule may be is never
decided on the texts it was searched on. The whole procedure is also run with each fold held out, which says how good
its rules are on average; the test is for the one rule that is kept.

References:
    Rules by `or` over the features that differ most in firing rate: Qwen-Scope, arXiv:2605.11887, section 5.
    Deviation: there K and a threshold of 0 are fixed; here both are chosen on a development split, beside other forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.analysis.rules.metrics import metric
from qscope_trl.analysis.rules.search import Found, Literal, Search, literal_bits, make_literals
from qscope_trl.analysis.rules.statistics import Candidates
from qscope_trl.config.rules import RulesLearnConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId

Bits = NDArray[np.bool_]

TOP_K = (1, 2, 5, 10)
"""Sizes of the published rules."""


@dataclass(frozen=True)
class Learned:
    """A rule, and what chose it.

    Args:
        found: The rule.
        train: The metric on the texts it was searched on.
        development: The metric on those it was chosen by.
        tried: How many rules it was chosen from.
    """

    found: Found
    train: float
    development: float
    tried: int


def parts_of_fold(fold: int, folds: int) -> tuple[tuple[int, ...], int]:
    """Training slices and development slice if slice `fold` is held out."""
    development = (fold + 1) % folds
    return tuple(s for s in range(folds) if s not in (fold, development)), development


def learn(
    table: FeatureTable, labels: Bits, train: Bits, development: Bits, candidates: Candidates, config: RulesLearnConfig
) -> Learned:
    """Search on the training texts, choose on the development texts.

    Of rules that are equally good there, the one with fewest comparisons is kept, then the one that is better on the
    training texts.

    Args:
        table: Values of the candidates, by text.
        labels: Whether each text is positive.
        train: Texts to search on.
        development: Texts to choose by; none of them is searched on.
        candidates: What is tried, chosen on the training texts.
        config: Forms, sizes, metric and search.

    Raises:
        DataError: If no rule can be made of the candidates.
    """
    inside = table.take(train)
    search = Search(config.metric, labels[train], config.width)
    rules: dict[Found, None] = {}
    # Every feature by whether it fires, and by thresholds: which of them carries over is decided below.
    for num_thresholds in dict.fromkeys((0, config.thresholds)):
        rules.update(dict.fromkeys(_search(inside, search, candidates, num_thresholds, config)))
    if not rules:
        raise DataError(
            f"No rule of the forms {', '.join(config.all_forms)} can be made: none of the candidates fires in the "
            f"training texts, or none helps. Try other layers or forms."
        )
    outside, truth = table.take(development), labels[development]
    scored = [(metric(config.metric, rule.holds(outside), truth), rule) for rule in rules]
    value, best = max(scored, key=lambda pair: (pair[0], -pair[1].size, pair[1].value))
    return Learned(best, best.value, value, len(scored))


def _search(
    table: FeatureTable, search: Search, candidates: Candidates, num_thresholds: int, config: RulesLearnConfig
) -> list[Found]:
    forms = config.all_forms
    positive = make_literals(table, candidates.positive, num_thresholds)
    negative = make_literals(table, candidates.negative, num_thresholds)
    positive_bits, negative_bits = literal_bits(table, positive), literal_bits(table, negative)
    counts = {"or": [1], "except": [1], "atleast": range(2, config.max_count + 1), "and": [config.max_size]}
    wanted = dict.fromkeys(count for form in forms for count in counts.get(form, ()))
    bases: list[Found] = []
    for count in wanted if positive else ():
        bases += search.members(positive, positive_bits, count, config.max_size)
    rules = [rule for rule in bases if rule.form in forms]
    if not negative:
        return rules
    everything = np.ones(table.num_documents, dtype=bool)
    if "none" in forms:
        rules += search.exceptions(Found((), 0), everything, negative, negative_bits, config.max_exceptions)
    if "except" in forms:
        for base in bases:
            held = base.holds(table)
            rules += search.exceptions(base, held, negative, negative_bits, config.max_exceptions)
    return rules


def top_by_delta(
    table: FeatureTable, labels: Bits, development: Bits, order: Sequence[FeatureId], metric_name: str
) -> Found | None:
    """The published rule: `any` of the K features that differ most in firing rate; K by the development texts.

    Args:
        table: Values of the features, by text.
        labels: Whether each text is positive.
        development: Texts to choose K by.
        order: Features by that difference on the training texts, largest first.
        metric_name: The metric.
    """
    return _best_prefix(table, labels, development, order, TOP_K, metric_name)


def best_of_layers(
    table: FeatureTable, labels: Bits, development: Bits, order: Sequence[FeatureId], metric_name: str
) -> Found | None:
    """The published rule over layers: `any` of the best feature of each of the m best layers; m by development.

    Args: As `top_by_delta`.
    """
    firsts: dict[int, FeatureId] = {}
    for feature in order:
        firsts.setdefault(feature.layer, feature)
    sizes = range(1, len(firsts) + 1)
    return _best_prefix(table, labels, development, list(firsts.values()), sizes, metric_name)


def _best_prefix(
    table: FeatureTable,
    labels: Bits,
    development: Bits,
    order: Sequence[FeatureId],
    sizes: Sequence[int],
    metric_name: str,
) -> Found | None:
    outside, truth = table.take(development), labels[development]
    rules = [Found(tuple(Literal(f, "max", 0.0) for f in order[:k]), 1) for k in sizes if k <= len(order)]
    scored = [(metric(metric_name, rule.holds(outside), truth), rule) for rule in rules]
    return max(scored, key=lambda pair: (pair[0], -pair[1].size))[1] if scored else None
