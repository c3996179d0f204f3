"""`qscope synthesize --store`: counted without the model, and refused if its texts were read otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qscope_trl.activations import index_run
from qscope_trl.analysis.synthesis.run import run
from qscope_trl.config.index import IndexConfig
from qscope_trl.errors import DataError, FeatureSetError
from qscope_trl.features import FeatureSet
from tests.analysis.synthesis_world import MIN_ACTIVATION, World, make_world
from tests.tiny import K, tiny_model

BARE = {"generator": "none", "model": "absent", "saes": "absent"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def make_store(world: World, name: str, **changes: Any) -> str:
    given = {
        "model": str(world.folder / "model"), "saes": str(world.folder / "saes"), "sae_k": K, "layers": "1,2",
        "data": str(world.folder / "data.jsonl"), "output": str(world.folder / name), **changes,
    }  # fmt: skip
    index_run.run(IndexConfig(**given), show_progress=False)
    return str(given["output"])


@pytest.fixture(scope="module")
def store(world: World) -> str:
    return make_store(world, "store")


def test_a_store_is_counted_without_the_model(world: World, store: str, tmp_path: Path) -> None:
    result = run(world.config(tmp_path / "out", data=None, store=store, **BARE), show_progress=False)
    fires = world.largest(world.data) > MIN_ACTIVATION
    assert list(result.before.counts.values()) == fires.sum(0).tolist()
    assert result.before.num_texts == len(world.data)


def refused(world: World, output: Path, store: str, message: str, **flags: Any) -> None:
    with pytest.raises(DataError, match=message):
        run(world.config(output, data=None, store=store, **flags), show_progress=False)
    assert not output.exists()


def test_a_store_that_was_read_otherwise_is_refused(world: World, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Without the model, what the settings say is compared.
    message = r"store' was read with another `max_length` \(512\) than this run \(64\), so equal texts would"
    refused(world, out, store, message, **BARE, max_length=64)
    first = make_store(world, "with_first", skip_first=False)
    refused(world, out, first, r"with another `skip_first` \(False\) than this run \(True\)", **BARE)
    refused(world, out, store, rf"with another `k of layer 1` \({K}\) than this run \(3\)", sae_k=3)
    refused(world, out, store, r"another `dtype` \(float32\) than this run \(bfloat16\)", dtype="bfloat16")
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    refused(world, out, store, "with another `model` ", model=str(tmp_path / "model"))
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    refused(world, out, store, "with another `tokenizer` ", model=str(tmp_path / "model"))


def test_a_store_of_other_saes_is_refused(world: World, store: str, tmp_path: Path) -> None:
    FeatureSet.from_names(["L1F3"], d_sae=64).save(tmp_path / "other.json")
    config = world.config(tmp_path / "out", data=None, store=store, features=str(tmp_path / "other.json"), **BARE)
    with pytest.raises(FeatureSetError, match="d_sae"):
        run(config, show_progress=False)
