"""Rows of files, folders and datasets: the same rows whatever the kind, the same numbers wherever one starts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from qscope_trl.activations.files import Files, count_rows, read_rows
from qscope_trl.activations.sources import open_source, source_of, text_columns, text_of
from qscope_trl.errors import ConfigError, DataError

# What a reader that splits at commas or line ends gets wrong, and another script.
ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'a comma, a "quote"\nand a second line', "label": "b"},
    {"text": "", "label": "c"},
    {"text": "你好，世界", "label": ""},
    {"text": " spaces ", "label": "null"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the form that the file's name says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    dataset = Dataset.from_list(rows)
    if kind == "parquet":
        # Two row groups and a bit, so that a start can lie in each.
        pq.write_table(dataset.with_format("arrow")[:], path, row_group_size=2)
        return path
    plain = path.parent / f"plain-{path.name.removesuffix('.gz')}"
    if kind == "csv":
        dataset.to_csv(str(plain), index=False)
    elif kind == "jsonl":
        # Blank lines are no rows.
        plain.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    else:
        plain.write_text(f"\n {json.dumps(rows)}", encoding="utf-8")
    content = plain.read_bytes()
    plain.unlink()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "ending", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", pytest.param("JSONL", id="upper")]
)
def test_every_kind_of_file_gives_the_same_rows_from_any_start(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows.{ending.lower()}", ROWS)
    path = path.rename(tmp_path / f"rows.{ending}")
    source = open_source(str(path))
    assert source.num_rows == len(source) == len(ROWS)
    assert list(source) == list(enumerate(ROWS))
    for start in range(len(ROWS) + 2):
        assert list(source.rows(start)) == list(enumerate(ROWS))[start:]
    assert source.is_random_access == (ending == "parquet")
    assert open_source(str(path), streaming=True).num_rows is None


def test_json_lines_are_read_under_the_name_json_too(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row for _, row in open_source(str(path))] == ROWS


def test_lines_of_text_are_rows_blank_ones_included(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\n\n two, three \nfour".encode())
    source = open_source(str(path))
    assert [row["text"] for _, row in source] == ["one", "", " two, three ", "four"]
    assert source.num_rows == 4
    assert [row for _, row in source.rows(3, columns=["body"])] == [{"body": "four"}]


def test_parquet_reads_only_the_columns_asked_for_and_all_when_one_is_missing(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "rows.parquet", ROWS)))
    assert [row for _, row in source.rows(3, columns=["label"])] == [{"label": ""}, {"label": "null"}]
    assert next(source.rows(columns=["body"]))[1] == ROWS[0]
    assert source.arrow_schema().names == ["text", "label"]
    assert open_source(str(write(tmp_path / "rows.jsonl", ROWS))).arrow_schema() is None


def test_a_folder_is_its_files_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train-0.jsonl", ROWS[:2])
    write(tmp_path / "folder" / "train-1.jsonl", ROWS[2:])
    source = open_source(str(tmp_path / "folder"))
    assert source.split == "train"
    for start in (0, 1, 2, 3, 5):
        assert list(source.rows(start)) == list(enumerate(ROWS))[start:]
    with pytest.raises(ConfigError, match=r"`split` is 'train\[:2\]'; of a local folder it is the name of a split"):
        open_source(str(tmp_path / "folder"), split="train[:2]")
    write(tmp_path / "folder" / "test-0.jsonl", ROWS[:1])
    with pytest.raises(ConfigError, match=r"has several splits: `\w+`, `\w+`. Choose one by `split`"):
        open_source(str(tmp_path / "folder"))
    with pytest.raises(ConfigError, match=r"has no split `dev`; there are `\w+`, `\w+`"):
        open_source(str(tmp_path / "folder"), split="dev")
    assert open_source(str(tmp_path / "folder"), split="test").num_rows == 1


def test_a_folder_of_several_kinds_is_refused_and_not_read_in_part(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "README.md").write_text("# Rows\n")
    (tmp_path / "LICENSE.txt").write_text("free\n")
    (tmp_path / ".hidden.txt").write_text("x\n")
    (tmp_path / "notes.md").write_text("x\n")
    assert open_source(str(tmp_path)).num_rows == len(ROWS)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("one more\n")
    with pytest.raises(DataError, match=r"files of several kinds: \.jsonl, \.txt. Only one kind"):
        open_source(str(tmp_path))
    # The folder's card says what its data are.
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    assert open_source(str(tmp_path)).num_rows == len(ROWS)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_damaged_gzip_files_are_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}.gz"
    lines = "".join(f'{{"text": "{n * n}"}}\n' for n in range(2000)).encode()
    whole = gzip.compress(b"text\n" + lines if ending == "csv" else lines, mtime=0)
    # Cut off in the middle, and after the header of 10 bytes a kind of block that there is not.
    for damaged in (whole[: len(whole) // 2], whole[:10] + b"\xff" * 4 + whole[14:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"'.*rows\.{ending}\.gz' cannot be read as {ending}: "):
            list(open_source(str(path)))
        if ending != "csv":
            with pytest.raises(DataError, match=rf"'.*rows\.{ending}\.gz' cannot be read as {ending}: "):
                len(open_source(str(path)))


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset, "test": dataset.select([3])}).save_to_disk(str(tmp_path / "several"))
    one = open_source(str(tmp_path / "one"))
    assert list(one.rows(2)) == list(enumerate(ROWS))[2:]
    assert next(one.rows(columns=["label"])) == (0, {"label": "a"})
    assert one.arrow_schema().names == ["text", "label"]
    assert [row for _, row in open_source(str(tmp_path / "several"), split="test")] == [ROWS[3]]
    with pytest.raises(ConfigError, match=r"has several splits: `test`, `train`"):
        open_source(str(tmp_path / "several"))
    with pytest.raises(ConfigError, match=r"as one dataset without splits. Leave `split` out"):
        open_source(str(tmp_path / "one"), split="train")
    with pytest.raises(ConfigError, match=r"which knows no configurations"):
        open_source(str(tmp_path / "one"), config="en")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"The dataset '.*one' cannot be opened"):
        open_source(str(tmp_path / "one"))


def test_datasets_in_memory_and_streams() -> None:
    dataset = Dataset.from_list(ROWS)
    assert list(source_of(dataset).rows(1, columns=["text"])) == [(i, {"text": ROWS[i]["text"]}) for i in range(1, 5)]
    assert source_of(dataset).fingerprint() != source_of(dataset.select([0])).fingerprint()
    stream = source_of(dataset.to_iterable_dataset(), name="mine")
    assert stream.num_rows is None
    assert stream.expected_rows is None
    for start in (0, 3):
        assert list(stream.rows(start)) == list(enumerate(ROWS))[start:]
    assert list(stream.rows(4, columns=["label"])) == [(4, {"label": "null"})]
    assert stream.arrow_schema().names == ["text", "label"]
    assert source_of(IterableDataset.from_generator(lambda: iter(ROWS))).arrow_schema() is None
    with pytest.raises(TypeError, match=r"'mine' is a stream: its number of rows is not known"):
        len(stream)
    with pytest.raises(DataError, match=r"'dataset' is a list, not a `datasets.Dataset`"):
        source_of(ROWS)


def test_a_fingerprint_is_of_the_bytes_and_their_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[2:])
    prints = [Files(paths).fingerprint() for paths in ([first, second], [second, first], [first])]
    assert len(set(prints)) == 3
    assert all(len(found) == 16 for found in prints)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(first.read_bytes())
    assert Files([copy]).fingerprint() == prints[2]
    copy.write_bytes(first.read_bytes().replace(b"plain", b"plaim"))
    assert Files([copy]).fingerprint() != prints[2]
    with pytest.raises(DataError, match=r"none.jsonl' cannot be read"):
        Files([tmp_path / "none.jsonl"]).fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"Line 3 of '.*a.jsonl' is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"Line 2 of '.*a.jsonl' is a list, not a mapping from column to value"),
        ("a.json", b'[{"text": "x"}, "y"]', r"Entry 1 of '.*a.json' is a str, not a mapping"),
        ("a.json", b'[{"text": "x"}', r"a.json' cannot be read as json"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl' cannot be read as jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], r"a.jsonl.gz' cannot be read as jsonl"),
        ("a.jsonl.gz", b"not gzip at all", r"a.jsonl.gz' cannot be read as jsonl"),
        ("a.csv", b"text,label\nx,a\ny\n", r"a.csv' cannot be read as csv"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet' cannot be read as parquet"),
        ("a.xml", b"<a/>", r"a.xml' is of no known kind. Known: .jsonl, .json, .parquet, .csv, .txt, and all but"),
        ("a.parquet.gz", b"", r"a.parquet.gz' is of no known kind"),
        ("a.gz", b"", r"a.gz' is of no known kind"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_counting_meets_the_same_damage(tmp_path: Path) -> None:
    for name, content in (("a.parquet", b"PAR1 and no more"), ("a.csv", b"a,b\n1\n"), ("a.jsonl.gz", b"not gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}' cannot be read as"):
            count_rows(tmp_path / name)
    with pytest.raises(DataError, match=r"No file at '.*none.jsonl'"):
        count_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.csv").write_bytes(b"")
    assert count_rows(tmp_path / "empty.csv") == 0


def test_parquet_files_that_disagree_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [[1.5]]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"The columns of '.*a.parquet' and the files with it cannot be read"):
        Files([tmp_path / "a.parquet", tmp_path / "b.parquet"]).arrow_schema()


def test_names_and_settings_that_fit_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    file = str(write(tmp_path / "rows.jsonl", ROWS))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.xyz").write_bytes(b"")
    asks: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: open_source(str(tmp_path / "none")), DataError, r"No file or folder at '.*none'"),
        (lambda: open_source("none.jsonl"), DataError, r"No file or folder at 'none.jsonl'"),
        (lambda: open_source("demo:none"), DataError, r"No data set `none` is bundled"),
        (lambda: open_source(file, revision="main"), ConfigError, r"`revision` is for datasets on the Hub"),
        (lambda: open_source(file, split="train"), ConfigError, r"is one file, which has neither splits"),
        (lambda: open_source(str(tmp_path / "pictures")), DataError, r"The dataset '.*pictures' cannot be opened"),
        (lambda: open_source("nobody/no-such-set"), DataError, r"'nobody/no-such-set' cannot be opened: .* the Hub"),
        (lambda: text_columns("a++b"), ConfigError, r"`text_column` is 'a\+\+b'; write one column"),
    ]
    for ask, kind, message in asks:
        with pytest.raises(kind, match=message):
            ask()


CHAT = [{"role": "user", "content": "hi"}]


def text(row: Any, column: str, **more: Any) -> str:
    return text_of(row, text_column=column, source_name="set", index=7, **more)


def test_the_text_of_a_row() -> None:
    row = {"prompt": "a ", "completion": "b", "none": None, "x+y": "whole name", "messages": CHAT}
    assert text(row, "prompt") == "a "
    assert text(row, " prompt + completion ") == "a b"
    assert text(row, "prompt+none") == "a "
    assert text(row, "x+y") == "whole name"

    def render(messages: list[Any]) -> str:
        return "|".join(message["content"] for message in messages)

    assert text(row, "messages", chat=render) == "hi"
    assert text(row, "messages+messages", chat=render) == "hi|hi"


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_half_characters_in_any_column_are_replaced_as_rows_are_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    line = r'{"a\udc00": ["\uD83d", {"b": "x\ud83d"}], "n": 1, "pair": "\ud83d\ude00", "plain": "\\ud83d"}'
    path.write_text(f"[{line}]" if ending == "json" else line)
    row = {"a\ufffd": ["\ufffd", {"b": "x\ufffd"}], "n": 1, "pair": "\U0001f600", "plain": "\\ud83d"}
    assert list(open_source(str(path))) == [(0, row)]


def test_half_characters_become_replacement_characters() -> None:
    half = json.loads(r'{"text": "half \ud83d emoji, \ud83d\ude00 whole", "end": "\udc00"}')
    assert text(half, "text") == "half \ufffd emoji, \U0001f600 whole"
    assert text(half, "end+end") == "\ufffd\ufffd"
    assert text({"m": [{"role": "user", "content": "\ud83d"}]}, "m", chat=lambda m: m[0]["content"]) == "\ufffd"


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ("plain", "text", r"Row 7 of 'set' is a str, not a mapping"),
        (
            {"note": "x", "n": 1},
            "text",
            r"Row 7 of 'set' has no column `text`; it has `note`, `n`. Name the right one",
        ),
        ({"text": "x"}, "text+more", r"has no column `more`"),
        ({"text": 7}, "text", r"holds 7 in column `text`, which is not a text"),
        ({"text": ["x"] * 99}, "text", r"holds \['x', .*\.\.\. in column `text`, which is not a text"),
        ({"m": CHAT}, "m", r"holds a conversation in column `m`, and no chat template is at hand"),
        ({"m": CHAT, "text": "x"}, "m+text", r"has a conversation in one of \('m', 'text'\) and none in another"),
    ],
)
def test_rows_without_a_text_are_named(row: Any, column: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text(row, column)
