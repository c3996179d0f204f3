"""`qscope dashboard`: a wandb workspace whose sections hold the panels of a run with features.

`plan` decides on sections and panels from names alone; `build` makes of them what the package wandb-workspaces saves.
Left out: reports, and changing a workspace that is there: each call saves a new view.
"""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qscope_trl.config.dashboard import DashboardConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.files import write_whole
from qscope_trl.monitor.dashboard_wandb import STEP, needing_account
from qscope_trl.monitor.run_record import RunRecord

_MOST_FEATURES = 12
_FEATURE = re.compile(r"sae/(monitor/)?(L\d+F\d+)/(\w+)")
_DRIFT = re.compile(r"sae/drift/(?:L\d+/)?(\w+)")
_NO_NAMES = (
    "loss",
    "sae/penalty",
    "sae/penalty_weight",
    "sae/text/rate",
    "sae/alarm",
    "reward",
)


class Panel(NamedTuple):
    """One panel."""

    kind: str
    """`lines`, `regex` (lines of all that match), `media`, `table` or `scatter`."""

    title: str
    """Its title."""

    keys: tuple[str, ...]
    """Names in wandb; of `regex` its one pattern, of `scatter` table, x and y."""

    x: str = STEP
    """What lies along the x axis."""


class Section(NamedTuple):
    """Panels under one heading."""

    name: str
    """The heading."""

    panels: tuple[Panel, ...]
    """What stands under it."""


class Result(NamedTuple):
    """What the command did."""

    sections: tuple[Section, ...]
    """What the workspace holds."""

    place: str
    """File or address it was written to."""


def run(config: DashboardConfig) -> Result:
    """Make the workspace and save it, in the account or as a file.

    Raises:
        ConfigError: If wandb-workspaces is not installed, or the account cannot be used.
        DataError: If `run_dir` holds no log.
    """
    sections = plan(None if config.run_dir is None else logged_names(Path(config.run_dir)))
    workspace = build(sections, config)
    if config.json is not None:
        write_whole(Path(config.json), json.dumps(workspace._spec, indent=1, default=str) + "\n")
        return Result(sections, config.json)
    needing_account(workspace.save)
    return Result(sections, str(workspace.url))


def format_result(result: Result) -> str:
    """The sections and where the workspace is, for the terminal."""
    lines = [f"{section.name}: {len(section.panels)} panels" for section in result.sections]
    return "\n".join([*lines, f"Workspace written to {result.place}", ""])


