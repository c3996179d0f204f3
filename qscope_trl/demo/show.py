"""The demo's results as a table and a figure."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.demo.arms import ARMS

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Per arm, one result per seed."""


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation over seeds if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(results: Results) -> str:
    """One row per arm: text-level detector first, then loss, features and time."""
    header = (
        "| arm | code-switching, % of generations | Chinese letters, % | English validation loss | penalised features "
        "| held-out monitors | step time |"
    )
    lines = [header, "|" + "---|" * 7]
    plain = [r["step_seconds"] for r in results.get("plain", ())]
    for arm, runs in results.items():
        if plain and runs[0]["step_seconds"] is not None:
            time = spread([r["step_seconds"] / p for r, p in zip(runs, plain, strict=False)], 2) + "x"
        else:
            time = "-"
        lines.append(
            f"| {arm}: {ARMS[arm]} | {spread([100 * r['rate'] for r in runs], 2)} "
            f"| {spread([100 * r['share'] for r in runs], 2)} | {spread([r['validation_loss'] for r in runs], 3)} "
            f"| {spread([r['penalty'] for r in runs], 3)} | {spread([r['monitor'] for r in runs], 3)} | {time} |"
        )
    return "\n".join(lines)


def reading(results: Results) -> str:
    """What the table says about the one comparison that matters, in words and with its uncertainty."""
    if not {"plain", "penalty"} <= results.keys():
        return ""
    plain, penalty = results["plain"], results["penalty"]
    n = sum(r["generations"] for r in plain)
    p, q = (statistics.mean(r["rate"] for r in runs) for runs in (plain, penalty))
    # Two binomial shares; over several seeds the spread between seeds counts instead, where it is larger.
    error = math.sqrt(p * (1 - p) / n + q * (1 - q) / n)
    if len(plain) > 1:
        between = [statistics.stdev([r["rate"] for r in runs]) / math.sqrt(len(runs)) for runs in (plain, penalty)]
        error = max(error, math.hypot(*between))
    verdict = "less" if p - q > 2 * error else "more" if q - p > 2 * error else "no clear difference"
    lines = [
        f"Code-switching by a text detector: {100 * p:.2f} % plain, {100 * q:.2f} % with the penalty: difference "
        f"{100 * (q - p):+.2f} points, standard error {100 * error:.2f}: {verdict}."
    ]
    silent = statistics.mean(r["penalty"] for r in penalty) < 0.5 * statistics.mean(r["penalty"] for r in plain)
    if silent and verdict != "less":
        lines.append("The penalised features fell silent and the behaviour stayed: the penalty was evaded.")
    return " ".join(lines)


def pyplot() -> Any:
    """Matplotlib's pyplot drawing to files, or None if it is not installed."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None


def figure(results: Results, path: Path) -> bool:
    """Draw rate and feature activation per arm; False if matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return False
    panels: list[tuple[str, Callable[[Mapping[str, Any]], float]]] = [
        ("code-switching, % of generations", lambda r: 100 * r["rate"]),
        ("penalised features, mean excess", lambda r: r["penalty"]),
        ("held-out monitors, mean excess", lambda r: r["monitor"]),
    ]
    canvas, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        for place, runs in enumerate(results.values()):
            values = [value(r) for r in runs]
            axis.bar(place, statistics.mean(values), width=0.7, color="#9db7d5")
            axis.plot([place] * len(values), values, "o", color="#1f3b57", markersize=4)
        axis.set_xticks(range(len(results)), list(results), rotation=30, ha="right")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)
    return True
