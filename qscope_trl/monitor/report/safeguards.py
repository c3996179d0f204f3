"""Alarms and drift against its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qscope_trl.monitor import charts, html
from qscope_trl.monitor.charts import Line
from qscope_trl.monitor.html import Html
from qscope_trl.monitor.report.reading import RunData

_MOST_ALARMS = 20
_MOST_NAMES = 6
_MEASURES = {
    "fvu": "Fraction of variance unexplained (fvu)",
    "fvu_ratio": "fvu over that of the model before",
    "jaccard": "Same active features (Jaccard)",
    "residual_cosine": "Residual cosine",
    "activation_cosine": "Activation cosine",
    "dead_rate": "Features gone silent",
    "l0": "Active features per token (l0)",
}


def warnings_box(data: RunData) -> Html:
    """What must not be overlooked: alarms, limits crossed, a control run, a run without an end."""
    lines: list[Html] = []
    control = data.run.get("control")
    if control:
        given = control if isinstance(control, Mapping) else {"kind": control}
        of = [f"L{one['layer']}F{one['index']}" for one in (given.get("of") or {}).get("features", [])]
        named = f"{', '.join(of[:_MOST_NAMES])}{' ...' if len(of) > _MOST_NAMES else ''}" if of else "the named ones"
        lines.append(html.text(f"Control run: {given.get('kind')} features were penalised instead of {named}."))
    alarms = data.rows.get("alarms", [])
    for row in alarms[:_MOST_ALARMS]:
        lines.append(
            html.joined([html.element("b", f"Alarm at step {row['step']}: "), html.coded(row.get("message", ""))])
        )
    if len(alarms) > _MOST_ALARMS:
        lines.append(html.text(f"{len(alarms) - _MOST_ALARMS} more alarms are in the record."))
    for row in data.rows.get("drift", []):
        if row.get("crossed"):
            crossed = _crossed(row, _limits(data))
            action = f" ({row['action']})" if row.get("action") else ""
            lines.append(html.joined([html.element("b", f"Drift at step {row['step']}: "), f"{crossed}{action}"]))
            break
    if data.is_recorded and data.end is None:
        lines.append(
            html.text(f"No end was recorded: the run was stopped after step {data.last_step}, or is still going.")
        )
    return html.element("ul", *(html.element("li", line) for line in lines), class_="alarms") if lines else Html("")


def drift(data: RunData) -> Html:
    """How far the model has moved from where it began, by measure and layer."""
    rows = data.rows.get("drift", []) or _from_log(data)
    if not rows:
        return Html("")
    limits = _limits(data)
    layers = sorted({layer for row in rows for layer in row.get("layers") or {}}, key=_number)
    found = []
    for measure, title in _MEASURES.items():
        lines = [_course(rows, layer, measure) for layer in layers]
        found.append(charts.line_chart(title, lines, limits=_named(limits, measure)))
    kl = Line("KL", [row["step"] for row in rows], [_value(row.get("kl")) for row in rows])
    found.append(charts.line_chart("KL from the model before", [kl], limits=_named(limits, "kl"), note="nats a token"))
    steps = [rows[0]["step"], rows[-1]["step"]]
    header = ["layer", *(name.replace("_", " ") for name in _MEASURES)]
    table = [[layer, *(_from_to(_course(rows, layer, name)) for name in _MEASURES)] for layer in layers]
    told = f"On fixed texts, {len(rows)} times, step {steps[0]} to step {steps[1]}, against the model before training."
    parts = [html.element("p", told), charts.charts(found), html.table(header, table)]
    if limits:
        stated = ", ".join(f"{name} {html.figure(value)}" for name, value in limits.items())
        parts.append(html.element("p", f"Limits: {stated}."))
    crossings = [[row["step"], _crossed(row, limits), row.get("action")] for row in rows if row.get("crossed")]
    if crossings:
        parts.append(html.table(["step", "limits crossed", "action"], crossings[:_MOST_ALARMS]))
    elif limits:
        parts.append(html.element("p", "No limit was crossed."))
    return html.section("Drift", *parts, id="drift")


# --- details -----------------------------------------------------------------------------------------------------


def _from_log(data: RunData) -> list[dict[str, Any]]:
    """Rows of drift as the trainer's log has them, for a run without a record."""
    rows: dict[int, dict[str, Any]] = {}
    for match, course in data.matching(r"sae/drift/L(\d+)/(\w+)"):
        for step, value in zip(course.steps, course.values, strict=True):
            row = rows.setdefault(step, {"step": step, "layers": {}})
            row["layers"].setdefault(match[1], {})[match[2]] = value
    kl = data.course("sae/drift/kl")
    for step, value in zip(kl.steps, kl.values, strict=True) if kl else ():
        rows.setdefault(step, {"step": step, "layers": {}})["kl"] = value
    return [rows[step] for step in sorted(rows)]


def _limits(data: RunData) -> dict[str, float]:
    described = data.run.get("drift") or {}
    found = described.get("limits") if isinstance(described, Mapping) else None
    return {
        str(name): float(value)
        for name, value in (found or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _crossed(row: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """The crossed limits of a row with the figures that crossed them."""
    told = []
    for name in row["crossed"]:
        layer, _, limit = str(name).rpartition("/")
        figures = (row.get("layers") or {}).get(layer[1:], {}) if layer else row
        value, bound = figures.get(limit[4:]), limits.get(limit)
        told.append(f"{name}: {html.figure(value)}" + ("" if bound is None else f" against {html.figure(bound)}"))
    return ", ".join(told)


def _named(limits: Mapping[str, float], measure: str) -> list[tuple[str, float]]:
    return [(name, value) for name, value in limits.items() if name[4:] == measure]


def _course(rows: Sequence[Mapping[str, Any]], layer: str, measure: str) -> Line:
    values = [_value((row.get("layers") or {}).get(layer, {}).get(measure)) for row in rows]
    return Line(f"layer {layer}", [row["step"] for row in rows], values)


def _from_to(line: Line) -> Html:
    return html.element("span", f"{html.figure(line.values[0])} to {html.figure(line.values[-1])}", class_="ends")


def _value(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _number(layer: str) -> tuple[bool, int, str]:
    return (not layer.isdecimal(), int(layer) if layer.isdecimal() else 0, layer)
