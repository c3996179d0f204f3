"""`qscope curate` from end to end on a tiny model: which rows stay, and why the others left."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from tests.analysis.curation_setting import (
    Setting,
    curate,
    kept_rows,
    make_store,
    plain_jaccard,
    plain_set,
    plain_values,
    removed,
    write_lines,
)


@pytest.fixture(scope="module")
def texts(setting: Setting) -> list[str]:
    return [row["text"] for row in setting.rows]


@pytest.fixture(scope="module")
def thresholds(texts: list[str]) -> dict[str, float]:
    """Features that fire in many texts, each with a threshold that halves the texts."""
    counts = Counter(feature for text in texts for feature in plain_set(text))
    frequent = [f"L{layer}F{index}" for (layer, index), _ in counts.most_common(6)]
    found = {}
    for name in frequent:
        values = np.sort(plain_values(texts, name))
        found[name] = round(float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean()), 4)
    return found


def test_rules_tag_keep_and_drop(
    setting: Setting, texts: list[str], thresholds: dict[str, float], tmp_path: Path
) -> None:
    (a, at), (b, bt), (c, ct) = list(thresholds.items())[:3]
    acts = {name: plain_values(texts, name) for name in (a, b, c)}
    (tmp_path / "drop.yaml").write_text(f"rule: 'not {c} > {ct}'\nname: quiet\n")
    curate(
        setting,
        tmp_path / "out",
        tag=[f"loud={a} > {at} or {b} > {bt}"],
        score=[f"how={a} > {at}"],
        keep=[f"{a} > {at} or {b} > {bt}"],
        drop=[str(tmp_path / "drop.yaml")],
    )
    first, second = (acts[a] > at) | (acts[b] > bt), acts[c] > ct
    wanted = np.flatnonzero(first & second)
    assert 0 < wanted.size < len(texts) // 2
    assert kept_rows(tmp_path / "out") == wanted.tolist()
    found = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert all(found["loud"])
    np.testing.assert_allclose(found["how"], acts[a][wanted] - at, rtol=1e-4, atol=1e-5)
    for entry in removed(tmp_path / "out"):
        row = entry["row"]
        if not first[row]:
            assert (entry["step"], entry["setting"]) == ("keep", f"--keep {a} > {at} or {b} > {bt}")
            values = [f"{name} > {t} does not hold at {acts[name][row]:.4g}" for name, t in ((a, at), (b, bt))]
            assert entry["reason"] == f"does not hold: {'; '.join(values)}"
        else:
            assert not second[row]
            assert (entry["step"], entry["setting"]) == ("drop", "--drop quiet")
            assert entry["reason"] == f"{c} > {ct} does not hold at {acts[c][row]:.4g}"


def test_near_duplicates_are_those_of_all_pairs_of_active_sets(
    setting: Setting, texts: list[str], tmp_path: Path
) -> None:
    # A row of 15 tokens whose last word changes has some nine tenths of its features left.
    curate(setting, tmp_path / "out", deduplicate=0.6)
    kept: list[int] = []
    wanted = {}
    for row, text in enumerate(texts):
        near = next((other for other in kept if plain_jaccard(text, texts[other]) >= 0.6), None)
        if near is None:
            kept.append(row)
        else:
            wanted[row] = near
    assert 10 <= len(wanted) <= 20
    assert kept_rows(tmp_path / "out") == kept
    entries = removed(tmp_path / "out")
    assert {entry["row"]: entry["other_row"] for entry in entries} == wanted
    for entry in entries:
        similarity = plain_jaccard(texts[entry["row"]], texts[entry["other_row"]])
        assert entry["similarity"] == similarity
        assert entry["reason"] == f"jaccard {similarity:.3f} with row {entry['other_row']}"
    counts = Counter(wanted.values())
    found = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert list(found["qscope_duplicates"]) == [counts[row] for row in kept]


def test_of_near_rows_the_longest_stays(setting: Setting, texts: list[str], tmp_path: Path) -> None:
    rows = [{"text": " ".join(texts[0].split()[:n])} for n in (9, 8, 10, 7)] + [{"text": "w50 w60 w70 w80 w90"}]
    data = write_lines(tmp_path / "growing.jsonl", rows)
    curate(setting, tmp_path / "out", data=str(data), deduplicate=0.4, deduplicate_keep="longest")
    assert kept_rows(tmp_path / "out") == [2, 4]


def test_of_near_rows_the_one_of_highest_score_stays(setting: Setting, texts: list[str], tmp_path: Path) -> None:
    words = texts[0].split()
    near = [" ".join([*words[:-1], last]) for last in ("w30", "w40", "w50", "w60", "w70")]
    data = write_lines(tmp_path / "near.jsonl", [{"text": text} for text in near])
    names = sorted({f"L{layer}F{index}" for text in near for layer, index in plain_set(text)})
    varied = next(
        name for name in names if plain_values(near, name).argmax() > 0 and plain_values(near, name).min() > 0
    )
    settings: dict[str, Any] = {"score": [f"s={varied} > 0"], "deduplicate_keep": "s"}
    curate(setting, tmp_path / "out", data=str(data), deduplicate=0.3, **settings)
    assert kept_rows(tmp_path / "out") == [int(plain_values(near, varied).argmax())]


def test_every_row_stays_as_it_was_or_left_once(setting: Setting, texts: list[str], tmp_path: Path) -> None:
    """Steps of all kinds at once: rows are conserved, and both outputs hold the input's rows in their order."""
    acts = plain_values(texts, "L1F118")
    middle = float(np.median(acts)) + 1e-3
    known = next(row for row, text in enumerate(texts) if len(text.split()) > 7 and acts[row] < middle)
    near = write_lines(tmp_path / "benchmark.jsonl", [{"question": texts[known]}, {"question": "w5 w6 w7 w8"}])
    result = curate(
        setting,
        tmp_path / "out",
        drop=[f"L1F118 > {middle}"],
        exclude_near=[str(near)],
        reference_column="question",
        deduplicate=0.7,
        deduplicate_by="weighted_jaccard",
        nearest=str(near),
        nearest_rows=20,
        balance=["lang"],
        max_rows=4,
    )
    entries = removed(tmp_path / "out")
    kept = kept_rows(tmp_path / "out")
    assert sorted(kept + [entry["row"] for entry in entries]) == list(range(len(texts)))
    assert {entry["step"] for entry in entries} == {
        "drop", "exclude_near", "deduplicate", "nearest", "balance", "max_rows",
    }  # fmt: skip
    assert len(kept) == 4
    assert kept == sorted(kept)
    saved = load_from_disk(str(tmp_path / "out" / "dataset"))
    parquet = Dataset.from_parquet(str(tmp_path / "out" / "data.parquet"), cache_dir=str(tmp_path / "cache"))
    assert list(saved) == list(parquet)
    names = list(setting.rows[0])
    assert [{name: row[name] for name in names} for row in saved] == [setting.rows[row] for row in kept]
    assert saved.column_names == [*names, "qscope_row", "qscope_duplicates", "qscope_nearness"]
    assert {entry["row"]: entry["other_row"] for entry in entries if entry["step"] == "exclude_near"}[known] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(step["removed"] for step in report["steps"]) == len(entries) == report["rows_before"] - 4
    assert report["steps"][-1]["left"] == report["rows_after"] == result.report["rows_after"] == 4


