"""Values of chosen features: against a plain computation, text by text, and token by token."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from qscope_trl import FeatureId, SAESuite
from qscope_trl.activations.feature_table import FeatureTable, TableEncoder, encode_table, table_from_store
from qscope_trl.activations.rule_filter import RuleFilter
from qscope_trl.activations.running import RunningValues
from qscope_trl.errors import ConfigError, DataError, FeatureSetError, RuleError
from qscope_trl.rules import TokenValues, compile_rule
from tests.tiny import D_SAE, K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes

FEATURES = (FeatureId(2, 40), FeatureId(1, 3), FeatureId(2, 7), FeatureId(1, 90))


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes")), k=K)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Of uneven length; among them none, one token (only position 0), and two."""
    generator = torch.Generator().manual_seed(3)
    return [sentence(generator, length) if length else "" for length in (7, 0, 20, 1, 2, 13, 5, 30, 9)]


def plain_acts(model: Any, text: str, features: tuple[FeatureId, ...] = FEATURES) -> torch.Tensor:
    """Activations after TopK and ReLU at every token but the first, from the hidden states, `(tokens - 1, S)`."""
    ids = tiny_tokenizer()(text).input_ids
    if len(ids) < 2:
        return torch.zeros(0, len(features))
    model.eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    columns = []
    for feature in features:
        sae = random_sae(100 + feature.layer)
        f = hidden[feature.layer + 1][0, 1:] @ sae["W_enc"].T + sae["b_enc"]
        kth = f.sort(dim=-1, descending=True).values[:, K - 1]
        mine = f[:, feature.index]
        columns.append(torch.where((mine >= kth) & (mine > 0), mine, 0))
    return torch.stack(columns, dim=1)


def plain_value(acts: torch.Tensor, name: str) -> torch.Tensor:
    if not len(acts):
        return torch.zeros(acts.shape[1])
    return {
        "max": acts.max(0).values, "mean": acts.mean(0), "last": acts[-1], "rate": (acts > 0).float().mean(0)
    }[name]  # fmt: skip


@pytest.fixture(scope="module")
def table(model: Any, saes: SAESuite, texts: list[str]) -> FeatureTable:
    return encode_table(model, tiny_tokenizer(), saes, texts, FEATURES, batch_size=4, show_progress=False)


@pytest.mark.parametrize("name", ["max", "mean", "last", "rate"])
def test_values_equal_a_plain_computation(name: str, table: FeatureTable, model: Any, texts: list[str]) -> None:
    wanted = torch.stack([plain_value(plain_acts(model, text), name) for text in texts]).numpy()
    assert (wanted > 0).mean() > 0.05
    np.testing.assert_allclose(table.matrix(name), wanted, rtol=2e-5, atol=2e-6)
    for place, feature in enumerate(FEATURES):
        assert table.values(feature, name).dtype == np.float64
        np.testing.assert_array_equal(table.values(feature, name), table.matrix(name)[:, place])


def test_texts_without_a_kept_token_are_silent_and_counted(table: FeatureTable, texts: list[str]) -> None:
    assert table.num_tokens is not None
    assert table.num_tokens.tolist() == [max(0, len(text.split()) - 1) for text in texts]
    assert not any(table.matrix(name)[[1, 3]].any() for name in table.aggregations)
    assert compile_rule("not L1F3").evaluate(table)[[1, 3]].all()


def test_texts_that_are_all_empty_are_no_error(model: Any, saes: SAESuite) -> None:
    found = encode_table(model, tiny_tokenizer(), saes, ["", "w3"], FEATURES, show_progress=False)
    assert found.num_documents == 2
    assert not found.matrix("max").any()


def test_length_is_cut_and_batches_do_not_matter(model: Any, saes: SAESuite, texts: list[str]) -> None:
    encoder = TableEncoder(model, tiny_tokenizer(), saes, FEATURES, max_length=6, batch_size=2, show_progress=False)
    cut = [" ".join(text.split()[:6]) for text in texts]
    wanted = encode_table(model, tiny_tokenizer(), saes, cut, FEATURES, batch_size=9, show_progress=False)
    found = encoder(texts)
    for name in found.aggregations:
        np.testing.assert_allclose(found.matrix(name), wanted.matrix(name), rtol=2e-5, atol=2e-6)


def test_tokens_of_one_text_are_what_its_document_is_made_of(model: Any, saes: SAESuite, texts: list[str]) -> None:
    encoder = TableEncoder(model, tiny_tokenizer(), saes, FEATURES, show_progress=False)
    for text in texts:
        found = encoder.tokens(text)
        assert found.token_ids == tiny_tokenizer()(text).input_ids
        np.testing.assert_allclose(found.acts, plain_acts(model, text).numpy(), rtol=2e-5, atol=2e-6)
        if len(found.acts):
            document, last = encoder([text]), TokenValues(FEATURES, found.acts)
            for name in document.aggregations:
                for feature in FEATURES:
                    assert last.values(feature, name)[-1] == document.values(feature, name)[0]


