"""`qscope rules explain`: why a rule holds for some texts, comparison by comparison and token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qscope_trl.activations.chat import model_chat_renderer
from qscope_trl.activations.feature_table import TableEncoder, TokenActs
from qscope_trl.activations.opening import open_model
from qscope_trl.activations.sources import open_source, text_of
from qscope_trl.analysis.rules.evaluate_run import open_rule
from qscope_trl.bundled import sae_path
from qscope_trl.config.rules import RulesExplainConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.monitor.html import token_texts
from qscope_trl.rules import Explanation, Rule
from qscope_trl.sae.suite import SAESuite


@dataclass(frozen=True)
class Explained:
    """One text and what a rule makes of it.

    Args:
        name: Where the text is from.
        text: The text.
        explanation: Why the rule holds, or does not.
        tokens: The text in tokens, position 0 included.
        acts: Activations of the rule's features at the tokens after position 0.
    """

    name: str
    text: str
    explanation: Explanation
    tokens: list[str]
    acts: TokenActs


@dataclass(frozen=True)
class ExplainResult:
    """What `qscope rules explain` found.

    Args:
        rule: The rule.
        features: Columns of the activations.
        texts: The texts.
    """

    rule: Rule
    features: tuple[FeatureId, ...]
    texts: tuple[Explained, ...]


def run(config: RulesExplainConfig) -> ExplainResult:
    """Explain a rule on some texts.

    Raises:
        ConfigError: If a setting or the model does not fit.
        RuleError: If the rule cannot be read, names a feature that is not there, or was made for other SAEs.
        DataError: If a row is not there, or has no text.
    """
    rule = open_rule(config.rule, config.set)
    saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
    rule.check(saes)
    named = _texts(config)
    model, tokenizer = open_model(
        config.model, revision=config.model_revision, dtype=config.dtype, device=config.device
    )
    encoder = TableEncoder(
        model,
        tokenizer,
        saes,
        rule.features,
        aggregations=sorted({aggregation for _, aggregation in rule.needs}),
        max_length=config.max_length,
        batch_size=config.batch_size,
        show_progress=False,
    )
    table = encoder([text for _, text in named])
    found = []
    for place, (name, text) in enumerate(named):
        acts = encoder.tokens(text)
        tokens = token_texts(tokenizer, acts.token_ids)
        found.append(Explained(name, text, rule.explain(table, place), tokens, acts))
    return ExplainResult(rule, encoder.features, tuple(found))


def _texts(config: RulesExplainConfig) -> list[tuple[str, str]]:
    if config.text:
        return [(f"text {place}", text) for place, text in enumerate(config.text)]
    source = open_source(
        str(config.data), split=config.data_split, config=config.data_config, revision=config.data_revision
    )
    chosen = config.chosen_rows
    chat = model_chat_renderer(config.model, revision=config.model_revision)
    found: list[tuple[str, str]] = []
    last: Any = None
    for index, row in source.rows():
        last = index
        if index in chosen:
            text = text_of(row, text_column=config.text_column, source_name=source.name, index=index, chat=chat)
            found.append((f"row {index}", text))
        if index >= chosen[-1]:
            break
    if len(found) < len(chosen):
        raise DataError(
            f"'{source.name}' has no row {chosen[-1]}: its rows end at "
            f"{'none' if last is None else last}. Choose others by `--rows`."
        )
    return found
