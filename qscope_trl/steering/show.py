"""What `qscope steer` shows: texts side by side, the table and figure of a sweep, the HTML report."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.errors import ConfigError
from qscope_trl.monitor.html import Html, details, element, highlighted, joined, section, settings, table, write_page
from qscope_trl.monitor.text_table import aligned
from qscope_trl.steering.sweep import FEATURES, Point, Sweep

_SHOWN_FEATURES = 20


def format_pairs(prompts: Sequence[str], plain: Sequence[str], steered: Sequence[str]) -> str:
    """Each prompt with both texts below it."""
    parts = []
    for prompt, one, other in zip(prompts, plain, steered, strict=True):
        for name, text in (("prompt", prompt), ("plain", one), ("steered", other)):
            parts.append(f"{name:8}{' '.join(text.split())}\n")
        parts.append("\n")
    return "".join(parts)


def format_sweep(sweep: Sweep) -> str:
    """A line for each strength and arm; the control is the mean over its draws, with the smallest and largest."""
    has_share = sweep.detector.parts is not None
    header = ["arm", "strength", "texts", "rate %", "95 % interval"]
    header += ["share %", "95 % interval"] if has_share else []
    rows = [[*header, "perplexity"]]
    for point in sweep.of(FEATURES):
        cells = [FEATURES if point.strength else "no steering", f"{point.strength:g}", str(point.num_texts)]
        cells += [f"{100 * point.rate:.1f}", _interval(point.rate_interval)]
        if point.share is not None and point.share_interval is not None:
            # One text has no spread to resample.
            interval = _interval(point.share_interval, 2) if point.num_texts > 1 else "-"
            cells += [f"{100 * point.share:.2f}", interval]
        rows.append([*cells, f"{point.perplexity:.1f}"])
    for strength, points in _controls(sweep).items():
        rates, ppl = [p.rate for p in points], [p.perplexity for p in points]
        cells = [f"random ({len(points)} draws)", f"{strength:g}", str(sum(p.num_texts for p in points))]
        cells += [f"{100 * _mean(rates):.1f}", f"{100 * min(rates):.1f} to {100 * max(rates):.1f}"]
        if has_share:
            shares = [p.share or 0.0 for p in points]
            cells += [f"{100 * _mean(shares):.2f}", f"{100 * min(shares):.2f} to {100 * max(shares):.2f}"]
        rows.append([*cells, f"{_mean(ppl):.1f}"])
    lines = aligned(rows)
    notes = f"rate: generations that show `{sweep.detector.name}`"
    if has_share:
        notes += f"; share: {sweep.detector.parts_name}"
    notes += "; perplexity: of the generations under the unsteered model"
    if sweep.controls:
        notes += "; random: interval is smallest to largest draw"
    noted = [notes, *(f"{', '.join(where)}: {message}" for message, where in sweep.warned.items())]
    return "\n".join([*lines, *noted]) + "\n"


def write_figure(path: str | os.PathLike[str], sweep: Sweep) -> None:
    """Behaviour and perplexity against strength, the control beside; PNG or SVG, whole or not at all.

    Raises:
        ConfigError: If matplotlib is missing, or the ending is another.
    """
    target = Path(path)
    require_figure(target)
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    has_share = sweep.detector.parts is not None
    what = sweep.detector.parts_name if has_share else f"generations with {sweep.detector.name}"
    canvas, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained")
    controls = sorted({p.arm for p in sweep.points} - {FEATURES})
    for axis, title in zip(axes, (f"{what}, %", "perplexity under the unsteered model"), strict=True):
        is_behaviour = axis is axes[0]

        def value(point: Point, is_behaviour: bool = is_behaviour) -> float:
            if not is_behaviour:
                return point.perplexity
            return 100 * (point.rate if point.share is None else point.share)

        for arm in controls:
            points = sweep.of(arm)
            axis.plot([p.strength for p in points], [value(p) for p in points], color="#b9b9b9", linewidth=1)
        if controls:
            lines = [[value(p) for p in sweep.of(arm)] for arm in controls]
            mean = [_mean(column) for column in zip(*lines, strict=True)]
            label = f"random features, mean of {len(controls)}"
            strengths = [p.strength for p in sweep.of(FEATURES)]
            axis.plot(strengths, mean, "s--", color="#6b6b6b", markersize=4, label=label)
        points = sweep.of(FEATURES)
        x, y = [p.strength for p in points], [value(p) for p in points]
        if is_behaviour:
            ends = [p.rate_interval if p.share_interval is None else p.share_interval for p in points]
            low = [max(0.0, v - 100 * end[0]) for v, end in zip(y, ends, strict=True)]
            high = [max(0.0, 100 * end[1] - v) for v, end in zip(y, ends, strict=True)]
            axis.errorbar(x, y, yerr=[low, high], fmt="o-", color="#1f5fa8", markersize=4, capsize=2, label="features")
            axis.set_ylim(bottom=0)
        else:
            axis.plot(x, y, "o-", color="#1f5fa8", markersize=4, label="features")
            axis.set_yscale("log")
            for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                ticks("{x:g}")
        axis.axvline(0, color="#dddddd", linewidth=1, zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("strength")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        canvas.savefig(temporary, dpi=150)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(canvas)


def require_figure(path: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` before the work if a figure could not be written after it."""
    if Path(path).suffix not in (".png", ".svg"):
        raise ConfigError(f"`figure` is '{path}'; its ending is `.png` or `.svg`.")
    try:
        importlib.import_module("matplotlib")
    except ImportError as err:
        raise ConfigError("`--figure` needs matplotlib, which is not installed. `pip install matplotlib`.") from err


