"""`qscope rules learn --store` and `evaluate --store`: the same as by the model, and refused if read otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qscope_trl.activations import index_run
from qscope_trl.analysis.rules import evaluate_run, learn_run
from qscope_trl.config.index import IndexConfig
from qscope_trl.errors import ConfigError, DataError
from tests.analysis.rules_world import NUM, World
from tests.tiny import K, tiny_model, tiny_tokenizer, write_saes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def store(world: World) -> str:
    """A store of the data, read as this module's commands read texts."""
    return make_store(world, "store")


def make_store(world: World, name: str, **changes: Any) -> str:
    given = {
        "model": str(world.folder / "model"), "saes": str(world.folder / "saes"), "sae_k": K, "device": "cpu",
        "layers": "1,2", "data": str(world.data), "output": str(world.folder / name), "batch_size": 32, **changes,
    }  # fmt: skip
    index_run.run(IndexConfig(**given), show_progress=False)
    return str(given["output"])


def test_a_store_gives_the_same_rule_without_the_model(world: World, tmp_path: Path) -> None:
    store = make_store(world, "of_max", aggregations="max")
    by_model = learn_run.run(world.learn(tmp_path / "o.yaml", group_column="page", baselines=False))
    config = world.learn(tmp_path / "o.yaml", store=store, group_column="page", baselines=False)
    # No model: only the store is read.
    result = learn_run.run(replace(config, model="/no/such/model"))
    assert str(result.rule) == str(by_model.rule) == str(world.feature)
    assert result.rule.model == str(world.folder / "model")
    assert result.table.aggregations == by_model.table.aggregations == ("max",)
    assert result.folds == by_model.folds
    with_model = learn_run.run(replace(config, baselines=True, random_draws=0))
    assert with_model.entries[0] == result.entries[0] == by_model.entries[0]

    with pytest.raises(ConfigError, match=r"has no `rate`, but max. Index the data with it"):
        learn_run.run(replace(config, aggregation=["rate"]))
    with pytest.raises(ConfigError, match=r"has no layer 0, but 1, 2. Choose among them by `--layers`"):
        learn_run.run(replace(config, layers="0,1"))
    other = tmp_path / "other.jsonl"
    lines = world.data.read_text(encoding="utf-8").splitlines(keepends=True)
    other.write_text("".join(lines[::-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has 160 rows, but 80 of .* are read. Give the `--max-rows`"):
        learn_run.run(replace(config, max_rows=80))
    with pytest.raises(DataError, match=r"was made from '.*data.jsonl', and '.*other.jsonl' is other data"):
        learn_run.run(replace(config, data=str(other)))
    saes = write_saes(tmp_path / "saes")
    torch.save(torch.load(saes / "layer0.sae.pt"), saes / "layer1.sae.pt")
    with pytest.raises(ConfigError, match="was made with another SAE of layer 1 than"):
        learn_run.run(replace(config, saes=str(saes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 5}, r"was read with another `max_length` \(512\) than this run \(5\)"),
        ({"sae_k": 3}, rf"was read with another `k of layer 1` \({K}\) than this run \(3\)"),
        ({"dtype": "bfloat16"}, r"was read with another `dtype` \(float32\) than this run \(bfloat16\)"),
        ({"model": "other"}, r"was read with another `model` "),
        ({"model": "retokenised"}, r"was read with another `tokenizer` "),
    ],
)
def test_a_store_that_was_read_otherwise_is_refused(
    world: World, store: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "model" in changes:
        tiny_model(seed=changes["model"] == "other").save_pretrained(tmp_path / "model")
        tokenizer = tiny_tokenizer()
        if changes["model"] == "retokenised":
            tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(tmp_path / "model")
        changes = {"model": str(tmp_path / "model")}
    with pytest.raises(DataError, match=message):
        learn_run.run(world.learn(tmp_path / "o.yaml", store=store, **changes))
    with pytest.raises(DataError, match=message):
        evaluate_run.run(world.evaluation(store=store, fit_data=str(world.data), **changes))
    assert not (tmp_path / "o.yaml").exists()


def test_a_store_of_another_column_is_refused(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text(encoding="utf-8").splitlines()]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**row, "title": "w5 "}) + "\n" for row in rows), encoding="utf-8")
    store = make_store(world, "by_text", data=str(data))
    config = world.learn(tmp_path / "o.yaml", store=store, data=str(data), text_column="title+text", baselines=False)
    with pytest.raises(DataError, match=r"was made from the column `text`, not `title\+text`"):
        learn_run.run(config)


def test_a_store_with_position_0_is_refused(world: World, tmp_path: Path) -> None:
    store = make_store(world, "with_first", skip_first=False)
    with pytest.raises(DataError, match=r"read with another `skip_first` \(False\) than this run \(True\)"):
        learn_run.run(world.learn(tmp_path / "o.yaml", store=store))


def test_evaluation_from_a_store_equals_that_by_the_model(world: World, store: str) -> None:
    text = f"{world.feature} > 0.3 or any(rate(L1: 5, 6) > 0.1; mean(L2F9) > 0.2)"
    given = world.evaluation(random_draws=0)
    # No model: only the store is read.
    alone = replace(given, rule=text, store=store, model="/no/such/model")
    assert evaluate_run.run(alone).entries == evaluate_run.run(replace(given, rule=text)).entries
    fitted = replace(given, rule=text, fit_data=str(world.data), max_fit_rows=60, random_draws=1)
    by_model, by_store = evaluate_run.run(fitted), evaluate_run.run(replace(fitted, store=store))
    assert by_store.table.aggregations == by_model.table.aggregations == ("max", "mean", "rate")
    assert by_store.table.num_documents == NUM + 60
    for name in by_model.table.aggregations:
        np.testing.assert_allclose(by_store.table.matrix(name), by_model.table.matrix(name), rtol=2e-5, atol=2e-6)
    assert [entry.name for entry in by_store.entries] == [entry.name for entry in by_model.entries]
