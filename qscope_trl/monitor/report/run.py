"""`qscope report`: a run's folder in, one page out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qscope_trl.config.report import ReportConfig
from qscope_trl.monitor import html
from qscope_trl.monitor.report.page import STYLE, build_page
from qscope_trl.monitor.report.reading import read_run

REPORT_FILE = "report.html"
"""Name of the page, in the run's folder, where no other was given."""


class Reported(NamedTuple):
    """A written report."""

    path: Path
    size: int
    """Bytes."""

    last_step: int
    is_finished: bool
    num_alarms: int


def run(config: ReportConfig) -> Reported:
    """Read a run and write its page.

    Raises:
        ConfigError: If the page could not be written there.
        DataError: If there is no run in the folder, or its record is damaged.
        FeatureSetError: If its features are malformed.
        OSError: If the page cannot be written.
    """
    data = read_run(config.run_dir)
    path = Path(config.output) if config.output else Path(config.run_dir) / REPORT_FILE
    name = Path(config.run_dir).resolve().name
    html.write_page(path, f"Run {name}", build_page(data, config.samples), STYLE)
    is_finished = data.end is not None or not data.is_recorded
    return Reported(path, path.stat().st_size, data.last_step, is_finished, len(data.rows.get("alarms", [])))


def format_result(result: Reported) -> str:
    """What to say of it in the terminal."""
    told = f"{result.last_step} steps" + ("" if result.is_finished else ", no end recorded")
    if result.num_alarms:
        told += f", {result.num_alarms} alarm{'s' if result.num_alarms > 1 else ''}"
    return f"Report of {told} written to {result.path} ({result.size / 1000:.0f} kB)\n"
