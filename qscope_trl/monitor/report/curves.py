"""Sections on scalars: the run at a glance, its curves, the time its parts took."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from qscope_trl.monitor import charts, html
from qscope_trl.monitor.charts import Line
from qscope_trl.monitor.html import Html
from qscope_trl.monitor.report.features import mean_rate
from qscope_trl.monitor.report.reading import Course, RunData

_OWN = re.compile(r"(?:eval_|test_)?sae/.*")
_MOST_NAMES = 400


def glance(data: RunData) -> Html:
    """First and last of what matters most."""
    named: list[tuple[str, Line | None]] = [
        ("task loss (loss - weight x penalty)" if data.course("sae/penalty") else "loss", task_loss(data)),
        ("penalty, unweighted", _line(data, "sae/penalty")),
        ("firing rate, mean of penalised features", mean_rate(data, "sae", data.features, "")),
        ("firing rate, mean of held-out monitors", mean_rate(data, "sae/monitor", data.monitors, "")),
        ("share of texts with the behaviour", _line(data, "sae/text/rate")),
        *((f"share of texts, rule {match[1]}", course.line()) for match, course in data.matching("sae/rule/([^/]+)")),
        ("reward", _line(data, "reward")),
        ("evaluation loss", _line(data, "eval_loss")),
        ("drift: KL from the model before training", _line(data, "sae/drift/kl")),
    ]
    rows = []
    for name, line in named:
        if line is None:
            continue
        course = Course(name, list(map(int, line.steps)), list(line.values))
        spark = charts.sparkline(Line(name, line.steps, line.values))
        rows.append([name, course.first, course.last, _change(course), spark])
    if not rows:
        return Html("")
    return html.section("At a glance", html.table(["", "first", "last", "change", "course"], rows), id="glance")


def curves(data: RunData) -> Html:
    """Loss, penalty, text, rewards, evaluation; then every other name as a row."""
    task, weight = task_loss(data), data.course("sae/penalty_weight")
    penalty = data.course("sae/penalty")
    found = []
    if penalty is not None and task is not None:
        found.append(charts.line_chart("Task loss", [task], is_noisy=True, note="loss - weight x penalty"))
    elif task is not None:
        found.append(charts.line_chart("Loss", [task], is_noisy=True))
    if penalty is not None:
        found.append(charts.line_chart("Penalty", [penalty.line("penalty")], is_noisy=True, note="unweighted"))
        if weight is not None and len(set(weight.values)) > 1:
            found.append(charts.line_chart("Penalty weight", [weight.line("weight")]))
        if task is not None:
            xs, ys = _paired(penalty, task)
            found.append(charts.path_chart("Penalty against task loss", "penalty", "task loss", xs, ys, "a dot a log"))
    found.append(charts.line_chart("Behaviour in texts", _text_lines(data), note="share of texts"))
    found.append(charts.line_chart("Reward", _reward_lines(data), is_noisy=True))
    scores = [course.line(match[1]) for match, course in data.matching("sae/([^/]+)/score")]
    found.append(charts.line_chart("Feature scores of rollouts", scores, is_noisy=True))
    losses = [course.line(match[1].rstrip("_") or "loss") for match, course in data.matching("eval_(.*)loss")]
    found.append(charts.line_chart("Evaluation loss", losses))
    found.append(charts.line_chart("Penalty in evaluation", _lines(data, {"eval_sae/penalty": "penalty"})))
    body = [charts.charts(found), _all_names(data)]
    return html.section("Curves", *body, id="curves") if any(body) else Html("")


def task_loss(data: RunData) -> Line | None:
    """The logged loss without the penalty that joined it; the loss itself where none did."""
    loss = data.course("loss")
    if loss is None:
        return None
    parts = [data.course("sae/penalty"), data.course("sae/penalty_weight")]
    penalty, weight = ({} if part is None else dict(zip(part.steps, part.values, strict=True)) for part in parts)
    values = [
        value - weight.get(step, 0.0) * penalty.get(step, 0.0)
        for step, value in zip(loss.steps, loss.values, strict=True)
    ]
    return Line("task loss" if penalty else "loss", loss.steps, values)


def overhead(data: RunData) -> Html:
    """What each part took of the steps' time."""
    rows = data.rows.get("overhead", [])
    steps = sum(int(row.get("steps") or 0) for row in rows)
    total = sum(float(row.get("step_seconds") or 0.0) for row in rows)
    if not steps or not total:
        return Html("")
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in (row.get("parts") or {}).items():
            seconds[name] = seconds.get(name, 0.0) + float(value)
    lines = [
        [name, value, 1000 * value / steps, f"{value / total:.2%}", charts.bar(value / total)]
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    own = sum(seconds.values())
    lines.append(["all of these", own, 1000 * own / steps, f"{own / total:.2%}", charts.bar(own / total)])
    told = (
        f"{steps} steps took {total:.1f} s, {1000 * total / steps:.1f} ms each. Share: seconds of a part, also of "
        f"what it does between steps, over the seconds of the steps, as measured in this run."
    )
    table = html.table(["part", "seconds", "ms per step", "share", ""], lines)
    nothing = html.element("p", "No part of this package reported its time.")
    return html.section("Overhead", html.element("p", told), table if seconds else nothing, id="overhead")


def _change(course: Course) -> str:
    """By how much it changed: as a share where that is below tenfold, else as a difference, of two values or more."""
    difference = course.last - course.first
    if len(course.values) < 2 or not math.isfinite(difference):
        return "-"
    if course.first > 0 and abs(difference) < 10 * course.first:
        return f"{difference / course.first:+.0%}"
    return f"{difference:+.3f}"


def _all_names(data: RunData) -> Html:
    """Everything logged that is about no single feature, folded in."""
    rows = []
    for name, course in data.courses.items():
        if re.search(r"/L\d+F\d+/", name):
            continue
        finite = [value for value in course.values if math.isfinite(value)]
        ends = [min(finite), max(finite)] if finite else [None, None]
        rows.append([name, len(course.values), course.first, course.last, *ends, charts.sparkline(course.line(), 8)])
    if not rows:
        return Html("")
    left = f", the first {_MOST_NAMES}" if len(rows) > _MOST_NAMES else ""
    header = ["name", "values", "first", "last", "least", "largest", "course"]
    return html.details(f"All {len(rows)} logged names{left}", html.table(header, rows[:_MOST_NAMES]))


def _text_lines(data: RunData) -> list[Line]:
    lines = _lines(data, {"sae/text/rate": "text detector"})
    return lines + [course.line(f"rule {match[1]}") for match, course in data.matching("sae/rule/([^/]+)")]


def _reward_lines(data: RunData) -> list[Line]:
    lines = _lines(data, {"reward": "all"})
    return lines + [course.line(match[1]) for match, course in data.matching("rewards/(.+)/mean")]


def _lines(data: RunData, names: dict[str, str]) -> list[Line]:
    return [course.line(shown) for name, shown in names.items() if (course := data.course(name)) is not None]


def _line(data: RunData, name: str) -> Line | None:
    course = data.course(name)
    return None if course is None else course.line()


def _paired(course: Course, line: Line) -> tuple[Sequence[float], Sequence[float]]:
    other = dict(zip(line.steps, line.values, strict=True))
    pairs = [(x, other[step]) for step, x in zip(course.steps, course.values, strict=True) if step in other]
    return [x for x, _ in pairs], [y for _, y in pairs]
