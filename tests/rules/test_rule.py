"""Compiled rules: deciding, ranking, explaining, checking against SAEs, files."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qscope_trl import Feature, FeatureId, FeatureSet, SAESuite
from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.errors import ConfigError, DataError, FeatureSetError, RuleError
from qscope_trl.rules import TokenValues, compile_rule, load_rule
from tests.rules.random_rules import AGGREGATIONS, FEATURES, LAYERS, SETS, Document, document, random_rule
from tests.tiny import D_SAE, write_saes

IDS = [FeatureId(layer, index) for layer in LAYERS for index in range(FEATURES)]


def table(documents: list[Document]) -> FeatureTable:
    columns = {name: np.array([[d[i.layer, i.index, name] for i in IDS] for d in documents]) for name in AGGREGATIONS}
    return FeatureTable(IDS, columns)


class TorchValues:
    """The same as tensors."""

    def __init__(self, values: FeatureTable) -> None:
        self._values, self.num_documents = values, values.num_documents

    def values(self, feature: FeatureId, aggregation: str) -> torch.Tensor:
        return torch.from_numpy(self._values.values(feature, aggregation))


def test_random_rules_hold_where_their_meaning_says_so() -> None:
    rng = random.Random(1)
    documents = [document(rng) for _ in range(40)]
    values = table(documents)
    shares = []
    for _ in range(200):
        meaning = random_rule(rng, rng.randint(0, 3))
        rule = compile_rule(meaning.text, sets=SETS)
        wanted = [meaning.holds(d) for d in documents]
        found = rule.evaluate(values)
        assert found.dtype == bool
        assert found.tolist() == wanted, meaning.text
        assert rule.without_sets().evaluate(values).tolist() == wanted
        assert rule.evaluate(TorchValues(values)).tolist() == wanted
        shares.append(np.mean(wanted))
    # The test would show nothing with rules that hold always or never.
    assert np.mean([0.1 < share < 0.9 for share in shares]) > 0.3


def test_the_score_of_random_rules_is_their_margin_and_its_sign_decides() -> None:
    rng = random.Random(2)
    documents = [document(rng) for _ in range(40)]
    values = table(documents)
    for _ in range(200):
        meaning = random_rule(rng, rng.randint(0, 3))
        rule = compile_rule(meaning.text, sets=SETS)
        score, held = rule.score(values), rule.evaluate(values)
        assert score.dtype == np.float64
        np.testing.assert_allclose(score, [meaning.margin(d) for d in documents], rtol=0, atol=1e-12)
        assert held[score > 0].all()
        assert not held[score < 0].any()


def test_explanations_of_random_rules_repeat_the_decision_and_every_value() -> None:
    rng = random.Random(3)
    documents = [document(rng) for _ in range(5)]
    values = table(documents)
    for _ in range(60):
        rule = compile_rule(random_rule(rng, 2).text, sets=SETS)
        for place in range(len(documents)):
            found = rule.explain(values, place)
            assert found.text == str(rule)
            assert found.holds == rule.evaluate(values)[place]
            assert found.margin == rule.score(values)[place]
            for leaf in found.leaves():
                alone = compile_rule(leaf.text, sets=SETS)
                assert leaf.holds == alone.evaluate(values)[place]
                if not leaf.text.startswith("sum"):
                    ((feature, aggregation),) = alone.needs
                    assert leaf.value == values.values(feature, aggregation)[place]


def test_an_explanation_is_read_by_a_person_and_by_json() -> None:
    chosen = FeatureSet(features=(Feature(layer=1, index=0, label="insults"), Feature(layer=1, index=1)))
    rule = compile_rule("any(set:toxic > 0.5) and not mean(L2F0)", sets={"toxic": chosen})
    d = {**document(random.Random(0)), (1, 0, "max"): 0.75, (1, 1, "max"): 0.0, (2, 0, "mean"): 0.125}
    found = rule.explain(table([d]), 0)
    assert found.format() == (
        "no  any(set:toxic > 0.5) and not mean(L2F0)\n"
        "  yes any(set:toxic > 0.5)\n"
        "    yes L1F0 > 0.5   [0.75]   insults\n"
        "    no  L1F1 > 0.5   [0]\n"
        "  no  not mean(L2F0)\n"
        "    yes mean(L2F0)   [0.125]\n"
    )
    read = json.loads(json.dumps(found.to_dict()))
    assert read["parts"][0]["parts"][0] == {
        "rule": "L1F0 > 0.5", "holds": True, "margin": 0.25, "value": 0.75, "label": "insults"
    }  # fmt: skip


def test_long_lists_show_what_holds_and_count_the_rest() -> None:
    ids = [FeatureId(1, n) for n in range(40)]
    acts = np.zeros((1, 40))
    acts[0, [3, 30]] = 1.0
    text = compile_rule(f"any(L1: {', '.join(map(str, range(40)))})").explain(FeatureTable(ids, {"max": acts}), 0)
    shown = text.format()
    assert "yes L1F3 " in shown
    assert "yes L1F30 " in shown
    assert "... and 33 more that do not hold" in shown
    assert len(shown.splitlines()) == 1 + 2 + 5 + 1


def test_a_document_that_is_not_there_cannot_be_explained() -> None:
    values = table([document(random.Random(0))])
    for place in (-1, 1):
        with pytest.raises(DataError, match=f"There is no document {place}: .* from 0 to 0"):
            compile_rule("L1F0").explain(values, place)


def test_values_that_are_no_numbers_are_refused() -> None:
    class Broken:
        num_documents = 3

        def values(self, feature: FeatureId, aggregation: str) -> Any:
            return np.array([0.0, np.nan, np.inf])

    for act in ("evaluate", "score"):
        with pytest.raises(DataError, match="`mean` of L1F0 is NaN or infinite in 2 of 3 documents"):
            getattr(compile_rule("not mean(L1F0)"), act)(Broken())


# --- token by token --------------------------------------------------------------------------------------------------


def aggregated(acts: np.ndarray, name: str) -> np.ndarray:
    """Of one text's activations `(tokens, features)`, written down once more; the package keeps fp32."""
    found = {"max": acts.max(0), "mean": acts.mean(0), "last": acts[-1], "rate": (acts > 0).mean(0)}[name]
    return found.astype(np.float32)


