from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from qscope_trl.activations.chat import model_chat_renderer
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
    elif path.suffix == ".csv":
        path.write_text("text,lang\n" + "".join(f"{row['text']},{row['lang']}\n" for row in ROWS))
    else:
        path.write_text("".join(row["text"] + "\n" for row in ROWS))
    return path


def config(**settings) -> FindConfig:
    return FindConfig(model="m", saes="s", layers="0", output="o.yaml", **settings)


def read(path: Path, **settings) -> list[str]:
    return read_texts(str(path), config(positive="a", negative="b", **settings))


@pytest.mark.parametrize("name", ["zh.jsonl", "zh.jsonl.gz", "zh.json", "zh.parquet", "zh.csv", "zh.txt"])
def test_every_format_gives_the_texts_without_blank_ones(name: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / name)) == ["w2 w3", "w4 w5 w6"]


def test_what_other_commands_read_is_read_here_too(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "lines.json").write_text("\ufeff" + lines, encoding="utf-8")
    assert read(tmp_path / "lines.json") == ["w2 w3", "w4 w5 w6"]
    assert read(tmp_path / "lines.json", text_column="text+lang") == ["w2 w3zh", "  zh", "w4 w5 w6en"]
    (tmp_path / "half.jsonl").write_text(r'{"text": "w2 \ud83d w3"}' + "\n")
    assert read(tmp_path / "half.jsonl") == ["w2 \ufffd w3"]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl")
    (folder / "test.jsonl").write_text('{"text": "w9"}\n')
    assert read(folder, data_split="test") == ["w9"]
    with pytest.raises(ConfigError, match="has several splits"):
        read(folder)


def test_conversations_go_through_the_template_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "w3"}], "lang": "zh"}) + "\n")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    given = config(positive="a", negative="b", text_column="messages")
    assert read_texts(str(path), given, model_chat_renderer(str(tmp_path / "chatty"))) == ["w9 w3"]
    with pytest.raises(DataError, match=r"the tokenizer of '.*plain' has no chat template"):
        read_texts(str(path), given, model_chat_renderer(str(tmp_path / "plain")))
    with pytest.raises(ConfigError, match=r"The model '.*none' cannot be loaded"):
        read_texts(str(path), given, model_chat_renderer(str(tmp_path / "none")))
    # Texts need no tokenizer.
    assert read_texts(str(path), config(positive="a", negative="b", text_column="lang")) == ["zh"]


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
    path.write_text("".join(json.dumps({"text": f"w{n}", "toxic": float(n % 2)}) + "\n" for n in range(5)))
    assert read_groups(config(data=str(path), group_column="toxic", target="1")) == (groups, target)
    path.write_text('{"text": "w1", "toxic": 0.5}\n')
    with pytest.raises(DataError, match=r"Row 0 of .* holds 0\.5 in column `toxic`, which names no group"):
        read_groups(config(data=str(path), group_column="toxic", target="1"))
    with pytest.raises(DataError, match=r"Row 0 of .* has no column `kind`; it has `text`, `toxic`"):
        read_groups(config(data=str(path), group_column="kind", target="1"))


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
        ("a.jsonl", '{"text": 3}\n', "holds 3 in column `text`, which is not a text"),
        ("a.jsonl", "[1]\n", "is a list, not a mapping"),
        ("a.jsonl", "{oops\n", "Line 1 of .* is not JSON"),
        ("a.json", "[3]", "Entry 0 of .* is a int, not a mapping"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.docx", "x", "is of no known kind"),
    ],
)
def test_unusable_files_say_what_is_wrong(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file or folder at"):
        read(tmp_path / "none.jsonl")


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
    with pytest.raises(DataError, match="Group `g` has one different text, so none can be held out"):
        prepare_group("g", ["w2 w3", "w2 w3"], tiny_tokenizer())
    assert prepare_group("g", ["w2 w3"], tiny_tokenizer(), holdout=0).heldout == [False]


def test_half_characters_are_read_as_replaced() -> None:
    group = prepare_group("g", ["w2 w3 \ud83d w4"], tiny_tokenizer(), holdout=0)
    assert group.token_ids == prepare_group("g", ["w2 w3 \ufffd w4"], tiny_tokenizer(), holdout=0).token_ids
