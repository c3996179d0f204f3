"""Rows that left, shown: their texts, the one they are near, and where along them a rule's features fire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qscope_trl.activations.feature_table import FeatureTable, TableEncoder
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import ChatRenderer, open_source, text_of
from qscope_trl.analysis.curation.features import ModelReader
from qscope_trl.analysis.curation.rows import RowFacts
from qscope_trl.analysis.curation.steps import Decision, Removal
from qscope_trl.analysis.curation.stored import StoreReader, is_store
from qscope_trl.config.curate import CurateConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.monitor.html import token_texts

# Tokens shown of a text, and how many of them come before its strongest one.
_SHOWN = 160
_BEFORE = 60
_SHOWN_CHARACTERS = 600


class Highlights(NamedTuple):
    """Tokens of a part of a text, and how strongly the rule's features fire there."""

    tokens: list[str]
    """Texts of the tokens."""

    values: list[float | None]
    """Largest activation of the rule's features; `None` at position 0, which is not read."""


class Example(NamedTuple):
    """One row that left."""

    removal: int
    """Place of its removal among the decision's."""

    row: int
    """Its number."""

    reason: str
    """Why."""

    text: str
    """Its text, cut short."""

    highlights: Highlights | None
    """Where the rule's features fire, if a rule decided and a model is at hand."""

    other_row: int | None
    """The row it is near."""

    other_text: str | None
    """That one's text, cut short, if it can be read."""


def collect_examples(
    config: CurateConfig,
    source: RowSource,
    facts: RowFacts,
    decision: Decision,
    reader: ModelReader | StoreReader | None,
    table: FeatureTable | None,
) -> list[Example]:
    """Some rows of every removal with their texts.

    Of rows that are near another one, those that are least near, where a mistake would be; of others a random choice
    by their content.
    """
    chosen = [_choose(removal, facts, config.examples) for removal in decision.removals]
    wanted: set[int] = set()
    elsewhere: dict[str, set[int]] = {}
    for removal, places in zip(decision.removals, chosen, strict=True):
        wanted.update(removal.rows[places].tolist())
        if removal.other is not None:
            there = elsewhere.setdefault(removal.other_source, set()) if removal.other_source else wanted
            there.update(removal.other[places].tolist())
    chat = reader.chat if isinstance(reader, ModelReader) else None
    texts = _texts(source, wanted, config.text_column, chat)
    column = config.reference_column or config.text_column
    others = {
        name: {}
        if is_store(name)
        else _texts(
            open_source(name, split=config.reference_split, config=config.reference_config), rows, column, chat
        )
        for name, rows in elsewhere.items()
    }
    examples = []
    for number, (removal, places) in enumerate(zip(decision.removals, chosen, strict=True)):
        some = _part(removal, places)
        encoder = None
        if some.rows.size and some.rule is not None and isinstance(reader, ModelReader):
            encoder = reader.token_encoder(some.rule.features)
        for place, reason in enumerate(some.reasons(table)):
            row = int(some.rows[place])
            other = None if some.other is None else int(some.other[place])
            theirs = others[some.other_source] if some.other_source else texts
            shown = None if encoder is None else _highlights(encoder, texts[row])
            other_text = None if other is None else theirs.get(other)
            examples.append(
                Example(number, row, reason, _cut(texts[row]), shown, other, other_text and _cut(other_text))
            )
    return examples


def _choose(removal: Removal, facts: RowFacts, count: int) -> Any:
    rows = removal.rows
    first = facts.keys[rows] if removal.other is None or removal.similarity is None else removal.similarity
    return np.lexsort((rows, first))[:count]


def _part(removal: Removal, places: Any) -> Removal:
    return Removal(
        step=removal.step,
        setting=removal.setting,
        rows=removal.rows[places],
        rule=removal.rule,
        holds=removal.holds,
        other=None if removal.other is None else removal.other[places],
        other_source=removal.other_source,
        similarity=None if removal.similarity is None else removal.similarity[places],
        note=removal.note,
    )


def _texts(source: RowSource, wanted: Iterable[int], column: str, chat: ChatRenderer | None) -> dict[int, str]:
    left = set(wanted)
    found: dict[int, str] = {}
    if not left:
        return found
    for index, row in source.rows(min(left)):
        if index in left:
            found[index] = _text(row, column, source.name, index, chat)
            left.discard(index)
            if not left:
                break
    return found


def _text(row: Mapping[str, Any], column: str, name: str, index: int, chat: ChatRenderer | None) -> str:
    try:
        return text_of(row, text_column=column, source_name=name, index=index, chat=chat)
    except DataError:
        # A store was made with a chat template that is not at hand here, or no text is read at all.
        return repr({key: row[key] for key in row if key in column.split("+")} or dict(row))


def _highlights(encoder: TableEncoder, text: str) -> Highlights | None:
    read = encoder.tokens(text)
    if not len(read.acts):
        return None
    strongest: list[float | None] = [None, *read.acts.max(1).tolist()]
    start = max(0, int(read.acts.max(1).argmax()) + 1 - _BEFORE)
    part = slice(start, start + _SHOWN)
    return Highlights(token_texts(encoder.tokenizer, read.token_ids[part]), strongest[part])


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} [...]"


def feature_names(features: Iterable[FeatureId], labels: Mapping[FeatureId, str]) -> list[str]:
    """Names of features with what they stand for."""
    return [f"{feature} ({labels[feature]})" if labels.get(feature) else str(feature) for feature in features]
