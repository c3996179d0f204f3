"""An audit as text for the terminal, as JSON and as one HTML page."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path

from qscope_trl.analysis.audit.result import Audit
from qscope_trl.analysis.audit.verdict import VERDICTS
from qscope_trl.files import write_whole
from qscope_trl.monitor import html
from qscope_trl.monitor.text_table import aligned

_WIDTH = 118


def format_text(result: Audit) -> str:
    """Tables, then notes, then the verdict and what decides it."""
    parts = [f"Tuned model '{result.tuned}' against '{result.model}', SAEs '{result.saes}'\n"]
    for title, _, header, rows in tables(result):
        parts.append(f"{title}\n")
        parts.append("\n".join(aligned([header, *rows])) + "\n")
    parts += [_wrapped(f"Note: {note}") for note in result.notes]
    parts.append(_wrapped(f"Verdict: {result.verdict}. {result.reason}"))
    return "\n".join(parts)


def tables(result: Audit) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Title, a sentence on it, header and rows of each table that has any row."""
    found = []
    if result.behaviour is not None:
        one = result.behaviour
        rows = [
            ["base", _percent(one.base), _range(one.base_low, one.base_high, percent=True), _percent(one.parts_base)],
            ["tuned", _percent(one.tuned), _range(one.tuned_low, one.tuned_high, percent=True),
             _percent(one.parts_tuned)],
            ["tuned - base", _percent(one.difference),
             _range(one.difference_low, one.difference_high, percent=True), ""],
            ["tuned / base", _percent(one.left), _range(one.left_low, one.left_high, percent=True), ""],
        ]  # fmt: skip
        header = ["", "generations", "95 % interval", one.parts_name]
        found.append(
            (
                f"Behaviour in texts: `{one.detector}`, {one.num_prompts} prompts",
                "Share of generations that show it, by a detector that reads text and no feature.",
                *_without_blank(header, rows),
            )
        )
    rows = [
        [row.kind, row.where, f"{row.num_texts_base}" if row.num_texts_base == row.num_texts_tuned else
         f"{row.num_texts_base} / {row.num_texts_tuned}", _figure(row.base), _figure(row.tuned), _percent(row.left),
         _range(row.left_low, row.left_high, percent=True)]
        for row in result.activity
    ]  # fmt: skip
    found.append(
        (
            "Activity of the features",
            "Weighted sum of their activations, mean over tokens. Generations are read by the model that wrote them.",
            ["features", "where", "texts", "base", "tuned", "left", "95 % interval"],
            rows,
        )
    )
    rows = [
        [row.kind, row.name, "" if row.layer is None else str(row.layer), _figure(row.base),
         _range(row.base_low, row.base_high), _figure(row.tuned), _range(row.tuned_low, row.tuned_high)]
        for row in result.detectors
    ]  # fmt: skip
    found.append(
        (
            "Who tells positive from negative texts: AUROC",
            f"{result.num_positive} positive and {result.num_negative} negative texts. What is retrained learns on "
            f"each model by itself and is tested on the {result.num_heldout} texts held out. Shuffled labels: mean, "
            f"least and largest.",
            ["detector", "name", "layer", "base", "95 % interval", "tuned", "95 % interval"],
            rows,
        )
    )
    rows = [
        [row.feature, row.kind, _percent(row.rate_base), _percent(row.rate_tuned), _percent(row.rate_negative_base),
         _percent(row.rate_negative_tuned), _figure(row.mean_base), _figure(row.mean_tuned), _figure(row.auroc_base),
         _figure(row.auroc_tuned), row.label]
        for row in result.features
    ]  # fmt: skip
    header = ["feature", "", "fires, positive", "tuned", "negative", "tuned", "mean act", "tuned", "AUROC", "tuned",
              "label"]  # fmt: skip
    found.append(
        (
            "The features one by one",
            "Share of tokens at which each fires, its mean activation on positive texts, and the AUROC of its largest "
            "activation in each text: on the base model, then on the tuned one.",
            *_without_blank(header, rows),
        )
    )
    lost = result.collateral
    rows = [[_figure(lost.perplexity_base, 2), _figure(lost.perplexity_tuned, 2), f"{lost.loss_difference:+.4f}",
             _range(lost.loss_difference_low, lost.loss_difference_high, digits=4), _figure(lost.kl, 4)]]  # fmt: skip
    found.append(
        (
            f"Neutral texts: {lost.source}, {lost.num_texts} texts, {lost.num_tokens} tokens",
            "Perplexity, loss tuned minus base in nats a token, and KL(base || tuned) in nats a token.",
            ["perplexity, base", "tuned", "loss difference", "95 % interval", "KL"],
            rows,
        )
    )
    rows = [
        [str(one.layer), *(_figure(value) for value in
         (one.fvu_base, one.fvu, one.cosine_base, one.cosine, one.jaccard, one.residual_cosine))]
        for one in result.fits
    ]  # fmt: skip
    found.append(
        (
            "The SAEs on both models, neutral texts",
            "Fraction of variance unexplained, cosine of residual and reconstruction, and how alike active features "
            "and residuals are.",
            ["layer", "fvu base", "tuned", "cosine base", "tuned", "jaccard", "residual cosine"],
            rows,
        )
    )
    return found


def write_json(result: Audit, path: str) -> None:
    """Every figure; NaN is null."""
    write_whole(Path(path), json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")


def write_html(result: Audit, path: str) -> None:
    """The same tables as one page, with a few generations of both models."""
    html.write_page(path, f"qscope audit: {result.verdict}", body(result))


def body(result: Audit) -> html.Html:
    """What the page says."""
    parts: list[object] = [
        html.element("p", f"Tuned model '{result.tuned}' against '{result.model}', SAEs '{result.saes}'."),
        html.element("p", html.element("b", f"Verdict: {result.verdict}"), f" ({VERDICTS[result.verdict]})"),
        html.element("p", result.reason),
    ]
    if result.notes:
        parts.append(html.section("Notes", html.element("ul", *(html.element("li", note) for note in result.notes))))
    for title, about, header, rows in tables(result):
        parts.append(html.section(title, html.element("p", about, class_="dim"), html.table(header, rows)))
    if result.samples:
        mark = {True: "shows it", False: ""}
        shown = [
            [
                html.element("div", one.prompt[-300:], class_="text"),
                html.joined([html.element("b", mark[one.base_shows]), html.element("div", one.base, class_="text")]),
                html.joined([html.element("b", mark[one.tuned_shows]), html.element("div", one.tuned, class_="text")]),
            ]
            for one in result.samples
        ]
        parts.append(html.section("Generations", html.table(["end of the prompt", "base", "tuned"], shown)))
    parts.append(html.section("Settings", html.details("all settings", html.settings(result.settings))))
    return html.joined(parts)


def _without_blank(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the last column, if no row has anything in it."""
    return (
        (header, rows) if any(row[-1] not in ("", "-") for row in rows) else (header[:-1], [row[:-1] for row in rows])
    )


def _wrapped(paragraph: str) -> str:
    return "\n".join(textwrap.wrap(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)) + "\n"


def _figure(value: float, digits: int = 3) -> str:
    return html.figure(value, digits)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _range(low: float, high: float, digits: int = 3, *, percent: bool = False) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{low:.1%} to {high:.1%}" if percent else f"{low:.{digits}f} to {high:.{digits}f}"