def logged_names(run_dir: Path) -> list[str]:
    """Every name that a run has logged, from its record or else from the trainer's own state.

    Raises:
        DataError: If it has left neither.
    """
    names: dict[str, None] = {}
    for row in RunRecord(run_dir).each("log"):
        names |= dict.fromkeys(row)
    for kind in ("penalised", "monitor"):
        features = {row["feature"] for row in RunRecord(run_dir).each("histograms") if row["kind"] == kind}
        names |= dict.fromkeys(f"sae_histograms/{kind}_{feature}" for feature in sorted(features))
    if names:
        return list(names)
    states = sorted(run_dir.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise DataError(
            f"'{run_dir}' holds neither a record nor a checkpoint, so it does not say what was logged. Name a run's "
            f"`output_dir`, or leave `run_dir` out for panels that fit any run."
        )
    for row in json.loads(states[-1].read_text(encoding="utf-8")).get("log_history", []):
        names |= dict.fromkeys(row)
    return list(names)


def plan(names: Sequence[str] | None) -> tuple[Section, ...]:
    """Sections for what a run has logged, or for any run.

    Args:
        names: Names as the trainer logs them; None for panels that take what matches.
    """
    known = list(_NO_NAMES if names is None else names)
    if names is None:
        features, monitors = _any_features("", "feature"), _any_features("monitor/", "monitor")
        drift = tuple(
            Panel("regex", f"Drift: {what}", (f"train/sae/drift/(L[0-9]+/)?{what}",))
            for what in ("fvu", "jaccard", "residual_cosine", "kl")
        )
        rollouts: tuple[Panel, ...] = (
            Panel("lines", "Reward", (_key("reward"),)),
            Panel("regex", "Scores of rollouts", ("train/sae/[^/]+/score",)),
            Panel("regex", "What the policy did", ("train/sae/rollouts/.*",)),
        )
    else:
        features, monitors = _features(known, ""), _features(known, "monitor/")
        drift, rollouts = _drift(known), _rollouts(known)
    found = (
        Section("Penalty and task loss", _penalty(known)),
        Section("Penalised features", features),
        Section("Held-out monitors", monitors),
        Section("Drift", drift),
        Section("Text", _text(known)),
        Section("Rollouts", rollouts),
        Section("Tables", _tables(with_rollouts=bool(rollouts))),
    )
    return tuple(section for section in found if section.panels)


def build(sections: Iterable[Section], config: DashboardConfig) -> Any:
    """The workspace as wandb-workspaces has it; nothing is sent.

    Raises:
        ConfigError: If that package is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Of its own use of pydantic, which no user can mend.
            warnings.simplefilter("ignore", DeprecationWarning)
            spaces: Any = importlib.import_module("wandb_workspaces.workspaces")
            parts: Any = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as err:
        raise ConfigError(
            f"`qscope dashboard` needs the package wandb-workspaces, and it cannot be imported ({err}). Install it by "
            f'`pip install "qscope_trl[wandb]"`.'
        ) from err
    return spaces.Workspace(
        name=config.name,
        entity=config.entity or "",
        project=config.project,
        sections=[
            spaces.Section(
                name=section.name,
                is_open=True,
                panels=[_built(parts, panel) for panel in section.panels],
                layout_settings=spaces.SectionLayoutSettings(columns=3, rows=max(1, -(-len(section.panels) // 3))),
            )
            for section in sections
        ],
        settings=spaces.WorkspaceSettings(x_axis=STEP),
    )


def _built(parts: Any, panel: Panel) -> Any:
    if panel.kind == "media":
        return parts.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1)
    if panel.kind == "table":
        return parts.WeavePanelSummaryTable(table_name=panel.keys[0])
    if panel.kind == "scatter":
        table, x, y = panel.keys
        query = {"summaryTable": {"tableKey": table}}
        return parts.CustomChart(query=query, chart_name="wandb/scatter/v0", chart_fields={"x": x, "y": y})
    if panel.kind == "regex":
        return parts.LinePlot(title=panel.title, x=panel.x, metric_regex=panel.keys[0])
    return parts.LinePlot(title=panel.title, x=panel.x, y=list(panel.keys))


def _penalty(names: Sequence[str]) -> tuple[Panel, ...]:
    found = []
    if "sae/penalty" in names:
        found.append(Panel("lines", "Penalty, unweighted", (_key("sae/penalty"),)))
        found.append(Panel("lines", "Task loss: loss - weight x penalty", ("sae_penalty/task_loss",)))
        found.append(
            Panel(
                "scatter", "Penalty against task loss", ("sae_penalty/against_task_loss_table", "penalty", "task_loss")
            )
        )
    losses = [name for name in names if re.fullmatch(r"(eval_|eval_.+_)?loss", name)]
    found += [Panel("lines", name, (_key(name),)) for name in losses]
    if "sae/penalty_weight" in names:
        found.append(Panel("lines", "Penalty weight", (_key("sae/penalty_weight"),)))
    layers = [_key(name) for name in names if re.fullmatch(r"sae/L\d+/penalty", name)]
    return (*found, Panel("lines", "Penalty of each layer", tuple(layers))) if layers else tuple(found)


def _any_features(prefix: str, what: str) -> tuple[Panel, ...]:
    pattern = f"train/sae/{prefix}L[0-9]+F[0-9]+"
    return (
        Panel("regex", f"Firing rate of each {what}", (f"{pattern}/firing_rate",)),
        Panel("regex", f"Mean value of each {what}", (f"{pattern}/mean_(pre_)?act",)),
    )


def _features(names: Sequence[str], prefix: str) -> tuple[Panel, ...]:
    """Every feature in one panel a quantity, then the first ones by themselves, with their histograms."""
    quantities: dict[str, list[str]] = {}
    ids: dict[str, None] = {}
    for name in names:
        match = _FEATURE.fullmatch(name)
        if match is not None and (match[1] or "") == prefix:
            quantities.setdefault(match[3], []).append(_key(name))
            ids[match[2]] = None
    found = [Panel("lines", f"{_words(what)}, all", tuple(keys)) for what, keys in quantities.items()]
    kind = "monitor" if prefix else "penalised"
    for feature in list(ids)[:_MOST_FEATURES]:
        keys = tuple(_key(f"sae/{prefix}{feature}/{what}") for what in quantities if what == "firing_rate")
        found += [Panel("lines", f"{feature}: firing rate", keys)] if keys else []
        histogram = f"sae_histograms/{kind}_{feature}"
        found += [Panel("lines", f"{feature}: activations", (histogram,))] if histogram in names else []
    return tuple(found)


def _drift(names: Sequence[str]) -> tuple[Panel, ...]:
    quantities: dict[str, list[str]] = {}
    for name in names:
        match = _DRIFT.fullmatch(name)
        if match is not None:
            quantities.setdefault(match[1], []).append(_key(name))
    return tuple(Panel("lines", f"Drift: {_words(what)}", tuple(keys)) for what, keys in quantities.items())


def _text(names: Sequence[str]) -> tuple[Panel, ...]:
    wanted = [name for name in names if re.fullmatch(r"sae/(text/.+|rule/.+|alarm)", name)]
    titles = {"sae/text/rate": "Share of generations with the behaviour", "sae/alarm": "Alarm"}
    return tuple(Panel("lines", titles.get(name, name.removeprefix("sae/")), (_key(name),)) for name in wanted)


def _rollouts(names: Sequence[str]) -> tuple[Panel, ...]:
    wanted = [
        name
        for name in names
        if name in ("reward", "reward_std", "kl")
        or re.fullmatch(r"rewards/.+/mean|sae/[^/]+/(score|unscored)|sae/rollouts/.+", name)
    ]
    return tuple(Panel("lines", name.removeprefix("sae/"), (_key(name),)) for name in wanted)


def _tables(*, with_rollouts: bool) -> tuple[Panel, ...]:
    shown = ["samples", "texts", *(["rollouts"] if with_rollouts else [])]
    titles = {"samples": "Generations", "texts": "Fixed texts", "rollouts": "Rollouts"}
    tables = {"samples": "generations", "texts": "strongest", "rollouts": "rollouts"}
    return (
        *(Panel("media", titles[name], (f"sae_{name}/page",)) for name in shown),
        *(Panel("table", titles[name], (f"sae_{name}/{tables[name]}",)) for name in shown),
    )


def _key(name: str) -> str:
    """The name in wandb of what a trainer logs, as transformers rewrites it."""
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name.removeprefix(f'{prefix}_')}"
    return f"train/{name}"


def _words(name: str) -> str:
    return name.replace("_", " ")
