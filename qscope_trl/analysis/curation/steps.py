"""The steps of curation, one after another: which rows leave, at which step, and why.

The order is fixed: `keep`, `drop`, `exclude_near`, `deduplicate`, `nearest`, `quota` (or `balance`), `max_rows`. What
is unwanted leaves first, then what is there twice; what counts rows comes last, so that it counts rows that stay.
A row leaves once, so every row has one reason at most. Nothing here reads or writes files but the references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.analysis.curation.choosing import (
    Cut,
    Groups,
    Shortage,
    by_key,
    cut_to_quotas,
    cut_to_smallest,
    groups_by_tags,
    groups_by_values,
    nearest_rows,
    refuse_shortages,
)
from qscope_trl.analysis.curation.equal import TextKeys, part_copies, with_copies, with_equal
from qscope_trl.analysis.curation.features import Features
from qscope_trl.analysis.curation.leaders import near_duplicates
from qscope_trl.analysis.curation.references import near_references, similarity_to
from qscope_trl.analysis.curation.rows import RowFacts
from qscope_trl.analysis.curation.sets import (
    ActiveSets,
    FloatArray,
    IntArray,
    Nearness,
    inverse_document_frequency,
)
from qscope_trl.config.curate import CurateConfig
from qscope_trl.rules import Explanation, Rule

# Rows explained at once, and comparisons shown of one.
_EXPLAINED = 256
_MOST_LEAVES = 5

Reference = Callable[[str], ActiveSets]
"""The active features of a dataset or store that others are compared with."""

ReferenceTexts = Callable[[str], TextKeys | None]
"""Hashes of its texts; `None` for a store, which holds none."""


class Rules(NamedTuple):
    """The rules of the settings, compiled."""

    tags: dict[str, Rule]
    scores: dict[str, Rule]
    keep: list[Rule]
    drop: list[Rule]

    def all(self) -> list[Rule]:
        """Every rule."""
        return [*self.tags.values(), *self.scores.values(), *self.keep, *self.drop]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Rows that leave at one step.

    Args:
        step: Name of the step.
        setting: The setting that asks for it, as on the command line.
        rows: The rows.
        rule: The rule that decided.
        holds: Whether it holds for the rows that leave.
        other: For each row the one it is near.
        other_source: Where that one is; `None`: in the data itself.
        similarity: How near.
        note: The same words for all.
    """

    step: str
    setting: str
    rows: IntArray
    rule: Rule | None = None
    holds: bool = True
    other: IntArray | None = None
    other_source: str | None = None
    similarity: FloatArray | None = None
    note: str = ""

    def reasons(self, table: FeatureTable | None) -> Iterator[str]:
        """Why each row leaves, in words."""
        if self.rule is not None and table is not None:
            for start in range(0, self.rows.size, _EXPLAINED):
                some = table.take(self.rows[start : start + _EXPLAINED])
                for place in range(some.num_documents):
                    yield in_words(self.rule.explain(some, place))
        elif self.other is not None and self.similarity is not None:
            where = f" of {self.other_source}" if self.other_source else ""
            for other, similarity in zip(self.other.tolist(), self.similarity.tolist(), strict=True):
                yield f"{self.note} {similarity:.3f} with row {other}{where}"
        elif self.similarity is not None:
            for similarity in self.similarity.tolist():
                yield f"{self.note} {similarity:.3f}"
        else:
            yield from (self.note for _ in range(self.rows.size))


@dataclass(kw_only=True)
class Decision:
    """What the steps decided.

    Args:
        left: Whether each row stays.
        removals: What leaves, in the order of the steps.
        shortages: Groups with fewer rows than asked for.
        columns: Columns to add, a value for every row: tags, scores, what `nearest` and `deduplicate` found.
    """

    left: NDArray[np.bool_]
    removals: list[Removal] = field(default_factory=list)
    shortages: list[Shortage] = field(default_factory=list)
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def rows(self) -> IntArray:
        """Rows that stay, ascending."""
        return np.flatnonzero(self.left)

    def remove(self, removal: Removal) -> None:
        """Let rows leave; those that left before stay with their first reason."""
        self.left[removal.rows] = False
        self.removals.append(removal)


