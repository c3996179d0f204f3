from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from qscope_trl.analysis.texts import prepare_group, read_groups, read_texts
from qscope_trl.config.find import FindConfig
from qscope_trl.errors import ConfigError, DataError
from tests.tiny import tiny_tokenizer

ROWS = [{"text": "w2 w3", "lang": "zh"}, {"text": "  ", "lang": "zh"}, {"text": "w4 w5 w6", "lang": "en"}]


def write(path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if path.name.endswith(".jsonl"):
        path.write_text(lines + "\n")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text("".join(row["text"] + "\n" for row in ROWS))
    return path


def config(**settings) -> FindConfig:
    return FindConfig(model="m", saes="s", layers="0", output="o.yaml", **settings)


@pytest.mark.parametrize("name", ["zh.jsonl", "zh.jsonl.gz", "zh.json", "zh.parquet", "zh.txt"])
def test_every_format_gives_the_texts_without_blank_ones(name: str, tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / name), "text") == ["w2 w3", "w4 w5 w6"]


def test_groups_are_named_after_files_columns_or_by_hand(tmp_path: Path) -> None:
    zh, en = str(write(tmp_path / "zh.jsonl.gz")), str(write(tmp_path / "en.jsonl"))
    groups, target = read_groups(config(positive=zh, negative=en))
    assert (list(groups), target) == (["zh", "en"], "zh")
    groups, target = read_groups(config(group=[f"a={zh}", f"b={en}", f"c={en}"], target="b"))
    assert (list(groups), target) == (["a", "b", "c"], "b")
    groups, target = read_groups(config(data=en, group_column="lang", target="en"))
    assert groups == {"zh": ["w2 w3"], "en": ["w4 w5 w6"]}


def test_bundled_texts_are_read_by_name() -> None:
    groups, target = read_groups(config(positive="demo:find_zh", negative="demo:find_en"))
    assert ({name: len(texts) for name, texts in groups.items()}, target) == (
        {"find_zh": 256, "find_en": 256},
        "find_zh",
    )
    groups, _ = read_groups(config(group=["a=demo:find_zh", "b=demo:find_en"], target="a"))
    assert list(groups) == ["a", "b"]
    groups, _ = read_groups(config(data="demo:rules_test", group_column="language", target="zh"))
    assert sorted(groups) == ["en", "mixed", "zh"]
    with pytest.raises(DataError, match="No data set `nothing` is bundled"):
        read_groups(config(data="demo:nothing", group_column="language", target="zh"))


def test_groups_may_be_whole_numbers_or_booleans(tmp_path: Path) -> None:
    groups, _ = read_groups(config(data="demo:rules_test", group_column="switched", target="true"))
    assert sorted(groups) == ["false", "true"]
    path = tmp_path / "toxic.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{n}", "toxic": n % 2}) + "\n" for n in range(5)))
    groups, target = read_groups(config(data=str(path), group_column="toxic", target="1"))
    assert (groups, target) == ({"0": ["w0", "w2", "w4"], "1": ["w1", "w3"]}, "1")
    path.write_text('{"text": "w1", "toxic": 0.5}\n')
    with pytest.raises(DataError, match=r"Column `toxic` of .* holds 0\.5, which is not a string"):
        read_groups(config(data=str(path), group_column="toxic", target="1"))


def test_groups_that_do_not_work_are_refused(tmp_path: Path) -> None:
    zh = str(write(tmp_path / "zh.jsonl"))
    with pytest.raises(ConfigError, match="Two files would both be the group `zh`"):
        read_groups(config(positive=zh, negative=zh))
    with pytest.raises(ConfigError, match="The target group `de` and at least one other"):
        read_groups(config(group=[f"zh={zh}", f"en={zh}"], target="de"))
    with pytest.raises(ConfigError, match="write it as NAME=FILE"):
        read_groups(config(group=[zh], target="zh"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", '{"text": " "}\n', "holds no text"),
        ("a.jsonl", '{"content": "x", "id": 1}\n', "no column `text`; it has `content`, `id`"),
        ("a.jsonl", '{"text": 3}\n', "holds 3, which is not a string"),
        ("a.jsonl", "[1]\n", "holds a list where a mapping"),
        ("a.jsonl", "{oops\n", "cannot be read as jsonl"),
        ("a.json", '{"text": "x"}', "holds a dict, not a list"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.docx", "x", "is of no known kind"),
    ],
)
def test_unusable_files_say_what_is_wrong(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name, "text")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No text file at"):
        read_texts(tmp_path / "none.jsonl", "text")


def test_holdout_depends_on_content_not_on_order_and_keeps_equal_texts_together() -> None:
    texts = [f"w{n} w{n + 1}" for n in range(2, 42)] + ["w50 w51"] * 5
    group = prepare_group("g", texts, tiny_tokenizer())
    again = prepare_group("g", texts[::-1], tiny_tokenizer())
    other = prepare_group("g", texts, tiny_tokenizer(), seed=1)
    held = [sorted(i for i, out in zip(g.token_ids, g.heldout, strict=True) if out) for g in (group, again, other)]
    assert held[0] == held[1] != held[2]
    assert len({tuple(ids) for ids in held[0]}) == 8
    repeated = [out for ids, out in zip(group.token_ids, group.heldout, strict=True) if ids == [50, 51]]
    assert len(repeated) == 5
    assert len(set(repeated)) == 1


def test_max_tokens_ends_a_group_early() -> None:
    texts = [f"w{n} w3 w4 w5" for n in range(2, 42)]
    group = prepare_group("g", texts, tiny_tokenizer(), max_tokens=10, holdout=0)
    assert len(group.token_ids) == 4  # Three tokens count in each, as the first is left out.


def test_groups_without_usable_or_spare_texts_are_errors() -> None:
    with pytest.raises(DataError, match="No token of group `g` is left"):
        prepare_group("g", ["w2", "w3"], tiny_tokenizer())
    with pytest.raises(DataError, match="Group `g` has one usable text"):
        prepare_group("g", ["w2 w3", "w2 w3"], tiny_tokenizer())
    assert prepare_group("g", ["w2 w3"], tiny_tokenizer(), holdout=0).heldout == [False]
