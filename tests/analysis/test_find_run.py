"""Baselines, examples and the report of `qscope find`, on random weights and texts of two kinds of words."""

from __future__ import annotations

import html.parser
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.activations.matching import draw_matched
from qscope_trl.analysis import baselines, find_run
from qscope_trl.analysis.baselines import Baseline, compare
from qscope_trl.analysis.discovery import Discovery, Search, discover
from qscope_trl.analysis.examples import Example, top_examples
from qscope_trl.analysis.find_report import write_report
from qscope_trl.analysis.find_run import format_notes, format_table
from qscope_trl.analysis.probes import DifferenceOfMeansProbe, residual_means
from qscope_trl.cli import main
from qscope_trl.config.find import FindConfig
from qscope_trl.errors import ConfigError, DataError
from tests.tiny import K, tiny_model, tiny_tokenizer, write_saes

LAYERS = (1, 3)


def make_texts(low: int, high: int, seed: int, count: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(low, high)}" for _ in range(draw.randrange(4, 9))) for _ in range(count)]


# The words overlap, so that nothing tells the groups apart without an error.
GROUPS = {"low": make_texts(2, 70, 0), "high": make_texts(25, 96, 1), "all": make_texts(2, 96, 2)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes")), k=K)


def search(model: Any, saes: SAESuite, **settings: Any) -> Discovery:
    chosen = Search(target="high", **{"top": 4, "holdout": 0.4, **settings})
    return discover(model, tiny_tokenizer(), saes, GROUPS, chosen, layers=LAYERS, show_progress=False)


@pytest.fixture(scope="module")
def discovery(model: Any, saes: SAESuite) -> Discovery:
    return search(model, saes, bootstrap=100)


@pytest.fixture(scope="module")
def compared(model: Any, discovery: Discovery) -> list[Baseline]:
    return compare(discovery, model, tiny_tokenizer(), show_progress=False)


def parting(discovery: Discovery) -> tuple[np.ndarray, np.ndarray]:
    """Whether each text is of the target, and whether it is held out."""
    target = [name == "high" for name, group in discovery.groups.items() for _ in group.heldout]
    return np.array(target), np.array([out for group in discovery.groups.values() for out in group.heldout])


def test_every_layer_is_compared_with_the_same_classifiers(compared: list[Baseline]) -> None:
    names = ["best feature", "chosen features", "random features", "best random feature"]
    probes = ["difference of means", "logistic probe"]
    wanted = [(layer, name) for layer in LAYERS for name in (*names, *probes)] + [(None, "words")]
    assert [(one.layer, one.name) for one in compared] == wanted
    for one in compared:
        assert one.low is not None
        assert one.high is not None
        assert 0 <= one.low <= one.heldout_auroc <= one.high <= 1
    by_name = {(one.layer, one.name): one.heldout_auroc for one in compared}
    assert by_name[None, "words"] > 0.7


def test_the_best_feature_and_the_mean_probe_equal_computations_apart(
    model: Any, discovery: Discovery, compared: list[Baseline]
) -> None:
    target, out = parting(discovery)
    by_name = {(one.layer, one.name): one.heldout_auroc for one in compared}
    ids = [row for group in discovery.groups.values() for row in group.token_ids]
    means = residual_means(model, ids, LAYERS, batch_size=5, show_progress=False)
    for layer in LAYERS:
        best = discovery.found.for_layer(layer)[0]
        assert by_name[layer, "best feature"] == pytest.approx(best.evidence["heldout_auroc"], abs=1e-12)
        x = means[layer].double().numpy()
        direction = x[target & ~out].mean(0) - x[~target & ~out].mean(0)
        assert by_name[layer, "difference of means"] == pytest.approx(roc_auc_score(target[out], (x @ direction)[out]))


def test_nothing_is_learned_from_the_texts_held_out(
    model: Any, discovery: Discovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = parting(discovery)
    fitted: list[int] = []
    original = DifferenceOfMeansProbe.fit

    def fit(self: DifferenceOfMeansProbe, x: Any, labels: Any) -> DifferenceOfMeansProbe:
        fitted.append(len(x))
        return original(self, x, labels)

    monkeypatch.setattr(DifferenceOfMeansProbe, "fit", fit)
    learned: list[int] = []

    def keywords(train: Any, labels: Any, test: Any) -> np.ndarray:
        learned.append(len(train))
        return np.zeros(len(test))

    monkeypatch.setattr(baselines, "keyword_scores", keywords)
    compare(discovery, model, tiny_tokenizer(), show_progress=False)
    assert fitted == [int((~out).sum())] * 2
    assert learned == [int((~out).sum())]


def test_random_features_fire_as_often_and_are_none_of_the_chosen() -> None:
    rate = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    chosen = [3, 50, 51, 120]
    drawn = draw_matched(rate, chosen, torch.Generator().manual_seed(1))
    assert len({*drawn, *chosen}) == 8
    for own, other in zip(chosen, drawn, strict=True):
        closer = ((rate - rate[own]).abs() < (rate[other] - rate[own]).abs()).sum()
        assert closer <= 20 + len(chosen) + 4
    with pytest.raises(ConfigError, match="3 of 5 features are chosen, so not as many others are left"):
        draw_matched(rate[:5], [0, 1, 2], torch.Generator())


def test_baselines_need_texts_held_out(model: Any, saes: SAESuite) -> None:
    with pytest.raises(DataError, match=r"measured on texts held out, and there are none. Set `holdout` above 0"):
        compare(search(model, saes, holdout=0), model, tiny_tokenizer(), show_progress=False)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_examples_are_the_texts_with_the_highest_activations(model: Any, saes: SAESuite, positions: Any) -> None:
    discovery = search(model, saes, positions=positions)
    found = top_examples(discovery, model, tiny_tokenizer(), count=3, show_progress=False)
    assert list(found) == list(discovery.found.ids)
    for feature, examples in found.items():
        figures = discovery.figures[feature.layer]
        for names in (["high"], ["low", "all"]):
            here = [example for example in examples if example.group in names]
            maxima = torch.cat([figures[n].act_max_XS[:, int(figures[n].column_F[feature.index])] for n in names])
            wanted = [value for value in maxima.sort(descending=True).values[:3].tolist() if value > 0]
            assert [example.act_max for example in here] == pytest.approx(wanted, rel=1e-4)
        for example in examples:
            assert example.act_max == max(act for act in example.acts if act is not None)
            assert len(example.tokens) == len(example.acts)
            assert "".join(example.tokens) in GROUPS[example.group]
            assert example.acts[0] is None
            assert example.acts.count(None) == (1 if positions == "all" else len(example.acts) - 1)
            assert example.is_cut == (False, False)


def test_long_texts_are_shown_around_the_highest_token_and_equal_ones_once(model: Any, saes: SAESuite) -> None:
    long = " ".join(make_texts(2, 96, 5, count=30))
    groups = {"high": [long, long, "w90 w91 w92"], "low": [*GROUPS["low"][:4]]}
    settings = Search(target="high", top=3, holdout=0)
    found = discover(model, tiny_tokenizer(), saes, groups, settings, layers=[1], show_progress=False)
    for examples in top_examples(found, model, tiny_tokenizer(), show_progress=False).values():
        texts = [example for example in examples if example.group == "high"]
        assert len(texts) <= 2
        piece = max(texts, key=lambda example: len(example.tokens))
        assert 25 <= len(piece.tokens) <= 65
        assert any(piece.is_cut)
        assert "".join(piece.tokens).strip() in long


def test_masked_tokens_are_shown_as_not_read(saes: SAESuite) -> None:
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[90] *= 300
    found = search(model, saes)
    examples = [e for some in top_examples(found, model, tiny_tokenizer(), show_progress=False).values() for e in some]
    odd = [(token, act) for e in examples for token, act in zip(e.tokens[1:], e.acts[1:], strict=True)]
    assert {act for token, act in odd if token.strip() == "w90"} == {None}
    assert None not in {act for token, act in odd if token.strip() != "w90"}


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag != "meta":
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_shows_every_feature_its_evidence_and_its_texts_and_escapes_them(
    discovery: Discovery, compared: list[Baseline], tmp_path: Path
) -> None:
    ids = discovery.found.ids
    piece = Example("low", True, ["<b>", "x & y"], [None, 2.0], 2.0, (True, False))
    write_report(tmp_path / "a" / "r.html", discovery, {ids[0]: [piece]}, compared)
    text = (tmp_path / "a" / "r.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert [name for name in tags.ids if name.startswith("L")] == [str(i) for i in ids]
    assert tags.links == [f"#{i}" for i in ids]
    assert "&lt;b&gt;" in text
    assert "<b>x" not in text
    for said in (
        "low</b>, held out, highest 2.000",
        "logistic probe",
        "words",
        "median norm",
        "Position 0 of 120 texts",
    ):
        assert said in text
    evidence = discovery.found.features[0].evidence
    inside, outside = f"{evidence['delta']:.3f}", f"{evidence['heldout_delta']:.3f}"
    ends = f"{evidence['heldout_delta_low']:.3f} to {evidence['heldout_delta_high']:.3f}"
    number = '<td class="number">'
    cells = f"<td>delta</td>{number}{inside}</td>{number}{outside}</td><td>{ends}</td>"
    assert cells in text
    write_report(tmp_path / "r.html", discovery, {})
    assert "logistic probe" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] in (["a", "r.html"], ["r.html", "a"])


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("find")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "saes")
    rows = [{"text": text, "kind": name} for name, group in GROUPS.items() for text in group]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def flags(assets: Path, **settings: Any) -> dict[str, Any]:
    where = {"model": str(assets / "model"), "saes": str(assets / "saes"), "sae_k": K, "layers": "3", "device": "cpu"}
    data = {"data": str(assets / "data.jsonl"), "group_column": "kind", "target": "high", "top": 3}
    return {**where, **data, "output": str(assets / "out.yaml"), **settings}


def test_command_does_it_all_and_the_file_holds_what_it_shows(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(assets, output=str(tmp_path / "high.yaml"), report=str(tmp_path / "high.html"))
    extra = ["--permutations", "100", "--splits", "4", "--bootstrap", "50", "--baselines", "--examples", "2"]
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert main(["find", *argv, *extra]) == 0
    shown = capsys.readouterr().out
    found = FeatureSet.load(tmp_path / "high.yaml")
    assert shown.startswith(format_table(found) + format_notes(found))
    head = shown.splitlines()[0].split()
    assert head[-4:] == ["p", "q", "selected", "threshold"]
    assert re.search(r"0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\]", shown)
    assert "features that fire have q up to 0.05" in shown
    assert "halves of the texts, L3: rank correlation" in shown
    assert shown.endswith(f"written to {given['output']}\nReport written to {given['report']}\n")
    assert [one["name"] for one in found.origin["baselines"]][-1] == "words"
    assert found.origin["settings"]["permutations"] == 100
    assert "Beside them" in (tmp_path / "high.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["high.html", "high.yaml"]


def test_without_extras_nothing_is_noted_but_norm_outliers(assets: Path) -> None:
    found = find_run.run(FindConfig(**flags(assets)))
    assert format_notes(found) == ""
    assert "search" not in found.origin
    assert "baselines" not in found.origin
    assert format_notes(FeatureSet.from_names(["L1F2"])) == ""
    # At a ratio of 1.2 of a random model's norms, some tokens are beyond.
    found = find_run.run(FindConfig(**flags(assets, max_norm_ratio=1.2)))
    count = found.origin["masked"]["norm_outliers"]["L3"]
    assert count > 0
    assert format_notes(found) == f"tokens masked for a residual of outlying length: {count} in L3\n"


def test_a_report_that_cannot_be_written_is_an_error_and_the_features_are_kept(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("qscope_trl.analysis.find_report.write_report", full)
    given = flags(assets, report=str(tmp_path / "r.html"), output=str(tmp_path / "f.yaml"))
    with pytest.raises(ConfigError, match=r"The report cannot be written to '.*r\.html'"):
        find_run.run(FindConfig(**given))
    assert FeatureSet.load(tmp_path / "f.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"permutations": -1}, "`permutations` is -1; it is 0 or more"),
        ({"splits": -1}, "`splits` is -1; it is 0 or more"),
        ({"examples": 0}, "`examples` is 0; it is 1 or more"),
        ({"bootstrap": 1}, "`bootstrap` is 1; an interval needs 2 resamples or more"),
        ({"max_norm_ratio": 0.9}, "`max_norm_ratio` is 0.9; it is above 1"),
        ({"baselines": True, "holdout": 0.0}, "`--baselines` are measured on texts held out, and `holdout` is 0"),
        (
            {"data": None, "group_column": None, "repetition": "r.txt", "report": "r.html"},
            "`--report` is for contrasts of groups; `--repetition` compares each text with itself",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(assets: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        FindConfig(**flags(assets, **settings))
