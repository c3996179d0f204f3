"""Steering under a condition: the rule decides for each row, by its prompt or token by token, as by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qscope_trl.errors import QScopeWarning, RuleError, SteeringError
from qscope_trl.rules import TokenValues, compile_rule
from qscope_trl.steering.steer import steer
from tests.steering.test_steer import FEATURES, batch, by_hand, columns, dense_acts, generate
from tests.tiny import K

# At layers 0 and 1, none above the first steered one; some hold from the first token on, some later, some never.
RULES = (
    "mean(L0F5) > 0.02 or mean(L1F9) > 0.05",
    "not rate(L1F9) > 0.3",
    "any(last(L0: 5, 17, 50, 60, 70), last(L1: 7, 9, 20, 30))",
    "atleast(2, L0: 5, 17, 50, 60, 70; L1: 7, 9, 20 > 0.1) and not max(L1F60) > 0.5",
)


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 90, (length,), generator=generator) for length in (9, 4, 6, 2)]


def gate_by_hand(model: Any, ids: Tensor, rule_text: str) -> Tensor:
    """After each token of one text: whether the rule holds for what the unsteered model makes of it."""
    rule = compile_rule(rule_text)
    seen: dict[int, Tensor] = {}
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _m, _a, out, layer=layer: seen.update({layer: out[0]}))
        for layer in (0, 1)
    ]
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    acts = torch.stack([dense_acts(f.layer, seen[f.layer])[:, f.index] for f in rule.features], dim=1).float()
    held = rule.evaluate_tokens(acts[1:].numpy())
    # Position 0 does not count: there, nothing has been read.
    nothing = rule.evaluate(TokenValues(rule.features, torch.zeros(1, len(rule.features)).numpy()))
    return torch.tensor([*nothing, *held])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("reads", ["prompt", "text"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_steered_where_the_rule_holds(
    model: Any, saes: Path, texts: list[Tensor], rule: str, reads: str, use_cache: bool
) -> None:
    with steer(model, saes, FEATURES, strength=2.0, gate=rule, gate_reads=reads, sae_k=K) as steering:
        found = generate(model, batch(texts), steps=6, use_cache=use_cache)
    decided = []
    for row, text in enumerate(texts):
        ids = text
        for step in range(6):
            is_on = gate_by_hand(model, ids, rule)
            if reads == "prompt":
                is_on = is_on[len(text) - 1].expand(len(ids))
            mask = is_on[:, None].float()

            def delta(layer: int, x: Tensor, _prompt: int, _row: int, mask: Tensor = mask) -> Tensor:
                _, weights, W = columns(layer, FEATURES)
                return 2.0 * (W @ weights).expand(len(x), -1) * mask

            wanted = by_hand(model, ids, delta, 1)[0]
            assert (found[row, step] - wanted).abs().max() < 2e-4 * wanted.abs().max()
            ids = torch.cat([ids, wanted.argmax()[None]])
        # The last token was chosen but never read.
        decided.append(is_on)
    if use_cache:
        assert steering.num_edits == sum(int(is_on.sum()) for is_on in decided)


def test_the_rules_of_this_file_tell_tokens_and_rows_apart(model: Any, texts: list[Tensor]) -> None:
    held = [torch.cat([gate_by_hand(model, text, rule) for text in texts]) for rule in RULES]
    assert all(0 < int(value.sum()) < len(value) for value in held)


def test_a_gate_that_never_opens_changes_nothing_and_says_so(model: Any, saes: Path, texts: list[Tensor]) -> None:
    plain = generate(model, batch(texts))
    with (
        pytest.warns(QScopeWarning, match=r"The gate `L0F5 > 1000000000` never held, so nothing was steered in 4 fo"),
        steer(model, saes, FEATURES, strength=9.0, gate="L0F5 > 1e9", gate_reads="text", sae_k=K) as steering,
    ):
        found = generate(model, batch(texts))
    assert torch.equal(found, plain)
    assert (steering.num_edits, steering.num_forwards) == (0, 4)


@pytest.mark.parametrize("reads", ["prompt", "text"])
def test_beams_carry_what_was_read_of_them(model: Any, saes: Path, texts: list[Tensor], reads: str) -> None:
    """Without a cache every beam is read anew from its tokens; with one, what is known moves with the beams."""
    settings = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    found = []
    for use_cache in (True, False):
        with steer(model, saes, FEATURES, strength=3.0, gate=RULES[2], gate_reads=reads, sae_k=K):
            found.append(model.generate(**batch(texts), use_cache=use_cache, **settings))
    assert torch.equal(*found)
    with steer(model, saes, FEATURES, strength=3.0, sae_k=K):
        always = model.generate(**batch(texts), **settings)
    assert not torch.equal(found[0], always)


def test_a_cache_keeps_nothing_of_the_gate(model: Any, saes: Path, texts: list[Tensor]) -> None:
    with steer(model, saes, FEATURES, gate=RULES[2], gate_reads="text", sae_k=K), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=texts[0][None], past_key_values=cache)
        assert "reorder_cache" in vars(cache)
    assert "reorder_cache" not in vars(cache)


def test_what_does_not_grow_token_by_token_is_refused(model: Any, saes: Path, texts: list[Tensor]) -> None:
    prompt = texts[0][None].repeat(1, 2)
    with (
        pytest.raises(
            SteeringError, match=r"A gate follows a text token by token; it has read \d+ tokens, and was given"
        ),
        steer(model, saes, FEATURES, gate=RULES[0], sae_k=K),
    ):
        model.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=6, do_sample=False, pad_token_id=0)


def test_a_rule_of_features_that_are_not_there_is_refused(model: Any, saes: Path) -> None:
    with pytest.raises(RuleError, match=r"L0F128 is not there: the SAE of layer 0 has 128 features"):
        steer(model, saes, FEATURES, gate="L0F128 > 1", sae_k=K)