def comparable(output: Path) -> Any:
    entries = removed(output)
    similarity = [np.nan if entry["similarity"] is None else entry.pop("similarity") for entry in entries]
    for entry in entries:
        # A cosine and a threshold's value in words, which batches round differently.
        entry["reason"] = ""
        entry["other_source"] = entry["other_source"] and "other"
    return kept_rows(output), entries, np.array(similarity)


@pytest.mark.parametrize("per", ["document", "token"])
def test_a_store_gives_the_same_as_encoding(setting: Setting, texts: list[str], tmp_path: Path, per: str) -> None:
    near = write_lines(tmp_path / "benchmark.jsonl", [{"text": text} for text in (*texts[4:9], "w5 w6 w7 w8")])
    settings: dict[str, Any] = {
        "tag": ["fires=mean(L1F3) > 0.01 or rate(L2F7) > 0.1"], "drop": ["last(L1F122) > 0"],
        "exclude_similarity": 0.7, "deduplicate": 0.7, "deduplicate_by": "cosine", "aggregation": "mean",
        "nearest_rows": 15, "quota": ["fires=6"],
        "allow_fewer": True,
    }  # fmt: skip
    curate(setting, tmp_path / "encoded", exclude_near=[str(near)], nearest=str(near), **settings)
    store = str(make_store(setting, tmp_path / "store", setting.data, per=per))
    near_store = str(make_store(setting, tmp_path / "near_store", near, per=per))
    bare = {"model": "", "saes": "", "layers": "", "store": store}
    curate(setting, tmp_path / "stored", exclude_near=[near_store], nearest=near_store, **settings, **bare)
    # Texts to compare with are encoded, the data is not.
    bare = {"layers": "1,2", "store": store}
    curate(setting, tmp_path / "both", exclude_near=[str(near)], nearest=near_store, **settings, **bare)
    rows, entries, similarity = comparable(tmp_path / "encoded")
    assert {entry["step"] for entry in entries} >= {"drop", "exclude_near", "deduplicate", "nearest"}
    for name in ("stored", "both"):
        their_rows, their_entries, their_similarity = comparable(tmp_path / name)
        assert their_rows == rows
        assert [{**e, "setting": ""} for e in their_entries] == [{**e, "setting": ""} for e in entries]
        np.testing.assert_allclose(their_similarity, similarity, atol=1e-5)
    first, second = (load_from_disk(str(tmp_path / name / "dataset")) for name in ("encoded", "stored"))
    assert list(first["fires"]) == list(second["fires"])
    assert len(set(first["fires"])) == 2