def test_rules_over_the_text_so_far_equal_rules_over_each_prefix(model: Any, saes: SAESuite, texts: list[str]) -> None:
    """What a gate sees after each token, against encoding every prefix as a document; two texts at a time."""
    encoder = TableEncoder(model, tiny_tokenizer(), saes, FEATURES, show_progress=False)
    rules = [
        compile_rule(text)
        for text in (
            "any(L2: 40, 7; L1F90 > 0.1) and not rate(L1F3) > 0.2",
            "atleast(2, last(L2: 40, 7), L1: 3, 90)",
            "mean(L2F40) > 0.05 or sum(rate(L2F7), rate(L1: 3, 90)) > 0.3",
            "not last(L1F90) and any(L1: 3, 90; last(L2F40) <= 0.3)",
        )
    ]
    assert {feature for rule in rules for feature in rule.features} == set(FEATURES)
    pair = [texts[2], texts[5]]
    acts = [encoder.tokens(text).acts for text in pair]
    prefixes = [
        [" ".join(text.split()[: end + 2]) for end in range(len(a))] for text, a in zip(pair, acts, strict=True)
    ]
    documents = [encoder(of_text) for of_text in prefixes]
    wanted = [[rule.evaluate(document) for document in documents] for rule in rules]
    assert sum(0 < w.sum() < len(w) for of_rule in wanted for w in of_rule) >= 5
    running = RunningValues(FEATURES)
    for token in range(max(map(len, acts))):
        has = torch.tensor([token < len(a) for a in acts])
        row = torch.tensor(np.stack([a[min(token, len(a) - 1)] for a in acts]))
        running.extend(row[:, None], has[:, None])
        for rule, of_rule in zip(rules, wanted, strict=True):
            found = rule.evaluate(running)[:, -1]
            assert found.tolist() == [bool(w[min(token, len(w) - 1)]) for w in of_rule]
    for rule, of_rule in zip(rules, wanted, strict=True):
        for a, w in zip(acts, of_rule, strict=True):
            assert rule.evaluate_tokens(a, FEATURES).tolist() == w.tolist()


def test_only_the_aggregations_that_are_asked_for_are_kept(
    model: Any, saes: SAESuite, table: FeatureTable, texts: list[str]
) -> None:
    given = {"aggregations": ("rate", "max"), "batch_size": 4, "show_progress": False}
    found = encode_table(model, tiny_tokenizer(), saes, texts, FEATURES, **given)
    assert found.aggregations == ("rate", "max")
    for name in found.aggregations:
        np.testing.assert_array_equal(found.matrix(name), table.matrix(name))
    with pytest.raises(ConfigError, match="`mode` is no aggregation"):
        TableEncoder(model, tiny_tokenizer(), saes, FEATURES, aggregations=("mode",))


def test_tables_are_joined(table: FeatureTable) -> None:
    parts = [table.take(slice(0, 3)), table.take(slice(3, None))]
    both = parts[0].followed_by(parts[1])
    for name in table.aggregations:
        np.testing.assert_array_equal(both.matrix(name), table.matrix(name))
    np.testing.assert_array_equal(both.num_tokens, table.num_tokens)
    uncounted = FeatureTable(FEATURES, parts[1].columns)
    assert parts[0].followed_by(uncounted).num_tokens is None
    with pytest.raises(ConfigError, match="other features or aggregations cannot be joined"):
        parts[0].followed_by(FeatureTable(FEATURES, {"max": parts[1].columns["max"]}))


def test_what_is_not_in_a_table_is_refused(table: FeatureTable, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"L3F1 is not among the 4 features .*rule\.features"):
        compile_rule("L3F1").evaluate(table)
    with pytest.raises(ConfigError, match="`median` is no aggregation"):
        table.values(FEATURES[0], "median")
    only = FeatureTable(FEATURES, {"max": table.columns["max"]})
    with pytest.raises(DataError, match="`mean` of L1F3 was not kept: there are max"):
        compile_rule("mean(L1F3)").evaluate(only)
    part = table.take(np.arange(len(texts)) % 2 == 0)
    assert part.num_documents == 5
    np.testing.assert_array_equal(part.matrix("mean"), table.matrix("mean")[::2])
    assert table.matrix("max", []).shape == (len(texts), 0)


