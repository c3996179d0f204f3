"""What a synthesis came to: coverage before and after, acceptance beside its controls, and the files written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qscope_trl.analysis.synthesis.coverage import Coverage
from qscope_trl.features import FeatureId
from qscope_trl.files import write_whole
from qscope_trl.monitor.text_table import aligned

TEXTS = "synthesized"
"""Name of the files with the accepted texts, without suffix."""

COVERAGE = "coverage.json"
"""Name of the file with everything that was measured."""

_LABEL_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What generating for one feature came to.

    Args:
        feature: The feature.
        label: What it stands for.
        before: Texts of the data that fire it.
        after: These, and the accepted texts of all features whose response fires it.
        accepted: Texts accepted for it.
        outcomes: Candidates by outcome: `accepted`, `silent` (does not fire), `duplicate`, `copy` (of an example),
            `empty`, `malformed`, `too long`.
        prompts_from: Where its prompts come from: `asked`, `prompts`, `examples` or `data`.
        fire_rate: Share of the responses read in which it fires; `None` if none was read.
        matched_rate: Mean share of its matched random features that fire in the same responses.
        plain_rate: Share of the plain generations in which it fires.
        requests: Requests for it that were answered.
    """

    feature: FeatureId
    label: str
    before: int
    after: int
    accepted: int
    outcomes: Mapping[str, int]
    prompts_from: str
    fire_rate: float | None
    matched_rate: float | None
    plain_rate: float | None
    requests: int


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What `qscope synthesize` did.

    Args:
        output: Folder that was written.
        min_activation: Activation that a feature had to exceed.
        before: Coverage of the data.
        after: Coverage of the data and the accepted texts.
        filled: What came of each feature that was generated for.
        rows: The accepted texts, as written.
        num_plain: Plain generations that were read.
        plain_error: Standard error of the mean `plain_rate` over these generations, which all features share; 0 with
            fewer than two.
        spent: Requests, failed attempts among them, and tokens, resumed runs included.
        left: Requests and tokens that the budget still has; without tokens if these have no bound.
        generator: What wrote the texts; empty if nothing did.
        is_finished: Whether all was asked; false if the budget ended before.
    """

    output: Path
    min_activation: float
    before: Coverage
    after: Coverage
    filled: Sequence[Filled] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    num_plain: int = 0
    plain_error: float = 0.0
    spent: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    generator: str = ""
    is_finished: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Everything but the texts, for JSON."""
        return {
            "generator": self.generator,
            "is_finished": self.is_finished,
            "min_activation": self.min_activation,
            "weak_below": self.before.weak_below,
            "coverage": {
                name: {
                    "value": coverage.value,
                    "num_texts": coverage.num_texts,
                    "missing": [str(feature) for feature in coverage.missing],
                    "weak": [str(feature) for feature in coverage.weak],
                    "counts": {str(feature): count for feature, count in coverage.counts.items()},
                }
                for name, coverage in (("before", self.before), ("after", self.after))
            },
            "filled": [{**vars(one), "feature": str(one.feature)} for one in self.filled],
            "num_plain": self.num_plain,
            "plain_error": self.plain_error,
            "spent": dict(self.spent),
            "left": dict(self.left),
        }


def write(result: Synthesis) -> None:
    """Write texts and coverage, each file whole or not at all.

    Raises:
        OSError: If one cannot be written.
    """
    if result.generator:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
        write_whole(result.output / f"{TEXTS}.jsonl", "".join(lines))
        _write_parquet(result.output / f"{TEXTS}.parquet", result.rows)
    write_whole(result.output / COVERAGE, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    schema = pa.schema(
        [
            ("text", text),
            ("prompt", text),
            ("response", text),
            ("feature", text),
            ("activation", number),
            ("fires", pa.list_(text)),
            ("generator", text),
            ("mode", text),
            ("template", text),
            ("seed", pa.int64()),
            ("key", text),
        ]
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def format_result(result: Synthesis) -> str:
    """Coverage before and after, a line for each feature that was generated for, the controls, and what was spent."""
    before, after = result.before, result.after
    lines = [f"coverage of {len(before.counts)} features, fired above {result.min_activation:g}:"]
    lines += aligned(
        [
            ("", "texts", "covered", "", "missing", f"weak (<{before.weak_below})"),
            *(
                (
                    name,
                    str(coverage.num_texts),
                    str(len(coverage.counts) - len(coverage.missing)),
                    f"{coverage.value:.1%}",
                    str(len(coverage.missing)),
                    str(len(coverage.weak)),
                )
                for name, coverage in (("before", before), ("after", after))
                if name == "before" or result.generator
            ),
        ]
    )
    if not result.generator:
        lines += ["", f"missing: {', '.join(map(str, before.missing)) or 'none'}"]
        thin = [feature for feature in before.weak if before.counts[feature]]
        if thin:
            lines.append(f"weak: {', '.join(f'{feature} ({before.counts[feature]})' for feature in thin)}")
        return "\n".join([*lines, f"Written to {result.output / COVERAGE}", ""])
    lines += ["", *_filled(result), "", *_controls(result)]
    spent = result.spent
    lines.append(
        f"{spent['requests']} requests ({spent['failed']} failed), {spent['tokens']} tokens; left: "
        + ", ".join(f"{count} {name}" for name, count in result.left.items())
    )
    if not result.is_finished:
        lines.append("The budget ended before all was asked. Go on with `--resume` and a larger one.")
    lines.append(f"{len(result.rows)} texts written to {result.output / TEXTS}.parquet and .jsonl")
    return "\n".join([*lines, ""])


def _filled(result: Synthesis) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("feature", "before", "after", "accepted", "tried", "fires", "matched", "plain", "not accepted", "label")
    ]
    for one in result.filled:
        rest = {name: count for name, count in one.outcomes.items() if name != "accepted"}
        rows.append(
            (
                str(one.feature),
                str(one.before),
                str(one.after),
                str(one.accepted),
                str(sum(one.outcomes.values())),
                *(_percent(rate) for rate in (one.fire_rate, one.matched_rate, one.plain_rate)),
                ", ".join(f"{count} {name}" for name, count in rest.items()) or "-",
                one.label if len(one.label) <= _LABEL_WIDTH else f"{one.label[: _LABEL_WIDTH - 3]}...",
            )
        )
    return aligned(rows, left=range(len(rows[0]) - 2, len(rows[0])))


def _controls(result: Synthesis) -> list[str]:
    lines = []
    for what, rates, shared_error in (
        ("matched random features in the same responses", [one.matched_rate for one in result.filled], 0.0),
        (
            f"the same features in {result.num_plain} plain generations",
            [one.plain_rate for one in result.filled],
            result.plain_error,
        ),
    ):
        pairs = [
            (one.fire_rate, rate)
            for one, rate in zip(result.filled, rates, strict=True)
            if one.fire_rate is not None and rate is not None
        ]
        if pairs:
            mine, other = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            lines.append(
                f"fires {mine:.1%} of responses on average over {len(pairs)} features; {what}: {other:.1%} "
                f"(difference {_difference(pairs, shared_error)})"
            )
    return lines


def _difference(pairs: Sequence[tuple[float, float]], shared_error: float) -> str:
    """Mean difference in points with its standard error: over features, and of what they share."""
    gaps = [100 * (mine - other) for mine, other in pairs]
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 2:
        return f"{mean:.1f} points"
    variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps)
    return f"{mean:.1f} +- {(variance + (100 * shared_error) ** 2) ** 0.5:.1f} points"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0%}"
