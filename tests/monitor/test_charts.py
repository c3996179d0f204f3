"""Charts: drawn points are the values, spikes and gaps survive thinning, nothing of data becomes markup."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import pytest

from qscope_trl.monitor import charts
from qscope_trl.monitor.charts import Bins, Line


def drawing(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", chart, re.DOTALL)[0])  # type: ignore[index]


def points(path: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (point.split() for point in piece.split("L"))]
        for piece in path.split("M")
        if piece
    ]


def number(word: ElementTree.Element) -> float:
    text = word.text or ""
    return 1000 * float(text[:-1]) if text.endswith("k") else float(text)


def read_back(chart: str) -> list[list[tuple[float, float]]]:
    """The drawn points of each piece of each curve, in the units of the axes' numbers."""
    tree = drawing(chart)
    levels = [float(line.get("y1", "")) for line in tree.findall("line[@class='grid']")]
    words = tree.findall("text")
    ups = [(level, number(word)) for level, word in zip(levels, words, strict=False)]
    across = [(float(word.get("x", "")), number(word)) for word in words if word.get("text-anchor") == "middle"]
    (y0, low), (y1, high) = ups[0], ups[-1]
    (x0, first), (x1, last) = across[0], across[-1]
    return [
        [(first + (x - x0) * (last - first) / (x1 - x0), low + (y - y0) * (high - low) / (y1 - y0)) for x, y in piece]
        for path in tree.iterfind(".//path")
        for piece in points(path.get("d", ""))
    ]


@pytest.mark.parametrize(
    "values",
    [[1.0, 3.0, 2.0, 2.5], [-4.0, -1.0, -2.0, 7.0], [0.001, 0.004, 0.002, 0.0], [5.0, 5.0, 5.0, 5.0]],
    ids=["small", "both signs", "tiny", "constant"],
)
def test_drawn_points_are_the_values(values: list[float]) -> None:
    steps = [10, 20, 40, 100]
    (found,) = read_back(charts.line_chart("loss", [Line("a", steps, values)]))
    reach = max(values) - min(values) or abs(values[0])
    for (x, y), step, value in zip(found, steps, values, strict=True):
        assert x == pytest.approx(step, abs=0.3)
        assert y == pytest.approx(value, abs=0.01 * reach)


def test_values_that_are_not_finite_are_gaps_and_a_lone_value_is_a_dot() -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0]
    chart = charts.line_chart("loss", [Line("a", range(7), values)])
    assert [len(piece) for piece in read_back(chart)] == [2, 2]
    assert len(drawing(chart).findall(".//circle")) == 5
    long = charts.line_chart("loss", [Line("a", range(80), [1.0] * 40 + [math.nan, 2.0, math.nan] + [1.0] * 37)])
    assert len(drawing(long).findall(".//circle")) == 1
    assert "a: 5.000" in chart


def test_no_finite_value_is_no_chart() -> None:
    assert charts.line_chart("loss", [Line("a", [1], [math.nan]), Line("b", [], [])]) == ""
    assert charts.charts([charts.line_chart("loss", [])]) == ""
    assert charts.path_chart("p", "x", "y", [1.0, math.nan], [math.nan, 1.0]) == ""
    assert charts.histogram_chart("h", [Bins("a", [0, 1], [0])]) == ""
    assert charts.sparkline(Line("a", [1], [1.0])) == ""


def test_thinning_keeps_spikes_ends_and_gaps() -> None:
    values = [math.sin(place / 50) for place in range(20_000)]
    values[7_777], values[12_345] = 50.0, -50.0
    values[15_000:16_000] = [math.nan] * 1000
    found = charts.thinned(Line("a", range(20_000), values), 400)
    assert len(found.steps) <= 400
    assert list(found.steps) == sorted(set(found.steps))
    assert (found.steps[0], found.steps[-1]) == (0, 19_999)
    kept = dict(zip(found.steps, found.values, strict=True))
    assert (kept[7_777], kept[12_345]) == (50.0, -50.0)
    assert any(15_000 <= step < 16_000 and math.isnan(value) for step, value in kept.items())
    short = Line("a", [1, 2], [3.0, 4.0])
    assert charts.thinned(short, 400) is short


def test_long_curves_stay_within_the_bound() -> None:
    values = np.random.default_rng(0).normal(size=50_000).tolist()
    chart = charts.line_chart("loss", [Line("a", range(50_000), values)], is_noisy=True)
    drawn = read_back(chart)
    assert max(map(len, drawn)) <= charts.MOST_POINTS
    assert max(y for piece in drawn for _, y in piece) == pytest.approx(max(values), rel=0.01)
    assert len(chart) < 25_000


