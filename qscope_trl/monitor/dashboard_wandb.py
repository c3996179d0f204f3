"""Weights & Biases, the one place that knows it: starting a run that may fail to, and what is shown of features in it.

Scalars reach wandb by the trainer's own log. Here are histograms, tables and pages, and the scalars once more under
names that group them: wandb makes a section of each first part of a name, so the project page reads from top to
bottom. Left out: files of models, and reading runs back from a server.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qscope_trl.errors import ConfigError, QScopeWarning
from qscope_trl.monitor import html
from qscope_trl.monitor.html import Html

STEP = "train/global_step"
"""The axis of every panel, as transformers and TRL log it."""

_NAMES = (
    (re.compile(r"(loss)|sae/(penalty|penalty_weight)"), "sae_penalty/{}"),
    (re.compile(r"sae/(L\d+F\d+/.+)"), "sae_features/{}"),
    (re.compile(r"sae/(L\d+/penalty)"), "sae_penalty/{}"),
    (re.compile(r"sae/monitor/(.+)|sae/(alarm)"), "sae_monitors/{}"),
    (re.compile(r"sae/drift/(.+)"), "sae_drift/{}"),
    (re.compile(r"sae/text/(.+)|sae/(rule/.+)"), "sae_text/{}"),
    (re.compile(r"(reward|kl)|sae/(.+)"), "sae_rollouts/{}"),
)


class Histogram(NamedTuple):
    """Counts between edges."""

    edges: Sequence[float]
    """One more than counts, ascending."""

    counts: Sequence[int]
    """How many values lie between two edges."""


class Table(NamedTuple):
    """Rows to sort and filter; a cell that is `Html` is shown as such."""

    columns: Sequence[str]
    """Their names."""

    rows: Sequence[Sequence[Any]]
    """Cells of each row."""


class Scatter(NamedTuple):
    """A point per row, of its first two columns."""

    table: Table
    """Its points."""

    title: str
    """Its title."""


Shown = Histogram | Table | Scatter | Html | float
"""What can be shown; `Html` is a page of its own."""


class WandbSink:
    """Shows things in a wandb run that is going on; make one by `of_running`.

    If wandb refuses, one warning says so and nothing more is shown: training goes on.

    Args:
        run: The run.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        self._wandb: Any = importlib.import_module("wandb")
        self._has_ended = False
        self._do(self._define)

    @classmethod
    def of_running(cls) -> WandbSink | None:
        """A sink of this process's run, or None if there is none. wandb is not imported for it."""
        run = getattr(sys.modules.get("wandb"), "run", None)
        return None if run is None else cls(run)

    def show(self, step: int, things: Mapping[str, Shown]) -> None:
        """Show things at a step of the training.

        Args:
            step: Optimizer steps done.
            things: What, by name; the part before the first `/` is its section.
        """
        if things:
            self._do(lambda: self.run.log({**{name: self._made(one) for name, one in things.items()}, STEP: step}))

    def alert(self, title: str, message: str) -> None:
        """Send a notice to whoever follows the run."""
        self._do(lambda: self.run.alert(title=title, text=message, level=self._wandb.AlertLevel.WARN))

    def _define(self) -> None:
        # transformers does the same for all names; a run that the user began may have no axis yet.
        self.run.define_metric(STEP)
        self.run.define_metric("sae_*", step_metric=STEP)

    def _do(self, act: Callable[[], Any]) -> None:
        if self._has_ended:
            return
        try:
            act()
        except (self._wandb.Error, OSError) as err:
            self._has_ended = True
            warnings.warn(
                f"wandb takes no more ({_first_line(err)}), so the dashboard ends there; training goes on. What is "
                f"measured is in the run's record, which `qscope report` shows.",
                QScopeWarning,
                stacklevel=4,
            )

    def _made(self, thing: Shown) -> Any:
        wandb = self._wandb
        if isinstance(thing, Histogram):
            import numpy as np

            return wandb.Histogram(np_histogram=(np.array(thing.counts), np.array(thing.edges)))
        if isinstance(thing, Table):
            return self._table(thing)
        if isinstance(thing, Scatter):
            x, y = thing.table.columns[:2]
            return wandb.plot.scatter(self._table(thing.table), x, y, title=thing.title)
        if isinstance(thing, Html):
            return wandb.Html(str(thing), inject=False)
        return float(thing)

    def _table(self, table: Table) -> Any:
        rows = [
            [self._wandb.Html(html.frame(cell), inject=False) if isinstance(cell, Html) else cell for cell in row]
            for row in table.rows
        ]
        return self._wandb.Table(columns=list(table.columns), data=rows)


def alert(title: str, message: str) -> bool:
    """Send a notice by this process's wandb run, if it has one.

    Returns:
        Whether there is one.
    """
    sink = WandbSink.of_running()
    if sink is not None:
        sink.alert(title, message)
    return sink is not None


def grouped(logs: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of a log event under names that group them: those of features, the loss and the reward.

    Args:
        logs: Names and values, as a trainer logs them; evaluations stay where they are.
    """
    found: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for pattern, form in _NAMES:
            match = pattern.fullmatch(name)
            if match is not None:
                rest = next(part for part in match.groups() if part is not None)
                # Further parts would make sections of their own where wandb groups by the last `/`.
                found[form.format(rest.replace("/", "_"))] = float(value)
                break
    return found


def start(begin: Callable[[], Any], *, project: str, name: str | None) -> str:
    """Begin a run; if wandb cannot, begin it offline, and if that fails too, say so and go without.

    Args:
        begin: Begins it as the trainer would.
        project: Project of the run that is begun instead.
        name: Its name.

    Returns:
        `begun` as the trainer would, `offline`, or `not`.
    """
    wandb: Any = importlib.import_module("wandb")
    try:
        begin()
        return "begun"
    except (wandb.Error, OSError) as err:
        reason = _first_line(err)
    try:
        wandb.init(project=project, name=name, mode="offline")
    except (wandb.Error, OSError) as err:
        warnings.warn(
            f"wandb could not be started ({reason}), nor without network ({_first_line(err)}); training goes on "
            f"without it. What is measured is in the run's record, which `qscope report` shows.",
            QScopeWarning,
            stacklevel=2,
        )
        return "not"
    folder = os.path.dirname(wandb.run.dir)
    warnings.warn(
        f"wandb could not be started ({reason}), so the run is kept on disk. `wandb sync '{folder}'` sends it later.",
        QScopeWarning,
        stacklevel=2,
    )
    return "offline"


def needing_account(act: Callable[[], Any]) -> None:
    """Do what needs a wandb account and network.

    Raises:
        ConfigError: If there is no account, or it may not do that, or the server is not reached.
    """
    wandb: Any = importlib.import_module("wandb")
    try:
        act()
    except (wandb.Error, OSError, ValueError) as err:
        raise ConfigError(
            f"The workspace cannot be saved in wandb: {_first_line(err)}. Log in by `wandb login` and name `entity` "
            f"and `project` as in the address of the project's page, or write it to a file by `--json`."
        ) from err


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")
