"""Sets as they are read: features against hidden states in fp64, splitting, stores, what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qscope_trl.analysis.evalmap.samples import Encoder, gather_sets, read_sets, train_blocks
from qscope_trl.config.evalmap import EvalmapConfig
from qscope_trl.errors import ConfigError, DataError
from tests.analysis.curation_setting import LAYERS, MAX_LENGTH, Setting, make_setting, make_store, write_lines
from tests.tiny import D_SAE, K, random_sae, tiny_model, tiny_tokenizer, write_saes


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("evalmap"))


def config(setting: Setting, **changes: Any) -> EvalmapConfig:
    given = {
        "output": "out", "data": [f"a={setting.data}"], "model": str(setting.model), "saes": str(setting.saes),
        "sae_k": K, "layers": "1,2", "max_length": MAX_LENGTH, "batch_size": 4, **changes,
    }  # fmt: skip
    return EvalmapConfig(**given)


def plain_active(texts: list[str], pool: str) -> list[set[int]]:
    """Active columns of each text, from the hidden states in fp64."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    found = []
    for text in texts:
        ids = tokenizer(text).input_ids
        ids = ids[-MAX_LENGTH:] if pool == "last" else ids[:MAX_LENGTH]
        active: set[int] = set()
        if len(ids) > 1:
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for place, layer in enumerate(LAYERS):
                sae = {name: value.double().numpy() for name, value in random_sae(100 + layer).items()}
                x = hidden[layer + 1][0].double().numpy()
                f = x[[-1] if pool == "last" else slice(1, None)] @ sae["W_enc"].T + sae["b_enc"]
                kth = np.sort(f, axis=1)[:, -K][:, None]
                active |= {place * D_SAE + int(j) for j in np.flatnonzero(((f >= kth) & (f > 0)).any(0))}
        found.append(active)
    return found


def rows_of(bitmap: Any) -> list[set[int]]:
    return [set(bitmap.indices[a:b].tolist()) for a, b in zip(bitmap.indptr[:-1], bitmap.indptr[1:], strict=True)]


@pytest.mark.parametrize("pool", ["last", "max"])
def test_active_sets_equal_the_hidden_states_ones(setting: Setting, pool: str) -> None:
    read = read_sets(config(setting, pool=pool))
    texts = [row["text"] for row in setting.rows]
    wanted = plain_active(texts, pool)
    kept = [i for i, text in enumerate(texts) if len(text.split()) > 1]
    assert read.footprints.row_ids["a"].tolist() == kept
    assert rows_of(read.footprints.bitmaps["a"]) == [wanted[i] for i in kept]
    assert read.sets[0].num_samples == len(texts)
    assert dict(read.footprints.columns) == dict.fromkeys(LAYERS, D_SAE)


@pytest.mark.parametrize("pool", ["last", "max"])
def test_batches_and_order_change_nothing(setting: Setting, pool: str, tmp_path: Path) -> None:
    first = rows_of(read_sets(config(setting, pool=pool, batch_size=1)).footprints.bitmaps["a"])
    turned = write_lines(tmp_path / "turned.jsonl", setting.rows[::-1])
    again = read_sets(config(setting, pool=pool, batch_size=16, data=[f"a={turned}"])).footprints.bitmaps["a"]
    assert rows_of(again)[::-1] == first


def test_long_texts_keep_the_end_that_is_read(setting: Setting, tmp_path: Path) -> None:
    long = " ".join(f"w{2 + i % 90}" for i in range(40))
    path = write_lines(tmp_path / "long.jsonl", [{"text": long}, {"text": "w3 w4"}])
    read = read_sets(config(setting, data=[str(path)]))
    assert read.num_full == {"long": 1}
    assert rows_of(read.footprints.bitmaps["long"]) == plain_active([long, "w3 w4"], "last")


def test_columns_split_and_filter_sets(setting: Setting) -> None:
    read = read_sets(
        config(setting, data=[f"a={setting.data}", f"b={setting.data}"], by=["a=lang"], filter=["b:good=True"])
    )
    by_name = {found.name: found for found in read.sets}
    assert list(by_name) == ["a/de", "a/en", "a/zh", "b"]
    for lang in ("de", "en", "zh"):
        assert by_name[f"a/{lang}"].rows.tolist() == [i for i, row in enumerate(setting.rows) if row["lang"] == lang]
    assert by_name["b"].rows.tolist() == [i for i, row in enumerate(setting.rows) if row["good"]]
    few = read_sets(config(setting, by=["lang"], max_samples=3))
    assert [found.num_samples for found in few.sets] == [3, 3, 3]
    assert few.sets[1].rows.tolist() == by_name["a/en"].rows.tolist()[:3]


