"""Sections on texts: generations before and after, activations on fixed texts, histograms, rollouts.

A token is shaded by the sum of the penalised features there, as in the dashboard. Left out: a shade per feature, as a
token has one background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qscope_trl.monitor import charts, html
from qscope_trl.monitor.charts import Bins
from qscope_trl.monitor.dashboard_things import summed
from qscope_trl.monitor.detectors import rate_interval
from qscope_trl.monitor.html import Html
from qscope_trl.monitor.report.reading import RunData, by_index

_MOST_TOKENS = 400
_MOST_HISTOGRAMS = 12
_MOST_MIDDLE = 4
_READING = (
    "The stronger a token's shade, the larger the sum of the {} features' activations there; the pointer shows it. "
    "One scale for the whole section; grey tokens were not read."
)
Row = Mapping[str, Any]


def generations(data: RunData, most: int) -> Html:
    """Generations from fixed prompts, before beside after.

    Args:
        data: The run.
        most: Prompts to show, the first ones.
    """
    rows = data.rows.get("samples", [])
    if not rows:
        return Html("")
    prompts = by_index(rows)
    shade = _Shade(data, rows)
    parts = [_verdicts(rows), shade.reading()]
    for versions in prompts[:most]:
        prompt = html.element("div", str(versions[0].get("prompt", ""))[:2000], class_="text dim")
        parts.append(html.element("div", prompt, _versions(versions, shade, "continuation"), class_="card"))
    parts += _left_out(len(prompts), most, "prompts")
    return html.section("Generations before and after", *parts, id="generations")


def fixed_texts(data: RunData, most: int) -> Html:
    """Activations on fixed texts, before beside after, and histograms."""
    rows = data.rows.get("texts", [])
    drawn = _histograms(data)
    if not rows and not drawn:
        return Html("")
    parts: list[Html] = []
    if rows:
        texts = by_index(rows)
        shade = _Shade(data, rows)
        parts.append(shade.reading())
        parts += [html.element("div", _versions(versions, shade, "text"), class_="card") for versions in texts[:most]]
        parts += _left_out(len(texts), most, "texts")
    if drawn:
        parts.append(html.section("Histograms", drawn, level=3))
    return html.section("Activations on texts", *parts, id="texts")


def rollouts(data: RunData, most: int) -> Html:
    """Rollouts of the last step they were kept at, with score, advantage and policy."""
    rows = data.rows.get("rollouts", [])
    if not rows:
        return Html("")
    last = rows[-1]["step"]
    chosen = [row for row in rows if row["step"] == last]
    shade = _Shade(data, chosen)
    parts = [html.element("p", f"Those of step {last}."), shade.reading()]
    for row in chosen[:most]:
        prompt = html.element("div", str(row.get("prompt", ""))[:1000], class_="text dim")
        told = html.element("p", html.joined(_facts(row), "  \u00b7  "), class_="facts")
        parts.append(html.element("div", told, prompt, _shown(row, shade), class_="card"))
    parts += _left_out(len(chosen), most, "rollouts")
    return html.section("Rollouts", *parts, id="rollouts")


def _facts(row: Row) -> list[Html]:
    facts = [html.text(f"{name} {html.figure(row.get(name))}") for name in ("score",) if row.get(name) is not None]
    before, after = row.get("advantage_before"), row.get("advantage")
    if before is not None and before != after:
        facts.append(html.text(f"advantage {html.figure(before)}, after the policy {html.figure(after)}"))
    elif after is not None:
        facts.append(html.text(f"advantage {html.figure(after)}"))
    if row.get("policy"):
        facts.append(html.element("b", str(row["policy"])))
    rewards = row.get("rewards") or {}
    if isinstance(rewards, Mapping):
        facts += [html.text(f"{name} {html.figure(value)}") for name, value in rewards.items()]
    return facts


def _verdicts(rows: Sequence[Row]) -> Html:
    """Share of generations that show the behaviour, at each step."""
    judged = [row for row in rows if row.get("is_shown") is not None]
    if not judged:
        return Html("")
    lines = []
    for step in sorted({row["step"] for row in judged}):
        verdicts = [bool(row["is_shown"]) for row in judged if row["step"] == step]
        low, high = rate_interval(sum(verdicts), len(verdicts))
        share = sum(verdicts) / len(verdicts)
        lines.append([step, sum(verdicts), len(verdicts), share, f"{low:.3f} to {high:.3f}"])
    detector = next((str(row["detector"]) for row in judged if row.get("detector")), "the text detector")
    if len(lines) > 2 * _MOST_MIDDLE:
        lines = [*lines[:_MOST_MIDDLE], *lines[-_MOST_MIDDLE:]]
    header = ["step", "show it", "generations", "share", "95 % interval"]
    return html.joined([html.element("p", f"Behaviour in the text, by {detector}:"), html.table(header, lines)])


def _versions(versions: Sequence[Row], shade: _Shade, what: str) -> Html:
    """The first and the last version side by side, those between folded in."""
    ends = [versions[0]] if len(versions) == 1 else [versions[0], versions[-1]]
    parts = [html.element("div", _version(row, shade, what), class_="version") for row in ends]
    pair = html.element("div", *parts, class_="pair")
    between = versions[1:-1]
    if not between:
        return pair
    stride = -(-len(between) // _MOST_MIDDLE)
    folded = [_version(row, shade, what) for row in between[::stride]]
    steps = ", ".join(str(row["step"]) for row in between[::stride])
    return html.joined([pair, html.details(f"between: step {steps}", *folded)])


def _version(row: Row, shade: _Shade, what: str) -> Html:
    head = [html.element("b", f"Step {row['step']}")]
    if row.get("is_shown") is not None:
        kind, word = ("bad", "shows it") if row["is_shown"] else ("good", "does not show it")
        head += [html.text(" "), html.element("span", word, class_=f"badge {kind}")]
    return html.joined([html.element("div", *head), _shown(row, shade, what)])


def _shown(row: Row, shade: _Shade, what: str = "completion") -> Html:
    tokens = [str(token) for token in row.get("tokens") or []]
    if not tokens:
        return html.element("div", str(row.get("text") or f"(empty {what})")[:4000], class_="text")
    values = shade.values(row)
    shown = html.highlighted(tokens[:_MOST_TOKENS], values[:_MOST_TOKENS], shade.largest)
    if len(tokens) <= _MOST_TOKENS:
        return shown
    return html.joined([shown, html.element("p", f"{len(tokens) - _MOST_TOKENS} more tokens", class_="dim")])


class _Shade:
    """By what tokens are shaded in one section."""

    def __init__(self, data: RunData, rows: Sequence[Row]) -> None:
        recorded = {name for row in rows for name in row.get("values") or {}}
        penalised = [str(feature.id) for feature in data.features if str(feature.id) in recorded]
        self.kind = "penalised" if penalised else "recorded"
        self.names = penalised or sorted(recorded)
        sums = (value for row in rows for value in self.values(row) if value is not None and math.isfinite(value))
        self.largest = max(sums, default=0.0)

    def values(self, row: Row) -> list[float | None]:
        """Of each token."""
        count = len(row.get("tokens") or [])
        recorded = row.get("values") or {}
        fitting = {name: values for name, values in recorded.items() if len(values) == count}
        return summed(fitting, self.names, count)

    def reading(self) -> Html:
        """How to read it."""
        return html.element("p", _READING.format(self.kind), class_="dim")


def _histograms(data: RunData) -> Html:
    """First against last of each feature; the penalised ones first."""
    rows = data.rows.get("histograms", [])
    found = by_index(rows, "feature")
    found.sort(key=lambda versions: versions[0].get("kind") != "penalised")
    silent = [versions for versions in found if not any(sum(row.get("counts") or []) for row in versions)]
    found = [versions for versions in found if versions not in silent]
    drawn = []
    for versions in found[:_MOST_HISTOGRAMS]:
        ends = versions if len(versions) == 1 else [versions[0], versions[-1]]
        title = f"{versions[0].get('feature')} ({versions[0].get('kind', 'feature')})"
        drawn.append(charts.histogram_chart(title, [_bins(row) for row in ends], "share of all tokens"))
    parts = [charts.charts(drawn), *_left_out(len(found), _MOST_HISTOGRAMS, "features")]
    if silent:
        names = ", ".join(str(versions[0].get("feature")) for versions in silent[:_MOST_HISTOGRAMS])
        parts.append(html.element("p", f"Never active on these texts: {names}{_more(len(silent))}."))
    return html.joined(parts) if any(drawn) or silent else Html("")


def _more(count: int) -> str:
    return f" and {count - _MOST_HISTOGRAMS} more" if count > _MOST_HISTOGRAMS else ""


def _bins(row: Row) -> Bins:
    counts, total = row.get("counts") or [], row.get("num_tokens")
    active = f": active at {sum(counts) / total:.2%}" if total else ""
    return Bins(f"step {row['step']}{active}", row.get("edges") or [], counts, total)


def _left_out(count: int, most: int, what: str) -> list[Html]:
    return [html.element("p", f"{count - most} more {what} are in the record.", class_="dim")] if count > most else []
