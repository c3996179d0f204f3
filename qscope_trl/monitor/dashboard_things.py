"""What a dashboard shows, made from the rows of a run's record: histograms, tables and pages, by name.

Names begin with the section they stand in. Tokens are shaded by the sum of the penalised features at them. Left out:
how the rows come about, and where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qscope_trl.monitor import html
from qscope_trl.monitor.dashboard_wandb import Histogram, Scatter, Shown, Table
from qscope_trl.monitor.html import Html

_MOST_POINTS = 2000
_EVEN = "table { display: table; table-layout: fixed; width: 100%; }"
_TEXTS_WIDE = "td:nth-child(-n + 2) { min-width: 15rem; }"

Values = Sequence[float | None]
"""A value for each token; None where nothing was read."""


class Strongest(NamedTuple):
    """A text in which a feature is strong."""

    feature: str
    """Its name."""

    text: int
    """Which text."""

    largest: float
    """Largest activation in it."""

    tokens: Sequence[str]
    """Its tokens."""

    values: Values
    """Activation of the feature at each."""


def histogram_things(rows: Sequence[Mapping[str, Any]]) -> dict[str, Shown]:
    """A histogram per feature, from rows of `histograms.jsonl`."""
    return {
        f"sae_histograms/{row['kind']}_{row['feature']}": Histogram(row["edges"], row["counts"])
        for row in rows
        if any(row["counts"])
    }


def text_things(step: int, strongest: Sequence[Strongest]) -> dict[str, Shown]:
    """The fixed texts in which features are strongest now, as a table and as a page."""
    if not strongest:
        return {}
    limits: dict[str, float] = {}
    for one in strongest:
        limits[one.feature] = max(limits.get(one.feature, 0.0), one.largest)
    shaded = [html.highlighted(one.tokens, one.values, limits[one.feature]) for one in strongest]
    rows = [[step, one.feature, one.text, one.largest, text] for one, text in zip(strongest, shaded, strict=True)]
    header = ["feature", "text", "largest", "tokens"]
    body = html.table(header, [row[1:] for row in rows])
    return {
        "sae_texts/strongest": Table(["step", *header], rows),
        "sae_texts/page": Html(html.page(f"Fixed texts at step {step}", body)),
    }


def sample_things(
    step: int,
    rows: Sequence[Mapping[str, Any]],
    first: Sequence[Mapping[str, Any]],
    penalised: Sequence[str],
) -> dict[str, Shown]:
    """Generations now beside those of the same prompts at the first measurement, as a table and as a page.

    Args:
        step: Optimizer steps done.
        rows: Rows of `samples.jsonl` at this step.
        first: Those of the first step, in the same order; the same rows there.
        penalised: Features that shade the tokens.
    """
    if not rows:
        return {}
    is_first = rows[0]["step"] == first[0]["step"]
    limit = _largest([*rows, *first], penalised)
    table, lines = [], []
    for row, before in zip(rows, first, strict=True):
        now = _shaded(row, penalised, limit)
        table.append([step, row["index"], row["prompt"], row["text"], _verdict(row), now])
        line: list[object] = [row["prompt"], html.joined([_dim(_verdict(row)), now])]
        if not is_first:
            line.insert(1, html.joined([_dim(_verdict(before)), _shaded(before, penalised, limit)]))
        lines.append(line)
    header = ["prompt", f"step {step}"] if is_first else ["prompt", f"step {first[0]['step']}", f"step {step}"]
    return {
        "sae_samples/generations": Table(["step", "prompt_index", "prompt", "text", "verdict", "tokens"], table),
        "sae_samples/page": Html(html.page(f"Generations at step {step}", html.table(header, lines), _EVEN)),
    }


def rollout_things(step: int, rows: Sequence[Mapping[str, Any]], penalised: Sequence[str]) -> dict[str, Shown]:
    """The last rollouts with score, advantages, policy and rewards, as a table and as a page."""
    if not rows:
        return {}
    limit = _largest(rows, penalised)
    rewards = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    header = ["prompt", "score", "advantage_before", "advantage", "policy", *rewards, "tokens"]
    lines = [
        [
            row["prompt"],
            row["score"],
            row["advantage_before"],
            row["advantage"],
            row["policy"],
            *(row["rewards"].get(name) for name in rewards),
            _shaded(row, penalised, limit),
        ]
        for row in rows
    ]
    shown = [name.replace("_before", " before") for name in (header[0], header[-1], *header[1:-1])]
    body = html.table(shown, [[line[0], line[-1], *line[1:-1]] for line in lines])
    return {
        "sae_rollouts/rollouts": Table(["step", *header], [[step, *line] for line in lines]),
        "sae_rollouts/page": Html(html.page(f"Rollouts at step {step}", body, _TEXTS_WIDE)),
    }


def penalty_things(points: Sequence[tuple[int, float, float]]) -> dict[str, Shown]:
    """Penalty against task loss, one point per log event: `(step, penalty, task loss)`."""
    if len(points) < 2:
        return {}
    apart = -(-len(points) // _MOST_POINTS)
    rows = [[penalty, loss, step] for step, penalty, loss in points[::apart]]
    table = Table(["penalty", "task_loss", "step"], rows)
    return {"sae_penalty/against_task_loss": Scatter(table, "Penalty against task loss, a point per log event")}


def summed(values: Mapping[str, Values], features: Sequence[str], count: int) -> list[float | None]:
    """Sum over some features at each token; None where none was read."""
    chosen = [values[name] for name in features if name in values]
    found: list[float | None] = []
    for place in range(count):
        read = [value for one in chosen if (value := one[place]) is not None]
        found.append(sum(read) if read else None)
    return found


def _shaded(row: Mapping[str, Any], features: Sequence[str], limit: float) -> Html:
    return html.highlighted(row["tokens"], summed(row["values"], features, len(row["tokens"])), limit)


def _largest(rows: Sequence[Mapping[str, Any]], features: Sequence[str]) -> float:
    sums = (summed(row["values"], features, len(row["tokens"])) for row in rows)
    return max((value for one in sums for value in one if value is not None), default=0.0)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["is_shown"] is None:
        return ""
    return f"shows {row['detector']}" if row["is_shown"] else f"no {row['detector']}"


def _dim(words: str) -> Html:
    return html.element("div", words, class_="dim")
