"""Finding rules: growing sets of comparisons by greedy or beam search so that a metric is as large as possible.

All rules searched are of one shape, "at least k of these hold, and none of those": `or` is k = 1, `and` is k = all.
What a further comparison would bring is counted for all of them at once, by one matrix product. Left out: choosing
among the found rules; that is done on other texts than these.

Shape legend: `L` literals (comparisons that may be used), `N` texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.analysis.rules.metrics import metric_of
from qscope_trl.analysis.rules.statistics import Candidate
from qscope_trl.features import FeatureId
from qscope_trl.rules.tree import And, Comparison, Group, Node, Not, Term

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]
Keys = NDArray[np.int64]

_DIGITS = 4


class Literal(NamedTuple):
    """A comparison that a rule may use: the aggregated activation above a threshold."""

    feature: FeatureId
    aggregation: str
    threshold: float

    def comparison(self) -> Comparison:
        """As part of a rule."""
        return Comparison(Term((self.feature,), self.aggregation), ">", self.threshold)


@dataclass(frozen=True)
class Found:
    """At least `count` of `members` hold, and none of `exceptions`. Without members, only the latter.

    Args:
        members: What speaks for the label.
        count: How many must hold; 0 without members.
        exceptions: What speaks against it.
        value: The metric on the texts it was found on.
    """

    members: tuple[Literal, ...]
    count: int
    exceptions: tuple[Literal, ...] = ()
    value: float = 0.0

    @property
    def size(self) -> int:
        """Number of comparisons."""
        return len(self.members) + len(self.exceptions)

    @property
    def form(self) -> str:
        """Its name among `config.rules.FORMS`."""
        if not self.members:
            return "none"
        if self.exceptions:
            return "except"
        if len(self.members) == 1 or self.count == 1:
            return "or"
        return "and" if self.count == len(self.members) else "atleast"

    def tree(self) -> Node:
        """The rule as a tree; comparisons ordered by aggregation, threshold and feature, so that its text is short."""
        parts = []
        if self.members:
            parts.append(_group(self.members, self.count))
        if self.exceptions:
            parts.append(Not(_group(self.exceptions, 1)))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def holds(self, table: FeatureTable) -> Bits:
        """Where it holds, by the texts of a table."""
        held = np.ones(table.num_documents, dtype=bool)
        if self.members:
            held &= literal_bits(table, self.members).sum(0) >= self.count
        if self.exceptions:
            held &= ~literal_bits(table, self.exceptions).any(0)
        return held


def _group(literals: Sequence[Literal], count: int) -> Node:
    ordered = sorted(literals, key=lambda literal: (literal.aggregation, literal.threshold, literal.feature))
    comparisons = tuple(literal.comparison() for literal in ordered)
    if len(comparisons) == 1:
        return comparisons[0]
    if count == 1:
        return Group("any", comparisons)
    return Group("all", comparisons) if count == len(comparisons) else Group("atleast", comparisons, count)


def make_literals(table: FeatureTable, candidates: Sequence[Candidate], num_thresholds: int) -> tuple[Literal, ...]:
    """The comparisons that are tried: every candidate above 0, and above quantiles of its values where it fires.

    Thresholds are rounded down to four digits first, so that a rule's text is what was searched.

    Args:
        table: Values of the texts that are searched on.
        candidates: Features and aggregations, best first.
        num_thresholds: How many quantiles.
    """
    found: dict[Literal, None] = {}
    for feature, aggregation in candidates:
        values = table.values(feature, aggregation)
        firing = values[values > 0]
        if not firing.size:
            continue
        levels = np.arange(1, num_thresholds + 1) / (num_thresholds + 1)
        thresholds = [0.0, *(_rounded_down(float(value)) for value in np.quantile(firing, levels))]
        for threshold in thresholds:
            if (values > threshold).any():
                found[Literal(feature, aggregation, threshold)] = None
    return tuple(found)


def _rounded_down(value: float) -> float:
    """Rounded towards zero to some significant digits."""
    digits = _DIGITS - 1 - int(np.floor(np.log10(value)))
    scale = 10.0**digits
    return float(np.floor(value * scale)) / scale


def literal_bits(table: FeatureTable, literals: Sequence[Literal]) -> Bits:
    """Where each literal holds, `(L, N)`."""
    columns: dict[tuple[FeatureId, str], Floats] = {}
    bits = np.zeros((len(literals), table.num_documents), dtype=bool)
    for row, (feature, aggregation, threshold) in enumerate(literals):
        if (feature, aggregation) not in columns:
            columns[feature, aggregation] = table.values(feature, aggregation)
        bits[row] = columns[feature, aggregation] > threshold
    return bits


def _keys(literals: Sequence[Literal]) -> Keys:
    """A number per literal; those of one feature in one aggregation have the same."""
    numbers: dict[tuple[FeatureId, str], int] = {}
    return np.array([numbers.setdefault(literal[:2], len(numbers)) for literal in literals], dtype=np.int64)


class Search:
    """Grows rules on some texts.

    Args:
        metric: One of `config.rules.METRICS`.
        labels: Whether each text is positive, `(N,)`.
        width: How many ways are followed; 1 is greedy search.
    """

    def __init__(self, metric: str, labels: Bits, width: int) -> None:
        self.metric, self.labels, self.width = metric, labels, width
        self._classes = np.stack([labels, ~labels]).astype(np.float32)
        self._sizes = (float(labels.sum()), float((~labels).sum()))

    def members(self, literals: Sequence[Literal], bits: Bits, count: int, max_size: int) -> list[Found]:
        """The best rule found of each size: at least `count` of its comparisons hold, or all while they are fewer.

        A feature is used once in an aggregation, with one of its thresholds.

        Args:
            literals: What may be used, best first.
            bits: Where each holds, `(L, N)`.
            count: The k of "k of n".
            max_size: Largest n.
        """
        keys, weights = _keys(literals), bits.astype(np.float32)
        beam: list[tuple[int, ...]] = [()]
        found = []
        for size in range(1, max_size + 1):
            need = min(count, size)
            held = [bits[list(state)].sum(0, dtype=np.int16) for state in beam]
            # With one more comparison, what holds already stays, and what lacks one more may come in.
            sure = np.stack([h >= need for h in held]).astype(np.float32)
            edge = np.stack([h == need - 1 for h in held]).astype(np.float32)
            hits, alarms = (weights @ (edge * own).T + (sure * own).sum(1) for own in self._classes)
            beam = self._best(keys, beam, metric_of(self.metric, hits, alarms, *self._sizes))
            if not beam:
                break
            found.append(self._found([literals[i] for i in beam[0]], need, [], bits[list(beam[0])].sum(0) >= need))
        return found

    def exceptions(self, base: Found, held: Bits, literals: Sequence[Literal], bits: Bits, most: int) -> list[Found]:
        """The best ways to leave out texts from a rule, by number of exceptions; ends where nothing is gained.

        Args:
            base: The rule, which may be empty: then it holds everywhere.
            held: Where it holds, `(N,)`.
            literals: What may be an exception, best first.
            bits: Where each holds, `(L, N)`.
            most: Largest number of exceptions.
        """
        keys, weights = _keys(literals), bits.astype(np.float32)
        beam: list[tuple[int, ...]] = [()]
        found = []
        best = self._value(held)
        for _ in range(most):
            left = np.stack([held & ~bits[list(state)].any(0) for state in beam]).astype(np.float32)
            hits, alarms = ((left * own).sum(1) - weights @ (left * own).T for own in self._classes)
            beam = self._best(keys, beam, metric_of(self.metric, hits, alarms, *self._sizes))
            if not beam:
                break
            state = list(beam[0])
            now = held & ~bits[state].any(0)
            if self._value(now) <= best:
                break
            best = self._value(now)
            found.append(self._found(base.members, base.count, [literals[i] for i in state], now))
        return found

    def _best(self, keys: Keys, beam: list[tuple[int, ...]], values: Floats) -> list[tuple[int, ...]]:
        """The best extensions, each set of comparisons once; `values` is `(L, states)`."""
        values = values.copy()
        for column, state in enumerate(beam):
            values[np.isin(keys, keys[list(state)]), column] = -np.inf
        # By value, then by the order of the literals: the same in every run.
        order = np.argsort(-values, axis=None, kind="stable")
        chosen: dict[tuple[int, ...], None] = {}
        for flat in order:
            row, column = divmod(int(flat), len(beam))
            if values[row, column] == -np.inf or len(chosen) == self.width:
                break
            chosen[tuple(sorted((*beam[column], row)))] = None
        return list(chosen)

    def _value(self, held: Bits) -> float:
        hits, alarms = float((held & self.labels).sum()), float((held & ~self.labels).sum())
        return float(metric_of(self.metric, hits, alarms, *self._sizes))

    def _found(self, members: Sequence[Literal], count: int, exceptions: Sequence[Literal], held: Bits) -> Found:
        return Found(tuple(members), count, tuple(exceptions), self._value(held))
