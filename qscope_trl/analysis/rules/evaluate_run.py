"""`qscope rules evaluate`: what a rule reaches on labelled texts, beside baselines that are fitted on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qscope_trl.activations.feature_table import FeatureTable, encode_table, table_from_store
from qscope_trl.activations.opening import Opened, open_model
from qscope_trl.activations.store import FeatureStore
from qscope_trl.analysis.probes import has_scikit_learn
from qscope_trl.analysis.rules.comparison import Entry, Judge, bits_entry, keyword_entry, probe_entries, random_entry
from qscope_trl.analysis.rules.data import TEST, Labelled, deal, read_labelled, with_test
from qscope_trl.analysis.rules.learn_run import NO_SCIKIT_LEARN, residuals_of
from qscope_trl.analysis.rules.statistics import matched_at_random, sums_of_texts
from qscope_trl.analysis.rules.stored import open_store, refuse_other_model
from qscope_trl.bundled import sae_path
from qscope_trl.config.rules import RulesEvaluateConfig, RulesLearnConfig
from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.rules import Rule, load_rule
from qscope_trl.sae.suite import SAESuite

_FOLDS = 5


@dataclass(frozen=True)
class EvaluateResult:
    """What `qscope rules evaluate` found.

    Args:
        rule: The rule.
        entries: The rule, then the baselines.
        notes: What the reader should know.
        data: The texts, those that baselines were fitted on first.
        judge: What they were judged by.
        table: Values of the rule's features, by text.
    """

    rule: Rule
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    data: Labelled
    judge: Judge
    table: FeatureTable


def run(config: RulesEvaluateConfig) -> EvaluateResult:
    """Judge a rule on texts that it was not made on.

    Raises:
        ConfigError: If a setting or the model does not fit.
        RuleError: If the rule cannot be read, names a feature that is not there, or was made for other SAEs.
        DataError: If the texts do not fit.
    """
    rule = open_rule(config.rule, config.set)
    saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
    rule.check(saes)
    layers = rule.layers if config.layers == "rule" else config.layer_list(saes.layers)
    test = read_labelled(config, group_column=config.group_column)
    fit = None
    notes = []
    if config.fit_data is not None and config.baselines:
        fit = read_labelled(
            config,
            data=config.fit_data,
            split=config.fit_split,
            max_rows=config.max_fit_rows,
            group_column=config.group_column,
        )
        shared = len(set(fit.groups) & set(test.groups))
        if shared:
            notes.append(
                f"{shared} groups of the texts to fit on are tested on too: the baselines' figures are too good"
            )
    elif config.baselines:
        notes.append("no baselines and no calibration: `--fit-data` names texts to fit them on")
    data = test if fit is None else with_test(fit, test)
    slices = np.full(len(data), TEST)
    if fit is not None:
        slices[: len(fit)] = deal(fit, folds=_FOLDS, test_share=0.0, seed=config.seed)
    judge = Judge(
        data.labels,
        slices == TEST,
        data.groups,
        config.metric,
        None if fit is None else slices > 0,
        None if fit is None else slices == 0,
        config.seed,
    )
    aggregations = sorted({aggregation for _, aggregation in rule.needs} | ({"max"} if fit is not None else set()))
    source, opened = _open(config, rule, layers, saes, test, aggregations, fits=fit is not None)
    draws: list[dict[FeatureId, FeatureId]] = []
    if fit is not None and opened is not None and config.random_draws:
        sums = sums_of_texts(
            opened.model, opened.tokenizer, saes, rule.layers, data.texts, slices, data.labels, ("max",),
            max_length=config.max_length, batch_size=config.batch_size,
        )  # fmt: skip
        draws = [matched_at_random(sums, rule.features, config.seed + draw) for draw in range(config.random_draws)]
    features = sorted({*rule.features, *(drawn for draw in draws for drawn in draw.values())})
    table = _table(config, source, opened, data.texts, 0 if fit is None else len(fit), features, aggregations)
    entries = [judge.by_rule("rule", rule, table)]
    if fit is not None and opened is not None:
        entries += _baselines(config, opened, data, judge, table, rule, draws)
        if not has_scikit_learn():
            notes.append(NO_SCIKIT_LEARN)
    return EvaluateResult(rule, tuple(entries), tuple(notes), data, judge, table)


def open_rule(text: str, named: list[str]) -> Rule:
    """A rule from its file or text, with the sets that `NAME=FILE` name.

    Raises:
        ConfigError: If a set is not given as `NAME=FILE`.
        RuleError: If the rule cannot be read.
        FeatureSetError: If a set cannot be read.
    """
    sets = {}
    for item in named:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"`--set` is `{item}`; write it as `NAME=FILE`, and the rule names it `set:NAME`.")
        sets[name] = FeatureSet.load(path)
    return load_rule(text, sets=sets)


def _open(
    config: RulesEvaluateConfig,
    rule: Rule,
    layers: Sequence[int],
    saes: SAESuite,
    test: Labelled,
    aggregations: Sequence[str],
    *,
    fits: bool,
) -> tuple[FeatureStore | Opened, Opened | None]:
    """Where features of the test texts come from, and the model as far as it runs."""
    store = None
    if config.store is not None:
        store = open_store(config.store, test, config, saes, rule.layers, aggregations)
        if not fits:
            return store, None
    model, tokenizer = open_model(
        config.model, revision=config.model_revision, dtype=config.dtype, device=config.device
    )
    opened = Opened(model, tokenizer, saes, tuple(layers))
    if store is None:
        return opened, opened
    refuse_other_model(store, opened)
    return store, opened


def _table(
    config: RulesEvaluateConfig,
    source: FeatureStore | Opened,
    opened: Opened | None,
    texts: Sequence[str],
    num_fit: int,
    features: Sequence[FeatureId],
    aggregations: Sequence[str],
) -> FeatureTable:
    """Values over all texts; a store has those of all but the first `num_fit`."""

    def encoded(model: Opened, chosen: Sequence[str]) -> FeatureTable:
        return encode_table(
            model.model,
            model.tokenizer,
            model.saes,
            chosen,
            features,
            aggregations=aggregations,
            max_length=config.max_length,
            batch_size=config.batch_size,
        )

    if isinstance(source, Opened):
        return encoded(source, texts)
    stored = table_from_store(source, features, aggregations)
    return stored if opened is None else encoded(opened, texts[:num_fit]).followed_by(stored)


def _baselines(
    config: RulesEvaluateConfig,
    opened: Opened,
    data: Labelled,
    judge: Judge,
    table: FeatureTable,
    rule: Rule,
    draws: list[dict[FeatureId, FeatureId]],
) -> list[Entry]:
    entries = []
    drawn = random_entry(judge, table, rule, draws, _search(config))
    if drawn is not None:
        entries.append(drawn)
    if has_scikit_learn():
        entries.append(bits_entry(judge, table, rule.features))
    entries += probe_entries(judge, residuals_of(opened, data.texts, config.max_length, config.batch_size))
    if has_scikit_learn():
        entries.append(keyword_entry(judge, data.texts))
    return entries


def _search(config: RulesEvaluateConfig) -> RulesLearnConfig:
    """The default search, by the metric of this evaluation; nothing of it but the search is used."""
    return replace(
        RulesLearnConfig(
            model=config.model, saes=config.saes, data=config.data, label_column=config.label_column,
            positive=config.positive, negative=config.negative, output="",
        ),
        metric=config.metric,
    )  # fmt: skip
