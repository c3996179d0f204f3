"""The section on the audit, from the plain tables that `qscope audit` leaves in the record.

Columns are taken as they come, and an interval is put beside its value, so that a table which gains a column is shown
with it. Left out: what the figures mean; `qscope audit` writes a page that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qscope_trl.monitor import html
from qscope_trl.monitor.html import Html
from qscope_trl.monitor.report.reading import RunData

_TITLES = {
    "behaviour": "Behaviour in texts",
    "activity": "Activity of the features",
    "detectors": "Who tells positive from negative texts: AUROC",
    "features": "The features one by one",
    "collateral": "Neutral texts",
    "fits": "The SAEs on both models",
}
_APART = ("verdict", "reason", "notes", "samples", "settings", "features")
_MOST_ROWS, _MOST_SAMPLES = 200, 8


def audit(data: RunData) -> Html:
    """What `qscope audit` found."""
    found = data.audit
    if not found:
        return Html("")
    parts = [html.element("p", html.element("b", f"Verdict: {found.get('verdict', '-')}"))]
    if found.get("reason"):
        parts.append(html.element("p", str(found["reason"])))
    if found.get("notes"):
        parts.append(html.element("ul", *(html.element("li", str(note)) for note in found["notes"])))
    parts.append(anything({key: value for key, value in found.items() if key not in _APART}))
    if found.get("features"):
        parts.append(html.details(_TITLES["features"], anything(found["features"])))
    if found.get("samples"):
        shown = [_sample(one) for one in found["samples"][:_MOST_SAMPLES]]
        parts.append(html.details("Generations of both models", *shown))
    if found.get("settings"):
        parts.append(html.details("Settings of the audit", anything(found["settings"])))
    return html.section("Audit", *parts, id="audit")


def anything(value: Any, depth: int = 0) -> Html:
    """Nested JSON as tables.

    Args:
        value: Mapping, list or plain value.
        depth: How deep it lies; from 3 it is shown as text.
    """
    if depth >= 3 or not isinstance(value, Mapping | list):
        return html.element("p", _cell(value))
    if isinstance(value, list):
        if value and all(isinstance(item, Mapping) for item in value):
            return _table(value)
        return html.element("p", ", ".join(map(_cell, value[:_MOST_ROWS])) or "none")
    plain = {key: item for key, item in value.items() if not isinstance(item, Mapping | list)}
    parts = [html.table(["", "value"], _folded(plain).items())] if plain else []
    for key, item in value.items():
        if isinstance(item, Mapping | list) and item:
            parts.append(html.section(_TITLES.get(key, str(key)), anything(item, depth + 1), level=3 + min(depth, 2)))
    return html.joined(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> Html:
    folded = [_folded(row) for row in rows[:_MOST_ROWS]]
    header = list(dict.fromkeys(key for row in folded for key in row))
    return html.table(header, [[row.get(key) for key in header] for row in folded])


def _folded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Names as words; `x_low` and `x_high` beside `x` in one cell."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in row:
            continue
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        ends = "" if low is None or high is None else f" ({html.figure(low)} to {html.figure(high)})"
        found[key.replace("_", " ")] = f"{html.figure(value)}{ends}" if ends else _plain(value)
    return found


def _sample(one: Mapping[str, Any]) -> Html:
    versions = []
    for name in ("base", "tuned"):
        mark = "shows it" if one.get(f"{name}_shows") else "does not show it"
        head = html.element("div", html.element("b", name), f" ({mark})")
        shown = html.element("div", str(one.get(name, ""))[:4000], class_="text")
        versions.append(html.element("div", head, shown, class_="version"))
    prompt = html.element("div", str(one.get("prompt", ""))[-1000:], class_="text dim")
    return html.element("div", prompt, html.element("div", *versions, class_="pair"), class_="card")


def _plain(value: Any) -> Any:
    return _cell(value) if isinstance(value, Mapping | list) else value


def _cell(value: Any) -> str:
    return str(value)[:400] if isinstance(value, Mapping | list) else html.figure(value)