def test_what_stays_depends_on_content_and_seed_and_not_on_order(setting: Setting, tmp_path: Path) -> None:
    rows = list({row["text"]: row for row in setting.rows}.values())
    chosen: dict[tuple[str, int], list[str]] = {}
    for name, order in (
        ("given", np.arange(len(rows))),
        ("shuffled", np.random.default_rng(5).permutation(len(rows))),
    ):
        data = write_lines(tmp_path / f"{name}.jsonl", [rows[i] for i in order])
        for seed in (0, 1):
            output = tmp_path / f"{name}{seed}"
            settings: dict[str, Any] = {"deduplicate": 0.7, "deduplicate_keep": "longest", "seed": seed}
            curate(setting, output, data=str(data), balance=["lang"], quota=["en=7", "*=4"], **settings)
            saved = load_from_disk(str(output / "dataset"))
            assert Counter(saved["lang"]) == {"en": 7, "zh": 4, "de": 4}
            chosen[name, seed] = sorted(saved["text"])
    assert chosen["given", 0] == chosen["shuffled", 0]
    assert chosen["given", 1] == chosen["shuffled", 1]
    assert chosen["given", 0] != chosen["given", 1]


def test_quotas_by_tag_count_a_row_for_its_first_tag(setting: Setting, texts: list[str], tmp_path: Path) -> None:
    first, second = plain_values(texts, "L1F3") > 0, plain_values(texts, "L2F7") > 0
    assert (first & second).any()
    result = curate(setting, tmp_path / "out", tag=["a=L1F3", "b=L2F7"], quota=["a=2", "b=1"], allow_fewer=True)
    kept = np.zeros(len(texts), dtype=bool)
    kept[kept_rows(tmp_path / "out")] = True
    assert (kept & first).sum() == min(2, first.sum())
    assert (kept & second & ~first).sum() == min(1, (second & ~first).sum())
    assert kept[~first & ~second].all()  # rows without a tag have no quota
    assert result.report["tags"]["a"]["before"]["true"] == first.sum()


def test_balance_alone_reads_no_feature_and_needs_no_model(setting: Setting, tmp_path: Path) -> None:
    curate(setting, tmp_path / "out", model="", saes="", layers="", balance=["lang", "good"])
    saved = load_from_disk(str(tmp_path / "out" / "dataset"))
    groups = Counter(zip(saved["lang"], saved["good"], strict=True))
    before = Counter((row["lang"], row["good"]) for row in setting.rows)
    assert set(groups.values()) == {min(before.values())}
    assert set(groups) == set(before)
    settings = {entry["setting"] for entry in removed(tmp_path / "out")}
    assert "--balance lang/good: en/false" in settings


def test_nearest_rows_are_those_of_highest_cosine(setting: Setting, texts: list[str], tmp_path: Path) -> None:
    near = write_lines(tmp_path / "wanted.jsonl", [{"text": texts[0]}, {"text": texts[7]}])
    curate(setting, tmp_path / "out", nearest=str(near), nearest_rows=4, nearest_by="max", deduplicate=1.0)
    saved = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert {0, 7} <= set(saved["qscope_row"])
    far = [entry["similarity"] for entry in removed(tmp_path / "out") if entry["step"] == "nearest"]
    assert min(saved["qscope_nearness"]) >= max(far)
    np.testing.assert_allclose(sorted(saved["qscope_nearness"])[-2:], 1.0, atol=1e-6)