def test_every_prefix_is_decided_as_a_document_of_its_own() -> None:
    generator, rng = np.random.default_rng(0), random.Random(4)
    acts = generator.random((30, len(IDS))) * (generator.random((30, len(IDS))) < 0.3)
    columns = {n: np.stack([aggregated(acts[: t + 1], n) for t in range(30)]) for n in AGGREGATIONS}
    whole = FeatureTable(IDS, columns)
    changes = 0
    for _ in range(100):
        rule = compile_rule(random_rule(rng, 2).text, sets=SETS)
        wanted = rule.evaluate(whole)
        assert rule.evaluate_tokens(acts, IDS).tolist() == wanted.tolist()
        own = [IDS.index(feature) for feature in rule.features]
        assert rule.evaluate_tokens(acts[:, own]).tolist() == wanted.tolist()
        changes += len(set(wanted.tolist())) == 2
    assert changes > 30


def test_token_values_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"`acts` has the shape \(3, 2\); it is \(tokens, features\) with 1"):
        TokenValues(IDS[:1], np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"`acts` holds -1.0 \(1 such values\)"):
        TokenValues(IDS[:1], [[-1.0]])
    with pytest.raises(DataError, match="L1F1 is not among the features"):
        compile_rule("L1F1").evaluate(TokenValues(IDS[:1], [[1.0]]))
    assert compile_rule("L1F0").evaluate_tokens(np.zeros((0, 1))).tolist() == []


# --- SAEs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes"), [1, 2]), k=4)


def test_features_that_are_not_there_are_shown_at_their_place(saes: SAESuite) -> None:
    text = f"L1F3 and\nany(L2: 5, {D_SAE} > 0.5)"
    wanted = rf"Line 2, column 12: L2F{D_SAE} is not there: the SAE of layer 2 has {D_SAE} features, .* end at 127"
    for given in (saes, {1: D_SAE, 2: D_SAE}):
        compile_rule(f"L1F3 and any(L2: 5, {D_SAE - 1})").check(given)
        with pytest.raises(RuleError, match=wanted) as caught:
            compile_rule(text).check(given)
        assert str(caught.value).endswith("  any(L2: 5, 128 > 0.5)\n             ^")
    with pytest.raises(RuleError, match=r"column 10: L7F1 is not there: '.*' have no layer 7, but layers 1, 2"):
        compile_rule("not last(L7F1)").check(saes)
    with pytest.raises(RuleError, match=r"column 9: L2F500 is not there"):
        compile_rule("not any(set:a)", sets={"a": FeatureSet.from_names(["L1F2", "L2F500"])}).check(saes)


