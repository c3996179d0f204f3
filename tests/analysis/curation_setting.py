"""A tiny model with SAEs and a small dataset on disk, and their features computed without the package."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import load_from_disk

from qscope_trl.activations import index_run
from qscope_trl.analysis.curation import run as curation
from qscope_trl.config.curate import CurateConfig
from qscope_trl.config.index import IndexConfig
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes

LAYERS = (1, 2)
MAX_LENGTH = 24


class Setting(NamedTuple):
    """What the tests curate, and with what."""

    folder: Path
    model: Path
    saes: Path
    data: Path
    rows: list[dict[str, Any]]

    def config(self, **changes: Any) -> CurateConfig:
        """Settings; `output` is `out` in the folder of the data unless it is given, or nothing is to be written."""
        given = {
            "data": str(self.data), "model": str(self.model), "saes": str(self.saes), "sae_k": K, "layers": "1,2",
            "max_length": MAX_LENGTH, "batch_size": 4, **changes,
        }  # fmt: skip
        return CurateConfig(**given)


def make_rows() -> list[dict[str, Any]]:
    """Sentences, small edits of them, equal texts, one of nothing and one of a single token, in a random order."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(6, 16, (44,), generator=generator).tolist()
    texts = [sentence(generator, length) for length in lengths]
    for place in range(0, 24, 2):
        words = texts[place].split()
        words[-1] = "w2" if words[-1] != "w2" else "w3"
        texts.append(" ".join(words))
    texts += [texts[1], texts[3], texts[5], "", "w9"]
    rows = [
        {
            "text": text,
            "lang": ("en", "en", "en", "zh", "de")[i % 5],
            "good": i % 3 == 0,
            "number": i if i % 7 else None,
            "list": list(range(i % 3)),
        }
        for i, text in enumerate(texts)
    ]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_setting(folder: Path) -> Setting:
    model = folder / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = make_rows()
    return Setting(folder, model, write_saes(folder / "saes"), write_lines(folder / "data.jsonl", rows), rows)


@functools.cache
def _plain_model() -> Any:
    return tiny_model().eval()


@functools.cache
def plain_max(text: str, layer: int) -> Any:
    """Largest activation of every feature after position 0, `(features,)`, from the hidden states in fp64."""
    ids = tiny_tokenizer()(text).input_ids[:MAX_LENGTH]
    sae = {name: value.double().numpy() for name, value in random_sae(100 + layer).items()}
    if len(ids) < 2:
        return np.zeros(len(sae["b_enc"]))
    with torch.no_grad():
        hidden = _plain_model().model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    f = hidden[layer + 1][0, 1:].double().numpy() @ sae["W_enc"].T + sae["b_enc"]
    kth = np.sort(f, axis=1)[:, -K][:, None]
    return np.where((f >= kth) & (f > 0), f, 0).max(0)


def plain_values(texts: list[str], feature: str) -> Any:
    layer, index = feature[1:].split("F")
    return np.array([plain_max(text, int(layer))[int(index)] for text in texts])


def plain_set(text: str) -> frozenset[tuple[int, int]]:
    """Active features of both layers."""
    return frozenset((layer, int(f)) for layer in LAYERS for f in np.flatnonzero(plain_max(text, layer)))


def plain_jaccard(a: str, b: str) -> float:
    first, second = plain_set(a), plain_set(b)
    return len(first & second) / len(first | second) if first and second else 0.0


def make_store(setting: Setting, folder: Path, data: Path, **changes: Any) -> Path:
    """A feature store of both layers, with few rows a shard."""
    given = {
        "data": str(data), "output": str(folder), "model": str(setting.model), "saes": str(setting.saes), "sae_k": K,
        "layers": "1,2", "max_length": MAX_LENGTH, "batch_size": 4, "shard_size": 16, **changes,
    }  # fmt: skip
    index_run.run(IndexConfig(**given), show_progress=False)
    return folder


def curate(setting: Setting, output: Path, **changes: Any) -> curation.Curated:
    return curation.run(setting.config(output=str(output), **changes), show_progress=False)


def kept_rows(output: Path) -> list[int]:
    return list(load_from_disk(str(output / "dataset"))["qscope_row"])


def removed(output: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(output / "removed.parquet").to_pylist())
