"""Run records: rows come back, a killed run's tail is dropped, and a disk that refuses stops nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qscope_trl.errors import DataError, QScopeWarning
from qscope_trl.monitor.run_record import PREVIOUS_FOLDER, RECORD_FOLDER, RunRecord


def test_rows_and_mappings_come_back_as_they_were(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    record.put("run", {"model": "m", "text": "中\n"})
    record.add("log", 1, {"loss": math.inf, "text": "line\nbreak"})
    record.add("log", 2, {"loss": 0.5})
    again = RunRecord(tmp_path)
    assert again.get("run") == {"model": "m", "text": "中\n"}
    assert again.rows("log") == [{"step": 1, "loss": math.inf, "text": "line\nbreak"}, {"step": 2, "loss": 0.5}]
    assert again.get("audit") is None
    assert again.rows("drift") == []


def test_going_on_from_a_step_drops_what_came_after_it(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    for step in (1, 2, 3):
        record.add("log", step, {})
    with open(record.folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in record.rows("log")] == [1, 2, 3]
    record.begin(2)
    record.add("log", 3, {"again": True})
    assert record.rows("log") == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_line_cut_inside_a_character_is_left_out(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.add("log", 1, {"text": "中"})
    with open(record.folder / "log.jsonl", "ab") as file:
        file.write('{"step": 2, "text": "中'.encode()[:-1])
    assert list(record.each("log")) == [{"step": 1, "text": "中"}]
    record.begin(1)
    assert record.rows("log") == [{"step": 1, "text": "中"}]


def test_a_new_run_keeps_the_last_one_beside_it(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        record = RunRecord(tmp_path)
        record.begin(0)
        record.put("run", {"model": name})
        record.add("log", 1, {})
    assert json.loads((tmp_path / RECORD_FOLDER / "run.json").read_text())["model"] == "third"
    assert json.loads((tmp_path / PREVIOUS_FOLDER / "run.json").read_text())["model"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD_FOLDER, PREVIOUS_FOLDER]


def test_a_disk_that_refuses_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / RECORD_FOLDER).write_text("in the way")
    record = RunRecord(tmp_path)
    with pytest.warns(QScopeWarning, match="training goes on without it") as caught:
        record.add("log", 1, {})
    record.add("log", 2, {})
    record.put("run", {})
    assert len(caught) == 1


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, writes=False)
    record.begin(0)
    record.put("run", {})
    record.add("log", 1, {})
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.add("log", 1, {})
    (record.folder / "log.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"Line 2 of .* is damaged"):
        record.rows("log")
    (record.folder / "run.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        record.get("run")
    (record.folder / "run.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="`format_version` 99"):
        record.get("run")


def test_a_try_that_made_no_step_displaces_no_earlier_run(tmp_path: Path) -> None:
    """As those of `auto_find_batch_size` before one fits."""
    for name, step in (("before", 3), ("too large", 0), ("fits", 1)):
        record = RunRecord(tmp_path)
        record.begin(0)
        record.put("run", {"model": name})
        record.add("log", step, {"sae/text/rate": 0.5})
    assert json.loads((tmp_path / RECORD_FOLDER / "run.json").read_text())["model"] == "fits"
    assert json.loads((tmp_path / PREVIOUS_FOLDER / "run.json").read_text())["model"] == "before"


def test_a_damaged_line_is_no_reason_not_to_resume(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.add("log", 1, {})
    with open(record.folder / "log.jsonl", "ab") as file:
        file.write(b"\0\0\n" + b'{"step": 2}\n' + b'{"step": 3}\n')
    with pytest.warns(QScopeWarning, match="1 damaged lines, which are left out"):
        record.begin(2)
    assert record.writes
    assert record.rows("log") == [{"step": 1}, {"step": 2}]


def test_half_a_character_in_a_text_is_written_and_read(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.put("run", {"label": "\ud800"})
    record.add("samples", 0, {"text": "\ud800 \u4e2d"})
    assert record.get("run") == {"label": "\ud800"}
    assert record.rows("samples") == [{"step": 0, "text": "\ud800 \u4e2d"}]


def test_the_rows_of_the_first_step_are_found_without_the_others(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step, index in ((0, 0), (0, 1), (2, 0)):
        record.add("texts", step, {"index": index})
    with open(record.folder / "texts.jsonl", "ab") as file:
        file.write(b"damaged, but not reached\n")
    assert [row["index"] for row in record.first("texts")] == [0, 1]
    assert list(record.first("samples")) == []
