"""`qscope find`: read texts, load model and SAEs, find features by contrast or by loops, write them, show them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from qscope_trl.activations.opening import open_all
from qscope_trl.analysis.discovery import find_features
from qscope_trl.analysis.repetition import continue_texts, find_repetition_features
from qscope_trl.analysis.texts import read_groups, read_texts
from qscope_trl.config.find import FindConfig
from qscope_trl.features import FeatureSet


def run(config: FindConfig) -> FeatureSet:
    """`qscope find`: read the texts, load model and SAEs, find features, write them to `config.output`.

    Returns:
        The set that was written.

    Raises:
        ConfigError: If the model cannot be loaded or a setting does not fit.
        DataError: If a file or a group is not usable.
    """
    groups, target = ({}, "") if config.repetition else read_groups(config)
    texts = read_texts(Path(config.repetition), config.text_column) if config.repetition else []
    model, tokenizer, saes, layers = open_all(config)
    if config.repetition:
        if config.generate_tokens:
            texts = continue_texts(
                model, tokenizer, texts, config.generate_tokens, config.batch_size, config.max_length
            )
        found = find_repetition_features(
            model,
            tokenizer,
            saes,
            texts,
            layers=layers,
            top=config.top,
            max_length=config.max_length + config.generate_tokens,
            batch_size=config.batch_size,
            holdout=config.holdout,
            seed=config.seed,
            model_name=config.model,
        )
        return _save(found, config)
    found = find_features(
        model,
        tokenizer,
        saes,
        groups,
        target=target,
        layers=layers,
        top=config.top,
        select=config.select,
        rank_by=config.rank_by,
        positions="last" if config.positions == "last" else "all",
        max_length=config.max_length,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        holdout=config.holdout,
        seed=config.seed,
        model_name=config.model,
    )
    return _save(found, config)


def _save(found: FeatureSet, config: FindConfig) -> FeatureSet:
    names = ("positive", "negative", "group", "data", "repetition", "generate_tokens")
    files = {name: value for name, value in asdict(config).items() if name in names and value}
    found = FeatureSet.from_dict({**found.to_dict(), "origin": {**found.origin, "files": files}})
    found.save(config.output)
    return found


def format_table(found: FeatureSet) -> str:
    """The chosen features as a table of fixed-width columns, one line each."""
    columns = [
        ("mean act", "mean_act"),
        ("others", "mean_act_others"),
        ("texts", "text_rate"),
        ("others", "text_rate_others"),
        ("AUROC", "auroc"),
        ("held out", "heldout_auroc"),
    ]
    if any("mean_increase" in feature.evidence for feature in found.features):
        columns = [
            ("first", "mean_act_first"),
            ("last", "mean_act_last"),
            ("increase", "mean_increase"),
            ("loops", "loop_rate"),
            ("held out", "heldout_mean_increase"),
            ("loops", "heldout_loop_rate"),
        ]
    head = ["feature", *(title for title, _ in columns), "threshold"]
    rows = [
        [str(feature.id), *(_figure(feature.evidence.get(key)) for _, key in columns), _figure(feature.threshold)]
        for feature in found.features
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
