"""A map as lines on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qscope_trl.analysis.evalmap.near import NearSets
from qscope_trl.analysis.evalmap.rankings import Interval
from qscope_trl.monitor.html import figure
from qscope_trl.monitor.text_table import aligned

if TYPE_CHECKING:
    from qscope_trl.analysis.evalmap.run import Mapped

FEW_PAIRS = "fewer than three pairs of scored sets: no correlation"
"""Said where a correlation over pairs of sets would say nothing."""

_MOST_SETS = 12
_MOST_LINES = 10


def format_map(result: Mapped) -> str:
    """Sets, overlaps, clusters, near samples and scores."""
    found = result.map
    header = ["set", "samples", "features", "R", "halves", "own", "nearest", "overlap", "10 %", "random"]
    rows = []
    for entry in found.sets:
        tenth = min(entry.subsets, key=lambda subset: abs(subset.size - entry.num_samples / 10))
        rows.append(
            [
                entry.name,
                str(entry.num_samples),
                str(entry.num_features),
                f"{entry.redundancy:.4f}",
                figure(entry.half_overlap),
                figure(entry.own),
                entry.nearest or "-",
                figure(entry.nearest_overlap),
                figure(tenth.greedy),
                figure(tenth.random),
            ]
        )
    lines = aligned([header, *rows], left=(0, 6))
    if 1 < len(found.names) <= _MOST_SETS:
        lines += ["", "overlap: share of the row's features that the column has"]
        table = [["", *found.names]]
        table += [[name, *map(figure, found.overlaps.of_row[i].tolist())] for i, name in enumerate(found.names)]
        lines += aligned(table, left=(0,))
    lines.append("")
    if found.clusters is not None:
        groups: dict[int, list[str]] = {}
        for entry in found.sets:
            groups.setdefault(entry.cluster, []).append(entry.name)
        lines.append("clusters: " + "; ".join(", ".join(names) for names in groups.values()))
        lines.append("added: " + ", ".join(f"{step.name} +{step.added}" for step in found.marginal))
    unlike = [entry.name for entry in found.sets if entry.is_unlike]
    if unlike:
        lines.append(f"unlike all others: {', '.join(unlike)}")
    lines += _near(result.near, "near samples") + _near(result.train, "near training texts")
    lines += _scores(result)
    for source in result.read.sets:
        dropped = source.num_samples - result.read.footprints.num_samples(source.name)
        if dropped:
            lines.append(f"{source.name}: {dropped} of {source.num_samples} samples have no token to read")
        if result.read.num_full[source.name]:
            lines.append(f"{source.name}: {result.read.num_full[source.name]} samples reach `max_length`")
    return "\n".join(lines) + "\n"


def _near(found: Sequence[NearSets], title: str) -> list[str]:
    some = sorted((entry for entry in found if entry.near), key=lambda entry: (-entry.same_text, -entry.near))
    lines = [
        f"{title}: {entry.near} of {entry.looked_up} of {entry.name} in {entry.other}, {entry.same_text} the same text"
        for entry in some[:_MOST_LINES]
    ]
    if len(some) > _MOST_LINES:
        lines.append(f"{title}: and {len(some) - _MOST_LINES} more")
    if found and not some:
        lines.append(f"{title}: none")
    return lines


def _scores(result: Mapped) -> list[str]:
    scores = result.scores
    if scores is None:
        return []
    lines = []
    for name, entry in scores.performance.items():
        last = scores.rankings[name][-1]
        lines.append(
            f"{name}: R_perf {_interval(entry.interval)}; subset of {last.size}: tau {_interval(last.greedy)}, random "
            f"{_interval(last.random)}"
        )
    shown = [
        ("Spearman of R and R_perf over sets", scores.redundancy_agreement),
        ("Pearson of overlap and score correlation", scores.overlap_agreement and scores.overlap_agreement.agreement),
        (f"the same, given {scores.given}", scores.partial_agreement and scores.partial_agreement.agreement),
    ]
    for title, interval in shown:
        if interval is not None:
            lines.append(f"{title}: {_interval(interval)}")
    if scores.overlap_agreement is None:
        lines.append(f"scores: {FEW_PAIRS}")
    elif scores.given is not None and scores.partial_agreement is None:
        lines.append(f"scores, given {scores.given}: {FEW_PAIRS}")
    return lines


def _interval(found: Interval) -> str:
    return f"{figure(found.value)} ({figure(found.low)} to {figure(found.high)})"