def test_a_rule_of_other_saes_is_refused(saes: SAESuite, tmp_path: Path) -> None:
    prints = {layer: saes.fingerprint(layer) for layer in (1, 2)}
    data = {"rule": "L1F3 or L2F4", "sae": "theirs", "sae_fingerprints": prints}
    path = tmp_path / "rule.yaml"
    path.write_text(yaml.safe_dump(data))
    load_rule(path).check(saes)
    path.write_text(yaml.safe_dump({**data, "sae_fingerprints": {1: prints[1], 2: "0" * 16}}))
    with pytest.raises(RuleError, match=r"layer 2 in '.*' is not the one this rule was made with \('theirs'\)"):
        load_rule(path).check(saes)
    chosen = FeatureSet.from_names(["L1F3"], sae="theirs", sae_fingerprints={1: "0" * 16})
    with pytest.raises(FeatureSetError, match="Set `a`: The SAE of layer 1"):
        compile_rule("any(set:a)", sets={"a": chosen}).check(saes)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rule.yaml", "deep/rule.json"])
def test_a_saved_rule_is_read_back_whole(name: str, tmp_path: Path) -> None:
    chosen = FeatureSet(features=(Feature(layer=1, index=0, label="侮辱"),), sae="mine", sae_fingerprints={1: "ab"})
    data = {
        "rule": "any(set:toxic > 0.5) and not L2F4",
        "sets": {"toxic": chosen.to_dict()},
        "name": "toxic",
        "model": "base",
        "sae": "mine",
        "sae_revision": "abc",
        "sae_fingerprints": {1: "ab", 2: "cd"},
        "evidence": {"test": {"f1": 0.9}},
    }
    (tmp_path / "first.json").write_text(json.dumps(data))
    rule = load_rule(tmp_path / "first.json")
    assert rule.labels == {FeatureId(1, 0): "侮辱"}
    rule.save(tmp_path / name)
    again = load_rule(str(tmp_path / name))
    assert again == rule
    assert again.sets == rule.sets == {"toxic": chosen}
    assert (again.name, again.model, again.sae, again.sae_revision) == ("toxic", "base", "mine", "abc")
    assert again.sae_fingerprints == {1: "ab", 2: "cd"}
    assert again.evidence == {"test": {"f1": 0.9}}
    assert pickle.loads(pickle.dumps(again)) == rule


def test_sets_of_a_file_may_be_paths_beside_it_or_names(tmp_path: Path) -> None:
    FeatureSet.from_names(["L1F2"]).save(tmp_path / "a.yaml")
    path = tmp_path / "rule.yaml"
    path.write_text("rule: any(set:a, set:b, set:c)\nsets: {a: a.yaml, b: [L3F4]}\n")
    assert str(load_rule(path, sets={"c": FeatureSet.from_names(["L5F6"])}).without_sets()) == "any(L1F2, L3F4, L5F6)"


def test_text_and_rules_are_taken_as_they_are() -> None:
    rule = load_rule("any(set:a)", sets=dict.fromkeys("ab", SETS["one"]))
    assert list(rule.sets) == ["a"]
    assert load_rule(rule) is rule


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"No rule file at '.*rule.yaml'"),
        ("a: [", "neither YAML nor JSON"),
        ("- a", "holds a list, not a mapping"),
        ("rules: L1F2", "unknown key `rules`"),
        ("name: x", "has no `rule`.$"),
        ("rule: L1F2\nfeatures: [L1F2]", "unknown key `features`"),
        ("rule: L1F2\nformat_version: 2", "`format_version` is 2"),
        ("rule: 12", "`rule` is 12; it is a text"),
        ("rule: L1F2\nevidence: good", "`evidence` is 'good'; it is a mapping"),
        ("rule: L1F2\nsae_fingerprints: {x: y}", "mapping from layer to fingerprint"),
        ("rule: L1F2 >", r"'.*rule.yaml': Line 1, column 7: the rule ends too early"),
    ],
)
def test_unusable_files_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rule.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RuleError, match=message):
        load_rule(str(path))


@pytest.mark.parametrize("value", ["nowhere.yaml", "{features: 3}", "7", "[x]"])
def test_unusable_sets_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "rule.yaml"
    path.write_text(f"rule: any(set:a)\nsets: {{a: {value}}}")
    with pytest.raises(FeatureSetError, match=r"rule\.yaml', set `a`: "):
        load_rule(path)


def test_a_set_in_the_place_of_a_rule_is_recognised(tmp_path: Path) -> None:
    FeatureSet.from_names(["L1F2"]).save(tmp_path / "a.yaml")
    with pytest.raises(RuleError, match=r"looks like a FeatureSet: name it by `--set NAME=FILE` and write"):
        load_rule(tmp_path / "a.yaml")


def test_a_rule_is_compiled_without_torch_and_numpy() -> None:
    code = (
        "import sys; from qscope_trl.rules import compile_rule, load_rule\n"
        "rule = compile_rule('any(L12: 31, 407 > 0.5) and not L20F99'); rule.check({12: 500, 20: 100}); str(rule)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
