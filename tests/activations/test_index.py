"""A store against a dense computation of every text; killed anywhere, by several processes, from any source."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from qscope_trl import FeatureId, FeatureSet
from qscope_trl.activations import index_run
from qscope_trl.activations.store import FeatureStore
from qscope_trl.activations.writing import only_writer
from qscope_trl.cli import main
from qscope_trl.errors import ConfigError, DataError, FeatureSetError
from tests.activations import index_setting
from tests.activations.index_setting import ROWS, config
from tests.forked import Done, run_forked
from tests.tiny import D_SAE, K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAEs, and texts of uneven length; some empty, one of a single token."""
    folder = tmp_path_factory.mktemp("index")
    tiny_model().eval().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "saes")
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 12, (ROWS,), generator=generator).tolist()
    lengths[3], lengths[11:14], lengths[20] = 0, [0, 1, 0], 1
    rows = [{"text": sentence(generator, n) if n else "", "number": i} for i, n in enumerate(lengths)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "store"
    index_run.run(config(folder, output), show_progress=False)
    return output


@pytest.fixture(scope="module")
def whole_by_token(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of tokens."""
    output = tmp_path_factory.mktemp("whole_by_token") / "store"
    index_run.run(config(folder, output, per="token"), show_progress=False)
    return output


@pytest.fixture(scope="module")
def dense(folder: Path) -> dict[int, list[np.ndarray]]:
    """By layer and text, activations after TopK and ReLU at every token but the first, `(tokens - 1, F)`."""
    model = tiny_model().eval()
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    found: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for text in texts:
        ids = tiny_tokenizer()(text).input_ids
        if len(ids) < 2:
            for acts in found.values():
                acts.append(np.zeros((0, D_SAE)))
            continue
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer, acts in found.items():
            sae = random_sae(100 + layer)
            f = (hidden[layer + 1][0, 1:] @ sae["W_enc"].T + sae["b_enc"]).double().numpy()
            kth = np.sort(f, axis=1)[:, -K, None]
            acts.append(np.where((f >= kth) & (f > 0), f, 0))
    return found


def summed(acts: np.ndarray, name: str) -> np.ndarray:
    if not len(acts):
        return np.zeros(D_SAE)
    return {"max": acts.max(0), "mean": acts.mean(0), "last": acts[-1], "rate": (acts > 0).mean(0)}[name]


@pytest.mark.parametrize("per", ["document", "token"])
@pytest.mark.parametrize("name", ["max", "mean", "last", "rate"])
@pytest.mark.parametrize("layer", [1, 2])
def test_documents_by_features_equal_a_dense_computation(
    whole: Path, whole_by_token: Path, dense: dict[int, list[np.ndarray]], layer: int, name: str, per: str
) -> None:
    store = FeatureStore.open(whole if per == "document" else whole_by_token)
    wanted = np.stack([summed(acts, name) for acts in dense[layer]])
    found = store.csr(layer, name)
    assert found.shape == (ROWS, D_SAE)
    np.testing.assert_allclose(found.toarray(), wanted, rtol=2e-5, atol=1e-6)
    assert found.nnz == (wanted > 0).sum()
    pieces = [piece.toarray() for piece in store.iter_csr(layer, name, rows_per_batch=7)]
    np.testing.assert_array_equal(np.concatenate(pieces), found.toarray())
    np.testing.assert_array_equal(store.csr(layer, name, 9, 23).toarray(), found.toarray()[9:23])
    ids = [FeatureId(layer, i) for i in (5, 77, 3)]
    np.testing.assert_array_equal(store.values(ids, name), found.toarray()[:, [5, 77, 3]])
    assert store.token_counts().tolist() == [len(acts) for acts in dense[layer]]


def test_tokens_by_features_equal_a_dense_computation(
    folder: Path, whole_by_token: Path, dense: dict[int, list[np.ndarray]]
) -> None:
    store = FeatureStore.open(whole_by_token)
    np.testing.assert_allclose(store.token_csr(2).toarray(), np.concatenate(dense[2]), rtol=2e-5, atol=1e-6)
    table = store.arrow(columns=["row", "position", "token_id"])
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    wanted = [
        (row, place, token)
        for row, text in enumerate(texts)
        for place, token in enumerate(tiny_tokenizer()(text).input_ids)
        if place
    ]
    assert list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True)) == wanted


def rows_of(path: Path) -> list[Any]:
    return FeatureStore.open(path).arrow().to_pylist()


@pytest.mark.parametrize(
    "kill", ["3", pytest.param("0", marks=pytest.mark.slow), pytest.param("7", marks=pytest.mark.slow)]
)
def test_a_killed_run_is_gone_on_with_and_ends_as_one_that_was_not(
    folder: Path, whole: Path, tmp_path: Path, kill: str
) -> None:
    output = tmp_path / "store"
    done = run_forked(Path(index_setting.__file__), str(folder), str(output), kill)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    there = sorted(path.name for path in output.glob("shard-*"))
    assert there == [f"shard-{index:06d}.parquet" for index in range(int(kill))]
    assert list(output.glob(".shard-*"))  # what it was writing when it died
    with pytest.raises(DataError, match=rf"is not finished: {kill} shards are there"):
        FeatureStore.open(output)
    assert FeatureStore.open(output, allow_partial=True).num_rows == 5 * int(kill)
    result = index_run.run(config(folder, output), show_progress=False)
    assert result.new_rows == ROWS - 5 * int(kill)
    assert not list(output.glob(".shard-*"))
    assert rows_of(output) == rows_of(whole)


def test_a_finished_store_is_left_alone(folder: Path, whole: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.glob("shard-*")}
    result = index_run.run(config(folder, whole), show_progress=False)
    assert result.new_rows == 0
    assert f"{ROWS} of the rows were there already, 0 are new" in index_run.format_result(result)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.glob("shard-*")} == before


@pytest.mark.distributed
def test_two_processes_write_what_one_does_also_after_one_was_killed(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    def launch(kill: str) -> Done:
        where = (str(folder), str(tmp_path / "store"))
        return run_forked(
            Path(index_setting.__file__), *where, kill, processes=2, environment={"KILLED_RANK": "1"}
        )  # fmt: skip

    assert launch("5").codes[1] == -signal.SIGKILL
    done = launch("never")
    assert done.returncode == 0, done.stderr[-3000:]
    new, processes = done.stdout.split(" new, ")
    assert 0 < int(new) < ROWS
    assert processes == "2 processes\n"
    assert rows_of(tmp_path / "store") == rows_of(whole)


def as_file(folder: Path, kind: str) -> Path:
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    dataset, path = Dataset.from_list(rows), folder / f"same.{kind}"
    if kind == "parquet":
        dataset.to_parquet(str(path))
    elif kind == "csv":
        dataset.to_csv(str(path), index=False)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress((folder / "texts.jsonl").read_bytes()))
    elif kind == "saved":
        dataset.save_to_disk(str(path))
    else:
        DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl.gz", "saved", "splits", "stream"])
def test_every_kind_of_source_gives_the_same_rows(folder: Path, whole: Path, kind: str, tmp_path: Path) -> None:
    path = folder / "texts.jsonl" if kind == "stream" else as_file(folder, kind)
    changes: dict[str, Any] = {"data": str(path), "streaming": kind == "stream"}
    if kind == "splits":
        changes["data_split"] = "train"
    index_run.run(config(folder, tmp_path / "store", **changes), show_progress=False)
    assert rows_of(tmp_path / "store") == rows_of(whole)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_rows_alone(folder: Path, whole: Path, tmp_path: Path, streaming: bool) -> None:
    settings = config(folder, tmp_path / "store", max_rows=8, streaming=streaming, batch_size=1)
    assert index_run.run(settings, show_progress=False).num_rows == 8
    found, wanted = FeatureStore.open(tmp_path / "store").csr(1), FeatureStore.open(whole).csr(1, stop=8)
    np.testing.assert_allclose(found.toarray(), wanted.toarray(), rtol=2e-5, atol=1e-6)


def test_conversations_go_through_the_chat_template(folder: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = config(folder, tmp_path / "store", data=str(tmp_path / "chat.jsonl"), text_column="messages")
    with pytest.raises(DataError, match=r"holds conversations, but the tokenizer of '.*' has no chat template"):
        index_run.run(settings, show_progress=False)
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    settings = config(
        folder, tmp_path / "chat", data=str(tmp_path / "chat.jsonl"), text_column="messages",
        model=str(tmp_path / "model"), per="token",
    )  # fmt: skip
    index_run.run(settings, show_progress=False)
    assert FeatureStore.open(tmp_path / "chat").arrow()["token_id"].to_pylist() == [5, 6, 9, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 4}, r"begun with something else: `settings.max_length` was 512 and is now 4"),
        ({"layers": "1"}, r"`saes.layers"),
        ({"per": "token"}, r"`settings"),
        ({"dtype": "bfloat16"}, r"`model.dtype` was 'float32' and is now 'bfloat16'"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    folder: Path, whole: Path, changes: dict[str, Any], message: str
) -> None:
    before = rows_of(whole)
    with pytest.raises(ConfigError, match=message):
        index_run.run(config(folder, whole, **changes), show_progress=False)
    assert rows_of(whole) == before


def test_other_weights_data_or_tokenizer_are_refused_whatever_their_names(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"`model.weights_checksum` was"):
        index_run.run(config(folder, whole, model=str(tmp_path / "model")), show_progress=False)
    data = tmp_path / "texts.jsonl"
    data.write_text((folder / "texts.jsonl").read_text().replace("w5", "w6"))
    with pytest.raises(ConfigError, match=r"`dataset.fingerprint` was"):
        index_run.run(config(folder, whole, data=str(data)), show_progress=False)
    shutil.copytree(folder / "model", tmp_path / "same")
    assert index_run.run(config(folder, whole, model=str(tmp_path / "same")), show_progress=False).new_rows == 0


def test_damage_is_told_and_mended(folder: Path, whole: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "store")
    shard = path / "shard-000002.parquet"
    content = bytearray(shard.read_bytes())
    content[200] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000002.parquet' is damaged .* Delete it and run `qscope index` again"):
        FeatureStore.open(path).csr(1)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"shard-000002.parquet' is damaged"):
        FeatureStore.open(path)
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks `shard-000002.parquet`, which its manifest lists"):
        FeatureStore.open(path)
    assert index_run.run(config(folder, path), show_progress=False).new_rows == 5
    assert rows_of(path) == rows_of(whole)


def test_a_folder_of_something_else_and_a_second_writer_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds `notes.txt` and is no feature store"):
        index_run.run(config(folder, tmp_path), show_progress=False)
    with (
        only_writer(tmp_path / "store"),
        pytest.raises(ConfigError, match=r"Another run is writing to '.*store'"),
    ):
        index_run.run(config(folder, tmp_path / "store"), show_progress=False)


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ('{"text": "w5 w6"}\n{"note": "w5"}\n', {}, r"Row 1 of '.*' has no column `text`; it has `note`"),
        ('{"text": "w5 w6"}\n{"text": 7}\n', {}, r"Row 1 of '.*' holds 7 in column `text`, which is not a text"),
        ('{"text": "w5 w6"}\n{"text": \n', {}, r"texts.jsonl"),
        ("", {}, r"texts.jsonl' has no rows|texts.jsonl"),
        ('{"text": "w5 w6"}\n', {"text_column": "body"}, r"has no column `body`"),
    ],
)
def test_bad_rows_are_named(folder: Path, tmp_path: Path, lines: str, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "texts.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        index_run.run(
            config(folder, tmp_path / "store", data=str(tmp_path / "texts.jsonl"), **changes), show_progress=False
        )


def test_questions_that_do_not_fit_the_store_are_refused(whole: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(whole)
    assert repr(store) == f"FeatureStore('{whole}', {ROWS} rows per document, layers [1, 2])"
    for ask, message in (
        (lambda: store.csr(3), r"holds no layer 3; it holds 1, 2"),
        (lambda: store.csr(1, "median"), r"`aggregation` is 'median'; .* holds max, mean, last, rate"),
        (lambda: store.csr(1, start=5, stop=99), rf"Rows 5 to 99 are not within 0 to {ROWS}"),
        (lambda: store.token_csr(1), r"holds documents, not tokens"),
        (lambda: store.arrow(columns=["L9_max"]), r"has no column `L9_max`"),
        (lambda: list(store.iter_csr(1, rows_per_batch=0)), r"`rows_per_batch` is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ask()
    with pytest.raises(FeatureSetError, match=r"d_sae"):
        store.check_fits(FeatureSet.from_names(["L1F3"], d_sae=64))
    with pytest.raises(DataError, match=r"No feature store at '.*none'"):
        FeatureStore.open(tmp_path / "none")


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["index", "--model", str(folder / "model"), "--saes", str(folder / "saes"), "--sae-k", "8"]
    command += ["--layers", "1", "--data", str(folder / "texts.jsonl"), "--output", str(tmp_path / "store")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{ROWS} rows, " in out
    assert "5 rows have no token to read" in out
    with pytest.raises(ConfigError, match=r"`aggregations` is 'max,median'"):
        index_setting.config(folder, tmp_path, aggregations="max,median")