def added_columns(config: CurateConfig) -> list[str]:
    """Names of the columns that will be added."""
    return [*config.own_columns, *config.tags, *config.scores]


def decide(
    config: CurateConfig,
    rules: Rules,
    facts: RowFacts,
    features: Features,
    reference: Reference,
    reference_texts: ReferenceTexts,
    *,
    show_progress: bool = True,
) -> Decision:
    """Take the steps.

    Args:
        config: The settings.
        rules: Their rules.
        facts: What is known of the rows.
        features: Their features.
        reference: Gives the active features of another dataset.
        reference_texts: Gives the hashes of its texts.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        ConfigError: If a quota names no group.
        DataError: If a quota cannot be met and `allow_fewer` is off.
    """
    decision = Decision(left=np.ones(facts.num_rows, dtype=bool))
    decision.columns[f"{config.prefix}row"] = np.arange(facts.num_rows)
    table = features.table
    if table is not None:
        for name, rule in rules.tags.items():
            decision.columns[name] = rule.evaluate(table)
        for name, rule in rules.scores.items():
            decision.columns[name] = rule.score(table)
        _filter(decision, rules, table)
    if features.sets is not None:
        _compare(config, decision, facts, features, reference, reference_texts, show_progress)
    _count(config, decision, facts)
    return decision


def in_words(explanation: Explanation) -> str:
    """An explanation on one line: the comparisons that decided, with their values."""
    leaves = list(explanation.leaves())
    outcome = "" if len(leaves) == 1 else f"{'holds' if explanation.holds else 'does not hold'}: "
    deciding = list(_deciding(explanation))
    shown = [
        f"{leaf.text} {'holds' if leaf.holds else 'does not hold'}"
        + ("" if leaf.value is None else f" at {leaf.value:.4g}")
        + (f" ({leaf.label})" if leaf.label else "")
        for leaf in deciding[:_MOST_LEAVES]
    ]
    more = f"; and {len(deciding) - _MOST_LEAVES} more" if len(deciding) > _MOST_LEAVES else ""
    return f"{outcome}{'; '.join(shown)}{more}"


def _deciding(explanation: Explanation) -> Iterator[Explanation]:
    """The comparisons that made a rule hold, or not."""
    if not explanation.parts:
        yield explanation
    # The part of a `not` is never like the whole; of other parts those decide that are.
    for part in [part for part in explanation.parts if part.holds is explanation.holds] or explanation.parts:
        yield from _deciding(part)


def _filter(decision: Decision, rules: Rules, table: FeatureTable) -> None:
    for step, given, leaves_if in (("keep", rules.keep, False), ("drop", rules.drop, True)):
        for rule in given:
            rows = np.flatnonzero(decision.left & (rule.evaluate(table) == leaves_if))
            setting = f"--{step} {rule.name or rule}"
            decision.remove(Removal(step=step, setting=setting, rows=rows, rule=rule, holds=leaves_if))


