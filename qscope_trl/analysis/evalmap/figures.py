"""Figures of a map: overlaps as a heat map, clusters as a tree, coverage as curves, scores as points.

Vector graphics only, so that a page may hold them without loading anything. Without Matplotlib there are none.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qscope_trl.analysis.evalmap.mapping import Map
from qscope_trl.analysis.evalmap.rankings import PairAgreement
from qscope_trl.analysis.evalmap.scoring import ScoreFigures

_MOST_NUMBERS = 20
_MOST_CURVES = 10


class Figure(NamedTuple):
    """A drawn figure."""

    name: str
    """Of its files."""

    title: str
    """What it shows."""

    svg: str
    """The whole file."""

    png: bytes
    """The same as pixels."""

    @property
    def inline(self) -> str:
        """The SVG as an element of a page; its ids are its own."""
        found = re.sub(r"<metadata>.*?</metadata>", "", self.svg[self.svg.index("<svg") :], flags=re.DOTALL)
        found = re.sub(r'\bid="', f'id="{self.name}-', found)
        found = re.sub(r'href="#', f'href="#{self.name}-', found)
        return re.sub(r"url\(#", f"url(#{self.name}-", found)


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return False
    return True


def draw(found: Map, scores: ScoreFigures | None) -> list[Figure]:
    """All figures that there is something to draw for; none if Matplotlib is not installed."""
    if not has_matplotlib():
        return []
    figures = [_overlaps(found)]
    if found.clusters is not None:
        figures.append(_tree(found))
    figures.append(_curves(found))
    if scores is not None:
        shown = [("scores", scores.overlap_agreement), ("scores_partial", scores.partial_agreement)]
        figures += [_agreement(name, pairs, scores.given) for name, pairs in shown if pairs is not None]
    return figures


def _overlaps(found: Map) -> Figure:
    order = _order(found)
    names = [found.names[place] for place in order]
    values = found.overlaps.of_row[np.ix_(order, order)]
    side = max(3.0, 1.8 + 0.45 * len(names))
    canvas, axis = _canvas(side, side)
    axis.pcolormesh(values, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    axis.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(np.arange(len(names)) + 0.5, names)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.set_ylabel("share of this set's features ...")
    axis.set_xlabel("... that this set has")
    if len(names) <= _MOST_NUMBERS:
        for row, column in np.ndindex(values.shape):
            color = "white" if values[row, column] < 0.6 else "black"
            text = f"{values[row, column]:.2f}"
            axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=color)
    return _saved(canvas, "overlaps", "Overlap: how much of the set of a row the set of a column covers")


def _tree(found: Map) -> Figure:
    from scipy.cluster.hierarchy import dendrogram

    tree: Any = dendrogram(found.clusters.linkage, no_plot=True) if found.clusters is not None else {}
    canvas, axis = _canvas(6.0, max(2.0, 0.6 + 0.3 * len(found.names)))
    for across, along in zip(tree["icoord"], tree["dcoord"], strict=True):
        axis.plot([1 - value for value in along], across, color="#1f3b57", linewidth=1.2)
    axis.set_yticks(10 * np.arange(len(found.names)) + 5, [found.names[leaf] for leaf in tree["leaves"]])
    axis.yaxis.tick_right()
    axis.invert_yaxis()
    axis.set_xlim(-0.02, 1.0)
    axis.set_xlabel("mean overlap of what is joined (overlap_min)")
    axis.spines[["top", "left"]].set_visible(False)
    return _saved(canvas, "clusters", "Clusters: sets joined by their mean overlap")


def _curves(found: Map) -> Figure:
    canvas, axis = _canvas(6.0, 4.0)
    color = importlib.import_module("matplotlib").colormaps["tab10"]
    # The largest sets, if there are more than can be told apart.
    shown = sorted(range(len(found.sets)), key=lambda place: -found.sets[place].num_samples)[:_MOST_CURVES]
    for place in sorted(shown):
        entry = found.sets[place]
        style = {"color": color(place % 10), "linewidth": 1.2}
        axis.plot(entry.curve_sizes, entry.curve, label=entry.name, **style)
        chosen = np.arange(1, entry.chosen.covered.size + 1)
        axis.plot(chosen, entry.chosen.covered / entry.num_features, linestyle=":", **style)
    axis.set_xscale("log")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("samples (dotted: chosen greedily; solid: at random)")
    axis.set_ylabel("share of the set's features")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    title = "Coverage: features that so many samples show"
    if len(found.sets) > _MOST_CURVES:
        title += f" (the {_MOST_CURVES} largest sets)"
    return _saved(canvas, "coverage", title)


def _agreement(name: str, pairs: PairAgreement, given: str | None) -> Figure:
    canvas, axis = _canvas(4.5, 3.6)
    axis.plot(pairs.overlap, pairs.correlation, "o", color="#1f3b57", markersize=4, alpha=0.8)
    axis.set_xlabel("overlap of the two sets")
    is_partial = name == "scores_partial"
    axis.set_ylabel("correlation of the scores" + (f", given {given}" if is_partial else ""))
    axis.spines[["top", "right"]].set_visible(False)
    return _saved(canvas, name, "Overlap and agreement of scores, one point a pair of sets")


def _order(found: Map) -> Sequence[int]:
    """Sets as the tree has them, so that like ones lie side by side."""
    if found.clusters is None:
        return range(len(found.names))
    from scipy.cluster.hierarchy import leaves_list

    leaves: Sequence[int] = leaves_list(found.clusters.linkage).tolist()
    return leaves


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    kind: Any = importlib.import_module("matplotlib.figure").Figure
    canvas = kind(figsize=(width, height), layout="constrained")
    return canvas, canvas.subplots()


def _saved(canvas: Any, name: str, title: str) -> Figure:
    matplotlib: Any = importlib.import_module("matplotlib")
    text, pixels = io.StringIO(), io.BytesIO()
    # Text stays text, and equal figures are equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        canvas.savefig(text, format="svg", metadata={"Date": None})
    canvas.savefig(pixels, format="png", dpi=150)
    return Figure(name, title, text.getvalue(), pixels.getvalue())
