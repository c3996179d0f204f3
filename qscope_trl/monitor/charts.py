"""Charts as inline SVG: curves over steps, small curves for tables, points, histograms.

Drawn here and not by Matplotlib: so a page of them follows the reader's light or dark theme and width, has a curve for
each of hundreds of features at a kilobyte apiece, and is made without Matplotlib or NumPy. Left out: anything that
needs a script, so the pointer shows a curve's name and not its values; the last ones stand in the legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from qscope_trl.monitor.html import Html, element, figure, joined, text

MOST_LINES = 10
"""Curves in one chart, as many as there are colours."""

MOST_POINTS = 500
"""Points of a drawn curve; of more, the least and the largest of each stretch are kept."""

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 10, 32
_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_POINTS = 120, 26, 60
_SMOOTH_FROM = 100
_DOTS_TO = 30
_LIGHT = ["#2458c0", "#c8480c", "#137a4b", "#9a2d9c", "#846300", "#0b7a8c", "#b81f55", "#5f4fa2", "#55636b", "#7a4b1f"]
_DARK = ["#74a9ff", "#ff9b61", "#5bd198", "#da90ea", "#dcbf52", "#58cfe0", "#ff8daf", "#b6a8ef", "#a9b6be", "#d2a57b"]


def _palette(colors: Sequence[str]) -> str:
    return " ".join(f".c{place} {{ color: {color}; }}" for place, color in enumerate(colors))


STYLE = f"""
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.4rem 2rem; }}
.chart {{ margin: 0; min-width: 0; }} .chart figcaption {{ font-size: .9rem; }}
.chart svg {{ width: 100%; height: auto; display: block; }}
.chart text {{ font: 11px system-ui, sans-serif; fill: currentColor; opacity: .75; }}
.chart text.over {{ paint-order: stroke; stroke: Canvas; stroke-width: 3px; opacity: 1; }}
.chart .grid {{ stroke: var(--line); }} .chart .limit {{ stroke: currentColor; stroke-dasharray: 5 4; opacity: .75; }}
.curve {{ fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }}
.curve.faint {{ opacity: .3; stroke-width: 1; }} .dot {{ fill: currentColor; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; margin: .2rem 0 0; padding: 0; }}
.legend li {{ list-style: none; overflow-wrap: anywhere; }}
.key {{ display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; background: currentColor; margin-right: .3rem; }}
.spark {{ width: {_SPARK_WIDTH}px; height: {_SPARK_HEIGHT}px; display: block; }}
{_palette(_LIGHT)}
@media (prefers-color-scheme: dark) {{ {_palette(_DARK)} }}
@media print {{ .chart {{ break-inside: avoid; }} }}
"""  # noqa: E501
"""What a page with charts adds to its style."""


class Line(NamedTuple):
    """One curve."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    """As many as steps; one that is not finite is a gap."""


class Bins(NamedTuple):
    """One histogram."""

    name: str
    edges: Sequence[float]
    """Ascending, one more than counts."""

    counts: Sequence[float]
    total: float | None = None
    """Of what the counts are shares; their sum if not given."""


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """The curve with at most so many points: of each stretch the least and the largest value, so no spike is lost.

    Args:
        line: The curve.
        most: Points to keep, 4 or more.
    """
    count = len(line.steps)
    if count <= most:
        return line
    kept: list[int] = []
    stretches = most // 2 - 1
    for number in range(stretches):
        places = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [place for place in places if math.isfinite(line.values[place])]
        # A stretch without a finite value stays a gap.
        ends = [min(finite, key=line.values.__getitem__), max(finite, key=line.values.__getitem__)] if finite else []
        kept += sorted(set(ends)) or [places[0]]
    chosen = sorted({0, *kept, count - 1})
    return Line(line.name, [line.steps[place] for place in chosen], [line.values[place] for place in chosen])


def smoothed(line: Line) -> Line:
    """The running mean over a fiftieth of the curve's values; values that are not finite are left out."""
    half = max(1, len(line.values) // 100)
    sums, counts = [0.0], [0]
    for value in line.values:
        sums.append(sums[-1] + (value if math.isfinite(value) else 0.0))
        counts.append(counts[-1] + math.isfinite(value))
    means = []
    for place in range(len(line.values)):
        low, high = max(0, place - half), min(len(line.values), place + half + 1)
        number = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / number if number else math.nan)
    return Line(line.name, line.steps, means)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    limits: Sequence[tuple[str, float]] = (),
    is_noisy: bool = False,
    x_name: str = "step",
    note: str = "",
) -> Html:
    """Curves over steps with axes, and a legend with the last value of each; nothing if there is no finite value.

    Args:
        title: What is shown, with its unit.
        lines: Curves; those after the first `MOST_LINES` are left out and counted in the legend.
        limits: Name and value of horizontal lines.
        is_noisy: Whether to draw the running mean of long curves, and the curves themselves faintly.
        x_name: What the horizontal axis counts.
        note: More about it, beside the title.
    """
    lines = [line for line in lines if any(map(math.isfinite, line.values))]
    if not lines:
        return Html("")
    shown = lines[:MOST_LINES]
    xs = [float(step) for line in shown for step in line.steps]
    ys = [value for line in shown for value in line.values if math.isfinite(value)]
    # A limit far away would flatten the curves; it is named in the legend in any case.
    reach = max(ys) - min(min(ys), 0.0)
    drawn_limits = [(name, value) for name, value in limits if min(ys) - reach <= value <= max(ys) + reach]
    frame = _Frame(xs, ys + [value for _, value in drawn_limits])
    parts = [frame.axes(x_name)]
    parts += [_level(frame, name, value) for name, value in drawn_limits]
    for place, line in enumerate(shown):
        is_smoothed = is_noisy and len(line.values) >= _SMOOTH_FROM
        if is_smoothed:
            parts.append(_curve(frame, thinned(line), place, "curve faint"))
        parts.append(_curve(frame, thinned(smoothed(line) if is_smoothed else line), place))
    entries = [_entry(place, line.name, _last(line)) for place, line in enumerate(shown)]
    entries += [element("li", f"limit {name}: {figure(value)}") for name, value in limits]
    if len(lines) > len(shown):
        entries.append(element("li", f"{len(lines) - len(shown)} more not drawn", class_="dim"))
    return _chart(title, note, parts, entries)