def write_report(
    path: str | os.PathLike[str],
    chosen: Mapping[str, Any],
    texts: Sequence[tuple[str, Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[float | None]]]]]],
) -> None:
    """Plain and steered text of each prompt, the features' activations on every token.

    Args:
        path: File to write.
        chosen: Settings to show.
        texts: For each prompt, the prompt and its two versions: name, tokens, and activation of each feature at each
            token (None: not read).
    """
    versions = [version for _, pair in texts for version in pair]
    largest = max((sum(_read(column)) for v in versions for column in zip(*v[2].values(), strict=True)), default=0.0)
    parts: list[object] = [
        section("Settings", settings(chosen)),
        element(
            "p",
            "Shade: the features' summed activation at each token, as the unsteered model reads the text; the same "
            "scale in all texts. Grey: position 0, which is not read.",
        ),
    ]
    for prompt, pair in texts:
        cells = [_version(tokens, acts, largest) for _, tokens, acts in pair]
        features = list(pair[0][2])[:_SHOWN_FEATURES]
        each = [
            section(name, *(_one(tokens, acts[name], label) for label, tokens, acts in pair), level=3)
            for name in features
        ]
        body: list[object] = [table([name for name, _, _ in pair], [cells])]
        if len(features) > 1:
            body.append(details("Feature by feature", *each))
        parts.append(section(" ".join(prompt.split())[:120] or "(empty prompt)", *body, level=2))
    write_page(Path(path), "Steering", joined(parts))


def _version(tokens: Sequence[str], acts: Mapping[str, Sequence[float | None]], largest: float) -> Html:
    sums = [
        None if any(value is None for value in column) else sum(_read(column))
        for column in zip(*acts.values(), strict=True)
    ]
    return highlighted(tokens, sums, largest)


def _one(tokens: Sequence[str], values: Sequence[float | None], label: str) -> Html:
    largest = max(_read(values), default=0.0)
    return joined([element("p", f"{label}, largest {largest:.3f}"), highlighted(tokens, values, largest)])


def _read(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _controls(sweep: Sweep) -> dict[float, list[Point]]:
    found: dict[float, list[Point]] = {}
    for point in sweep.points:
        if point.arm != FEATURES:
            found.setdefault(point.strength, []).append(point)
    return dict(sorted(found.items()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(ends: tuple[float, float], digits: int = 1) -> str:
    return f"{100 * ends[0]:.{digits}f} to {100 * ends[1]:.{digits}f}"
