"""A rule beside what it is to be compared with, all on the same texts and by the same steps.

Everything that is fitted is fitted on the training texts; thresholds, layers and probability curves are chosen on the
development texts; figures are of the test texts. Left out: baselines that read the text by hand-written patterns,
which depend on the behaviour; `Judge.by_score` takes their scores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.analysis.probes import DifferenceOfMeansProbe, LogisticProbe, has_scikit_learn, keyword_scores
from qscope_trl.analysis.rules.evaluation import Figures, PlattScaling, figures
from qscope_trl.analysis.rules.learning import learn
from qscope_trl.analysis.rules.metrics import best_threshold, metric
from qscope_trl.analysis.rules.search import Found
from qscope_trl.analysis.rules.statistics import Candidate, Candidates
from qscope_trl.config.rules import RulesLearnConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.rules import Rule
from qscope_trl.rules.tree import to_text

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]

_PROBE_C = (0.001, 0.01, 0.1, 1.0)
_SHOWN = ("precision", "recall", "f1", "auroc", "average_precision")


@dataclass(frozen=True)
class Entry:
    """A classifier and what it reaches.

    Args:
        name: What it is called in tables.
        runs: Its figures; several if it was drawn at random several times.
        metric: The metric that was made large, mean over the runs.
        note: What the development texts chose, such as a layer.
    """

    name: str
    runs: tuple[Figures, ...]
    metric: float
    note: str = ""

    def mean(self, name: str) -> float:
        """Mean of a figure over the runs."""
        return statistics.fmean(getattr(run, name) for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {
            "name": self.name,
            "note": self.note,
            "metric": self.metric,
            "runs": [run.to_dict() for run in self.runs],
        }

    def summary(self) -> dict[str, float]:
        """The main figures, for evidence in a rule file."""
        return {name: round(self.mean(name), 4) for name in _SHOWN if self.mean(name) == self.mean(name)}


def rule_of(found: Found) -> Rule:
    """A found rule as one that can be evaluated, explained and saved."""
    tree = found.tree()
    return Rule(tree=tree, text=to_text(tree))


@dataclass(frozen=True)
class Judge:
    """Judges classifiers on the same test texts.

    Args:
        labels: Whether each text is positive, all texts.
        test: Which texts are judged on.
        groups: What must not be parted, by text.
        metric: What thresholds make as large as possible.
        train: Texts to fit on; None if nothing is fitted.
        development: Texts to choose thresholds and probability curves on.
        seed: Decides folds and bootstrap samples.
    """

    labels: Bits
    test: Bits
    groups: Sequence[str]
    metric: str
    train: Bits | None = None
    development: Bits | None = None
    seed: int = 0

    def by_rule(self, name: str, rule: Rule, table: FeatureTable, note: str = "") -> Entry:
        """Judge a rule by what it decides, and rank texts by its margin."""
        decisions: Bits = rule.evaluate(table)
        return self._entry(name, rule.score(table), decisions, note)

    def by_score(self, name: str, scores: Floats, note: str = "") -> Entry:
        """Judge a score; the development texts choose the threshold."""
        if self.development is None:
            raise DataError(f"`{name}` has no threshold of its own and there are no development texts to choose one.")
        threshold = best_threshold(self.metric, scores[self.development], self.labels[self.development])
        return self._entry(name, scores, scores > threshold, note)

    def _entry(self, name: str, scores: Floats, decisions: Bits, note: str) -> Entry:
        probabilities = None
        if self.development is not None:
            curve = PlattScaling(scores[self.development], self.labels[self.development])
            probabilities = curve(scores[self.test])
        found = figures(
            scores[self.test],
            decisions[self.test],
            self.labels[self.test],
            probabilities=probabilities,
            groups=[group for group, inside in zip(self.groups, self.test, strict=True) if inside],
            seed=self.seed,
        )
        value = metric(self.metric, decisions[self.test], self.labels[self.test])
        return Entry(name, (found,), value, note)


def probe_entries(judge: Judge, residuals: Mapping[int, Tensor]) -> list[Entry]:
    """Probes on the raw residual, each at the layer where it ranks the development texts best.

    Args:
        judge: What judges them.
        residuals: Mean residual of every text, by layer.
    """

    def difference(x: Tensor, labels: Bits) -> Any:
        return DifferenceOfMeansProbe().fit(x, labels)

    def logistic(x: Tensor, labels: Bits) -> Any:
        return LogisticProbe(_PROBE_C, seed=judge.seed).fit(x, labels)

    kinds: list[tuple[str, Callable[[Tensor, Bits], Any]]] = [("difference of means", difference)]
    if has_scikit_learn():
        kinds.append(("logistic probe", logistic))
    return [_best_layer(judge, residuals, name, fit) for name, fit in kinds]


def _best_layer(judge: Judge, residuals: Mapping[int, Tensor], name: str, fit: Callable[[Tensor, Bits], Any]) -> Entry:
    train, development = fitting_parts(judge)
    scores: dict[int, Floats] = {
        layer: fit(x[train], judge.labels[train]).score(x) for layer, x in sorted(residuals.items())
    }
    truth = judge.labels[development]
    auroc = {
        layer: figures(found[development], found[development] > 0, truth, resamples=0).auroc
        for layer, found in scores.items()
    }
    # Of equal ones the first layer.
    best = max(auroc, key=lambda layer: auroc[layer])
    return judge.by_score(name, scores[best], f"layer {best}")


def keyword_entry(judge: Judge, texts: Sequence[str]) -> Entry:
    """What the words alone tell."""
    train, _ = fitting_parts(judge)
    rest = np.flatnonzero(~train)
    scores = np.zeros(len(texts))
    scores[rest] = keyword_scores(
        [texts[i] for i in np.flatnonzero(train).tolist()], judge.labels[train], [texts[i] for i in rest.tolist()]
    )
    return judge.by_score("words", scores)


def bits_entry(judge: Judge, table: FeatureTable, features: Sequence[FeatureId]) -> Entry:
    """Logistic regression on whether each feature of the rule fires: the same evidence, weighed freely."""
    train, _ = fitting_parts(judge)
    fires = (table.matrix("max", features) > 0).astype(np.float64)
    probe = LogisticProbe((0.01, 0.1, 1.0, 10.0), seed=judge.seed).fit(fires[train], judge.labels[train])
    return judge.by_score("logistic on the rule's features", probe.score(fires))


def random_entry(
    judge: Judge,
    table: FeatureTable,
    rule: Rule,
    draws: Sequence[Mapping[FeatureId, FeatureId]],
    config: RulesLearnConfig,
) -> Entry | None:
    """Rules of as many random features, with form and thresholds searched as the rule's own were.

    Args:
        judge: What judges them.
        table: Values that include the drawn features.
        rule: The rule to match.
        draws: By draw, another feature for each one of the rule.
        config: Settings of the search.

    Returns:
        The mean over the draws that fire at all; None if there is none.
    """
    size = max(1, len(rule.needs))
    limits = replace(config, max_size=size, max_count=max(2, min(config.max_count, size)), max_exceptions=size)
    matched = [[Candidate(draw[f], a) for f, a in sorted(rule.needs) if f in draw] for draw in draws]
    return _random("random features, as many", judge, table, matched, limits)


def random_search_entry(
    judge: Judge,
    table: FeatureTable,
    candidates: Candidates,
    draws: Sequence[Mapping[FeatureId, FeatureId]],
    config: RulesLearnConfig,
) -> Entry | None:
    """The same search over as many random candidates: what searching alone brings. Arguments as `random_entry`."""
    tried = dict.fromkeys((*candidates.positive, *candidates.negative))
    matched = [[Candidate(draw[c.feature], c.aggregation) for c in tried if c.feature in draw] for draw in draws]
    return _random("random features, same search", judge, table, matched, config)


def _random(
    name: str, judge: Judge, table: FeatureTable, matched: Sequence[list[Candidate]], config: RulesLearnConfig
) -> Entry | None:
    train, development = fitting_parts(judge)
    entries = []
    for drawn in matched:
        # Which of them speak for the label is not known, so each may be used either way.
        both = Candidates(tuple(drawn), tuple(drawn), ())
        try:
            found = learn(table, judge.labels, train, development, both, config).found
        except DataError:
            continue
        entries.append(judge.by_rule(name, rule_of(found), table))
    if not entries:
        return None
    note = f"mean of {len(entries)} draws" if len(entries) > 1 else ""
    runs = tuple(run for entry in entries for run in entry.runs)
    return Entry(name, runs, statistics.fmean(entry.metric for entry in entries), note)


def fitting_parts(judge: Judge) -> tuple[Bits, Bits]:
    """Training and development texts; refused if there are none."""
    if judge.train is None or judge.development is None:
        raise DataError("There are no texts to fit baselines on.")
    return judge.train, judge.development
