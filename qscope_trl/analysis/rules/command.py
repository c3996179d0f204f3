"""`qscope rules`: its four subcommands, and the text each of them shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_trl.config.rules import RulesCheckConfig, RulesEvaluateConfig, RulesExplainConfig, RulesLearnConfig
from qscope_trl.errors import ConfigError
from qscope_trl.files import write_whole
from qscope_trl.monitor.text_table import aligned
from qscope_trl.parsing import parse_flags, suggestion

if TYPE_CHECKING:
    from qscope_trl.analysis.rules.comparison import Entry
    from qscope_trl.analysis.rules.evaluate_run import EvaluateResult
    from qscope_trl.analysis.rules.explain_run import ExplainResult
    from qscope_trl.analysis.rules.learn_run import LearnResult

_ABOUT = {
    "check": "read a rule, and compare it with SAEs",
    "explain": "why a rule holds for a text, comparison by comparison",
    "learn": "learn a rule from labelled texts",
    "evaluate": "precision, recall, F1 and AUROC of a rule beside baselines",
}
_SHOWN_CHARACTERS = 70


def main(argv: Sequence[str]) -> int:
    """Run `qscope rules ...`.

    Raises:
        ConfigError: If the subcommand or a flag is unknown, or a value does not fit.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<9} {what}\n" for name, what in _ABOUT.items())
        sys.stdout.write(f"usage: qscope rules COMMAND ...\n\nRules over SAE features.\n\n{lines}")
        sys.stdout.write("\n`qscope rules COMMAND --help` says more.\n")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in _ABOUT:
        raise ConfigError(f"Unknown command `rules {name}`.{suggestion(name, _ABOUT)}")
    about = f"{_ABOUT[name][0].upper()}{_ABOUT[name][1:]}."
    if name == "check":
        sys.stdout.write(_check(parse_flags(rest, RulesCheckConfig, prog="qscope rules check", description=about)))
    elif name == "explain":
        sys.stdout.write(
            _explain(parse_flags(rest, RulesExplainConfig, prog="qscope rules explain", description=about))
        )
    elif name == "learn":
        sys.stdout.write(_learn(parse_flags(rest, RulesLearnConfig, prog="qscope rules learn", description=about)))
    else:
        sys.stdout.write(
            _evaluate(parse_flags(rest, RulesEvaluateConfig, prog="qscope rules evaluate", description=about))
        )
    return 0


def _check(config: RulesCheckConfig) -> str:
    from qscope_trl.analysis.rules.evaluate_run import open_rule

    rule = open_rule(config.rule, config.set)
    lines = [str(rule), f"{len(rule.features)} features of layers {', '.join(map(str, rule.layers))}"]
    lines += [f"  {feature}  {rule.labels[feature]}" for feature in rule.features if feature in rule.labels]
    if config.saes is not None:
        from qscope_trl.bundled import sae_path
        from qscope_trl.sae.suite import SAESuite

        saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision)
        rule.check(saes)
        lines.append(f"every feature is in {config.saes}")
        rule = replace(
            rule,
            sae=rule.sae or config.saes,
            sae_revision=rule.sae_revision or config.sae_revision,
            sae_fingerprints={layer: saes.fingerprint(layer) for layer in rule.layers},
        )
    if config.output:
        rule.save(config.output)
        lines.append(f"written to {config.output}")
    return "\n".join(lines) + "\n"


def _explain(config: RulesExplainConfig) -> str:
    from qscope_trl.analysis.rules import explain_run
    from qscope_trl.analysis.rules.report import write_explanation

    result = explain_run.run(config)
    shown = format_explanations(result)
    if config.report:
        write_explanation(config.report, result)
        shown += f"Report written to {config.report}\n"
    return shown


def _learn(config: RulesLearnConfig) -> str:
    from qscope_trl.analysis.rules import learn_run

    result = learn_run.run(config)
    shown = format_learned(result, config.metric) + f"Rule written to {config.output}\n"
    return shown + _written(config, result)


def _evaluate(config: RulesEvaluateConfig) -> str:
    from qscope_trl.analysis.rules import evaluate_run

    result = evaluate_run.run(config)
    shown = f"{result.rule}\n\n" + format_entries(result.entries) + _notes(result.notes)
    return shown + _written(config, result)


def _written(config: RulesLearnConfig | RulesEvaluateConfig, result: Any) -> str:
    """Write figures and report where they were asked for, and say so."""
    from qscope_trl.analysis.rules.report import write_comparison

    shown = ""
    if config.json:
        write_json(config.json, result, config.metric)
        shown += f"Figures written to {config.json}\n"
    if config.report:
        write_comparison(config.report, result, config.metric)
        shown += f"Report written to {config.report}\n"
    return shown


def format_explanations(result: ExplainResult) -> str:
    """Each text with its indented explanation."""
    parts = []
    for one in result.texts:
        shown = " ".join(one.text.split())
        cut = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
        parts.append(f"{one.name}: {cut}\n{one.explanation.format()}\n")
    return "".join(parts)


def format_learned(result: LearnResult, metric: str) -> str:
    """The rule, what chose it, and the table of the test."""
    folds, learned = result.folds, result.learned
    mean = sum(folds) / len(folds)
    return (
        f"{result.rule}\n\n"
        f"{metric}: {learned.train:.3f} on the texts it was searched on, {learned.development:.3f} on the development "
        f"texts, the best of {learned.tried} rules\n"
        f"cross-validation: {mean:.3f} (lowest {min(folds):.3f}, highest {max(folds):.3f}) over {len(folds)} folds\n\n"
        f"{format_entries(result.entries)}{_notes(result.notes)}"
    )


def format_entries(entries: Sequence[Entry]) -> str:
    """The table of classifiers, one a line."""
    first = entries[0].runs[0]
    header = ["", "precision", "recall", "F1", "95 %", "AUROC", "PR area", "Brier", ""]
    rows = [header]
    for entry in entries:
        interval = entry.runs[0].f1_interval if len(entry.runs) == 1 else None
        calibrated = [run.calibration.brier for run in entry.runs if run.calibration is not None]
        rows.append(
            [
                entry.name,
                *(_number(entry.mean(name)) for name in ("precision", "recall", "f1")),
                "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}",
                *(_number(entry.mean(name)) for name in ("auroc", "average_precision")),
                _number(sum(calibrated) / len(calibrated)) if calibrated else "-",
                entry.note,
            ]
        )
    shown = aligned(rows, left=(0, len(header) - 1))
    return f"on {first.texts} test texts, {first.positive} of them positive:\n" + "\n".join(shown) + "\n"


def write_json(path: str, result: LearnResult | EvaluateResult, metric: str) -> None:
    """Every figure of a result."""
    content = {
        "rule": str(result.rule),
        "metric": metric,
        "data": result.data.describe(),
        "notes": list(result.notes),
        "classifiers": [entry.to_dict() for entry in result.entries],
    }
    folds = getattr(result, "folds", None)
    if folds is not None:
        content["cross_validation"] = list(folds)
    write_whole(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _notes(notes: Sequence[str]) -> str:
    return "".join(f"note: {note}\n" for note in notes) + "\n"


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"
