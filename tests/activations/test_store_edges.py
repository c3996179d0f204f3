"""Stores at their edges: nothing to encode, data that changes meanwhile, files that are not what they should be."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qscope_trl import FeatureId
from qscope_trl.activations import files, index_run
from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.layout import MANIFEST
from qscope_trl.activations.store import FeatureStore
from qscope_trl.activations.writing import finish
from qscope_trl.errors import ConfigError, DataError
from tests.activations import index_setting
from tests.activations.index_setting import config
from tests.tiny import D_SAE, sentence, tiny_model, tiny_tokenizer, write_saes

ROWS = 12
ROOT = Path(__file__).parents[2]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edges")
    tiny_model().eval().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "saes")
    generator = torch.Generator().manual_seed(6)
    write_texts(folder / "texts.jsonl", [sentence(generator, 6) for _ in range(ROWS)])
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    index_run.run(config(folder, tmp_path / "store"), show_progress=False)
    return tmp_path / "store"


@pytest.mark.parametrize("per", ["document", "token"])
def test_rows_without_tokens_are_rows_without_features(folder: Path, tmp_path: Path, per: str) -> None:
    # The first shard has no token at all, the second one text of a single token beside one that has some.
    texts = ["", "w5", "", "", "", "w6", "w7 w8 w9"]
    data = write_texts(tmp_path / "texts.jsonl", texts)
    result = index_run.run(config(folder, tmp_path / "store", data=str(data), per=per), show_progress=False)
    assert (result.num_rows, result.num_tokens, result.num_empty) == (7, 2, 6)
    assert "6 rows have no token to read" in index_run.format_result(result)
    store = FeatureStore.open(tmp_path / "store")
    assert store.token_counts().tolist() == [0, 0, 0, 0, 0, 0, 2]
    for name in ("max", "mean", "last", "rate"):
        found = store.csr(1, name)
        assert found.shape == (7, D_SAE)
        assert found[:6].nnz == 0
        assert found[6].nnz > 0
    assert store.csr(1, stop=5).nnz == 0
    assert store.values([FeatureId(1, 3)], "max").shape == (7, 1)
    assert store.arrow(stop=5).num_rows == (5 if per == "document" else 0)
    if per == "token":
        assert store.token_csr(1, stop=5).shape == (0, D_SAE)
        assert store.arrow(columns=["row", "position"]).to_pylist() == [
            {"row": 6, "position": 1},
            {"row": 6, "position": 2},
        ]


def test_position_zero_is_kept_on_request(folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "texts.jsonl", ["w5", "w7 w8"])
    settings = config(folder, tmp_path / "store", data=str(data), per="token", skip_first=False)
    assert index_run.run(settings, show_progress=False).num_empty == 0
    found = FeatureStore.open(tmp_path / "store").arrow(columns=["row", "position"]).to_pylist()
    assert found == [{"row": 0, "position": 0}, {"row": 1, "position": 0}, {"row": 1, "position": 1}]


def test_only_the_aggregations_asked_for_are_stored(folder: Path, tmp_path: Path) -> None:
    whole = config(folder, tmp_path / "whole")
    index_run.run(whole, show_progress=False)
    index_run.run(config(folder, tmp_path / "some", aggregations="rate, max"), show_progress=False)
    some = FeatureStore.open(tmp_path / "some")
    assert some.aggregations == ("max", "rate")
    assert some.arrow().schema.names == [
        "row", "num_tokens", "L1_features", "L1_max", "L1_rate", "L2_features", "L2_max", "L2_rate",
    ]  # fmt: skip
    for name in some.aggregations:
        np.testing.assert_array_equal(
            some.csr(2, name).toarray(), FeatureStore.open(tmp_path / "whole").csr(2, name).toarray()
        )
    with pytest.raises(ConfigError, match=r"`aggregation` is 'mean'; .* holds max, rate"):
        some.csr(1, "mean")


def test_data_that_shrinks_or_is_not_there_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = write_texts(tmp_path / "empty.jsonl", [])
    for streaming in (False, True):
        settings = config(folder, tmp_path / "none", data=str(empty), streaming=streaming)
        with pytest.raises(DataError, match=r"empty.jsonl' has no rows, so there is nothing to index"):
            index_run.run(settings, show_progress=False)
    assert not (tmp_path / "none").exists()
    with monkeypatch.context() as changed:
        changed.setattr(files, "count_rows", lambda _: ROWS + 1)
        with pytest.raises(DataError, match=rf"ended at row {ROWS}, but {ROWS + 1} rows were counted before"):
            index_run.run(config(folder, tmp_path / "store"), show_progress=False)
    assert [path.name for path in (tmp_path / "store").glob("*shard-*")] == [
        "shard-000000.parquet",
        "shard-000001.parquet",
    ]
    assert index_run.run(config(folder, tmp_path / "store"), show_progress=False).new_rows == ROWS - 10


def test_a_stream_that_is_empty_at_its_second_reading_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_run._Job, "_write_stream", lambda *given: 0)
    with pytest.raises(DataError, match=r"holds rows 0 to 0 without a gap, but there are 0. Did the data change"):
        index_run.run(config(folder, tmp_path / "store", streaming=True), show_progress=False)


def test_a_run_that_failed_before_its_first_shard_does_not_bar_a_corrected_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column `txt`; it has `text`"):
        index_run.run(config(folder, tmp_path / "store", text_column="txt"), show_progress=False)
    assert not (tmp_path / "store").exists()
    # Row 1 alone is wrong: the manifest is written before it is read.
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "w5 w6"}\n{"note": "w7 w8"}\n')
    with pytest.raises(DataError, match=r"Row 1 of .* has no column `text`"):
        index_run.run(config(folder, tmp_path / "store", data=str(data)), show_progress=False)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["manifest.json"]
    data.write_text('{"text": "w5 w6"}\n{"text": "w7 w8 w9"}\n')
    settings = config(folder, tmp_path / "store", data=str(data), max_length=2)
    assert index_run.run(settings, show_progress=False).new_rows == 2
    store = FeatureStore.open(tmp_path / "store")
    assert (store.num_tokens, store.manifest["settings"]["max_length"]) == (2, 2)
    # Now there is something to lose.
    with pytest.raises(ConfigError, match=r"`settings.max_length` was 2 and is now 512"):
        index_run.run(config(folder, tmp_path / "store", data=str(data)), show_progress=False)


def test_a_residual_that_is_not_finite_stops_the_run_with_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        # Only texts with this token are spoiled.
        model.get_input_embeddings().weight[50] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = write_texts(tmp_path / "texts.jsonl", ["w5 w6 w7"] * 7 + ["w5 w50 w7"])
    settings = config(folder, tmp_path / "store", model=str(tmp_path / "model"), data=str(data))
    with pytest.raises(DataError, match=r"The residuals of layer 1 are not finite"):
        index_run.run(settings, show_progress=False)
    assert [path.name for path in sorted((tmp_path / "store").iterdir())] == [MANIFEST, "shard-000000.parquet"]


def test_shards_out_of_place_and_gaps_are_told(folder: Path, store: Path) -> None:
    shards = sorted(store.glob("shard-*"))
    moved = shards[1].rename(store / "shard-000007.parquet")
    with pytest.raises(DataError, match=r"shard-000007.parquet' holds rows from 5, which belong to `shard-000001"):
        index_run.run(config(folder, store), show_progress=False)
    moved.rename(shards[1])
    manifest = json.loads((store / MANIFEST).read_text())
    with pytest.raises(DataError, match=rf"holds rows 0 to {ROWS} without a gap, but there are 99"):
        finish(store, manifest, 99)
    shards[1].unlink()
    with pytest.raises(DataError, match=rf"holds rows 0 to 5 without a gap, but there are {ROWS}"):
        finish(store, manifest, ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], r"manifest.json' cannot be read as JSON"),
        (lambda _: "[]", r"is not the manifest of a feature store: it lacks `format: qscope feature store`"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), r"has `format_version` 9, but this"),
    ],
)
def test_a_manifest_that_is_none_is_refused(store: Path, change: Callable[[str], str], message: str) -> None:
    path = store / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        FeatureStore.open(store)


def test_reading_needs_the_rows_asked_for_alone(store: Path) -> None:
    """Damage in one shard is met only by who reads it."""
    wanted = FeatureStore.open(store).csr(1, stop=5).toarray()
    shard = store / "shard-000002.parquet"
    content = bytearray(shard.read_bytes())
    content[150:900] = bytes(750)
    shard.write_bytes(content)
    opened = FeatureStore.open(store)
    np.testing.assert_array_equal(opened.csr(1, stop=5).toarray(), wanted)
    with pytest.raises(DataError, match=r"shard-000002.parquet' is damaged"):
        opened.arrow(10, ROWS)


def test_conversations_that_the_template_refuses_are_told() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    render = chat_renderer(tokenizer, name="tiny")
    with pytest.raises(DataError, match=r"The chat template of 'tiny' refuses a conversation: roles must alternate"):
        render([{"role": "user", "content": "w5"}])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    count = 600
    data = write_texts(tmp_path / "texts.jsonl", [sentence(generator, 60) for _ in range(count)])
    for name in ("model", "saes"):
        (tmp_path / name).symlink_to(folder / name)
    index_run.run(config(tmp_path, tmp_path / "whole", data=str(data)), show_progress=False)
    command = [sys.executable, "-W", "ignore", index_setting.__file__, str(tmp_path), str(tmp_path / "store"), "never"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seed = random.SystemRandom().randrange(2**32)
    moments, kills = random.Random(seed), 0
    for _ in range(200):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and not (tmp_path / "store" / MANIFEST).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = len(list((tmp_path / "store").glob("shard-*")))
        while process.poll() is None and len(list((tmp_path / "store").glob("shard-*"))) == before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 2, f"seed {seed}: nothing was killed"
    wanted, found = (FeatureStore.open(tmp_path / name).arrow().to_pylist() for name in ("whole", "store"))
    assert found == wanted, f"seed {seed}"
