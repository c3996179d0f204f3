"""Sections on features: what was penalised, what was held out, and how both went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qscope_trl.features import Feature, FeatureSet
from qscope_trl.monitor import charts, html
from qscope_trl.monitor.charts import Line
from qscope_trl.monitor.html import Html
from qscope_trl.monitor.report.reading import Course, RunData, short_name

_SHOWN_ROWS = 20
_FEW_LINES = 8
_SHOWN_EVIDENCE = 4
_USUAL = ("heldout_auroc", "auroc", "mean_difference", "p_value")
_VALUES = ("mean_pre_act", "mean_act")


def penalised(data: RunData) -> Html:
    """The penalised features with evidence, weight and course."""
    if not data.features:
        return Html("")
    penalty = data.run.get("penalty") or {}
    told = [f"{len(data.features)} features of {layers_of(data.features)}"]
    sae = data.run.get("sae") or {}
    if isinstance(sae, dict) and sae.get("name"):
        told.append(f" of the SAEs {short_name(str(sae['name']))}")
    if penalty.get("penalty_kind"):
        weight = html.figure(penalty.get("penalty_weight"))
        told.append(f", penalised by {penalty['penalty_kind']} with weight {weight}")
    note = (
        "From the first logged value to the mean of the last tenth of them, at most ten. Firing rate: share of the "
        "penalised tokens at which the feature is above its threshold or, for topk_act, active."
    )
    charted = _charts(data, "sae", data.features, "penalised")
    return html.section(
        "Penalised features",
        html.element("p", *told, "."),
        feature_table(data, data.features, "sae", 0),
        html.element("p", note, class_="dim"),
        charted,
        id="features",
    )


def held_out(data: RunData) -> Html:
    """The monitors, and how they went beside what was penalised and what the text shows."""
    together = _together(data)
    if not data.monitors and not together:
        return Html("")
    if data.monitors:
        about = (
            f"{len(data.monitors)} features of {layers_of(data.monitors)} were measured and never trained on. If the "
            f"penalised features fall and these do not, the behaviour may have moved where the penalty does not look."
        )
    else:
        about = "No features were held out; the text alone tells whether the behaviour went away."
    table = feature_table(data, data.monitors, "sae/monitor", 1) if data.monitors else Html("")
    charted = [*together, _rates(data, "sae/monitor", data.monitors, "held-out")]
    body = html.element("p", about), charts.charts(charted), table
    return html.section("Held-out monitors", *body, id="monitors")


def rewarded(data: RunData) -> Html:
    """Features that rewards read, and how they went."""
    parts: list[Html] = []
    for reward in data.run.get("rewards") or []:
        name, given = str(reward.get("name", "reward")), reward.get("features")
        features = FeatureSet.from_dict(given).features if given else ()
        if not features:
            continue
        settings = {key: value for key, value in reward.items() if key not in ("name", "features")}
        told = ", ".join(f"{key} {html.figure(value)}" for key, value in settings.items() if _is_plain(value))
        # A rollout policy reads its features by a reward function of scale 0.
        heading = f"Reward {name}" if reward.get("scale", 1.0) else f"Read without a reward: {name}"
        parts.append(html.section(heading, html.element("p", told), level=3))
        parts.append(feature_table(data, features, f"sae/{name}", 0))
    policy = data.run.get("policy")
    if isinstance(policy, dict):
        told = ", ".join(f"{key} {html.figure(value)}" for key, value in policy.items() if _is_plain(value))
        parts.append(html.section("Rollout policy", html.element("p", told), level=3))
    return html.section("Rewards and rollout policy", *parts, id="rewards") if parts else Html("")


def feature_table(data: RunData, features: Sequence[Feature], prefix: str, tone: int) -> Html:
    """One row a feature; those after the first rows are folded in."""
    has_label, has_evidence = (any(getattr(one, name) for one in features) for name in ("label", "evidence"))
    has_groups = any(feature.group_thresholds for feature in features)
    value_name = _value_name(data, prefix)
    header = ["feature", *(["label"] if has_label else []), "firing rate", "course"]
    header += [value_name.replace("_", " ")] if value_name else []
    header += ["weight", "threshold", *(["evidence"] if has_evidence or has_groups else [])]
    rows = []
    for feature in features:
        rate = data.course(f"{prefix}/{feature.id}/firing_rate")
        label = html.element("span", feature.label[:200], class_="label") if feature.label else html.text("-")
        course = charts.sparkline(rate.line(), tone) if rate else html.text("-")
        row: list[Any] = [str(feature.id), *([label] if has_label else []), _ends(rate), course]
        if value_name:
            row.append(_ends(data.course(f"{prefix}/{feature.id}/{value_name}")))
        row += [charts.number(feature.weight), charts.number(feature.threshold)]
        if has_evidence or has_groups:
            groups = [f"threshold {group} {html.figure(value)}" for group, value in feature.group_thresholds.items()]
            told = ", ".join([_evidence(feature), *groups] if feature.evidence else groups)
            row.append(html.element("span", told, class_="evidence"))
        rows.append(row)
    shown = html.table(header, rows[:_SHOWN_ROWS])
    if len(rows) <= _SHOWN_ROWS:
        return shown
    rest = html.table(header, rows[_SHOWN_ROWS:])
    return html.joined([shown, html.details(f"{len(rows) - _SHOWN_ROWS} more features", rest)])


def layers_of(features: Sequence[Feature]) -> str:
    """The layers of some features in words."""
    layers = sorted({feature.layer for feature in features})
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def mean_rate(data: RunData, prefix: str, features: Sequence[Feature], name: str) -> Line | None:
    """The mean firing rate of some features at each step, or None if none was logged."""
    sums: dict[int, list[float]] = {}
    for feature in features:
        course = data.course(f"{prefix}/{feature.id}/firing_rate")
        for step, value in zip(course.steps, course.values, strict=True) if course else ():
            if math.isfinite(value):
                sums.setdefault(step, []).append(value)
    if not sums:
        return None
    steps = sorted(sums)
    return Line(name, steps, [sum(sums[step]) / len(sums[step]) for step in steps])


def _charts(data: RunData, prefix: str, features: Sequence[Feature], kind: str) -> Html:
    layers = [course.line(f"layer {match[1]}") for match, course in data.matching(rf"{prefix}/L(\d+)/penalty")]
    found = [_rates(data, prefix, features, kind)]
    if len(layers) > 1:
        found.append(charts.line_chart("Penalty by layer", layers, is_noisy=True, note="unweighted"))
    return charts.charts(found)


def _rates(data: RunData, prefix: str, features: Sequence[Feature], kind: str) -> Html:
    lines = []
    for feature in features:
        course = data.course(f"{prefix}/{feature.id}/firing_rate")
        if course is not None:
            label = f" {feature.label[:40]}" if feature.label else ""
            lines.append(course.line(f"{feature.id}{label}"))
    title, note = f"Firing rate, {kind} features", "share of tokens"
    if len(lines) > _FEW_LINES:
        mean = mean_rate(data, prefix, features, f"mean of {len(lines)}")
        lines.sort(key=lambda line: -max((value for value in line.values if math.isfinite(value)), default=0.0))
        lines = [*([mean] if mean else []), *lines[: _FEW_LINES - 1]]
        note += f"; the mean and the {len(lines) - 1} that reach highest"
    return charts.line_chart(title, lines, is_noisy=True, note=note)


def _together(data: RunData) -> list[Html]:
    """Penalised features, monitors and the text in one chart, each over its first value."""
    lines = [
        mean_rate(data, "sae", data.features, "penalised features"),
        mean_rate(data, "sae/monitor", data.monitors, "held-out monitors"),
    ]
    texts = [course.line("text: rate of the behaviour") for course in [data.course("sae/text/rate")] if course]
    texts += [course.line(f"rule {match[1]}") for match, course in data.matching("sae/rule/([^/]+)")]
    shown = [line for line in [*map(_relative, lines), *map(_relative, texts)] if line is not None]
    # One curve alone is compared with nothing.
    if len(shown) < 2:
        return []
    note = "each over its first value that is not 0"
    return [charts.line_chart("Course beside what was held out", shown, is_noisy=True, note=note)]


def _relative(line: Line | None) -> Line | None:
    if line is None:
        return None
    first = next((value for value in line.values if math.isfinite(value) and value != 0), None)
    return None if first is None else Line(line.name, line.steps, [value / first for value in line.values])


def _evidence(feature: Feature) -> str:
    """The figures it was chosen on, the usual ones first."""
    names = sorted(feature.evidence, key=lambda name: _USUAL.index(name) if name in _USUAL else len(_USUAL))
    told = [f"{name.replace('_', ' ')} {html.figure(feature.evidence[name])}" for name in names[:_SHOWN_EVIDENCE]]
    return ", ".join(told) or "-"


def _value_name(data: RunData, prefix: str) -> str | None:
    for name in _VALUES:
        if any(data.matching(rf"{prefix}/L\d+F\d+/{name}")):
            return name
    return None


def _ends(course: Course | None) -> Html:
    if course is None:
        return html.text("-")
    return html.element("span", f"{html.figure(course.first)} to {html.figure(course.last)}", class_="ends")


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)
