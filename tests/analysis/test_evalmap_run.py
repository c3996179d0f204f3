"""The whole command: what is computed of sets is what is written, in files that other programs read."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qscope_trl.analysis.evalmap import figures
from qscope_trl.analysis.evalmap.footprints import Footprints, bitmap
from qscope_trl.analysis.evalmap.mapping import make_map
from qscope_trl.analysis.evalmap.rankings import Scores, kendall
from qscope_trl.analysis.evalmap.report import plain, subset_files
from qscope_trl.analysis.evalmap.run import Mapped, format_result, run
from qscope_trl.analysis.evalmap.samples import Encoder
from qscope_trl.analysis.evalmap.scoring import compare_scores
from qscope_trl.cli import main
from qscope_trl.config.evalmap import EvalmapConfig
from qscope_trl.errors import ConfigError, DataError
from tests.analysis.curation_setting import MAX_LENGTH, Setting, make_setting, write_lines
from tests.tiny import K

FILES = {
    "report.html", "report.json", "sets.csv", "pairs.csv", "marginal.csv", "near.csv", "subset_a_de.csv",
    "subset_a_en.csv", "subset_a_zh.csv", "subset_b.csv", "overlaps.svg", "overlaps.png", "clusters.svg",
    "clusters.png", "coverage.svg", "coverage.png", "scores.svg", "scores.png", "scores_partial.svg",
    "scores_partial.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("evalmap"))


def config(setting: Setting, output: Path, **changes: Any) -> EvalmapConfig:
    given = {
        "output": str(output), "data": [f"a={setting.data}", f"b={setting.data}"], "by": ["a=lang"],
        "filter": ["b:good=True"], "model": str(setting.model), "saes": str(setting.saes), "sae_k": K,
        "layers": "1,2", "max_length": MAX_LENGTH, "batch_size": 8, **changes,
    }  # fmt: skip
    return EvalmapConfig(**given)


@pytest.fixture(scope="module")
def mapped(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    """A run with everything: near samples, training texts that hold a sample, scores."""
    folder = tmp_path_factory.mktemp("run")
    markup = "w2 w3 w4"
    train = write_lines(folder / "train.jsonl", [{"text": setting.rows[7]["text"]}, {"text": markup}])
    generator = np.random.default_rng(0)
    sizes = {f"a/{lang}": sum(row["lang"] == lang for row in setting.rows) for lang in ("de", "en", "zh")}
    header = ["model", "b", *(f"{name}/{i}" for name, size in sizes.items() for i in range(size))]
    skills = generator.normal(size=8)
    lines = [
        [f"m{i}", f"{skill:.3f}", *(str(int(generator.normal() < skill)) for _ in header[2:])]
        for i, skill in enumerate(skills)
    ]
    scores = folder / "scores.csv"
    scores.write_text("\n".join(",".join(line) for line in [header, *lines]) + "\n")
    return run(
        config(
            setting, folder / "out", train=[f"t={train}"], scores=str(scores), given="b", bootstrap=30,
            subset=4, near=0.5,
        ),
        show_progress=False,
    )  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_the_folder_holds_every_file_and_nothing_else(mapped: Mapped) -> None:
    assert {path.name for path in mapped.output.iterdir()} == FILES
    for name in ("overlaps", "clusters", "coverage", "scores"):
        assert (mapped.output / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert ElementTree.parse(mapped.output / f"{name}.svg").getroot().tag.endswith("svg")


def test_tables_hold_what_sets_of_features_say(mapped: Mapped) -> None:
    found = {
        name: [set(b.indices[x:y].tolist()) for x, y in zip(b.indptr[:-1], b.indptr[1:], strict=True)]
        for name, b in mapped.read.footprints.bitmaps.items()
    }
    unions = {name: set().union(*rows) for name, rows in found.items()}
    sets = table(mapped.output / "sets.csv")
    assert [row["set"] for row in sets] == ["a/de", "a/en", "a/zh", "b"]
    for row in sets:
        name = row["set"]
        counts = [sum(j in sample for sample in found[name]) for j in unions[name]]
        n, size = len(found[name]), len(unions[name])
        assert (int(row["samples"]), int(row["features"])) == (n, size)
        assert float(row["R"]) == pytest.approx((n + 1) / size**2 * sum(m / (m + 1) for m in counts))
        assert float(row["mean_coverage"]) == pytest.approx(float(row["R"]) * size / n)
        others = set().union(*(unions[other] for other in unions if other != name))
        assert float(row["own_share"]) == pytest.approx(len(unions[name] - others) / size)
        best = max((len(unions[name] & unions[o]) / size, o) for o in unions if o != name)
        assert float(row["nearest_overlap"]) == pytest.approx(best[0])
    pairs = table(mapped.output / "pairs.csv")
    assert len(pairs) == 6
    for row in pairs:
        first, second = unions[row["first"]], unions[row["second"]]
        assert int(row["shared"]) == len(first & second)
        assert float(row["overlap_of_first"]) == pytest.approx(len(first & second) / len(first))
        assert float(row["overlap_of_second"]) == pytest.approx(len(first & second) / len(second))
        assert float(row["overlap_min"]) == pytest.approx(len(first & second) / min(len(first), len(second)))
    total = len(set().union(*unions.values()))
    assert int(table(mapped.output / "marginal.csv")[-1]["total"]) == total


def test_subsets_name_rows_of_the_data_and_cover_what_they_say(mapped: Mapped, setting: Setting) -> None:
    rows = table(mapped.output / "subset_a_en.csv")
    assert len(rows) == 4
    source = next(entry for entry in mapped.read.sets if entry.name == "a/en")
    bitmap_, ids = mapped.read.footprints.bitmaps["a/en"], mapped.read.footprints.row_ids["a/en"].tolist()
    covered: set[int] = set()
    for row in rows:
        sample = int(row["sample"])
        assert int(row["row"]) == source.rows[sample]
        assert row["text"] == setting.rows[int(row["row"])]["text"]
        covered |= set(bitmap_[ids.index(sample)].indices.tolist())
        assert int(row["features"]) == len(covered)


def test_samples_that_stand_in_two_sets_and_in_the_training_texts_are_found(mapped: Mapped, setting: Setting) -> None:
    rows = table(mapped.output / "near.csv")
    same = {(row["set"], row["other_set"], row["text"]) for row in rows if row["same_text"] == "True"}
    good = [row for row in setting.rows if row["good"] and len(row["text"].split()) > 1]
    assert good
    for row in good:
        assert (f"a/{row['lang']}", "b", row["text"]) in same
    hidden = setting.rows[7]
    assert (f"a/{hidden['lang']}", "t", hidden["text"]) in same
    for row in rows:
        if row["same_text"] == "True":
            assert float(row["similarity"]) == float(row["ngrams_in_other"]) == float(row["ngrams_of_other"]) == 1
        if row["other_set"] == "t":
            assert row["other_text"] == (hidden["text"], "w2 w3 w4")[int(row["other_sample"])]
    keys = [frozenset([(r["set"], r["sample"]), (r["other_set"], r["other_sample"])]) for r in rows]
    assert len(set(keys)) == len(keys)


def test_json_holds_the_figures_and_no_nan(mapped: Mapped) -> None:
    found = json.loads((mapped.output / "report.json").read_text(), parse_constant=pytest.fail)
    assert np.allclose(found["overlap"], mapped.map.overlaps.of_row)
    assert [entry["set"] for entry in found["sets"]] == list(mapped.map.names)
    assert found["settings"]["by"] == ["a=lang"]
    assert set(found["scores"]["performance"]) == {"a/de", "a/en", "a/zh"}
    assert found["scores"]["overlap_agreement"]["agreement"]["low"] is not None
    assert plain({"x": float("nan"), 1: np.int64(2)}) == {"x": None, "1": 2}


class Page(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing(mapped: Mapped) -> None:
    page = Page()
    page.feed((mapped.output / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    names = [tag for tag, _ in page.tags]
    assert names.count("svg") == 5
    assert not {"script", "img", "image", "link", "iframe", "object"} & set(names)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    links = [attributes.get("xlink:href") for _, attributes in page.tags if "xlink:href" in attributes]
    assert links
    assert all(link and link[0] == "#" and link[1:] in ids for link in links)


def test_the_table_says_what_matters(mapped: Mapped) -> None:
    lines = format_result(mapped).splitlines()
    assert lines[0].split()[:4] == ["set", "samples", "features", "R"]
    text = "\n".join(lines)
    assert "near samples: " in text
    assert "near training texts: " in text
    number = r"-?\d\.\d+ \(-?\d\.\d+ to -?\d\.\d+\)"
    assert re.search(rf"a/en: R_perf {number}; subset of \d+: tau {number}, random {number}\n", text)
    assert "fewer than three" not in text
    assert "Pearson of overlap and score correlation: " in text
    assert "the same, given b: " in text
    assert lines[-1] == f"Report written to {mapped.output / 'report.html'}"
    short = {entry.name: sum(len(text.split()) < 2 for text in entry.texts or ()) for entry in mapped.read.sets}
    assert sum(short.values()) >= 2
    for entry in mapped.read.sets:
        line = f"{entry.name}: {short[entry.name]} of {entry.num_samples} samples have no token to read"
        assert (line in lines) is (short[entry.name] > 0)


def test_one_set_without_matplotlib_has_a_report_too(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.has_matplotlib()
    argv = ["--model", str(setting.model), "--saes", str(setting.saes), "--sae-k", str(K), "--layers", "2"]
    output = tmp_path / "new" / "out"
    assert main(["evalmap", *argv, "--data", str(setting.data), "--near", "0", "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {
        "report.html", "report.json", "sets.csv", "pairs.csv", "marginal.csv", "subset_data.csv",
    }  # fmt: skip
    assert "No figures: Matplotlib is not installed." in (output / "report.html").read_text()
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[0] == "data"
    assert table(output / "pairs.csv") == []


def test_what_cannot_be_done_is_said_before_anything_is_read(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ConfigError, match=r"The output '.*out' is there already, and nothing is written over"):
        run(config(setting, tmp_path / "out", model="nowhere"))
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ConfigError, match=r"`evalmap` needs SciPy, which is not installed"):
        run(config(setting, tmp_path / "new", model="nowhere"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"by": ["b=nothing"]}, DataError, r"has no column `nothing`, which `filter` or `by` names"),
        ({"filter": ["b:lang=xx"]}, DataError, r"No row of '.*' has `lang=xx`, so `b` is empty"),
        ({"text_column": ["b=nothing"]}, DataError, r"has no column `nothing`"),
        ({"train": ["t=DATA"], "train_column": "nothing"}, DataError, r"has no column `nothing`"),
        ({"subset": 1000}, ConfigError, r"`subset` is 1000, but `a` has 61 samples"),
        ({"scores": "none.csv"}, DataError, r"The scores 'none.csv' cannot be read"),
        ({"scores": "SCORES", "given": "b"}, ConfigError, r"`given` is 'b', of which there are no scores"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_encoded(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kind: Any, message: str
) -> None:
    def encode(*_: Any) -> None:
        pytest.fail("something was encoded")

    monkeypatch.setattr(Encoder, "__call__", encode)
    scores = tmp_path / "scores.csv"
    scores.write_text("model,a\none,1\ntwo,2\n")
    given = {"by": [], "filter": [], **changes}
    if given.get("scores") == "SCORES":
        given["scores"] = str(scores)
    given["train"] = [entry.replace("DATA", str(setting.data)) for entry in given.get("train", [])]
    with pytest.raises(kind, match=message):
        run(config(setting, tmp_path / "out", **given), show_progress=False)
    assert not (tmp_path / "out").exists()


def test_too_few_scored_sets_are_said(setting: Setting, tmp_path: Path) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("model,a,b\none,1,2\ntwo,2,3\n")
    found = run(
        config(setting, tmp_path / "out", by=[], scores=str(scores), near=0.0, max_samples=9), show_progress=False
    )
    assert "scores: fewer than three pairs of scored sets: no correlation\n" in format_result(found)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<p>Fewer than three pairs of scored sets: no correlation.</p>" in page
    three = Scores(("A", "B"), {name: np.array([0.1, 0.2]) for name in "abc"}, {})
    footprints = prints({"a": 9, "b": 8, "c": 7})
    compared = compare_scores(make_map(footprints), footprints, three, given="a", draws=5)
    assert compared.overlap_agreement is not None
    text = format_result(found._replace(scores=compared))
    assert "scores, given a: fewer than three pairs of scored sets: no correlation\n" in text


def prints(sizes: dict[str, int], seed: int = 0) -> Footprints:
    generator = np.random.default_rng(seed)
    bitmaps = {n: bitmap([generator.integers(0, 40, 6) for _ in range(s)], 40) for n, s in sizes.items()}
    return Footprints(bitmaps, {0: 40}, {name: np.arange(size) for name, size in sizes.items()})


def test_a_subset_larger_than_a_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`subset` is 9, but `b` has 8 samples"):
        make_map(prints({"a": 30, "b": 8}), subset=9)


def test_subsets_are_of_the_sizes_asked_for() -> None:
    found = make_map(prints({"a": 100}), subset=7).sets[0]
    assert [subset.size for subset in found.subsets] == [1, 2, 5, 7, 10]
    assert found.nearest is None
    assert math.isnan(found.nearest_overlap)
    assert not found.is_unlike
    assert [round(found.curve[-1], 12), found.curve_sizes[-1]] == [1, 100]
    alone = make_map(
        Footprints({"x": bitmap([[0, 1, 2]], 9), "y": bitmap([[0, 5, 6, 7]], 9), "z": bitmap([[0, 1]], 9)}, {0: 9})
    )
    assert [entry.is_unlike for entry in alone.sets] == [False, True, False]
    assert [entry.cluster for entry in alone.sets] == [1, 2, 1]


def test_scores_are_compared_on_the_chosen_samples() -> None:
    footprints = prints({"a": 40, "b": 30, "c": 20})
    # Samples without a token are not among the rows: numbers in the scores are those of the whole set.
    footprints = Footprints(
        footprints.bitmaps, footprints.columns, {n: 2 * ids for n, ids in footprints.row_ids.items()}
    )
    found = make_map(footprints, subset=3)
    generator = np.random.default_rng(1)
    by_sample = {name: generator.random((7, 2 * footprints.num_samples(name))) for name in "abc"}
    scores = Scores(tuple("ABCDEFG"), {n: v.mean(1) for n, v in by_sample.items()}, by_sample)
    compared = compare_scores(found, footprints, scores, draws=20)
    for entry in found.sets:
        ranking = next(r for r in compared.rankings[entry.name] if r.size == 3)
        values = by_sample[entry.name]
        chosen = 2 * entry.chosen.samples[:3]
        assert ranking.greedy.value == pytest.approx(kendall(values.mean(1), values[:, chosen].mean(1)))
        assert -1 <= ranking.greedy.low <= ranking.greedy.high <= 1
        assert -1 <= ranking.random.low <= ranking.random.value <= ranking.random.high <= 1
    assert compared.redundancy_agreement is not None
    assert compared.overlap_agreement is not None
    assert compared.partial_agreement is None
    with pytest.raises(ConfigError, match=r"`given` is 'd', of which there are no scores; there are of a, b, c"):
        compare_scores(found, footprints, scores, given="d")


def test_subsets_have_files_of_their_own() -> None:
    assert subset_files(["a/b", "a_b", "a b", "c"]) == {
        "a/b": "subset_a_b.csv", "a_b": "subset_a_b_.csv", "a b": "subset_a_b__.csv", "c": "subset_c.csv",
    }  # fmt: skip