def _compare(
    config: CurateConfig,
    decision: Decision,
    facts: RowFacts,
    features: Features,
    reference: Reference,
    reference_texts: ReferenceTexts,
    show_progress: bool,
) -> None:
    sets = features.sets
    if sets is None or facts.texts is None:
        return
    # Of the whole data, so that no step changes what another one measures.
    idf = inverse_document_frequency(sets)
    for name in config.exclude_near:
        near = near_references(
            sets,
            decision.rows,
            reference(name),
            Nearness(config.exclude_by, idf),
            config.exclude_similarity,
            show_progress=show_progress,
        )
        texts = reference_texts(name)
        if texts is not None:
            near = with_equal(near, decision.rows, facts.texts, texts)
        decision.remove(
            Removal(
                step="exclude_near",
                setting=f"--exclude-near {name}",
                rows=near.rows,
                other=near.reference,
                other_source=name,
                similarity=near.similarity,
                note=config.exclude_by,
            )
        )
    if config.deduplicate is not None:
        copies = part_copies(facts.texts, _priority(config, decision, facts, features))
        nearness = Nearness(config.deduplicate_by, idf)
        near_ones = near_duplicates(sets, copies.originals, nearness, config.deduplicate, show_progress=show_progress)
        found = with_copies(near_ones, copies, facts.num_rows)
        by_row = np.argsort(found.rows)
        decision.columns[f"{config.prefix}duplicates"] = np.bincount(found.leader, minlength=facts.num_rows).astype(
            np.int64
        )
        decision.remove(
            Removal(
                step="deduplicate",
                setting=f"--deduplicate {config.deduplicate:g}",
                rows=found.rows[by_row],
                other=found.leader[by_row],
                similarity=found.similarity[by_row],
                note=config.deduplicate_by,
            )
        )
    if config.nearest is not None and config.nearest_rows is not None:
        rows = decision.rows
        similarity = np.zeros(facts.num_rows)
        similarity[rows] = similarity_to(
            sets.take(rows),
            reference(config.nearest),
            Nearness("cosine", idf),
            config.nearest_by,
            show_progress=show_progress,
        )
        decision.columns[f"{config.prefix}nearness"] = similarity
        far = nearest_rows(similarity, rows, facts.keys, config.nearest_rows)
        if rows.size < config.nearest_rows:
            _shorten(config, decision, [Shortage(f"--nearest {config.nearest}", config.nearest_rows, int(rows.size))])
        decision.remove(
            Removal(
                step="nearest",
                setting=f"--nearest {config.nearest} --nearest-rows {config.nearest_rows}",
                rows=far,
                similarity=similarity[far],
                note=f"{config.nearest_by} cosine",
            )
        )


def _priority(config: CurateConfig, decision: Decision, facts: RowFacts, features: Features) -> IntArray:
    """Rows that are left, those to keep first."""
    rows = decision.rows
    if config.deduplicate_keep == "first":
        return rows
    if config.deduplicate_keep == "longest":
        wanted = features.num_tokens if features.num_tokens is not None else np.zeros(facts.num_rows)
    else:
        wanted = decision.columns[config.deduplicate_keep]
    return rows[np.lexsort((rows, facts.keys[rows], -wanted[rows]))]


def _count(config: CurateConfig, decision: Decision, facts: RowFacts) -> None:
    quotas = config.quotas
    cuts: Sequence[Cut] = ()
    step = "balance" if config.balance and not quotas else "quota"
    if quotas:
        groups = _balanced(config, decision, facts) if config.balance else groups_by_tags(_tags(decision, quotas))
        cuts, short = cut_to_quotas(groups, decision.rows, facts.keys, quotas)
        _shorten(config, decision, short)
    elif config.balance:
        cuts = cut_to_smallest(_balanced(config, decision, facts), decision.rows, facts.keys)
    for cut in cuts:
        setting = (
            f"--quota {cut.group}={cut.quota}" if quotas else f"--balance {'/'.join(config.balance)}: {cut.group}"
        )
        note = f"group `{cut.group}` had {cut.had} rows, {cut.quota} stay"
        decision.remove(Removal(step=step, setting=setting, rows=cut.rows, note=note))
    rows = decision.rows
    if config.max_rows is not None and rows.size > config.max_rows:
        over = np.sort(by_key(rows, facts.keys)[config.max_rows :])
        note = f"{rows.size} rows were left, {config.max_rows} stay"
        decision.remove(Removal(step="max_rows", setting=f"--max-rows {config.max_rows}", rows=over, note=note))


def _shorten(config: CurateConfig, decision: Decision, short: Sequence[Shortage]) -> None:
    if not config.allow_fewer:
        refuse_shortages(short)
    decision.shortages.extend(short)


def _balanced(config: CurateConfig, decision: Decision, facts: RowFacts) -> Groups:
    columns = [
        decision.columns[name].tolist() if name in decision.columns else facts.columns[name].values()
        for name in config.balance
    ]
    return groups_by_values(columns, facts.num_rows)


def _tags(decision: Decision, quotas: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    return {name: decision.columns[name] for name in quotas}
