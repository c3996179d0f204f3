"""Rows of equal text are duplicates, whatever features were computed for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from qscope_trl.analysis.curation import equal
from qscope_trl.analysis.curation.features import Block, ModelReader
from qscope_trl.analysis.curation.leaders import Duplicates
from qscope_trl.analysis.curation.references import NearReference
from qscope_trl.analysis.curation.sets import ActiveSets
from tests.analysis.curation_setting import (
    Setting,
    curate,
    kept_rows,
    make_store,
    plain_jaccard,
    removed,
    write_lines,
)
from tests.tiny import sentence


def doubled(count: int) -> list[str]:
    """Texts of many lengths, each twice, in a random order."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 24, (count,), generator=generator).tolist()
    texts = [sentence(generator, length) for length in lengths] * 2
    return [texts[i] for i in torch.randperm(2 * count, generator=generator).tolist()]


def key(value: Any, column: str = "text") -> bytes:
    row = value if isinstance(value, dict) else {"text": value}
    return equal.text_key(row, text_column=column, source_name="x", index=0)


def test_texts_are_equal_character_by_character() -> None:
    chat = [{"role": "user", "content": "a"}]
    texts: list[Any] = ["a", "A", "a ", "", "\ud800", chat, json.dumps(chat), [{**chat[0], "content": "b"}]]
    assert len({key(text) for text in texts}) == len(texts)
    assert key(None) == key("")
    assert key([{"content": "a", "role": "user"}]) == key(chat)
    assert key({"p": "a", "c": "bc"}, "p+c") == key({"p": "ab", "c": "c"}, "p+c") == key("abc")


def test_the_first_equal_text_is_that_of_a_plain_search() -> None:
    generator = np.random.default_rng(0)
    words = [bytes([n]) * 16 for n in range(12)]
    mine, theirs = ([words[n] for n in generator.integers(0, most, 40)] for most in (12, 9))
    found = equal.first_equal(equal.text_keys(mine), equal.text_keys(theirs))
    assert found.tolist() == [theirs.index(word) if word in theirs else -1 for word in mine]
    assert -1 in found
    order = generator.permutation(40)[:30]
    copies = equal.part_copies(equal.text_keys(mine), order)
    seen: dict[bytes, int] = {}
    wanted = [(row, seen.setdefault(mine[row], row)) for row in order.tolist()]
    assert copies.originals.tolist() == list(seen.values())
    assert list(zip(copies.rows.tolist(), copies.original.tolist(), strict=True)) == [
        pair for pair in wanted if pair[0] != pair[1]
    ]


def test_a_copy_is_near_what_its_original_is_near() -> None:
    near = Duplicates(np.array([4]), np.array([2]), np.array([0.7]))
    copies = equal.Copies(np.array([2, 4, 5]), np.array([0, 1, 3]), np.array([2, 4, 5]))
    found = equal.with_copies(near, copies, 6)
    assert [column.tolist() for column in found] == [[4, 0, 1, 3], [2, 2, 2, 5], [0.7, 1.0, 0.7, 1.0]]


def test_an_equal_reference_counts_before_a_near_one() -> None:
    near = NearReference(np.array([1, 4]), np.array([3, 3]), np.array([0.9, 0.8]))
    mine, theirs = (equal.text_keys([bytes([n]) * 16 for n in some]) for some in ((9, 1, 2, 9, 3), (8, 2, 1, 1)))
    found = equal.with_equal(near, np.array([1, 2, 4]), mine, theirs)
    assert [column.tolist() for column in found] == [[1, 2, 4], [2, 1, 3], [1.0, 1.0, 0.8]]


def roughened(read: Any) -> Any:
    """`ModelReader.read` that loses the first feature of every second row, as rounding does now and then."""

    def rough(self: ModelReader, *args: Any, **settings: Any) -> Block:
        block: Block = read(self, *args, **settings)
        sets = block.sets
        assert sets is not None
        lost = sets.offsets[1:-1:2]
        offsets = sets.offsets - np.concatenate([[0], np.cumsum(np.arange(sets.num_documents) % 2)])
        values = None if sets.values is None else np.delete(sets.values, lost)
        return block._replace(sets=ActiveSets(offsets, np.delete(sets.features, lost), values, sets.starts))

    return rough


