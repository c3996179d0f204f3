"""A diagnosis as text for the terminal, as JSON and as one HTML page."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path

from qscope_trl.analysis.doctor.reading import EMBEDDINGS
from qscope_trl.analysis.doctor.result import Diagnosis, LayerFit
from qscope_trl.files import write_whole
from qscope_trl.monitor import html
from qscope_trl.monitor.text_table import aligned

_WIDTH = 118
_INDENT = 23


def format_text(result: Diagnosis) -> str:
    """Tables per layer, then the findings, the worst first, then the verdict."""
    parts = [
        f"SAEs '{result.saes}' on model '{result.model}' ({result.dtype}, {result.device}): {result.num_texts} texts, "
        f"{result.num_tokens} tokens after position 0\n"
    ]
    for title, header, rows in tables(result):
        if title:
            parts.append(f"{title}\n")
        parts.append("\n".join(aligned([header, *rows])) + "\n")
    parts.append("".join(_finding_lines(result)))
    parts.append(f"Verdict: {result.verdict} (exit code {result.exit_code})\n")
    return "\n".join(parts)


def tables(result: Diagnosis) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table that has any row."""
    found: list[tuple[str, list[str], list[list[str]]]] = []
    if result.layers:
        reach = sorted({place - fit.layer for fit in result.layers for place in fit.places})
        header = ["layer", "fvu", "chance", "cosine", "l0", "silent", "norm", "pos 0"]
        header += [f"at n{step:+d}" if step else "at n" for step in reach]
        rows = [
            [
                str(fit.layer),
                _figure(fit.fvu),
                _figure(fit.chance),
                _figure(fit.cosine),
                _figure(fit.l0, 1),
                _percent(fit.silent_share),
                _figure(fit.norm, 1),
                _figure(math.nan if fit.first is None else fit.first.fvu),
                *(_figure(fit.places.get(fit.layer + step, math.nan)) for step in reach),
            ]
            for fit in result.layers
        ]
        found.append(("", header, rows))
    if result.tuned:
        header = ["layer", "fvu base", "tuned", "cosine base", "tuned", "jaccard", "residual cosine", "rates changed"]
        rows = [
            [
                str(one.layer),
                *(_figure(value) for value in (one.fvu_base, one.fvu, one.cosine_base, one.cosine)),
                *(_figure(value) for value in (one.jaccard, one.residual_cosine)),
                _percent(one.changed_share),
            ]
            for one in result.tuned
        ]
        found.append((f"Tuned model '{result.tuned_name}'", header, rows))
    if result.features:
        header = ["feature", "tokens", "recorded", "texts", "label"]
        rows = [
            [
                one.name,
                _percent(one.token_rate, 2),
                " / ".join(_percent(rate, 2) for rate in one.recorded.values()) or "-",
                _percent(one.text_rate),
                one.label,
            ]
            for one in result.features
        ]
        found.append(("Chosen features: firing rates", header, rows))
    return found


def write_json(result: Diagnosis, path: str) -> None:
    """Every figure and finding; NaN is null."""
    write_whole(Path(path), json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")


def write_html(result: Diagnosis, path: str) -> None:
    """The same tables and findings as one page, with the readings of each SAE."""
    body = [
        html.element(
            "p",
            f"SAEs '{result.saes}' on model '{result.model}' ({result.dtype}, {result.device}): {result.num_texts} "
            f"texts, {result.num_tokens} tokens after position 0.",
        ),
        html.element("p", html.element("b", f"Verdict: {result.verdict}"), f" (exit code {result.exit_code})"),
        html.section(
            "Findings",
            html.table(
                ["", "check", "what", "why", "what to do"],
                [[f.severity, f.check, f.what, f.why, f.action] for f in result.findings],
            ),
        ),
    ]
    for title, header, rows in tables(result):
        body.append(html.section(title or "Layers", html.table(header, rows)))
    if result.layers:
        names = list(dict.fromkeys(name for fit in result.layers for name in fit.readings))
        rows = [
            [str(fit.layer), *(_figure(fit.readings.get(name, math.nan)) for name in names)] for fit in result.layers
        ]
        body.append(html.section("Fraction unexplained under other readings", html.table(["layer", *names], rows)))
        body.append(html.section("The same at other places", *(_places(fit) for fit in result.layers)))
    html.write_page(path, f"qscope doctor: {result.verdict}", html.joined(body))


def _places(fit: LayerFit) -> html.Html:
    told = ", ".join(
        f"{'embeddings' if place == EMBEDDINGS else place} {_figure(value)}" for place, value in fit.places.items()
    )
    return html.element("p", f"SAE of layer {fit.layer}: {told}")


def _finding_lines(result: Diagnosis) -> list[str]:
    lines = []
    for finding in result.findings:
        head = f"{finding.severity:5} {finding.check:16} "
        told = " ".join(part for part in (finding.what, finding.why, finding.action) if part)
        wrapped = textwrap.wrap(
            told,
            _WIDTH,
            initial_indent=head,
            subsequent_indent=" " * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.append("\n".join(wrapped) + "\n")
    return lines


def _figure(value: float, digits: int = 3) -> str:
    return html.figure(value, digits)


def _percent(share: float, digits: int = 1) -> str:
    return "-" if math.isnan(share) else f"{share:.{digits}%}"
