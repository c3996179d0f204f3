"""What `qscope curate` refuses, each with its message, and that nothing is left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qscope_trl.analysis.curation import rows as row_reading
from qscope_trl.analysis.curation import run as curation
from qscope_trl.analysis.curation.sets import sparse
from qscope_trl.analysis.curation.stored import stored_sets
from qscope_trl.config.curate import CurateConfig
from qscope_trl.errors import CheckpointError, ConfigError, DataError, QScopeError, RuleError
from tests.analysis.curation_setting import Setting, make_store, write_lines
from tests.tiny import K, write_saes


@pytest.fixture(scope="module")
def store(setting: Setting) -> Path:
    return make_store(setting, setting.folder / "store", setting.data)


@pytest.fixture(scope="module")
def near(setting: Setting) -> Path:
    return write_lines(setting.folder / "near.jsonl", [{"text": "w5 w6 w7 w8"}, {"text": "w9 w10 w11"}])


MODEL = {"model": "m", "saes": "s", "layers": "1"}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "similarity": ({**MODEL, "deduplicate": 1.5}, "`deduplicate` is 1.5; it is a similarity above 0"),
    "zero similarity": ({**MODEL, "exclude_similarity": 0.0}, "`exclude_similarity` is 0.0; it is a similarity"),
    "no output": ({"output": None}, "`--output` is missing: name the folder to make, or give `--dry-run`"),
    "nearest": ({**MODEL, "nearest": "x"}, "`--nearest` and `--nearest-rows` come together"),
    "nearest rows": ({**MODEL, "nearest_rows": 5}, "`--nearest` and `--nearest-rows` come together"),
    "model alone": ({"model": "m"}, "`--model` and `--saes` come together"),
    "twice": ({**MODEL, "tag": ["a=L1F1"], "score": ["a=L1F2"]}, "`a` is named twice among tags and scores"),
    "own name": ({**MODEL, "tag": ["qscope_row=L1F1"]}, "`qscope_row` is the name of a column that curation adds"),
    "two quotas": ({"balance": ["lang"], "quota": ["en=1", "en=2"]}, "A group has two quotas"),
    "keep": ({**MODEL, "deduplicate": 0.5, "deduplicate_keep": "best"}, "`deduplicate_keep` is 'best'; it is `first`"),
    "stray quota": ({"quota": ["en=5"]}, "`--quota en=...` names no tag"),
    "no number": ({"balance": ["lang"], "quota": ["en=few"]}, "'few' is not a number of rows"),
    "no features": ({"drop": ["L1F1"]}, "`--drop` reads features: give `--model` and `--saes`"),
    "no features to compare": ({"deduplicate": 0.5}, "`--deduplicate` reads features"),
    "no layers": ({"model": "m", "saes": "s", "deduplicate": 0.5}, "`--layers` is missing: say which layers"),
    "no name": ({**MODEL, "tag": ["L1F1 > 2"]}, "`--tag` is 'L1F1 > 2'; write it as NAME=RULE"),
    "no file": ({**MODEL, "set": ["toxic"]}, "`--set` is 'toxic'; write it as NAME=FILE"),
    "measure": ({**MODEL, "deduplicate": 0.5, "deduplicate_by": "minhash"}, "`deduplicate_by` is 'minhash'"),
    "max rows": ({"max_rows": 0}, "`max_rows` is 0"),
    "batch size": ({"batch_size": 0}, "`batch_size` is 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_fit_are_refused(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        CurateConfig(**{"data": "d", "output": "o", **changes})


def refuses(setting: Setting, output: Path, kind: type[QScopeError], message: str, **changes: Any) -> None:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(kind, match=message):
        curation.run(setting.config(output=str(output), **changes), show_progress=False)
    assert sorted(output.parent.rglob("*")) == before


def test_quotas_that_cannot_be_met(setting: Setting, tmp_path: Path, near: Path) -> None:
    out = tmp_path / "out"
    refuses(setting, out, ConfigError, "`--quota fr=2` names no group; there are `", balance=["lang"], quota=["fr=2"])
    refuses(
        setting, out, DataError, "fewer rows than the quotas ask for: `de` has 12 of 500, `zh` has 12 of 600. Lower",
        balance=["lang"], quota=["zh=600", "de=500"],
    )  # fmt: skip
    refuses(
        setting, out, DataError, "`--nearest .*near.jsonl` has 61 of 100.*give `--allow-fewer`",
        nearest=str(near), nearest_rows=100,
    )  # fmt: skip


def test_data_that_cannot_be_curated(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refuses(setting, out, ConfigError, "has a column `lang` already", tag=["lang=L1F1"])
    refuses(
        setting, out, DataError, "has no column `country`, and no tag is named so; it has `text`", balance=["country"]
    )
    empty = write_lines(tmp_path / "empty.jsonl", [])
    refuses(setting, out, DataError, "empty.jsonl' has no rows", data=str(empty), max_rows=1)
    refuses(
        setting,
        out,
        DataError,
        "No row is left of 61, so nothing is written. `--keep L1F3 > 1000",
        keep=["L1F3 > 1000"],
    )
    mixed = write_lines(tmp_path / "mixed.jsonl", [{"text": "w2", "n": 1}, {"text": "w3", "n": "one"}])
    message = "Column `n` of '.*' holds values of different kinds in rows 0 to 1"
    refuses(setting, out, DataError, message, data=str(mixed), max_rows=1)
    monkeypatch.setattr(row_reading, "BLOCK", 1)
    message = "A column of '.*' holds values of different kinds in rows 0 to 1"
    refuses(setting, out, DataError, message, data=str(mixed), max_rows=1)
    struct = write_lines(tmp_path / "struct.jsonl", [{"text": "w2", "meta": {}}, {"text": "w3", "meta": {}}])
    refuses(setting, out, DataError, "cannot be written as Arrow and Parquet", data=str(struct), max_rows=1)


def test_rules_and_layers_that_are_not_there(setting: Setting, tmp_path: Path, store: Path) -> None:
    out = tmp_path / "out"
    stored = {"store": str(store), "model": "", "saes": ""}
    for where in ({}, stored):
        refuses(setting, out, RuleError, "L1F500 is not there: the SAE of layer 1 has 128", drop=["L1F500"], **where)
        refuses(setting, out, RuleError, "L9F5 is not there: .* have no layer 9", drop=["L9F5"], **where)
    refuses(setting, out, CheckpointError, "No SAE for layer 9", deduplicate=0.5, layers="9")
    refuses(setting, out, ConfigError, "holds no layer 3; it holds 1, 2", deduplicate=0.5, **{**stored, "layers": "3"})


def test_stores_that_do_not_fit(setting: Setting, tmp_path: Path, store: Path, near: Path) -> None:
    out = tmp_path / "out"
    stored: dict[str, Any] = {"store": str(store), "model": "", "saes": "", "deduplicate": 0.5}
    other = write_lines(tmp_path / "other.jsonl", setting.rows[1:])
    message = "was made from '.*data.jsonl', and '.*other.jsonl' is other data, or has changed since"
    refuses(setting, out, DataError, message, **stored, data=str(other))
    message = "was made from the column `text`, not `lang`"
    refuses(setting, out, DataError, message, **stored, text_column="lang")
    short = make_store(setting, tmp_path / "short", setting.data, max_rows=20)
    message = "holds 20 rows, but '.*' has 61. Index all of it"
    refuses(setting, out, DataError, message, **{**stored, "store": str(short)})
    last = make_store(setting, tmp_path / "last", setting.data, aggregations="last")
    message = "holds last, which does not show every feature that is active in a text. Index with `max`"
    refuses(setting, out, ConfigError, message, **{**stored, "store": str(last)})
    refuses(setting, out, ConfigError, "`aggregation` is 'max'", **{**stored, "store": str(last)}, drop=["L1F3"])


def test_references_that_do_not_fit(setting: Setting, tmp_path: Path, store: Path, near: Path) -> None:
    out = tmp_path / "out"
    bare: dict[str, Any] = {"store": str(store), "model": "", "saes": "", "exclude_near": [str(near)]}
    message = "near.jsonl' is to be encoded: give `--model` and `--saes`, or name a feature store"
    refuses(setting, out, ConfigError, message, **bare)
    others = tmp_path / "others"
    write_saes(others, [1])
    write_saes(others / "more", [3])
    (others / "more" / "layer3.sae.pt").rename(others / "layer2.sae.pt")
    other_store = make_store(setting, tmp_path / "other_store", near, saes=str(others))
    message = "other_store' was made with other SAEs than the data's: layer 2 differs"
    refuses(setting, out, DataError, message, exclude_near=[str(other_store)])
    message = "others' are other SAEs than those of the store"
    refuses(setting, out, DataError, message, **{**bare, "model": str(setting.model), "saes": str(others)})
    message = r"near.jsonl' as it is encoded here was read with another `max_length` \(9\) than the data \(24\)"
    both = {**bare, "model": str(setting.model), "saes": str(setting.saes)}
    refuses(setting, out, DataError, message, **both, max_length=9)
    whole = make_store(setting, tmp_path / "whole", near, skip_first=False)
    message = r"The store '.*whole' was read with another `skip_first` \(False\) than the data \(True\)"
    refuses(setting, out, DataError, message, exclude_near=[str(whole)])
    few = make_store(setting, tmp_path / "few", near, sae_k=3)
    message = rf"The store '.*few' was read with another `k of layer 1` \(3\) than the data \({K}\)"
    refuses(setting, out, DataError, message, exclude_near=[str(few)])
    refuses(setting, out, DataError, message, **{**bare, "exclude_near": [str(few)]})
    empty = write_lines(tmp_path / "empty.jsonl", [])
    refuses(setting, out, DataError, "empty.jsonl' has no row to compare with", exclude_near=[str(empty)])
    nothing: Any = SimpleNamespace(path="s", num_rows=0, aggregations=("max",), d_sae=lambda layer: 8)
    with pytest.raises(DataError, match="The store 's' has no row"):
        stored_sets(nothing, (1,), None)


def test_places_that_are_not_written_to(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refuses(setting, tmp_path / "file", ConfigError, "file', which is a file; it is a folder to make", max_rows=3)
    refuses(setting, tmp_path / "full", ConfigError, "is there already, and nothing is written over", max_rows=3)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    pq.write_table(pa.Table.from_pylist(setting.rows), inputs / "data.parquet")
    message = "The output '.*out' lies in '.*inputs', which is read and stays as it is"
    refuses(setting, inputs / "out", ConfigError, message, data=str(inputs), max_rows=3)
    config = setting.config(output=str(tmp_path / "late" / "out"), max_rows=3)
    (tmp_path / "late").touch()
    with pytest.raises(DataError, match="late/out' cannot be written"):
        curation.run(config, show_progress=False)

    def meanwhile(*args: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")

    monkeypatch.setattr(curation, "write_report", meanwhile)
    with pytest.raises(ConfigError, match=r"Something has been written to '.*out' meanwhile"):
        curation.run(setting.config(output=str(tmp_path / "out"), max_rows=3), show_progress=False)
    assert (tmp_path / "out" / "theirs").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "inputs", "late", "out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "it has 60 rows instead of 61"),
        (lambda rows: [*rows, rows[0]], "row 61 is another"),
        (lambda rows: [*rows[:9], {**rows[9], "good": None}, *rows[10:]], "row 9 is another"),
    ],
)
def test_data_that_changes_meanwhile(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", setting.rows)
    decide = curation.decide

    def changing(*args: Any, **settings: Any) -> Any:
        write_lines(data, change(setting.rows))
        return decide(*args, **settings)

    monkeypatch.setattr(curation, "decide", changing)
    refuses(setting, tmp_path / "out", DataError, f"is not what it was when its rows were judged: {message}",
            data=str(data), max_rows=3)  # fmt: skip


def test_without_scipy_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ConfigError, match=r"Curation needs SciPy.*pip install 'qscope-trl\[data\]'"):
        sparse()