def test_equal_texts_of_unequal_features_are_duplicates(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = doubled(20)
    data = str(write_lines(tmp_path / "data.jsonl", [{"text": text, "n": n} for n, text in enumerate(texts)]))
    benchmark = str(write_lines(tmp_path / "benchmark.jsonl", [{"text": text} for text in texts[:3]]))
    monkeypatch.setattr(ModelReader, "read", roughened(ModelReader.read))
    curate(setting, tmp_path / "out", data=data, deduplicate=1)
    first = {text: texts.index(text) for text in texts}
    assert kept_rows(tmp_path / "out") == sorted(first.values())
    left = removed(tmp_path / "out")
    assert {entry["row"]: entry["other_row"] for entry in left} == {
        row: first[text] for row, text in enumerate(texts) if first[text] != row
    }
    assert {entry["similarity"] for entry in left} == {1.0}
    assert left[0]["reason"] == f"jaccard 1.000 with row {left[0]['other_row']}"
    curate(setting, tmp_path / "near", data=data, exclude_near=[benchmark], exclude_similarity=1)
    near = {entry["row"]: entry["other_row"] for entry in removed(tmp_path / "near")}
    assert near == {row: texts.index(text) for row, text in enumerate(texts) if text in texts[:3]}


def test_in_bf16_as_in_fp32_and_with_a_store_each_text_stays_once(setting: Setting, tmp_path: Path) -> None:
    texts = doubled(20)
    data = write_lines(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    wanted = sorted({texts.index(text) for text in texts})
    curate(setting, tmp_path / "encoded", data=str(data), deduplicate=1, dtype="bfloat16")
    assert kept_rows(tmp_path / "encoded") == wanted
    store = str(make_store(setting, tmp_path / "store", data, dtype="bfloat16"))
    curate(setting, tmp_path / "stored", data=str(data), deduplicate=1, model="", saes="", layers="", store=store)
    assert kept_rows(tmp_path / "stored") == wanted


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_rows_without_a_token_to_read_are_duplicates_too(setting: Setting, tmp_path: Path, keep: str) -> None:
    texts = ["w9", "w8", "w9", "", "w9", None, "w5 w6 w7"]
    data = str(write_lines(tmp_path / "data.jsonl", [{"text": text} for text in texts]))
    curate(setting, tmp_path / "out", data=data, deduplicate=0.5, deduplicate_keep=keep)
    kept = [texts[row] or "" for row in kept_rows(tmp_path / "out")]
    assert sorted(kept) == ["", "w5 w6 w7", "w8", "w9"]
    benchmark = str(write_lines(tmp_path / "benchmark.jsonl", [{"text": "w8"}, {"text": "w20 w21 w22"}]))
    curate(setting, tmp_path / "near", data=data, exclude_near=[benchmark])
    assert [(e["row"], e["other_row"], e["similarity"]) for e in removed(tmp_path / "near")] == [(1, 0, 1.0)]


def test_which_of_equal_texts_stays_does_not_depend_on_their_order(setting: Setting, tmp_path: Path) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate(["w5 w6 w7 w8"] * 6 + ["w9"] * 3)]
    kept = []
    for name, order in (("given", rows), ("turned", rows[::-1])):
        data = str(write_lines(tmp_path / f"{name}.jsonl", order))
        curate(setting, tmp_path / name, data=data, deduplicate=0.9, deduplicate_keep="longest")
        kept.append(sorted(load_from_disk(str(tmp_path / name / "dataset"))["n"]))
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2


def test_every_row_that_leaves_is_near_the_row_named_which_stays(setting: Setting, tmp_path: Path) -> None:
    texts = [row["text"] for row in setting.rows] * 2
    data = str(write_lines(tmp_path / "data.jsonl", [{"text": text} for text in texts]))
    curate(setting, tmp_path / "out", data=data, deduplicate=0.6)
    kept, left = set(kept_rows(tmp_path / "out")), removed(tmp_path / "out")
    assert len(kept) + len(left) == len(texts)
    for entry in left:
        assert entry["other_row"] in kept
        mine, other = texts[entry["row"]], texts[entry["other_row"]]
        assert entry["similarity"] == (1.0 if mine == other else plain_jaccard(mine, other))


def test_texts_are_no_column_of_few_values(setting: Setting, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n}", "answer": "w7 w8", "kind": n % 2} for n in range(3, 9)]
    data = str(write_lines(tmp_path / "data.jsonl", rows))
    bare: dict[str, Any] = {"data": data, "model": "", "saes": "", "layers": "", "dry_run": True, "max_rows": 4}
    for given, wanted in (
        ({"text_column": "prompt"}, {"kind"}),
        ({"text_column": "answer+prompt"}, {"kind"}),
        ({"text_column": "prompt", "balance": ["prompt"]}, {"kind", "prompt"}),
    ):
        result = curate(setting, tmp_path / "out", **bare, **given)
        assert set(result.report["columns"]) == wanted
