"""The report of a curation: one mapping, as JSON, as a page and as lines on the terminal.

It says what left at which step and why, with examples, and how the data's columns, tags, lengths and features stand
before and after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from qscope_trl._version import __version__
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.analysis.curation.choosing import value_name
from qscope_trl.analysis.curation.examples import Example, feature_names
from qscope_trl.analysis.curation.features import Features, ModelReader
from qscope_trl.analysis.curation.rows import RowFacts
from qscope_trl.analysis.curation.sets import ActiveSets, IntArray
from qscope_trl.analysis.curation.steps import Decision, Rules
from qscope_trl.analysis.curation.stored import StoreReader
from qscope_trl.config.curate import CurateConfig
from qscope_trl.features import FeatureId
from qscope_trl.files import write_whole
from qscope_trl.monitor import html
from qscope_trl.monitor.text_table import aligned

_QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
_MOST_CHANGED = 10
_LARGEST = 10
_MOST_VALUES = 20
_MOST_LINES = 6


def build_report(
    config: CurateConfig,
    source: RowSource,
    rules: Rules,
    facts: RowFacts,
    features: Features,
    decision: Decision,
    reader: ModelReader | StoreReader | None,
) -> dict[str, Any]:
    """Everything but the examples, as plain values for JSON."""
    rows, before = decision.rows, np.arange(facts.num_rows)
    left = facts.num_rows
    steps = []
    for removal in decision.removals:
        left -= int(removal.rows.size)
        steps.append(
            {
                "step": removal.step,
                "setting": removal.setting,
                "rule": None if removal.rule is None else str(removal.rule),
                "removed": int(removal.rows.size),
                "left": left,
            }
        )
    report: dict[str, Any] = {
        "qscope_trl": __version__,
        "data": {"name": source.name, "split": source.split, "fingerprint": source.fingerprint()},
        "settings": _settings(config),
        "features": _origin(config, reader),
        "rows_before": facts.num_rows,
        "rows_after": int(rows.size),
        "rows_without_tokens": None if features.num_tokens is None else int((features.num_tokens == 0).sum()),
        "steps": steps,
        "shortages": [shortage._asdict() for shortage in decision.shortages],
        "tags": {name: _tag(decision, name, str(rule), rows) for name, rule in rules.tags.items()},
        "columns": {
            name: _counts(column.counts(before), column.counts(rows))
            for name, column in facts.columns.items()
            if 1 < len(column.names) <= _MOST_VALUES
        },
        "scores": {
            name: {"rule": str(rule), **_spread(decision.columns[name], before, rows)}
            for name, rule in rules.scores.items()
        },
        "tokens": None if features.num_tokens is None else _spread(features.num_tokens, before, rows),
        "changed_features": [] if features.sets is None else _changed(features.sets, rows, reader, rules),
        "most_duplicated": _most_duplicated(decision, config.prefix),
    }
    return report


def with_examples(report: Mapping[str, Any], decision: Decision, examples: Sequence[Example]) -> dict[str, Any]:
    """The report with the rows that it shows."""
    listed = []
    for example in examples:
        removal = decision.removals[example.removal]
        entry = {"step": removal.step, "setting": removal.setting, "row": example.row, "reason": example.reason}
        entry["text"] = example.text
        if example.other_row is not None:
            entry["other"] = {"source": removal.other_source, "row": example.other_row, "text": example.other_text}
        listed.append(entry)
    return {**report, "examples": listed}


def write_report(folder: Path, report: Mapping[str, Any], decision: Decision, examples: Sequence[Example]) -> None:
    """Write `report.json` and `report.html`."""
    data = with_examples(report, decision, examples)
    write_whole(folder / "report.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    html.write_page(folder / "report.html", f"Curation of {report['data']['name']}", _page(report, decision, examples))


def format_report(report: Mapping[str, Any]) -> str:
    """The figures as lines: what each step removed, and how columns and tags stand before and after."""
    table = [["step", "removed", "left", "setting"], ["", "", str(report["rows_before"]), ""]]
    table += [[step["step"], str(step["removed"]), str(step["left"]), step["setting"]] for step in report["steps"]]
    lines = aligned(table, left=(0, 3))
    counted = {**{f"tag {name}": tag for name, tag in report["tags"].items()}, **report["columns"]}
    for name, found in counted.items():
        values = list(found["before"])[:_MOST_LINES]
        more = f", and {len(found['before']) - _MOST_LINES} more" if len(found["before"]) > _MOST_LINES else ""
        shown = ", ".join(f"{value} {found['before'][value]} -> {found['after'][value]}" for value in values)
        lines.append(f"{name}: {shown}{more}")
    if report["tokens"] is not None:
        before, after = report["tokens"]["before"], report["tokens"]["after"]
        lines.append(f"tokens: {before['total']} -> {after['total']}, median {before['median']} -> {after['median']}")
    if report["rows_without_tokens"]:
        lines.append(f"{report['rows_without_tokens']} rows have no token to read, so no feature fires in them")
    lines += [f"{item['group']}: {item['had']} rows of {item['quota']}" for item in report["shortages"]]
    return "\n".join(lines) + "\n"


def _settings(config: CurateConfig) -> dict[str, Any]:
    """The settings that are not their defaults."""
    values = asdict(config)
    return {item.name: values[item.name] for item in fields(config) if values[item.name] not in (item.default, [])}


def _origin(config: CurateConfig, reader: ModelReader | StoreReader | None) -> dict[str, Any] | None:
    if reader is None:
        return None
    common = {"compared_layers": list(reader.set_layers)}
    if isinstance(reader, StoreReader):
        return {"store": config.store, "saes": reader.store.manifest["saes"]["source"], **common}
    prints = {str(layer): reader.saes.fingerprint(layer) for layer in reader.layers}
    return {"model": config.model, "saes": config.saes, "sae_fingerprints": prints, **common}


def _tag(decision: Decision, name: str, rule: str, rows: IntArray) -> dict[str, Any]:
    held = decision.columns[name]

    def count(some: Any) -> dict[str, int]:
        return {value_name(value): int((some == value).sum()) for value in (True, False)}

    return {"rule": rule, **_counts(count(held), count(held[rows]))}


def _counts(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    return {"before": dict(before), "after": dict(after)}


def _spread(values: Any, before: IntArray, after: IntArray) -> dict[str, Any]:
    """Total and quantiles of a figure over the rows before and after."""
    found: dict[str, Any] = {}
    for name, rows in (("before", before), ("after", after)):
        some = values[rows]
        entry: dict[str, Any] = {"total": some.sum().item()}
        for quantile, share in _QUANTILES.items():
            entry[quantile] = float(np.quantile(some, share)) if some.size else None
        found[name] = entry
    return found


def _changed(
    sets: ActiveSets, rows: IntArray, reader: ModelReader | StoreReader | None, rules: Rules
) -> list[dict[str, Any]]:
    """The features whose share of rows changed most."""
    if reader is None or not rows.size:
        return []
    before = sets.document_frequency() / sets.num_documents
    after = sets.take(rows).document_frequency() / rows.size
    order = np.lexsort((np.arange(before.size), -np.abs(after - before)))[:_MOST_CHANGED]
    ids = [feature_id(sets, reader.set_layers, int(place)) for place in order if after[place] != before[place]]
    labels = {name: label for rule in rules.all() for name, label in rule.labels.items()}
    return [
        {"feature": name, "before": float(before[place]), "after": float(after[place])}
        for name, place in zip(feature_names(ids, labels), order, strict=False)
    ]


def feature_id(sets: ActiveSets, layers: Sequence[int], number: int) -> FeatureId:
    """The feature that has a number in `ActiveSets`."""
    place = int(np.searchsorted(sets.starts, number, side="right")) - 1
    return FeatureId(layers[place], number - sets.starts[place])


def _most_duplicated(decision: Decision, prefix: str) -> list[dict[str, int]]:
    counts = decision.columns.get(f"{prefix}duplicates")
    if counts is None:
        return []
    order = np.lexsort((np.arange(counts.size), -counts))[:_LARGEST]
    return [{"row": int(row), "duplicates": int(counts[row])} for row in order if counts[row]]


def _page(report: Mapping[str, Any], decision: Decision, examples: Sequence[Example]) -> html.Html:
    steps = [[step["step"], step["setting"], step["removed"], step["left"]] for step in report["steps"]]
    parts = [
        html.element("p", f"{report['rows_after']} of {report['rows_before']} rows stay."),
        html.section("Steps", html.table(["step", "setting", "removed", "left"], steps)),
    ]
    if report["shortages"]:
        rows = [[item["group"], item["quota"], item["had"]] for item in report["shortages"]]
        parts.append(html.section("Fewer than asked for", html.table(["group", "wanted", "there"], rows)))
    parts.append(html.section("What left", *_examples(decision, examples)))
    for name, found in {**report["tags"], **report["columns"]}.items():
        heading = f"Tag {name}: {found['rule']}" if "rule" in found else f"Column {name}"
        parts.append(html.section(heading, _count_table(found, report)))
    for name, found in [("Tokens of a row", report["tokens"]), *report["scores"].items()]:
        if found is not None:
            heading = f"Score {name}: {found['rule']}" if "rule" in found else name
            rows = [[key, found["before"][key], found["after"][key]] for key in ("total", *_QUANTILES)]
            parts.append(html.section(heading, html.table(["", "before", "after"], rows)))
    if report["changed_features"]:
        rows = [[item["feature"], item["before"], item["after"]] for item in report["changed_features"]]
        title = "Features whose share of rows changed most"
        parts.append(html.section(title, html.table(["feature", "before", "after"], rows)))
    if report["most_duplicated"]:
        rows = [[item["row"], item["duplicates"]] for item in report["most_duplicated"]]
        parts.append(html.section("Rows that stand for most others", html.table(["row", "duplicates"], rows)))
    origin = {**report["data"], **(report["features"] or {}), **report["settings"]}
    parts.append(html.section("How it was made", html.settings(origin)))
    return html.joined(parts)


def _count_table(found: Mapping[str, Any], report: Mapping[str, Any]) -> html.Html:
    rows = [
        [
            value,
            count,
            found["after"][value],
            count / report["rows_before"],
            found["after"][value] / report["rows_after"] if report["rows_after"] else None,
        ]
        for value, count in found["before"].items()
    ]
    return html.table(["value", "before", "after", "share before", "share after"], rows)


def _examples(decision: Decision, examples: Sequence[Example]) -> list[html.Html]:
    parts: list[html.Html] = []
    for number, removal in enumerate(decision.removals):
        shown = []
        for example in examples:
            if example.removal != number:
                continue
            text: html.Html = html.element("div", example.text, class_="text", dir="auto")
            if example.highlights is not None:
                values = [value for value in example.highlights.values if value is not None]
                text = html.highlighted(example.highlights.tokens, example.highlights.values, max(values, default=0.0))
            pieces = [html.element("p", f"Row {example.row}. {example.reason}"), text]
            if example.other_row is not None:
                where = f" of {removal.other_source}" if removal.other_source else ""
                pieces.append(html.element("p", f"Row {example.other_row}{where}:", class_="dim"))
                pieces.append(html.element("div", example.other_text or "(no text)", class_="text", dir="auto"))
            shown.append(html.joined(pieces))
        if removal.rows.size:
            summary = f"{removal.setting}: {removal.rows.size} rows"
            parts.append(html.details(summary, *shown, is_open=len(parts) == 0))
    return parts or [html.element("p", "Nothing.")]