@pytest.mark.parametrize(
    ("features", "columns", "tokens", "error", "message"),
    [
        (FEATURES[:1] * 2, {"max": np.zeros((3, 2))}, None, ConfigError, "stands twice"),
        (FEATURES, {"max": np.zeros((3, 2))}, None, ConfigError, r"shapes \[\(3, 2\)\]; each is \(documents, 4\)"),
        (FEATURES[:1], {"max": np.zeros((3, 1)), "mean": np.zeros((2, 1))}, None, ConfigError, "shapes"),
        (FEATURES[:1], {"max": np.zeros((3, 1))}, np.zeros(2), ConfigError, r"`num_tokens` has the shape \(2,\)"),
        (FEATURES[:1], {"mode": np.zeros((3, 1))}, None, ConfigError, "`mode` is no aggregation"),
        (FEATURES[:1], {"max": np.array([[np.nan]])}, None, DataError, "`max` of a feature is negative, NaN"),
        (FEATURES[:1], {"max": np.array([[-1.0]])}, None, DataError, "`max` of a feature is negative, NaN"),
    ],
)
def test_ill_formed_tables_are_refused(
    features: Any, columns: Any, tokens: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FeatureTable(features, columns, tokens)


def test_features_that_are_not_there_are_refused(model: Any, saes: SAESuite) -> None:
    with pytest.raises(FeatureSetError, match=rf"Feature L1F{D_SAE} is out of range: .* end at {D_SAE - 1}"):
        encode_table(model, tiny_tokenizer(), saes, ["w2 w3"], [FeatureId(1, D_SAE)])
    with pytest.raises(ConfigError, match="nothing to encode"):
        encode_table(model, tiny_tokenizer(), saes, ["w2 w3"], [])


def test_a_store_gives_the_same_table(table: FeatureTable) -> None:
    class Store:
        """The part of a store that is read, filled from the table."""

        layers, aggregations, num_rows = (1, 2), ("max", "mean"), table.num_documents

        def values(self, features: Any, aggregation: str) -> Any:
            return table.matrix(aggregation, features).astype(np.float32)

        def token_counts(self) -> Any:
            return table.num_tokens

    found = table_from_store(Store(), FEATURES[::-1])  # type: ignore[arg-type]
    assert found.aggregations == ("max", "mean")
    assert table_from_store(Store(), FEATURES, ["mean"]).aggregations == ("mean",)  # type: ignore[arg-type]
    for feature in FEATURES:
        np.testing.assert_array_equal(found.values(feature, "mean"), table.values(feature, "mean"))
    with pytest.raises(ConfigError, match="nothing to read"):
        table_from_store(Store(), [])  # type: ignore[arg-type]


# --- the filter ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_rule_filters_datasets(model: Any, folder: Path, saes: SAESuite, table: FeatureTable, texts: Any) -> None:
    rule = compile_rule("L2F40 or L1F3")
    held = rule.evaluate(table)
    assert 1 < held.sum() < len(texts) - 1
    dataset = Dataset.from_dict({"text": texts, "number": range(len(texts))})
    by_name = RuleFilter(rule, str(folder), saes.source, sae_k=K)
    kept = dataset.filter(by_name, batched=True, batch_size=4)
    assert kept["number"][:] == np.flatnonzero(held).tolist()
    by_object = RuleFilter(str(rule), model, saes, tokenizer=tiny_tokenizer(), keep="others")
    stream = IterableDataset.from_generator(lambda: iter(dataset))
    rest = [row["number"] for row in stream.filter(by_object, batched=True, batch_size=4)]
    assert rest == np.flatnonzero(~held).tolist()
    assert by_name({"text": []}) == []


def test_a_filter_reads_conversations_by_the_template(model: Any, saes: SAESuite, texts: Any) -> None:
    tokenizer = tiny_tokenizer()
    chats = {"text": [[{"role": "user", "content": text}] for text in texts]}
    bare = RuleFilter("L2F40 or L1F3", model, saes, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"the tokenizer of '.*ForCausalLM' has no chat template"):
        bare(chats)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chatty = RuleFilter("L2F40 or L1F3", model, saes, tokenizer=tokenizer)
    held = chatty(chats)
    assert held == chatty({"text": texts})
    assert 1 < sum(held) < len(held) - 1
    # A process that gets the filter makes its own.
    assert chatty.__getstate__()["_chat"] is None


def test_a_filter_by_names_is_pickled_without_what_it_opened(folder: Path, saes: SAESuite) -> None:
    chosen = RuleFilter("L2F40", str(folder), saes.source, sae_k=K)
    before = pickle.dumps(chosen)
    first = chosen({"text": ["w3 w4 w5", None]})
    assert pickle.dumps(chosen) == before
    assert pickle.loads(before)({"text": ["w3 w4 w5", None]}) == first
    dataset = Dataset.from_dict({"text": ["w3 w4 w5"]})
    again = RuleFilter("L2F40", str(folder), saes.source, sae_k=K)
    prints = [dataset.filter(f, batched=True)._fingerprint for f in (chosen, again)]
    assert prints[0] == prints[1]


def test_wrong_filters_are_refused(model: Any, folder: Path, saes: SAESuite) -> None:
    with pytest.raises(ConfigError, match="`keep` is 'all'; choose `matching` or `others`"):
        RuleFilter("L2F40", str(folder), saes, keep="all")
    with pytest.raises(ConfigError, match="given as an object needs its `tokenizer`"):
        RuleFilter("L2F40", model, saes)
    with pytest.raises(RuleError, match="L2F999 is not there"):
        RuleFilter("L2F999", str(folder), saes)({"text": ["w3 w4"]})
    with pytest.raises(DataError, match=r"Row 0 of 'batch' has no column `body`; it has `text`"):
        RuleFilter("L2F40", str(folder), saes, text_column="body")({"text": ["w3 w4"]})
