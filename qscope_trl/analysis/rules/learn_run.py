"""`qscope rules learn`: from labelled texts to a rule file whose evidence stands beside the baselines'."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_trl._version import __version__
from qscope_trl.activations.encode import tokenize
from qscope_trl.activations.feature_table import FeatureTable, encode_table, table_from_store
from qscope_trl.activations.opening import Opened, open_all
from qscope_trl.activations.store import FeatureStore
from qscope_trl.analysis.probes import has_scikit_learn, residual_means
from qscope_trl.analysis.rules.comparison import (
    Entry,
    Judge,
    bits_entry,
    fitting_parts,
    keyword_entry,
    probe_entries,
    random_entry,
    random_search_entry,
    rule_of,
)
from qscope_trl.analysis.rules.data import TEST, Labelled, deal, read_labelled, with_test
from qscope_trl.analysis.rules.learning import Learned, best_of_layers, learn, parts_of_fold, top_by_delta
from qscope_trl.analysis.rules.metrics import metric
from qscope_trl.analysis.rules.statistics import (
    Candidates,
    LayerSums,
    choose_candidates,
    matched_at_random,
    sums_of_store,
    sums_of_texts,
)
from qscope_trl.analysis.rules.stored import open_store, refuse_other_model
from qscope_trl.bundled import sae_path
from qscope_trl.config.rules import RulesLearnConfig
from qscope_trl.features import FeatureId
from qscope_trl.rules import Rule
from qscope_trl.sae.suite import SAESuite

Bits = NDArray[np.bool_]

NO_SCIKIT_LEARN = "scikit-learn is not installed: no logistic probe, no words. `pip install 'qscope-trl[data]'`"


@dataclass(frozen=True)
class LearnResult:
    """What `qscope rules learn` found.

    Args:
        rule: The rule, with its evidence.
        learned: What chose it.
        folds: The metric on each fold, of the rule that was learned without it.
        entries: The rule and the baselines on the test texts.
        notes: What the reader should know.
        data: The texts.
        judge: What they were judged by.
        table: Values of all features that were tried, by text.
    """

    rule: Rule
    learned: Learned
    folds: tuple[float, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    data: Labelled
    judge: Judge
    table: FeatureTable


def run(config: RulesLearnConfig) -> LearnResult:
    """Learn a rule, judge it beside baselines, and write its file.

    Raises:
        ConfigError: If a setting, the store or the model does not fit.
        DataError: If the texts do not fit, or no rule can be made.
        CheckpointError: If a layer has no SAE.
    """
    data, slices, notes = _read(config)
    source, opened, saes = _open(config, data)
    sums = _sums(config, source, saes.layers, data, slices)
    folds = range(config.folds)
    by_fold = [
        choose_candidates(sums, parts_of_fold(fold, config.folds)[0], config.candidates, config.all_aggregations)
        for fold in folds
    ]
    final = choose_candidates(sums, tuple(folds)[1:], config.candidates, config.all_aggregations)
    draws = _draws(config, sums, final) if config.baselines else []
    wanted = {c.feature for chosen in (*by_fold, final) for part in chosen[:2] for c in part}
    wanted |= {feature for draw in draws for feature in draw.values()}
    table = _table(config, source, data, sorted(wanted))

    def part(chosen: Sequence[int]) -> Bits:
        return np.isin(slices, chosen)

    scores = []
    for fold, candidates in zip(folds, by_fold, strict=True):
        train, development = parts_of_fold(fold, config.folds)
        found = learn(table, data.labels, part(train), part([development]), candidates, config).found
        held_out = part([fold])
        scores.append(metric(config.metric, found.holds(table)[held_out], data.labels[held_out]))
    judge = Judge(data.labels, part([TEST]), data.groups, config.metric, part(folds[1:]), part([0]), config.seed)
    learned = learn(table, data.labels, part(folds[1:]), part([0]), final, config)
    rule = rule_of(learned.found)
    entries = [judge.by_rule("rule", rule, table, learned.found.form)]
    if config.baselines and opened is not None:
        more, said = _baselines(config, opened, data, judge, table, rule, final, draws)
        entries += more
        notes += said
    rule = replace(
        rule,
        name=config.name,
        # What read the texts: a model that is not opened cannot be compared with the store's.
        model=source.manifest["model"]["name"] if isinstance(source, FeatureStore) else config.model,
        sae=config.saes,
        sae_revision=config.sae_revision,
        sae_fingerprints={layer: saes.fingerprint(layer) for layer in rule.layers},
        evidence=_evidence(config, data, judge, learned, scores, entries),
    )
    rule.save(config.output)
    return LearnResult(rule, learned, tuple(scores), tuple(entries), tuple(notes), data, judge, table)


def _read(config: RulesLearnConfig) -> tuple[Labelled, NDArray[np.int64], list[str]]:
    data = read_labelled(config, group_column=config.group_column)
    if config.test_data is None:
        slices = deal(data, folds=config.folds, test_share=config.test_share, seed=config.seed)
        return data, slices, []
    slices = deal(data, folds=config.folds, test_share=0.0, seed=config.seed)
    test = read_labelled(
        config,
        data=config.test_data,
        split=config.test_split,
        max_rows=config.max_rows,
        group_column=config.group_column,
    )
    notes = []
    shared = len(set(data.groups) & set(test.groups))
    if shared:
        what = "texts" if config.group_column is None else f"values of `{config.group_column}`"
        notes.append(f"{shared} {what} of the test set are in '{data.name}' too: its figures are too good")
    both = with_test(data, test)
    return both, np.concatenate([slices, np.full(len(test), TEST)]), notes


def _suite(config: RulesLearnConfig) -> SAESuite:
    saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
    return SAESuite.from_pretrained(saes, layers=config.layer_list(saes.layers))


def _open(config: RulesLearnConfig, data: Labelled) -> tuple[FeatureStore | Opened, Opened | None, SAESuite]:
    """Where features come from, the model as far as it runs, and the SAEs."""
    if config.store is None:
        opened = open_all(config)
        return opened, opened, opened.saes
    saes = _suite(config)
    store = open_store(config.store, data, config, saes, saes.layers, _aggregations(config))
    if not config.baselines:
        return store, None, saes
    opened = open_all(config)
    refuse_other_model(store, opened)
    return store, opened, saes


def _aggregations(config: RulesLearnConfig) -> tuple[str, ...]:
    """Those that are searched, and `max`, by which the baselines ask whether a feature fires."""
    return tuple(dict.fromkeys((*config.all_aggregations, "max")))


def _sums(
    config: RulesLearnConfig,
    source: FeatureStore | Opened,
    layers: Sequence[int],
    data: Labelled,
    slices: NDArray[np.int64],
) -> dict[int, LayerSums]:
    if isinstance(source, FeatureStore):
        return sums_of_store(source, layers, slices, data.labels, config.all_aggregations)
    return sums_of_texts(
        source.model,
        source.tokenizer,
        source.saes,
        layers,
        data.texts,
        slices,
        data.labels,
        config.all_aggregations,
        max_length=config.max_length,
        batch_size=config.batch_size,
    )


def _table(
    config: RulesLearnConfig,
    source: FeatureStore | Opened,
    data: Labelled,
    features: Sequence[FeatureId],
) -> FeatureTable:
    if isinstance(source, FeatureStore):
        return table_from_store(source, features, _aggregations(config))
    return encode_table(
        source.model,
        source.tokenizer,
        source.saes,
        data.texts,
        features,
        aggregations=_aggregations(config),
        max_length=config.max_length,
        batch_size=config.batch_size,
    )


def _draws(
    config: RulesLearnConfig, sums: Mapping[int, LayerSums], candidates: Candidates
) -> list[dict[FeatureId, FeatureId]]:
    features = [c.feature for part in candidates[:2] for c in part]
    return [matched_at_random(sums, features, config.seed + draw) for draw in range(config.random_draws)]


def _baselines(
    config: RulesLearnConfig,
    opened: Opened,
    data: Labelled,
    judge: Judge,
    table: FeatureTable,
    rule: Rule,
    candidates: Candidates,
    draws: Sequence[Mapping[FeatureId, FeatureId]],
) -> tuple[list[Entry], list[str]]:
    _, development = fitting_parts(judge)
    entries: list[Entry | None] = []
    for name, choose in (("any of the top K by delta", top_by_delta), ("best of each layer", best_of_layers)):
        found = choose(table, data.labels, development, candidates.by_delta, config.metric)
        if found is not None:
            entries.append(judge.by_rule(name, rule_of(found), table, f"K = {len(found.members)}"))
    entries.append(random_entry(judge, table, rule, draws, config))
    entries.append(random_search_entry(judge, table, candidates, draws, config))
    if has_scikit_learn():
        entries.append(bits_entry(judge, table, rule.features))
    entries += probe_entries(judge, residuals_of(opened, data.texts, config.max_length, config.batch_size))
    if has_scikit_learn():
        entries.append(keyword_entry(judge, data.texts))
    return [entry for entry in entries if entry is not None], [] if has_scikit_learn() else [NO_SCIKIT_LEARN]


def residuals_of(opened: Opened, texts: Sequence[str], max_length: int, batch_size: int) -> dict[int, Any]:
    """Mean residual of each text, by layer."""
    ids = tokenize(opened.tokenizer, texts, max_length=max_length)
    return residual_means(opened.model, ids, opened.layers, batch_size=batch_size)


def _evidence(
    config: RulesLearnConfig,
    data: Labelled,
    judge: Judge,
    learned: Learned,
    folds: Sequence[float],
    entries: Sequence[Entry],
) -> dict[str, Any]:
    return {
        "command": "rules learn",
        "version": __version__,
        "data": data.describe(),
        "label": {
            "column": config.label_column,
            "positive": config.positive_label if config.data else config.positive,
        },
        "settings": {
            name: getattr(config, name)
            for name in (
                "layers",
                "max_length",
                "candidates",
                "thresholds",
                "max_size",
                "max_count",
                "max_exceptions",
                "search",
                "beam_width",
                "folds",
                "group_column",
                "seed",
            )
        }
        | {"aggregation": list(config.all_aggregations), "form": list(config.all_forms)},
        "metric": config.metric,
        "train": round(learned.train, 4),
        "development": round(learned.development, 4),
        "rules_tried": learned.tried,
        "cross_validation": {
            "mean": round(statistics.fmean(folds), 4),
            "folds": [round(value, 4) for value in folds],
        },
        "test": {"documents": int(judge.test.sum()), "positive": int(judge.labels[judge.test].sum())}
        | {entry.name: entry.summary() for entry in entries},
    }
