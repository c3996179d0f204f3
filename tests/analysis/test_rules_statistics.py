"""Sums by slice and class, and the candidates chosen by them, against plain NumPy on dense activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qscope_trl import SAESuite
from qscope_trl.activations.feature_table import encode_table
from qscope_trl.analysis.rules.statistics import LayerSums, choose_candidates, matched_at_random, sums_of_texts
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from tests.tiny import D_SAE, K, sentence, tiny_model, tiny_tokenizer, write_saes

LAYERS = (1, 2)
NUM = 36


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    saes = SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes")), k=K)
    model = tiny_model().eval()
    generator = torch.Generator().manual_seed(0)
    texts = [sentence(generator, 2 + i % 9) for i in range(NUM)]
    labels = np.random.default_rng(0).random(NUM) < 0.4
    slices = np.arange(NUM) % 4 - 1
    sums = sums_of_texts(
        model, tiny_tokenizer(), saes, LAYERS, texts, slices, labels, ("max", "mean"), show_progress=False
    )
    every = [FeatureId(layer, index) for layer in LAYERS for index in range(D_SAE)]
    table = encode_table(model, tiny_tokenizer(), saes, texts, every, show_progress=False)
    return {"sums": sums, "table": table, "labels": labels, "slices": slices, "saes": saes, "model": model,
            "texts": texts}  # fmt: skip


def dense(setting: dict[str, object], layer: int, name: str) -> np.ndarray:
    features = [FeatureId(layer, index) for index in range(D_SAE)]
    found: np.ndarray = setting["table"].matrix(name, features)  # type: ignore[attr-defined]
    return found


def chosen(setting: dict[str, object], slices: tuple[int, ...], positive: bool) -> np.ndarray:
    found: np.ndarray = np.isin(setting["slices"], slices) & (setting["labels"] == positive)
    return found


@pytest.mark.parametrize("slices", [(0, 1), (2,)])
def test_sums_by_slice_give_the_figures_of_those_texts_alone(
    setting: dict[str, object], slices: tuple[int, ...]
) -> None:
    for layer in LAYERS:
        sums: LayerSums = setting["sums"][layer]  # type: ignore[index]
        high, low = chosen(setting, slices, True), chosen(setting, slices, False)
        fires = dense(setting, layer, "max") > 0
        np.testing.assert_allclose(sums.delta(slices), fires[high].mean(0) - fires[low].mean(0))
        for name in ("max", "mean"):
            values = dense(setting, layer, name)
            pooled = (values[high].var(0) * high.sum() + values[low].var(0) * low.sum()) / (high.sum() + low.sum() - 2)
            difference = values[high].mean(0) - values[low].mean(0)
            moves = pooled > 1e-9
            wanted = (difference / np.sqrt(np.maximum(pooled, 1e-300)))[moves]
            # Forwards in fp32: the table was encoded in other batches, and means may nearly cancel.
            np.testing.assert_allclose(sums.effect(slices, name)[moves], wanted, rtol=1e-5, atol=1e-5)


def test_texts_of_no_slice_are_not_read(setting: dict[str, object]) -> None:
    labels = setting["labels"]
    sums = setting["sums"][1]  # type: ignore[index]
    assert sums.texts.sum() == (setting["slices"] >= 0).sum()  # type: ignore[operator]
    other = np.where(setting["slices"] < 0, ~labels, labels)  # type: ignore[operator]
    again = sums_of_texts(
        setting["model"], tiny_tokenizer(), setting["saes"], LAYERS, setting["texts"], setting["slices"], other,
        ("max",), show_progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(again[1].fired, sums.fired)


def test_candidates_are_the_best_by_delta_and_by_effect(setting: dict[str, object]) -> None:
    sums = setting["sums"]
    found = choose_candidates(sums, (0, 1), 5, ("max", "mean"))  # type: ignore[arg-type]
    delta = np.concatenate([sums[layer].delta((0, 1)) for layer in LAYERS])  # type: ignore[index]
    best = np.argsort(-delta, kind="stable")[:5]
    assert found.by_delta == tuple(FeatureId(LAYERS[i // D_SAE], int(i % D_SAE)) for i in best)
    assert {c.feature for c in found.positive} >= set(found.by_delta)
    effect = np.concatenate([sums[layer].effect((0, 1), "mean") for layer in LAYERS])  # type: ignore[index]
    worst = int(np.argmin(effect))
    assert (FeatureId(LAYERS[worst // D_SAE], worst % D_SAE), "mean") in found.negative
    assert len(set(found.positive)) == len(found.positive) <= 20


def test_features_that_differ_nowhere_are_refused(setting: dict[str, object]) -> None:
    silent = LayerSums.empty(np.array([[3, 3]]), D_SAE, ("max",))
    with pytest.raises(DataError, match="No feature of these layers fires differently in the two classes"):
        choose_candidates({1: silent}, (0,), 5, ("max",))


def test_matched_features_are_others_of_the_layer_that_fire_as_often(setting: dict[str, object]) -> None:
    sums = setting["sums"]
    features = [FeatureId(1, 3), FeatureId(1, 9), FeatureId(2, 3)]
    found = matched_at_random(sums, features, 0, nearest=6)  # type: ignore[arg-type]
    assert list(found) == features
    assert len({*found.values(), *features}) == 6
    for feature, other in found.items():
        assert other.layer == feature.layer
        rate = sums[feature.layer].fired.sum((0, 1))  # type: ignore[index]
        distance = np.sort(np.abs(rate - rate[feature.index]))
        # Itself, another candidate, one drawn before, and six to choose from.
        assert abs(rate[other.index] - rate[feature.index]) <= distance[8]
    draws = {tuple(matched_at_random(sums, features, seed).values()) for seed in range(5)}  # type: ignore[arg-type]
    assert len(draws) > 1
    assert matched_at_random(sums, features, 0, nearest=6) == found  # type: ignore[arg-type]


def test_texts_without_a_kept_token_are_refused(setting: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="None of the texts has a token after position 0"):
        sums_of_texts(
            setting["model"], tiny_tokenizer(), setting["saes"], LAYERS, ["w2", "w3"], np.array([0, 0]),
            np.array([True, False]), ("max",), show_progress=False,
        )  # fmt: skip
