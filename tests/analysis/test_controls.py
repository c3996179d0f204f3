"""Control features fire as often as the chosen ones and are none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.analysis.controls import matched_random_features
from tests.tiny import D_SAE, K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes

CHOSEN = ["L1F3", "L1F77", "L2F5"]


def texts(seed: int, count: int = 30) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [sentence(generator, 12) for _ in range(count)]


@pytest.fixture
def suite(tmp_path: Path) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path / "saes"), k=K)


def draw(suite: SAESuite, seed: int = 0) -> FeatureSet:
    return matched_random_features(
        FeatureSet.from_names(CHOSEN), tiny_model(), tiny_tokenizer(), suite, texts(0), texts(1), seed=seed,
        show_progress=False,
    )  # fmt: skip


def test_controls_match_layer_count_and_rate_and_avoid_the_chosen(suite: SAESuite) -> None:
    control = draw(suite)
    assert [feature.layer for feature in control.features] == [1, 1, 2]
    assert not {str(i) for i in control.ids} & set(CHOSEN)
    for feature in control.features:
        # 20 nearest of 128 features: within the rates that a sixth of all features span around the matched one.
        assert abs(feature.evidence["token_rate"] - feature.evidence["matched_token_rate"]) < 0.1


def test_thresholds_are_mean_pre_activations_on_the_threshold_texts(suite: SAESuite) -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    for feature in draw(suite).features:
        sae, values = random_sae(100 + feature.layer), []
        for text in texts(1):
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            f = output.hidden_states[feature.layer + 1][0, 1:] @ sae["W_enc"][feature.index]
            values += (f + sae["b_enc"][feature.index]).tolist()
        assert feature.threshold == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_the_seed_decides_the_draw(suite: SAESuite) -> None:
    assert draw(suite, 0) == draw(suite, 0)
    assert any(draw(suite, 0).ids != draw(suite, seed).ids for seed in (1, 2))
    assert all(i.index < D_SAE for i in draw(suite, 1).ids)
