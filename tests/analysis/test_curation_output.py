"""What `qscope curate` leaves on disk and says: output, report, input untouched, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk

from qscope_trl.analysis.curation import run as curation
from qscope_trl.cli import main
from qscope_trl.errors import DataError
from tests.analysis.curation_setting import (
    Setting,
    curate,
    kept_rows,
    removed,
    write_lines,
)
from tests.forked import run_forked
from tests.tiny import K

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def texts(setting: Setting) -> list[str]:
    return [row["text"] for row in setting.rows]


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file with its content and time of change."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_figures_name_shortages_and_rows_without_a_token(setting: Setting, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"balance": ["lang"], "quota": ["zh=600", "en=9"], "allow_fewer": True}
    result = curate(setting, tmp_path / "out", deduplicate=1.0, **settings)
    lines = curation.format_result(result).splitlines()
    assert "2 rows have no token to read, so no feature fires in them" in lines
    left = Counter(setting.rows[row]["lang"] for row in kept_rows(tmp_path / "out"))
    assert f"zh: {left['zh']} rows of 600" in lines
    assert left["en"] == 9
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Fewer than asked for" in page
    # The row that left and the one it is like, one after the other.
    pair = next(entry for entry in removed(tmp_path / "out") if entry["step"] == "deduplicate")
    assert page.count(setting.rows[pair["row"]]["text"]) >= 2


def test_the_input_is_not_changed(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    Dataset.from_list(setting.rows).save_to_disk(str(folder))
    for name, data in (("lines", setting.data), ("saved", folder)):
        before = snapshot(setting.folder), snapshot(folder)
        curate(setting, tmp_path / name, data=str(data), deduplicate=0.7, quota=["en=3"], balance=["lang"])
        assert (snapshot(setting.folder), snapshot(folder)) == before
    assert kept_rows(tmp_path / "lines") == kept_rows(tmp_path / "saved")


def test_a_dry_run_shows_the_same_figures_and_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"deduplicate": 0.7, "drop": ["L1F3 > 0.8"], "max_rows": 20}
    before = snapshot(setting.folder)
    dry = curate(setting, tmp_path / "out", dry_run=True, **settings)
    assert list(tmp_path.iterdir()) == []
    assert snapshot(setting.folder) == before
    assert "20 of 61 rows would stay; nothing was written" in curation.format_result(dry)
    wet = curate(setting, tmp_path / "out", **settings)
    assert f"20 of 61 rows written to {tmp_path / 'out'}" in curation.format_result(wet)
    assert [{**r, "settings": None} for r in (dry.report,)] == [{**r, "settings": None} for r in (wet.report,)]
    assert dry.decision.rows.tolist() == kept_rows(tmp_path / "out")


def test_the_report_shows_examples_as_text(setting: Setting, tmp_path: Path) -> None:
    rows = [*setting.rows[:20], {"text": "w5 <script>alert(1)</script> w6 w7 w5 w6"}, {"text": "w5 w8 w9 w6 w7"}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    result = curate(setting, tmp_path / "out", data=str(data), keep=["L1F3"], examples=40)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;pad&gt;" in page  # what the tokenizer makes of it, token by token
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [example["row"] for example in report["examples"]]
    assert any("<script>alert(1)</script>" in example["text"] for example in report["examples"])
    assert len(report["examples"]) == len(rows) - result.report["rows_after"]
    assert "http" not in page.replace("http-equiv", "")


def test_conversations_are_rendered_by_the_template(setting: Setting, texts: list[str], tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": text}] for text in texts[:12]]
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in [*chats, chats[0]]])
    with pytest.raises(DataError, match="has no chat template"):
        curate(setting, tmp_path / "none", data=str(data), text_column="messages", deduplicate=1.0)
    assert not (tmp_path / "none").exists()
    model = tmp_path / "model"
    model.mkdir()
    for file in setting.model.iterdir():
        os.link(file, model / file.name)
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    curate(setting, tmp_path / "out", data=str(data), model=str(model), text_column="messages", deduplicate=1.0)
    assert [(e["row"], e["other_row"]) for e in removed(tmp_path / "out")] == [(12, 0)]
    assert load_from_disk(str(tmp_path / "out" / "dataset"))[0]["messages"] == chats[0]


def test_column_types_and_nulls_of_parquet_stay(setting: Setting, tmp_path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("text", pa.large_string()),
            ("small", pa.int16()),
            ("when", pa.timestamp("ms")),
            ("kind", pa.dictionary(pa.int8(), pa.string())),
            ("parts", pa.list_(pa.struct([("a", pa.float32()), ("b", pa.binary())]))),
        ]
    )
    rows = [
        {
            "text": row["text"], "small": i if i % 2 else None, "when": i, "kind": "xy"[i % 2],
            "parts": [{"a": i / 3, "b": bytes([i])}] if i % 3 else None,
        }
        for i, row in enumerate(setting.rows)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "data.parquet")
    curate(setting, tmp_path / "out", data=str(tmp_path / "data.parquet"), max_rows=20)
    found = pq.read_table(tmp_path / "out" / "data.parquet")
    kept = found["qscope_row"].to_pylist()
    assert len(kept) == 20
    wanted = table.take(kept)
    for name in schema.names:
        assert found[name].to_pylist() == wanted[name].to_pylist()
    assert found.schema.field("small").type == pa.int16()
    assert found.schema.field("when").type == pa.timestamp("ms")
    assert load_from_disk(str(tmp_path / "out" / "dataset"))[3]["small"] == wanted["small"][3].as_py()


def test_an_error_while_writing_leaves_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(curation, "write_removed", fail)
    with pytest.raises(KeyboardInterrupt):
        curate(setting, tmp_path / "out", max_rows=3)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys
from qscope_trl.analysis.curation import run
from qscope_trl.config.curate import CurateConfig
run.write_removed = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
run.run(CurateConfig(data=sys.argv[1], output=sys.argv[2], max_rows=3), show_progress=False)
"""


def test_a_kill_leaves_no_half_output_and_the_next_run_writes_it_whole(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_forked(_KILLED, str(setting.data), str(output))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    assert [path.name.startswith(".out.") for path in tmp_path.iterdir()] == [True]
    curate(setting, output, max_rows=3)
    assert len(kept_rows(output)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_writes_and_says_what_it_did(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "curate", "--data", str(setting.data), "--model", str(setting.model), "--saes", str(setting.saes),
        "--sae-k", str(K), "--layers", "1,2", "--deduplicate", "0.7", "--tag", "fires=L1F3 > 0",
        "--balance", "lang", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "removed", "left", "setting"]
    assert any(line.startswith("lang: en ") for line in lines)
    assert lines[-1].endswith(f"of 61 rows written to {tmp_path / 'out'}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data.parquet", "dataset", "removed.parquet", "report.html", "report.json",
    ]  # fmt: skip
    assert main(command) == 2
    assert "is there already, and nothing is written over" in capsys.readouterr().err