def sparkline(line: Line, place: int = 0) -> Html:
    """A curve for a table's cell, on its own scale, with 0 where values are not negative."""
    values = [value for value in _means(line.values, _SPARK_POINTS) if math.isfinite(value)]
    if len(values) < 2:
        return Html("")
    low, high = min(values), max(values)
    low = 0.0 if low >= 0 else low
    span = high - low or 1.0
    step = (_SPARK_WIDTH - 4) / (len(values) - 1)
    points = " ".join(
        f"{2 + place * step:.1f},{2 + (_SPARK_HEIGHT - 4) * (1 - (value - low) / span):.1f}"
        for place, value in enumerate(values)
    )
    curve = element("polyline", points=points, class_=f"curve c{place % MOST_LINES}")
    about = f"{line.name}: {figure(_first(line))} to {figure(_last(line))}"
    box = f"0 0 {_SPARK_WIDTH} {_SPARK_HEIGHT}"
    return element("svg", element("title", about), curve, viewBox=box, class_="spark", role="img")


def path_chart(title: str, x_name: str, y_name: str, xs: Sequence[float], ys: Sequence[float], note: str = "") -> Html:
    """Pairs of values in the order they came, later ones stronger, with the first and the last named."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    pairs = pairs[:: max(1, -(-len(pairs) // MOST_POINTS))]
    if len(pairs) < 2:
        return Html("")
    frame = _Frame([x for x, _ in pairs], [y for _, y in pairs], keeps_zero=False)
    parts = [frame.axes(x_name), _words(y_name, _LEFT + 6, _TOP + 10, "start")]
    for number, (x, y) in enumerate(pairs):
        strength = 0.15 + 0.75 * number / (len(pairs) - 1)
        at = {"cx": f"{frame.x(x):.1f}", "cy": f"{frame.y(y):.1f}", "r": "3"}
        parts.append(element("circle", **at, class_="dot c0", style=f"opacity:{strength:.2f}"))
    for name, (x, y) in (("first", pairs[0]), ("last", pairs[-1])):
        anchor, dx = ("end", -6) if frame.x(x) > _WIDTH / 2 else ("start", 6)
        dy = 16 if frame.y(y) < _HEIGHT / 2 else -8
        parts.append(_words(name, frame.x(x) + dx, frame.y(y) + dy, anchor, class_="over"))
    return _chart(title, note, parts, [])


def histogram_chart(title: str, histograms: Sequence[Bins], note: str = "") -> Html:
    """Histograms over one another as outlines: the share of tokens in each bin, on a logarithmic scale."""
    shares = []
    for bins in histograms[:MOST_LINES]:
        total = bins.total or sum(bins.counts)
        if total > 0 and len(bins.edges) == len(bins.counts) + 1:
            shares.append(Bins(bins.name, bins.edges, [count / total for count in bins.counts]))
    positive = [share for bins in shares for share in bins.counts if share > 0]
    if not positive:
        return Html("")
    # The lowest line stands for 0, so every share lies above it.
    floor = math.ceil(math.log10(min(positive))) - 1
    edges = [edge for bins in shares for edge in bins.edges]
    powers = [float(power) for power in range(floor, 1)]
    frame = _Frame(edges, [floor, 0.0], ticks=powers, write=lambda value: "0" if value == floor else _power(value))
    parts = [frame.axes("activation")]
    for place, bins in enumerate(shares):
        points: list[tuple[float, float]] = []
        for number, share in enumerate(bins.counts):
            height = math.log10(share) if share > 0 else float(floor)
            points += [(bins.edges[number], height), (bins.edges[number + 1], height)]
        line = Line(bins.name, [x for x, _ in points], [y for _, y in points])
        parts.append(_curve(frame, line, place, "curve outline"))
    entries = [_entry(place, bins.name, None) for place, bins in enumerate(shares)]
    return _chart(title, note, parts, entries)


def bar(share: float) -> Html:
    """A bar for a table's cell: a share of its width."""
    width = 100 * min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    style = f"display:block;width:8rem;background:linear-gradient(90deg,currentColor {width:.1f}%,var(--line) 0)"
    return element("span", style=f"{style};height:.6rem;border-radius:.2rem;margin-top:.45rem", class_="c0")


