"""Labelled texts: what counts as positive, and dealing them out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from qscope_trl.analysis.rules.data import TEST, Labelled, deal, read_labelled
from qscope_trl.config.rules import LabelledConfig
from qscope_trl.errors import DataError
from tests.tiny import tiny_tokenizer


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(**changes: object) -> LabelledConfig:
    return LabelledConfig(**{"model": "demo", "saes": "demo", "layers": "all", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "positive_label"),
    [
        ([1, 0, 0, 1], "1"),
        ([True, False, False, True], "true"),
        (["a", "b", "c", "a"], "a"),
        ([1.0, 0.0, 2.0, 1], "1"),
    ],
)
def test_labels_of_any_kind_are_read(tmp_path: Path, values: list[object], positive_label: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t {i}", "y": value} for i, value in enumerate(values)])
    found = read_labelled(settings(data=path, label_column="y", positive_label=positive_label))
    assert found.labels.tolist() == [True, False, False, True]
    assert found.describe()["positive"] == 2


def test_two_files_give_the_two_classes(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [{"text": "a"}, {"text": "b"}])
    bad = write(tmp_path / "bad.jsonl", [{"text": "c"}])
    found = read_labelled(settings(positive=good, negative=bad))
    assert (found.texts, found.labels.tolist()) == (["a", "b", "c"], [True, True, False])


def test_conversations_go_through_the_template_of_the_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": [{"role": "user", "content": f"w{i}"}], "y": i} for i in range(2)]
    data = write(tmp_path / "a.jsonl", rows)  # type: ignore[arg-type]
    found = read_labelled(settings(model=str(tmp_path / "model"), data=data, label_column="y"))
    assert found.texts == ["w9 w0", "w9 w1"]


def test_half_characters_in_groups_and_texts_are_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"\ud83d {i}", "y": i % 2, "g": "\ud83d"} for i in range(4)])
    found = read_labelled(settings(data=path, label_column="y", group_column="g"), group_column="g")
    assert (found.texts[0], found.groups[0]) == ("\ufffd 0", "\ufffd")


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t {i}", "y": i % 2} for i in range(9)])
    found = settings(data=path, label_column="y", max_rows=4)
    assert len(read_labelled(found)) == 4
    # Another set has its own limit, or none.
    assert len(read_labelled(found, data=path)) == 9
    assert len(read_labelled(found, data=path, max_rows=6)) == 6


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a", "y": 1}, {"text": "b", "y": None}])
    with pytest.raises(
        DataError, match=r"has no column `z`; it has `text`, `y`. Name the right one by `label_column`"
    ):
        read_labelled(settings(data=path, label_column="z"))
    with pytest.raises(DataError, match=r"Row 1 of .* has no label: column `y` is null there"):
        read_labelled(settings(data=path, label_column="y"))
    # A Parquet column of numbers, as pandas writes one with gaps.
    for value, message in (
        (float("nan"), "Row 1 of .* has no label: column `y` is null there. Leave such rows out"),
        (float("inf"), "Row 1 of .* has the label inf in column `y`, which names no class"),
    ):
        Dataset.from_dict({"text": ["a", "b"], "y": [1.0, value]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            read_labelled(settings(data=str(tmp_path / "a.parquet"), label_column="y"))
    with pytest.raises(DataError, match="Name the right one by `group_column`"):
        read_labelled(settings(data=path, label_column="y"), group_column="page")
    for value, which in ((1, "positive"), (0, "negative")):
        path = write(tmp_path / "b.jsonl", [{"text": "a", "y": value}, {"text": "b", "y": value}])
        with pytest.raises(DataError, match=f"All 2 texts of .* are {which}, so there is nothing to tell apart"):
            read_labelled(settings(data=path, label_column="y"))


def labelled(num_groups: int = 60, seed: int = 0) -> Labelled:
    generator = np.random.default_rng(seed)
    groups = [f"g{i}" for i in range(num_groups) for _ in range(int(generator.integers(1, 5)))]
    labels = generator.random(len(groups)) < 0.3
    return Labelled("made up", [f"t{i}" for i in range(len(groups))], labels, groups)


def test_groups_are_never_parted_and_shares_are_kept() -> None:
    data = labelled()
    slices = deal(data, folds=4, test_share=0.2, seed=1)
    parts = {group: {int(s) for s, g in zip(slices, data.groups, strict=True) if g == group} for group in data.groups}
    assert all(len(found) == 1 for found in parts.values())
    assert set(slices.tolist()) == {TEST, 0, 1, 2, 3}
    for name, share in [(TEST, 0.2), *((fold, 0.2) for fold in range(4))]:
        inside = slices == name
        assert inside.mean() == pytest.approx(share, abs=0.06)
        assert data.labels[inside].mean() == pytest.approx(data.labels.mean(), abs=0.1)


def test_groups_with_a_text_in_common_stay_together() -> None:
    data = labelled()
    # A chain: the last text of each of the first five groups is the first one of the next.
    starts = [data.groups.index(f"g{i}") for i in range(6)]
    texts = list(data.texts)
    for here, following in pairwise(starts):
        texts[following - 1] = texts[following] = f"shared {here}"
    slices = deal(Labelled("chained", texts, data.labels, data.groups), folds=4, test_share=0.2, seed=1)
    assert len(set(slices[: data.groups.index("g6")].tolist())) == 1
    # They are not alike by chance.
    assert len(set(deal(data, folds=4, test_share=0.2, seed=1)[: data.groups.index("g6")].tolist())) > 1


def test_the_order_of_the_texts_does_not_matter_but_the_seed_does() -> None:
    data = labelled()
    slices = deal(data, folds=4, test_share=0.2, seed=1)
    order = np.random.default_rng(5).permutation(len(data))
    shuffled = Labelled(
        "shuffled", [data.texts[i] for i in order], data.labels[order], [data.groups[i] for i in order]
    )
    np.testing.assert_array_equal(deal(shuffled, folds=4, test_share=0.2, seed=1), slices[order])
    assert (deal(data, folds=4, test_share=0.2, seed=2) != slices).any()
    assert TEST not in deal(data, folds=4, test_share=0.0, seed=1)


def test_too_few_texts_are_refused() -> None:
    data = Labelled("few", list("abcdef"), np.array([1, 0, 0, 0, 0, 0], dtype=bool), list("abcdef"))
    with pytest.raises(DataError, match="1 positive and 5 negative texts in 6 groups: too few to deal out"):
        deal(data, folds=3, test_share=0.2, seed=0)
