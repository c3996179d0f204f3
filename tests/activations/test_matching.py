"""Firing rates against a dense count, text by text; what is drawn by them fires as often and was not chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.activations.matching import draw_matched, matched_random_features, token_rates
from qscope_trl.errors import ConfigError
from qscope_trl.hooks.layers import find_layers
from tests.tiny import D_SAE, K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes


def test_rates_count_every_token_but_the_first(tmp_path: Path) -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    texts = [sentence(generator, length) for length in (7, 12, 3)]
    saes = SAESuite.from_pretrained(write_saes(tmp_path), k=K)
    found = token_rates(model, tokenizer, saes, (1, 3), texts, batch_size=2, show_progress=False)
    for layer in (1, 3):
        sae, active = random_sae(100 + layer), []
        for text in texts:
            seen: list[torch.Tensor] = []
            handle = find_layers(model)[layer].register_forward_hook(lambda _m, _a, x, seen=seen: seen.append(x))
            with torch.no_grad():
                model(torch.tensor([tokenizer(text)["input_ids"]]))
            handle.remove()
            f = seen[0][0, 1:].double() @ sae["W_enc"].double().T + sae["b_enc"].double()
            kept = torch.zeros_like(f).scatter_(-1, f.topk(K).indices, 1.0)
            active.append((f.relu() * kept) > 0)
        assert torch.allclose(found[layer], torch.cat(active).double().mean(0))


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


def test_what_is_to_be_avoided_is_not_drawn() -> None:
    rates = torch.linspace(0.0, 1.0, 10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_matched(rates, [2, 4], generator, avoid=[0, 1, 3, 5, 6, 7]) for _ in range(20)]
    assert {frozenset(pair) for pair in drawn} == {frozenset({8, 9})}


def test_too_few_features_to_draw_from_are_refused() -> None:
    with pytest.raises(ConfigError, match="9 of 10 features are chosen, so not as many others are left"):
        draw_matched(torch.zeros(10), [1, 2], torch.Generator(), avoid=range(3, 10))