def test_values_that_name_sets_are_told_apart(setting: Setting, tmp_path: Path) -> None:
    values = [None, "None", 1, 1.0, 1.5, True, "x"]
    path = write_lines(tmp_path / "by.jsonl", [{"text": "w2 w3", "v": value} for value in values])
    found = {
        entry.name: entry.rows.tolist() for entry in gather_sets(config(setting, data=[str(path)], by=["v"])).sets
    }
    assert found == {
        "by/(none)": [0], "by/None": [1], "by/1": [2, 3], "by/1.5": [4], "by/True": [5], "by/x": [6],
    }  # fmt: skip
    (whole,) = gather_sets(config(setting, data=[str(path)], filter=["v=1"])).sets
    assert whole.rows.tolist() == [2, 3]


def test_a_null_is_an_empty_text_and_a_number_none(setting: Setting, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "null.jsonl", [{"text": "w2 w3"}, {"text": None}])
    read = read_sets(config(setting, data=[str(path)]))
    assert (read.sets[0].num_samples, read.footprints.row_ids["null"].tolist()) == (2, [0])
    path = write_lines(tmp_path / "three.jsonl", [{"text": 3}])
    with pytest.raises(DataError, match=r"Row 0 of '.*three.jsonl' holds 3 in column `text`, which is not a text"):
        read_sets(config(setting, data=[str(path)]))


@pytest.mark.parametrize("per", ["document", "token"])
@pytest.mark.parametrize("pool", ["last", "max"])
def test_a_store_gives_what_its_texts_give(setting: Setting, tmp_path: Path, per: str, pool: str) -> None:
    store = make_store(setting, tmp_path / "store", setting.data, per=per)
    texts = read_sets(config(setting, pool=pool)).footprints
    both = read_sets(config(setting, pool=pool, data=[f"a={setting.data}", f"s={store}"])).footprints
    alone = read_sets(config(setting, pool=pool, data=[f"s={store}"], model="", saes="", layers="")).footprints
    wanted = rows_of(texts.bitmaps["a"])
    assert rows_of(both.bitmaps["s"]) == rows_of(alone.bitmaps["s"]) == wanted
    assert alone.row_ids["s"].tolist() == texts.row_ids["a"].tolist()
    one = read_sets(config(setting, pool=pool, data=[f"s={store}"], model="", saes="", layers="2", max_samples=9))
    assert rows_of(one.footprints.bitmaps["s"]) == [
        {j - D_SAE for j in row if j >= D_SAE}
        for row, i in zip(wanted, texts.row_ids["a"].tolist(), strict=True)
        if i < 9
    ]


def test_training_texts_come_in_blocks_from_texts_and_stores(setting: Setting, tmp_path: Path) -> None:
    store = make_store(setting, tmp_path / "store", setting.data)
    settings = config(setting, train=[f"t={setting.data}"], train_rows=20)
    read = read_sets(settings)
    (texts,) = train_blocks(settings, "t", str(setting.data), read)
    (stored,) = train_blocks(settings, "t", str(store), read)
    assert texts.texts == [row["text"] for row in setting.rows[:20]]
    assert rows_of(texts.bitmap) == rows_of(stored.bitmap)
    assert len(rows_of(texts.bitmap)) == 20
    alone = read_sets(config(setting, data=[f"s={store}"], model="", saes="", layers=""))
    with pytest.raises(ConfigError, match=r"`t` is to be encoded: give `model`, `saes` and `layers`"):
        list(train_blocks(settings, "t", str(setting.data), alone))


