"""`qscope rules` from end to end on a tiny model, with labels that a feature decides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope_trl import SAESuite
from qscope_trl.analysis.rules import comparison, evaluate_run, explain_run, learn_run
from qscope_trl.analysis.rules.command import main
from qscope_trl.analysis.rules.comparison import Judge, probe_entries
from qscope_trl.cli import main as cli
from qscope_trl.config.rules import RulesExplainConfig
from qscope_trl.errors import ConfigError, DataError, RuleError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.rules import compile_rule, load_rule
from tests.analysis.rules_world import LAYERS, NUM, World
from tests.tiny import K, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def learned(world: World) -> tuple[learn_run.LearnResult, Path]:
    path = world.folder / "rules" / "toxic.yaml"
    return learn_run.run(world.learn(path, group_column="page", name="toxic", random_draws=2)), path


def test_the_planted_feature_is_found_and_the_file_is_the_rule(
    world: World, learned: tuple[learn_run.LearnResult, Path]
) -> None:
    result, path = learned
    rule = load_rule(path)
    assert rule == result.rule
    assert str(rule) == str(world.feature)
    assert (rule.name, rule.layers) == ("toxic", (world.feature.layer,))
    rule.check(SAESuite.from_pretrained(world.folder / "saes"))
    assert result.entries[0].name == "rule"
    assert result.entries[0].metric == 1
    assert result.folds == (1, 1, 1)
    assert rule.evidence["cross_validation"]["mean"] == 1
    assert rule.evidence["test"]["rule"]["f1"] == 1
    assert rule.evidence["data"]["positive"] == world.labels.sum()


def test_baselines_stand_beside_it_and_random_features_fall_behind(
    learned: tuple[learn_run.LearnResult, Path],
) -> None:
    entries = {entry.name: entry for entry in learned[0].entries}
    assert list(entries) == [
        "rule",
        "any of the top K by delta",
        "best of each layer",
        "random features, as many",
        "random features, same search",
        "logistic on the rule's features",
        "difference of means",
        "logistic probe",
        "words",
    ]
    assert len(entries["random features, as many"].runs) == 2
    assert entries["random features, as many"].metric < 0.9
    assert entries["logistic on the rule's features"].metric == 1
    assert all(run.calibration is not None for entry in entries.values() for run in entry.runs)


def test_pages_are_kept_together(learned: tuple[learn_run.LearnResult, Path]) -> None:
    judge = learned[0].judge
    assert judge.train is not None
    assert judge.development is not None
    part = judge.test * 1 + judge.development * 2 + judge.train * 4
    assert set(part.tolist()) == {1, 2, 4}
    for page in set(judge.groups):
        assert len({int(p) for p, g in zip(part, judge.groups, strict=True) if g == page}) == 1


def test_labels_of_the_test_do_not_reach_the_rule(
    world: World, learned: tuple[learn_run.LearnResult, Path], tmp_path: Path
) -> None:
    rows = [{"text": text, "toxic": int(label)} for text, label in world.rows()]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:120]), encoding="utf-8")
    found = []
    for flip in (0, 1):
        flipped = [{**row, "toxic": abs(row["toxic"] - flip)} for row in rows[120:]]  # type: ignore[operator]
        test.write_text("".join(json.dumps(row) + "\n" for row in flipped), encoding="utf-8")
        config = world.learn(tmp_path / "o.json", data=str(train), test_data=str(test), baselines=False)
        found.append(learn_run.run(config))
    assert found[0].rule == found[1].rule
    assert found[0].learned == found[1].learned
    assert found[0].entries[0].metric == 1
    assert found[1].entries[0].metric == 0
    assert len(found[0].entries) == 1


def test_test_texts_that_were_learned_from_are_told(world: World, tmp_path: Path) -> None:
    config = world.learn(tmp_path / "o.yaml", test_data=str(world.data), baselines=False)
    assert learn_run.run(config).notes == (
        f"{len(set(world.texts))} texts of the test set are in '{world.data}' too: its figures are too good",
    )


def test_the_first_rows_of_the_test_and_of_what_is_fitted_on_are_counted_apart(world: World) -> None:
    given = world.evaluation(fit_data=str(world.data), max_rows=40, random_draws=0)
    for fit_rows, wanted in ((None, NUM), (90, 90)):
        judge = evaluate_run.run(replace(given, max_fit_rows=fit_rows)).judge
        assert judge.train is not None
        assert judge.development is not None
        assert (judge.test.sum(), judge.train.sum() + judge.development.sum()) == (40, wanted)


def test_learn_writes_report_and_figures(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = world.flags(layers="1", output=tmp_path / "r.yaml", report=tmp_path / "r.html", json=tmp_path / "r.json",
                        folds=3, candidates=4, max_size=2, random_draws=1)  # fmt: skip
    assert main(["learn", *flags]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert shown.splitlines()[0] == figures["rule"]
    assert "cross-validation: " in shown
    assert "words" in shown
    run = figures["classifiers"][0]["runs"][0]
    assert run["curve"][-1]["recall"] == 1
    assert run["calibration"]["bins"]
    assert run["f1_interval"][0] <= run["f1"] <= run["f1_interval"][1]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for part in ("Precision and recall", "Calibration", "polyline", "held-out fold 3", "told rightly", "stroke-width"):
        assert part in page
    assert "stroke_width" not in page
    assert sorted(item.name for item in tmp_path.iterdir()) == ["r.html", "r.json", "r.yaml"]


def test_the_toxicity_set_is_read_language_by_language(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(world.folder / "toxicity")
    rule = tmp_path / "toxic.yaml"
    learn = world.flags(data=data, data_split="en", layers="1,2", output=rule, folds=3, candidates=6, max_size=2)
    assert main(["learn", *learn, "--no-baselines"]) == 0
    evaluate = world.flags(data=data, data_split="de", fit_data=data, fit_split="en", rule=rule, random_draws=1,
                           json=tmp_path / "de.json", report=tmp_path / "de.html")  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", *evaluate]) == 0
    shown = capsys.readouterr().out
    german = world.labels[NUM // 2 :]
    assert f"on {NUM // 2} test texts, {german.sum()} of them positive" in shown
    found = {one["name"]: one for one in json.loads((tmp_path / "de.json").read_text())["classifiers"]}
    assert found["rule"]["metric"] == 1
    assert set(found) == {"rule", "random features, as many", "logistic on the rule's features",
                          "difference of means", "logistic probe", "words"}  # fmt: skip
    assert "missed" in (tmp_path / "de.html").read_text(encoding="utf-8")


def test_evaluation_equals_the_rule_on_a_table(world: World) -> None:
    text = f"{world.feature} > 0.3 or any(L1: 5, 6; L2F9 > 0.2)"
    result = evaluate_run.run(replace(world.evaluation(), rule=text))
    held = compile_rule(text).evaluate(world.table)
    run = result.entries[0].runs[0]
    assert (run.told, run.positive) == (held.sum(), world.labels.sum())
    assert run.recall == pytest.approx((held & world.labels).sum() / world.labels.sum())
    assert run.calibration is None
    assert result.notes == ("no baselines and no calibration: `--fit-data` names texts to fit them on",)
    assert len(result.entries) == 1


def test_texts_both_fitted_and_tested_on_are_told(world: World) -> None:
    config = world.evaluation(fit_data=str(world.data), random_draws=0)
    assert "groups of the texts to fit on are tested on too" in evaluate_run.run(config).notes[0]


def test_without_texts_to_fit_on_nothing_is_fitted(world: World) -> None:
    judge = Judge(world.labels, np.ones(NUM, dtype=bool), world.texts, "f1")
    with pytest.raises(DataError, match="`words` has no threshold of its own and there are no development texts"):
        judge.by_score("words", np.zeros(NUM))
    with pytest.raises(DataError, match="There are no texts to fit baselines on"):
        probe_entries(judge, {1: torch.zeros(NUM, 2)})


def test_without_scikit_learn_the_rest_is_still_compared(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (learn_run, comparison):
        monkeypatch.setattr(module, "has_scikit_learn", lambda: False)
    result = learn_run.run(world.learn(tmp_path / "o.yaml", random_draws=0))
    assert {entry.name for entry in result.entries} == {"rule", "any of the top K by delta", "best of each layer",
                                                        "difference of means"}  # fmt: skip
    assert result.notes == (learn_run.NO_SCIKIT_LEARN,)


def test_probes_are_read_at_the_layer_that_is_best_on_the_development_texts(world: World) -> None:
    part = np.arange(NUM) % 3
    judge = Judge(world.labels, part == 0, world.texts, "f1", part == 1, part == 2)
    truth = torch.from_numpy(world.labels.astype(np.float32))
    noise = torch.randn(NUM, 2, generator=torch.Generator().manual_seed(0))
    # Layer 3 tells the test texts apart, but not those of development.
    test_only = torch.where(torch.from_numpy(part != 2), truth, 1 - truth)
    residuals = {2: noise + 2 * truth[:, None], 3: noise * 0.01 + test_only[:, None]}
    assert [entry.note for entry in probe_entries(judge, residuals)] == ["layer 2", "layer 2"]


def test_explain_shows_values_and_tokens(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = int(np.flatnonzero(world.labels)[0])
    flags = ["--model", str(world.folder / "model"), "--saes", str(world.folder / "saes"), "--sae-k", str(K)]
    chosen = FeatureSet(features=(Feature(layer=world.feature.layer, index=world.feature.index, label="<planted>"),))
    chosen.save(tmp_path / "set.yaml")
    rule = ["--rule", "any(set:toxic) and not L2F127 > 99", "--set", f"toxic={tmp_path / 'set.yaml'}"]
    data = ["--data", str(world.data), "--rows", str(place), "--report", str(tmp_path / "e.html")]
    assert main(["explain", *flags, *rule, *data]) == 0
    shown = capsys.readouterr().out
    value = world.table.values(world.feature, "max")[place]
    assert f"row {place}: {world.texts[place]}" in shown
    assert f"yes {world.feature}   [{value:.4g}]   <planted>" in shown
    page = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "&lt;planted&gt;" in page
    assert 'class="high"' in page
    assert main(["explain", *flags, "--rule", "L1F3", "--text", "w2", "--text", "w5 w6 w7 " * 40]) == 0
    shown = capsys.readouterr().out
    assert "text 0: w2\nno  L1F3   [0]\n" in shown
    assert "..." in shown


def test_conversations_are_explained_as_the_template_renders_them(world: World, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w9{% endfor %}"
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": [{"role": "user", "content": "w3 w4"}]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found = explain_run.run(
        RulesExplainConfig(
            model=str(tmp_path / "model"),
            saes=str(world.folder / "saes"),
            sae_k=K,
            rule="L1F3",
            data=str(tmp_path / "chat.jsonl"),
            rows="0",
        )
    )
    assert [one.text for one in found.texts] == ["w3 w4 w9"]


def test_check_writes_the_rule_with_fingerprints(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(tmp_path / "set.yaml").write_text("features: [{layer: 1, index: 4, label: slurs}]\n")
    path = tmp_path / "rule.yaml"
    flags = ["--rule", "any(set:bad) or L2F3 > 0.50", "--set", f"bad={tmp_path / 'set.yaml'}", "--output", str(path)]
    assert main(["check", *flags, "--saes", str(world.folder / "saes")]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "any(set:bad) or L2F3 > 0.5"
    assert "L1F4  slurs" in shown
    assert "every feature is in" in shown
    suite = SAESuite.from_pretrained(world.folder / "saes")
    assert load_rule(path).sae_fingerprints == {layer: suite.fingerprint(layer) for layer in LAYERS}
    assert main(["check", "--rule", str(path)]) == 0
    assert "every feature" not in capsys.readouterr().out


def test_an_unknown_feature_is_shown_with_its_place(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["rules", "check", "--rule", "L1F3 or L2F128", "--saes", str(world.folder / "saes")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: Line 1, column 9: L2F128 is not there: the SAE of layer 2 has 128 features, so indices end at 127.",
        "  L1F3 or L2F128",
        "          ^",
    ]
    for run in (
        lambda: evaluate_run.run(replace(world.evaluation(), rule="L9F3")),
        lambda: main(["explain", *world.flags()[:6], "--rule", "L9F3", "--text", "w2 w3"]),
    ):
        with pytest.raises(RuleError, match=r"Line 1, column 1: L9F3 is not there"):
            run()


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert "evaluate" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"Unknown command `rules chek`. Did you mean `check`?"):
        main(["chek"])
    with pytest.raises(ConfigError, match="`--set` is `toxic`; write it as `NAME=FILE`"):
        main(["check", "--rule", "any(set:toxic)", "--set", "toxic"])


def test_rows_that_are_not_there_are_refused(world: World) -> None:
    with pytest.raises(DataError, match=r"has no row 999: its rows end at 159. Choose others by `--rows`"):
        main(["explain", *world.flags()[:6], "--rule", "L1F3", "--data", str(world.data), "--rows", "3,999"])