def charts(parts: Iterable[Html]) -> Html:
    """Charts side by side, as many as fit; nothing if all are empty."""
    found = [part for part in parts if part]
    return element("div", *found, class_="charts") if found else Html("")


def number(value: float) -> str:
    """A short form for axes: `1.5k`, `0.02`, `1e-05`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    return f"{value / 1000:g}k" if size >= 10_000 else f"{round(value, 6):g}"


# --- details -----------------------------------------------------------------------------------------------------


class _Frame:
    """Where values lie in a chart."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        keeps_zero: bool = True,
        ticks: Sequence[float] | None = None,
        write: Callable[[float], str] = number,
    ) -> None:
        self.x_low, self.x_high = min(xs), max(xs)
        low, high = min(ys), max(ys)
        if keeps_zero and ticks is None and 0 < low < 0.6 * high:
            low = 0.0
        if low == high:
            low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
        self.ticks = list(ticks) if ticks is not None else _ticks(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        self.write = write

    def x(self, value: float) -> float:
        """Its place to the right."""
        span = self.x_high - self.x_low
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((value - self.x_low) / span if span else 0.5)

    def y(self, value: float) -> float:
        """Its place downwards."""
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share

    def axes(self, x_name: str) -> Html:
        """Lines and numbers."""
        parts = []
        for tick in self.ticks[:: max(1, len(self.ticks) // 7 + (len(self.ticks) > 7))]:
            at = f"{self.y(tick):.1f}"
            parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
            parts.append(_words(self.write(tick), _LEFT - 6, self.y(tick) + 4, "end"))
        is_whole = x_name == "step"
        wanted = _ticks(self.x_low, self.x_high, is_whole=is_whole) if self.x_high > self.x_low else [self.x_low]
        for tick in wanted:
            if self.x_low <= tick <= self.x_high:
                parts.append(_words(number(tick), self.x(tick), _HEIGHT - _BOTTOM + 14, "middle"))
        parts.append(_words(x_name, _WIDTH - _RIGHT, _HEIGHT - 3, "end"))
        return joined(parts)


def _ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    """At most seven round numbers that reach over both ends as little as possible; whole ones if that is asked for."""
    rough = max((high - low) / 4, 1.0) if is_whole else (high - low) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    sizes = [size for size in (1, 2, 2.5, 5, 10) if not is_whole or (size * scale).is_integer()]
    step = next(size * scale for size in sizes if size * scale >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def _curve(frame: _Frame, line: Line, place: int, kind: str = "curve") -> Html:
    pieces: list[list[str]] = [[]]
    for step, value in zip(line.steps, line.values, strict=True):
        if math.isfinite(value):
            pieces[-1].append(f"{frame.x(step):.1f} {frame.y(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    pieces = [piece for piece in pieces if piece]
    path = "".join("M" + "L".join(piece) for piece in pieces if len(piece) > 1)
    parts = [element("path", element("title", line.name), d=path, class_=kind)] if path else []
    # Where values are few, the reader should see which there are.
    is_dotted = kind == "curve" and sum(map(len, pieces)) <= _DOTS_TO
    for piece in pieces:
        for point in piece if is_dotted or len(piece) == 1 else ():
            x, y = point.split()
            parts.append(element("circle", element("title", line.name), cx=x, cy=y, r="2.2", class_="dot"))
    return element("g", *parts, class_=f"c{place % MOST_LINES}")


def _level(frame: _Frame, name: str, value: float) -> Html:
    at = f"{frame.y(value):.1f}"
    line = element("line", element("title", name), x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="limit")
    height = frame.y(value) + (13 if frame.y(value) < _TOP + 12 else -4)
    return joined([line, _words(name, _WIDTH - _RIGHT, height, "end", class_="over")])


def _words(words: str, x: float, y: float, anchor: str, class_: str | None = None) -> Html:
    return element("text", words, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, **{"text-anchor": anchor})


def _entry(place: int, name: str, value: float | None) -> Html:
    told = name if value is None else f"{name}: {figure(value)}"
    return element("li", element("span", class_=f"key c{place % MOST_LINES}"), text(told))


def _chart(title: str, note: str, parts: Sequence[Html], entries: Sequence[Html]) -> Html:
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    drawing = element("svg", element("title", title), *parts, viewBox=box, role="img", **{"aria-label": title})
    about = [element("b", title)] + ([element("span", f" {note}", class_="dim")] if note else [])
    legend = [element("ul", *entries, class_="legend")] if entries else []
    return element("figure", element("figcaption", *about), drawing, *legend, class_="chart")


def _means(values: Sequence[float], most: int) -> list[float]:
    """Means of as many stretches, of finite values only."""
    if len(values) <= most:
        return list(values)
    means = []
    for place in range(most):
        part = values[place * len(values) // most : (place + 1) * len(values) // most]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _first(line: Line) -> float:
    return next((value for value in line.values if math.isfinite(value)), math.nan)


def _last(line: Line) -> float:
    return next((value for value in reversed(line.values) if math.isfinite(value)), math.nan)


def _power(value: float) -> str:
    return f"{100 * 10**value:g}%"
