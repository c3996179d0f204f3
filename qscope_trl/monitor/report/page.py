"""The page of a run: its sections in order, its settings, and what the run did not leave."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qscope_trl.monitor import charts, html
from qscope_trl.monitor.html import Html
from qscope_trl.monitor.report import audit, curves, features, safeguards, texts
from qscope_trl.monitor.report.reading import RunData, short_name
from qscope_trl.monitor.secrets import without_secrets

STYLE = (
    charts.STYLE
    + """
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; border-bottom: 1px solid var(--line);
  padding-bottom: .6rem; }
.alarms { border: 1px solid #c8480c; border-left-width: .4rem; border-radius: .4rem; }
.alarms { padding: .6rem .8rem .6rem 1.8rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; margin: .8rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .8rem 1.6rem; }
.label { display: inline-block; min-width: 9rem; max-width: 20rem; } .ends { white-space: nowrap; }
.evidence { display: inline-block; min-width: 14rem; font-size: .85rem; }
.version { min-width: 0; } .facts { margin: 0 0 .3rem; }
.badge { font-size: .8rem; border-radius: .3rem; padding: .05rem .4rem; border: 1px solid currentColor; }
.badge.bad { color: #c8480c; } .badge.good { color: #137a4b; }
@media (prefers-color-scheme: dark) { .badge.bad { color: #ff9b61; } .badge.good { color: #5bd198; } }
"""
)
_KNOWN = (
    "model", "trainer", "sae", "penalty", "features", "monitors", "rewards", "policy", "uses", "arguments", "versions",
    "hardware", "started", "num_processes", "qscope_trl", "control", "drift",
)  # fmt: skip
_ABSENT = {
    "features": "penalised features: no penalty was attached",
    "monitors": "held-out monitors: give the penalty `monitor_features`",
    "samples": "generations: put a `FeatureDashboard` with `prompts` into the trainer's callbacks",
    "texts": "activations on fixed texts: give the `FeatureDashboard` `texts`",
    "drift": "drift: put a `DriftMonitor` into the trainer's callbacks",
    "overhead": "the time that parts took",
    "audit": "an audit: run `qscope audit --run-dir` on this folder",
}


def build_page(data: RunData, most: int) -> Html:
    """Everything between the title and the end of the page.

    Args:
        data: The run.
        most: Generations, texts and rollouts to show, each.
    """
    sections = [
        curves.glance(data),
        features.penalised(data),
        features.rewarded(data),
        curves.curves(data),
        features.held_out(data),
        texts.generations(data, most),
        texts.fixed_texts(data, most),
        safeguards.drift(data),
        texts.rollouts(data, most),
        audit.audit(data),
        curves.overhead(data),
        _configuration(data),
        _absent(data),
    ]
    found = [part for part in sections if part]
    return html.joined([_head(data), safeguards.warnings_box(data), _contents(found), *found])


def _head(data: RunData) -> Html:
    run, end = data.run, data.end or {}
    told = [f"Model {short_name(str(run['model']))}"] if run.get("model") else []
    told += [f"trained by {run['trainer']}"] if run.get("trainer") else []
    told.append(f"{data.last_step} steps")
    if isinstance(end.get("seconds"), int | float):
        told.append(f"{end['seconds']:.0f} s")
    told += [f"on {run['hardware']}"] if run.get("hardware") else []
    if isinstance(run.get("num_processes"), int) and run["num_processes"] > 1:
        told.append(f"{run['num_processes']} processes")
    told += [f"begun {str(run['started']).replace('T', ' ').replace('+00:00', ' UTC')}"] if run.get("started") else []
    source = "" if data.is_recorded else " Read from `trainer_state.json`: this run left no record."
    return html.element("p", ", ".join(told), ".", source)


def _contents(sections: list[Html]) -> Html:
    """Links to the sections."""
    found = [re.match(r'<h2 id="([\w-]+)">(.*?)</h2>', part) for part in sections]
    links = [html.element("a", Html(match[2]), href=f"#{match[1]}") for match in found if match]
    return html.element("nav", *links)


def _configuration(data: RunData) -> Html:
    run = data.run
    parts: list[Html] = []
    if run.get("model"):
        parts.append(html.element("p", f"Model: {run['model']}"))
    for name, title in (("penalty", "Penalty"), ("sae", "SAEs"), ("drift", "Drift")):
        if isinstance(run.get(name), Mapping) and run[name]:
            parts.append(html.section(title, html.settings(_hidden(run[name])), level=3))
    if run.get("uses"):
        used = [[name, ", ".join(map(str, ways))] for name, ways in run["uses"].items()]
        parts.append(html.details(f"Trained on: {len(used)} features", html.table(["feature", "by"], used)))
    rest = {key: value for key, value in run.items() if key not in _KNOWN}
    if rest:
        parts.append(html.section("More", audit.anything(_hidden(rest)), level=3))
    if run.get("arguments"):
        shown = html.settings(_hidden(run["arguments"]))
        parts.append(html.details(f"All {len(run['arguments'])} arguments of the trainer", shown))
    versions = {**({"qscope_trl": run["qscope_trl"]} if run.get("qscope_trl") else {}), **(run.get("versions") or {})}
    if versions:
        parts.append(html.section("Versions", html.settings(versions), level=3))
    return html.section("Configuration", *parts, id="configuration") if parts else Html("")


def _absent(data: RunData) -> Html:
    """What the run left nothing of, and how to have it next time."""
    there = {"features": data.features or data.run.get("rewards"), "monitors": data.monitors, "audit": data.audit}
    missing = [told for name, told in _ABSENT.items() if not there.get(name) and not data.rows.get(name)]
    if not missing:
        return Html("")
    items = [html.element("li", html.coded(item)) for item in missing]
    return html.section("Not in this run", html.element("ul", *items), id="absent")


def _hidden(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may be a secret, empty values last."""
    shown = {key: _words(value) for key, value in without_secrets(values).items()}
    return dict(sorted(shown.items(), key=lambda item: item[1] in (None, "", [], {})))


def _words(value: Any) -> Any:
    if isinstance(value, Mapping) and not any(isinstance(item, Mapping | list) for item in value.values()):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return value