@pytest.mark.parametrize("count", [5, 100, 999])
def test_the_running_mean_is_that_of_a_fiftieth(count: int) -> None:
    values = np.random.default_rng(1).normal(size=count)
    values[count // 2] = math.nan
    half = max(1, count // 100)
    wanted = [np.nanmean(values[max(0, place - half) : place + half + 1]) for place in range(count)]
    found = charts.smoothed(Line("a", range(count), values.tolist()))
    assert found.values == pytest.approx(wanted, abs=1e-9)


def test_a_limit_is_drawn_at_its_value_or_only_named_if_it_is_far_away() -> None:
    line = Line("a", [0, 1], [0.2, 0.4])
    near = drawing(charts.line_chart("j", [line], limits=[("min_jaccard", 0.6)]))
    level = near.find("line[@class='limit']")
    assert level is not None
    rows = zip(near.findall("line[@class='grid']"), near.findall("text"), strict=False)
    grid = {word.text: line.get("y1") for line, word in rows}
    assert level.get("y1") == grid["0.6"]
    far = charts.line_chart("j", [line], limits=[("max_fvu", 50.0)])
    assert drawing(far).find("line[@class='limit']") is None
    assert "limit max_fvu: 50.000" in far


def test_curves_beyond_the_colours_are_counted() -> None:
    lines = [Line(f"layer {n}", [0, 1], [n, n + 1.0]) for n in range(36)]
    chart = charts.line_chart("fvu", lines)
    assert len(drawing(chart).findall(".//path")) == charts.MOST_LINES
    assert "26 more not drawn" in chart


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (2.479, 3.976), (-7.0, 13.0), (1e-7, 3e-7), (0.0, 48_211.0), (99.999, 100.0)]
)
def test_ticks_are_few_round_and_reach_over_the_values(low: float, high: float) -> None:
    ticks = charts._ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-9 * high
    assert ticks[-1] >= high * (1 - 1e-9)
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - size) for size in (1, 2, 2.5, 5, 10)) < 1e-6


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 10), (0, 12), (5, 60), (1, 3000)])
def test_ticks_of_steps_are_whole(low: int, high: int) -> None:
    ticks = charts._ticks(low, high, is_whole=True)
    assert all(float(tick).is_integer() for tick in ticks)
    assert sum(low <= tick <= high for tick in ticks) in range(2, 8)


def test_numbers_of_axes_are_short() -> None:
    given = [0, 0.30000000000000004, 2.5, 15_000, 12_500, 2e-5, 3_000_000, -0.05]
    assert [charts.number(value) for value in given] == [
        "0", "0.3", "2.5", "15k", "12.5k", "2e-05", "3e+06", "-0.05",
    ]  # fmt: skip


def test_histograms_show_shares_of_all_tokens_on_a_logarithmic_scale() -> None:
    chart = charts.histogram_chart(
        "L5F1", [Bins("step 0", [0, 1, 2, 3], [90, 10, 0], 1000), Bins("step 9", [0, 1, 2], [0, 0])]
    )
    tree = drawing(chart)
    paths = [path for path in tree.iterfind(".//path") if path.get("class") == "curve outline"]
    assert len(paths) == 1
    (outline,) = points(paths[0].get("d", ""))
    words = tree.findall("text")
    levels = {
        word.text: float(line.get("y1", ""))
        for line, word in zip(tree.findall("line[@class='grid']"), words, strict=False)
    }
    assert set(levels) == {"0", "1%", "10%", "100%"}
    decade = levels["1%"] - levels["10%"]
    assert outline[0][1] == pytest.approx(levels["10%"] - math.log10(0.9) * decade, abs=0.2)
    assert outline[2][1] == pytest.approx(levels["1%"], abs=0.2)
    assert outline[-1][1] == pytest.approx(levels["0"], abs=0.2)


def test_pairs_are_drawn_in_their_order() -> None:
    chart = charts.path_chart("p", "penalty", "loss", [1.0, 2.0, 3.0], [9.0, 8.0, 7.0])
    dots = drawing(chart).findall("circle")
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in dots]
    assert places == sorted(places)
    strengths = [float((dot.get("style") or "").split(":")[1]) for dot in dots]
    assert strengths == sorted(strengths)
    assert {"first", "last", "penalty", "loss"} <= {word.text for word in drawing(chart).findall("text")}


def test_small_curves_are_bounded_and_say_their_ends() -> None:
    shown = charts.sparkline(Line("rate", range(5000), [1 - place / 5000 for place in range(5000)]))
    (curve,) = drawing(shown).findall("polyline")
    heights: Sequence[float] = [float(point.split(",")[1]) for point in (curve.get("points") or "").split()]
    assert len(heights) == 60
    assert list(heights) == sorted(heights)
    assert "rate: 1.000 to 2.0e-04" in shown


def test_names_are_escaped() -> None:
    name = '"><script>alert(1)</script>'
    line = Line(name, [0, 1], [1.0, 2.0])
    shown = charts.line_chart(name, [line], limits=[(name, 1.5)], x_name=name, note=name) + charts.sparkline(line)
    shown += charts.histogram_chart(name, [Bins(name, [0, 1], [1])]) + charts.path_chart(
        name, name, name, [1, 2], [1, 2]
    )
    assert "<script" not in shown
