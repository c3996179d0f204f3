"""`qscope find`: read texts, load model and SAEs, find features by contrast or by loops, write them, show them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qscope_trl.activations.chat import model_chat_renderer
from qscope_trl.activations.opening import Opened, open_all
from qscope_trl.analysis.discovery import Discovery, Search, discover
from qscope_trl.analysis.repetition import continue_texts, find_repetition_features
from qscope_trl.analysis.texts import read_groups, read_texts
from qscope_trl.config.find import FindConfig
from qscope_trl.errors import ConfigError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.monitor.text_table import aligned


def run(config: FindConfig) -> FeatureSet:
    """`qscope find`: read the texts, load model and SAEs, find features, write them to `config.output`.

    Returns:
        The set that was written.

    Raises:
        ConfigError: If the model cannot be loaded, a setting does not fit, or the report cannot be written.
        DataError: If a file or a group is not usable.
    """
    chat = model_chat_renderer(config.model, revision=config.model_revision)
    groups, target = ({}, "") if config.repetition else read_groups(config, chat)
    texts = read_texts(config.repetition, config, chat) if config.repetition else []
    opened = open_all(config)
    if config.repetition:
        return _save(_repetition(config, opened, texts), config)
    search = Search(
        target=target,
        top=config.top,
        select=config.select,
        rank_by=config.rank_by,
        positions="last" if config.positions == "last" else "all",
        max_length=config.max_length,
        max_tokens=config.max_tokens,
        max_norm_ratio=config.max_norm_ratio,
        batch_size=config.batch_size,
        holdout=config.holdout,
        seed=config.seed,
        permutations=config.permutations,
        splits=config.splits,
        bootstrap=config.bootstrap,
    )
    discovery = discover(
        opened.model,
        opened.tokenizer,
        opened.saes,
        groups,
        search,
        layers=opened.layers,
        model_name=config.model,
    )
    return _compare_and_save(discovery, config, opened)


def _repetition(config: FindConfig, opened: Opened, texts: list[str]) -> FeatureSet:
    model, tokenizer, saes, layers = opened
    if config.generate_tokens:
        texts = continue_texts(model, tokenizer, texts, config.generate_tokens, config.batch_size, config.max_length)
    return find_repetition_features(
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


def _compare_and_save(discovery: Discovery, config: FindConfig, opened: Opened) -> FeatureSet:
    from qscope_trl.analysis.baselines import compare
    from qscope_trl.analysis.examples import top_examples
    from qscope_trl.analysis.find_report import write_report

    baselines = compare(discovery, opened.model, opened.tokenizer) if config.baselines else []
    beside = [{key: value for key, value in one._asdict().items() if value is not None} for one in baselines]
    found = _save(discovery.found, config, {"baselines": beside} if beside else {})
    if config.report:
        examples = top_examples(discovery, opened.model, opened.tokenizer, count=config.examples)
        try:
            write_report(config.report, discovery, examples, baselines)
        except OSError as err:
            raise ConfigError(f"The report cannot be written to '{config.report}': {err}") from err
    return found


def _save(found: FeatureSet, config: FindConfig, more: dict[str, Any] | None = None) -> FeatureSet:
    texts = ("positive", "negative", "group", "data", "repetition", "generate_tokens")
    names = (*texts, "data_split", "data_config", "data_revision")
    files = {name: value for name, value in asdict(config).items() if name in names and value}
    found = FeatureSet.from_dict({**found.to_dict(), "origin": {**found.origin, "files": files, **(more or {})}})
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
    for title, key in (("p", "p_value"), ("q", "q_value"), ("selected", "selection_rate")):
        if any(key in feature.evidence for feature in found.features):
            columns.append((title, key))
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
        [str(feature.id), *(_cell(feature, key) for _, key in columns), _figure(feature.threshold)]
        for feature in found.features
    ]
    return "\n".join(aligned([head, *rows])) + "\n"


def format_notes(found: FeatureSet) -> str:
    """What else was found out: baselines, stability, norm outliers. Empty if there is nothing of it."""
    text = ""
    origin = found.origin
    if "baselines" in origin:
        rows = [
            [
                f"layer {one['layer']}" if "layer" in one else "",
                one["name"],
                _figure(one["heldout_auroc"]),
                _range(one.get("low"), one.get("high")),
            ]
            for one in origin["baselines"]
        ]
        text += "\n" + "\n".join(aligned([["", "classifier", "held-out AUROC", "range"], *rows])) + "\n\n"
    search = origin.get("search", {})
    if "tested_features" in search:
        text += (
            f"{search['features_with_q_up_to_0.05']} of {search['tested_features']} features that fire have q up to "
            f"0.05\n"
        )
    for layer, halves in search.get("split_half", {}).items():
        text += (
            f"halves of the texts, {layer}: rank correlation {halves['rank_correlation']:.2f}, overlap of the best "
            f"{halves['top_overlap']:.2f}\n"
        )
    outliers = {layer: count for layer, count in origin.get("masked", {}).get("norm_outliers", {}).items() if count}
    if outliers:
        counts = ", ".join(f"{count} in {layer}" for layer, count in outliers.items())
        text += f"tokens masked for a residual of outlying length: {counts}\n"
    return text


def _cell(feature: Feature, key: str) -> str:
    text = _figure(feature.evidence.get(key))
    ends = [feature.evidence.get(f"{key}_{end}") for end in ("low", "high")]
    return text if ends[0] is None else f"{text} [{_range(*ends)}]"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f}, {high:.3f}"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.0e}"
