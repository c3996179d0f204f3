"""HTML reports of rules: tables, precision-recall curves, calibration, and the texts that a rule gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qscope_trl.monitor.html import Html, details, element, highlighted, joined, section, table, write_page

if TYPE_CHECKING:
    from qscope_trl.analysis.rules.comparison import Entry
    from qscope_trl.analysis.rules.evaluate_run import EvaluateResult
    from qscope_trl.analysis.rules.explain_run import Explained, ExplainResult
    from qscope_trl.analysis.rules.learn_run import LearnResult

_EXAMPLES = 5
_LONGEST = 600
_SIZE = 260
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b79f00", "#5d3a9b")


def write_comparison(path: str, result: LearnResult | EvaluateResult, metric: str) -> None:
    """The report of `learn` and of `evaluate`."""
    entries = result.entries
    parts: list[Html] = [element("pre", str(result.rule), class_="text")]
    parts += [element("p", note) for note in result.notes]
    learned = getattr(result, "learned", None)
    if learned is not None:
        rows = [["training texts", learned.train], ["development texts", learned.development]]
        rows += [[f"held-out fold {place + 1}", value] for place, value in enumerate(result.folds)]  # type: ignore[union-attr]
        parts.append(section(f"How it was chosen: {metric}", table(["on", metric], rows)))
    first = entries[0].runs[0]
    heading = f"On {first.texts} test texts, {first.positive} of them positive"
    parts.append(section(heading, _figures(entries)))
    parts.append(section("Precision and recall", _curves(entries)))
    calibrated = [entry for entry in entries if entry.runs[0].calibration is not None]
    if calibrated:
        parts.append(section("Calibration", *(_calibration(entry) for entry in calibrated)))
    parts.append(section("Texts it gets wrong, and right", *_examples(result)))
    write_page(path, f"Rule {result.rule.name or ''}".strip(), joined(parts))


def write_explanation(path: str, result: ExplainResult) -> None:
    """The report of `explain`: each text shaded by the features that fire in it."""
    parts = [element("pre", str(result.rule), class_="text")]
    parts += [section(one.name, *_explained(one, result)) for one in result.texts]
    write_page(path, f"Explained: {result.rule.name or 'rule'}", joined(parts))


def _figures(entries: Sequence[Entry]) -> Html:
    header = ["classifier", "precision", "recall", "F1", "F1, 95 %", "AUROC", "AUROC, 95 %", "PR area", "Brier",
              "calibration error", "note"]  # fmt: skip
    rows = []
    for entry in entries:
        run, single = entry.runs[0], len(entry.runs) == 1
        rows.append(
            [
                entry.name,
                *(entry.mean(name) for name in ("precision", "recall", "f1")),
                _interval(run.f1_interval) if single else "",
                entry.mean("auroc"),
                _interval(run.auroc_interval) if single else "",
                entry.mean("average_precision"),
                run.calibration.brier if single and run.calibration else None,
                run.calibration.error if single and run.calibration else None,
                entry.note,
            ]
        )
    return table(header, rows)


def _curves(entries: Sequence[Entry]) -> Html:
    def at(recall: float, precision: float) -> str:
        return f"{30 + recall * _SIZE:.1f},{10 + (1 - precision) * _SIZE:.1f}"

    lines: list[Html] = [
        element("rect", x=30, y=10, width=_SIZE, height=_SIZE, fill="none", stroke="#888"),
        element("text", "recall", x=30 + _SIZE / 2 - 20, y=_SIZE + 32, fill="currentColor", font_size=12),
        element("text", "1", x=18, y=16, fill="currentColor"),
        element("text", "0", x=18, y=_SIZE + 12, fill="currentColor"),
    ]
    key = []
    for place, entry in enumerate(entries):
        colour = _COLOURS[place % len(_COLOURS)]
        points = " ".join(at(point.recall, point.precision) for point in entry.runs[0].curve)
        lines.append(element("polyline", points=points, fill="none", stroke=colour, stroke_width=1.5))
        run = entry.runs[0]
        if run.told:
            x, y = at(run.recall, run.precision).split(",")
            lines.append(element("circle", cx=x, cy=y, r=3, fill=colour))
        key.append(element("li", element("span", "\u25a0 ", style=f"color:{colour}"), entry.name))
    drawn = Html(
        element("svg", *lines, width=_SIZE + 50, height=_SIZE + 45)
        .replace("stroke_width", "stroke-width")
        .replace("font_size", "font-size")
    )
    about = element("p", "The curve ranks texts by the score; the dot is what is decided.")
    return Html(about + drawn + element("ul", *key))


def _calibration(entry: Entry) -> Html:
    found = entry.runs[0].calibration
    rows = [] if found is None else [[one.texts, one.mean_probability, one.share_positive] for one in found.bins]
    return details(entry.name, table(["texts", "mean probability", "share that is positive"], rows))


def _examples(result: LearnResult | EvaluateResult) -> list[Html]:
    labels, test = result.judge.labels, result.judge.test
    held: NDArray[np.bool_] = result.rule.evaluate(result.table)
    margin = result.rule.score(result.table)
    kinds = (
        ("told positive, but are not", test & held & ~labels, -1),
        ("missed", test & ~held & labels, 1),
        ("told rightly", test & held & labels, -1),
    )
    parts = []
    for heading, mask, sign in kinds:
        places = np.flatnonzero(mask)
        # The clearest first: the largest margin of what it holds for, the largest lack of what it misses.
        chosen = places[np.argsort(sign * margin[places], kind="stable")][:_EXAMPLES]
        parts.append(element("h3", f"{len(places)} texts are {heading}" if "told" in heading else
                             f"{len(places)} positive texts are {heading}"))  # fmt: skip
        for place in chosen:
            text = result.data.texts[place]
            shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
            parts.append(element("div", shown, class_="text", dir="auto"))
            parts.append(
                details("why", element("pre", result.rule.explain(result.table, int(place)).format(), class_="text"))
            )
    return parts


def _explained(one: Explained, result: ExplainResult) -> list[Html]:
    parts = [element("pre", one.explanation.format(), class_="text")]
    fires = one.acts.acts.max(axis=0) if len(one.acts.acts) else np.zeros(len(result.features))
    for column in np.argsort(-fires, kind="stable"):
        if fires[column] <= 0:
            continue
        feature = result.features[column]
        values: list[float | None] = [None, *(float(value) for value in one.acts.acts[:, column])]
        label = result.rule.labels.get(feature, "")
        shaded = highlighted(one.tokens, values, float(fires[column]))
        parts.append(section(f"{feature} {label}".strip(), shaded, level=3))
    if len(parts) == 1:
        parts.append(element("div", one.text, class_="text", dir="auto"))
    return parts


def _interval(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"