def test_stores_that_do_not_belong_together_are_refused(setting: Setting, tmp_path: Path) -> None:
    good = make_store(setting, tmp_path / "good", setting.data)
    others = tmp_path / "others"
    write_saes(others, range(3, 4))
    other_saes = write_saes(tmp_path / "saes", list(LAYERS))
    torch.save(random_sae(7), other_saes / "layer1.sae.pt")
    other = make_store(setting, tmp_path / "other", setting.data, saes=other_saes)
    with pytest.raises(DataError, match=r"was made with other SAEs than the others: layer 1 differs"):
        read_sets(config(setting, data=[f"a={good}", f"b={other}"], model="", saes="", layers=""))
    for key, value, message in [
        (("model", "weights_checksum"), "0" * 16, r"was made with another model than the others"),
        (("settings", "skip_first"), False, r"has `skip_first=False`, unlike the others"),
    ]:
        changed = make_store(setting, tmp_path / key[1], setting.data)
        manifest = json.loads((changed / "manifest.json").read_text())
        manifest[key[0]][key[1]] = value
        (changed / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=message):
            read_sets(config(setting, data=[f"a={good}", f"b={changed}"], model="", saes="", layers=""))
    with pytest.raises(ConfigError, match=r"`s` is a feature store, which has no columns of the data"):
        read_sets(config(setting, data=[f"s={good}"], by=["lang"], model="", saes="", layers=""))
    with pytest.raises(ConfigError, match=r"`model` is needed to read texts; feature stores alone need none"):
        read_sets(config(setting, model=""))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": ["nothing"]}, r"Row 0 of '.*' has no column `nothing`, which `filter` or `by` names; it has `text`"),
        ({"filter": ["lang=xx"]}, r"No row of '.*' has `lang=xx`, so `a` is empty"),
        ({"text_column": ["number"]}, r"Row \d+ of '.*' holds \d+ in column `number`, which is not a text"),
    ],
)
def test_data_that_does_not_fit_is_refused(setting: Setting, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_sets(config(setting, **changes))


def test_a_column_of_too_many_values_is_refused(setting: Setting, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "many.jsonl", [{"text": "w2 w3", "id": i} for i in range(201)])
    with pytest.raises(DataError, match=r"Column `id` of '.*' has more than 200 values"):
        read_sets(config(setting, data=[str(path)], by=["id"]))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"No row of '.*' is there, so `empty` is empty"):
        read_sets(config(setting, data=[str(empty)]))
    silent = write_lines(tmp_path / "silent.jsonl", [{"text": "w2"}, {"text": ""}])
    with pytest.raises(DataError, match=r"No feature is active in any sample of `silent`"):
        read_sets(config(setting, data=[str(silent)]))


def test_one_encoder_reads_several_lots_alike(setting: Setting) -> None:
    encoder = Encoder(config(setting))
    texts = [row["text"] for row in setting.rows]
    whole = rows_of(encoder(texts).bitmap)
    assert rows_of(encoder(texts[:7]).bitmap) + rows_of(encoder(texts[7:]).bitmap) == whole
    nothing = encoder(["", "w2"])
    assert nothing.bitmap.nnz == 0
    assert nothing.num_tokens.tolist() == [0, 0]


def test_settings_name_sets_and_what_holds_for_each() -> None:
    def specs(**given: Any) -> Any:
        return EvalmapConfig(output="o", model="m", saes="s", layers="1", **given).specs()

    first, second, third = specs(
        data=["openai/gsm8k", "mmlu=cais/mmlu", "x/y.jsonl.gz"],
        data_split=["test", "y=dev"], data_config=["gsm8k=main"], text_column=["mmlu=question+choices"],
        filter=["a=1", "mmlu:b:c=2", "q:r=3"],
    )  # fmt: skip
    assert first == ("gsm8k", "openai/gsm8k", "test", "main", None, "text", (("a", "1"), ("q:r", "3")), None)
    assert second[:6] == ("mmlu", "cais/mmlu", "test", None, None, "question+choices")
    assert second.filters == (("a", "1"), ("b:c", "2"), ("q:r", "3"))
    assert third[:3] == ("y", "x/y.jsonl.gz", "dev")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": []}, r"No set is given: name some by `--data NAME=DATA` or `--tasks`"),
        ({"data": ["a=x", "b/a.jsonl"]}, r"Two sets are called `a`"),
        ({"data": ["b/a b"]}, r"'b/a b' names no set; write it as `NAME=DATA`"),
        ({"data_split": ["b=test"]}, r"`data_split` is given for `b`, but the sets are a"),
        ({"data_split": ["x", "y"]}, r"`data_split` is given twice for all sets; write `NAME=y` for one"),
        ({"filter": ["lang"]}, r"`filter` is 'lang'; write `COLUMN=VALUE`"),
        ({"pool": "mean"}, r"`pool` is 'mean'; choose one of last, max"),
        ({"near": 1.5}, r"`near` is 1.5; it is a share, 0 to 1"),
        ({"near": 0.0, "train": ["x"]}, r"`train` was given, but `near` is 0, so nothing is looked for"),
        ({"train": ["x/t.jsonl", "y/t.jsonl"]}, r"Two training sets are called `t`.* `--train first=t`"),
        ({"train": ["t=x", "t=y"]}, r"Two training sets are called `t`"),
        ({"train": ["a=y"]}, r"A training set and an evaluation set are both called `a`.* `--train a_train=DATA`"),
        ({"tasks": "gsm8k", "train": ["x/gsm8k"]}, r"A training set and an evaluation set are both called `gsm8k`"),
        ({"given": "a"}, r"`given` is 'a', a set to take out of scores, but no `scores` are given"),
        ({"max_samples": 0}, r"`max_samples` is 0; it is 1 or more"),
        ({"near_pairs": -1}, r"`near_pairs` is -1; it is 0 or more"),
        ({"layers": "", "batch_size": 0}, r"`batch_size` is 0; it is 1 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalmapConfig(**{"output": "o", "data": ["a=x"], "layers": "1", **given})
