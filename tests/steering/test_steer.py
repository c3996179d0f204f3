"""Steering against loops that know nothing of hooks on forwards: a model run token by token, edited by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.errors import ConfigError, FeatureSetError, ModelStructureError, QScopeWarning, SteeringError
from qscope_trl.hooks.layers import find_layers
from qscope_trl.steering.steer import steer
from tests.tiny import D_SAE, K, random_sae, tiny_model, tiny_tokenizer, write_saes

LENGTHS = (7, 3, 5)
FEATURES = {"L1F3": 1.0, "L1F9": -0.5, "L2F40": 0.7}
# Enough of them that some are active at most tokens.
MANY = {f"L{layer}F{index}": 1.0 - index / 200 for layer in (1, 2) for index in range(0, D_SAE, 3)}


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 90, (length,), generator=generator) for length in LENGTHS]


def batch(texts: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


Delta = Callable[[int, Tensor, int, int], Tensor]
"""Layer, residual `(T, D)` of one text, its prompt's length, and row, to what is added."""


def by_hand(model: Any, text: Tensor, delta: Delta, steps: int, row: int = 0) -> Tensor:
    """Logits of the greedily chosen tokens, `(steps, V)`: one text, no padding, no cache, an edit of its own."""
    ids, prompt, found = text[None], len(text), []
    for _ in range(steps):

        def edit(layer: int) -> Any:
            def replace(_m: Any, _a: Any, output: Tensor) -> Tensor:
                return output + delta(layer, output[0], prompt, row)[None]

            return replace

        handles = [find_layers(model)[layer].register_forward_hook(edit(layer)) for layer in (1, 2)]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        found.append(logits)
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    return torch.stack(found)


def generate(model: Any, inputs: dict[str, Tensor], steps: int = 4, **settings: Any) -> Tensor:
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1)


def dense_acts(layer: int, x: Tensor) -> Tensor:
    sae = random_sae(100 + layer)
    f = x.double() @ sae["W_enc"].double().T + sae["b_enc"].double()
    kept = torch.zeros_like(f).scatter_(-1, f.topk(K).indices, 1.0)
    return f.relu() * kept


def columns(layer: int, features: dict[str, float]) -> tuple[list[int], Tensor, Tensor]:
    chosen = {int(n.split("F")[1]): w for n, w in features.items() if n.startswith(f"L{layer}F")}
    index = list(chosen)
    return index, torch.tensor(list(chosen.values())), random_sae(100 + layer)["W_dec"][:, index]


def span(phases: tuple[str, ...], first: int = 0) -> Callable[[int, int], Tensor]:
    def mask(length: int, prompt: int) -> Tensor:
        place = torch.arange(length)
        is_prompt = place < prompt - 1
        wanted = (is_prompt & ("prompt" in phases)) | (~is_prompt & ("generation" in phases))
        return (wanted & (place >= first))[:, None].float()

    return mask


def delta_of(mode: str, unit: str, strengths: list[float], mask: Callable[[int, int], Tensor]) -> Delta:
    def delta(layer: int, x: Tensor, prompt: int, row: int) -> Tensor:
        index, weights, W = columns(layer, MANY if mode == "ablate" else FEATURES)
        strength = strengths[row]
        if mode == "add":
            vector = W @ weights
            change = strength * vector.expand(len(x), -1)
            if unit == "norm":
                change = strength * x.norm(dim=-1, keepdim=True) * vector / vector.norm()
        else:
            acts = dense_acts(layer, x)[:, index].float()
            wanted = strength * weights
            change = (-wanted * acts if mode == "ablate" else wanted - acts) @ W.T
            if strength == 0:
                change = torch.zeros_like(x)
        return change * mask(len(x), prompt)

    return delta


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("phases", [("prompt",), ("generation",), ("prompt", "generation")], ids="+".join)
@pytest.mark.parametrize(
    ("mode", "unit"), [("add", "raw"), ("add", "norm"), ("ablate", "raw"), ("clamp", "raw")], ids=lambda v: v
)
def test_padded_batches_are_steered_as_texts_by_hand(
    model: Any, saes: Path, texts: list[Tensor], mode: str, unit: str, phases: tuple[str, ...], use_cache: bool
) -> None:
    strengths = {"add": [0.8, 0.0, -1.5], "ablate": [1.0, 0.0, 0.5], "clamp": [2.0, 0.0, 0.7]}[mode]
    features = MANY if mode == "ablate" else FEATURES
    with steer(
        model, saes, features, strength=strengths, mode=mode, unit=unit, phases=phases, positions=slice(1, None),
        sae_k=K,
    ):  # fmt: skip
        found = generate(model, batch(texts), use_cache=use_cache)
    delta = delta_of(mode, unit, strengths, span(phases, first=1))
    for row, text in enumerate(texts):
        wanted = by_hand(model, text, delta, 4, row)
        assert (found[row] - wanted).abs().max() < 2e-4 * wanted.abs().max()
        if strengths[row]:
            plain = by_hand(model, text, lambda _l, x, _p, _r: torch.zeros_like(x), 4)
            assert (plain - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["add", "ablate", "clamp"])
def test_strength_0_is_bit_equal(model: Any, saes: Path, texts: list[Tensor], mode: str) -> None:
    inputs = batch(texts)
    plain = generate(model, inputs)
    with steer(model, saes, FEATURES, strength=0, mode=mode, sae_k=K) as steering:
        assert torch.equal(generate(model, inputs), plain)
    assert steering.num_edits == 0
    with steer(model, saes, MANY, strength=[0.0, 3.0, 0.0], mode=mode, sae_k=K):
        mixed = generate(model, inputs)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(mixed[1], plain[1], atol=1e-3)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (slice(1, None), lambda t, prompt: t >= 1),
        (slice(0, 2), lambda t, prompt: t < 2),
        (slice(1, None, 2), lambda t, prompt: t % 2 == 1),
        (slice(-2, None), lambda t, prompt: t >= prompt - 2),
        ((0, -1), lambda t, prompt: t in (0, prompt - 1)),
    ],
    ids=["from 1", "first two", "every second", "last two", "first and last"],
)
def test_positions_count_from_the_text_not_from_the_padding(
    model: Any, saes: Path, texts: list[Tensor], positions: Any, chosen: Callable[[int, int], bool]
) -> None:
    def mask(length: int, prompt: int) -> Tensor:
        return torch.tensor([[float(chosen(t, prompt))] for t in range(length)])

    with steer(model, saes, FEATURES, strength=2.0, positions=positions, sae_k=K):
        found = generate(model, batch(texts))
    for row, text in enumerate(texts):
        wanted = by_hand(model, text, delta_of("add", "raw", [2.0], mask), 4)
        assert (found[row] - wanted).abs().max() < 2e-4 * wanted.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_plain_forward_is_steered_at_every_token(model: Any, saes: Path, texts: list[Tensor], side: str) -> None:
    inputs = batch(texts, side)
    with torch.no_grad(), steer(model, saes, FEATURES, strength=2.0, sae_k=K) as steering:
        logits = model(**inputs).logits
    assert steering.num_edits == sum(LENGTHS)
    delta = delta_of("add", "raw", [2.0], span(("prompt", "generation")))
    for row, text in enumerate(texts):
        last = -1 if side == "left" else len(text) - 1
        assert torch.allclose(logits[row, last], by_hand(model, text, delta, 1)[0], atol=1e-3)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_beams_follow_their_row(model: Any, saes: Path, texts: list[Tensor], use_cache: bool) -> None:
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "use_cache": use_cache}
    strengths = [2.0, 0.0, -2.0]
    with steer(model, saes, FEATURES, strength=strengths, sae_k=K):
        together = model.generate(**batch(texts), **settings)[:, -5:]
    for row, text in enumerate(texts):
        with steer(model, saes, FEATURES, strength=strengths[row], sae_k=K):
            alone = model.generate(text[None], attention_mask=torch.ones(1, len(text)), **settings)[0, -5:]
        assert together[row].tolist() == alone.tolist()


def test_several_generations_in_one_block_are_each_steered_from_their_begin(
    model: Any, saes: Path, texts: list[Tensor]
) -> None:
    settings = {"strength": 2.0, "phases": ("generation",), "sae_k": K}
    with steer(model, saes, FEATURES, **settings):
        both = [generate(model, {"input_ids": text[None]}, use_cache=use) for text in texts for use in (True, False)]
    for place, text in enumerate(texts):
        with steer(model, saes, FEATURES, **settings):
            alone = generate(model, {"input_ids": text[None]})
        assert torch.allclose(both[2 * place], alone, atol=1e-4)
        assert torch.allclose(both[2 * place + 1], alone, atol=1e-4)


def test_tokens_are_counted(model: Any, saes: Path, texts: list[Tensor]) -> None:
    with steer(model, saes, FEATURES, sae_k=K) as steering:
        generate(model, batch(texts), steps=4)
    assert (steering.num_edits, steering.num_forwards) == (sum(LENGTHS) + 3 * 3, 4)
    with steer(model, saes, FEATURES, strength=[1.0, 0.0, 1.0], phases="generation", sae_k=K) as steering:
        generate(model, batch(texts), steps=4)
    assert steering.num_edits == 2 * 4
    with steer(model, saes, ["L1F3"], mode="ablate", sae_k=K) as steering, torch.no_grad():
        model(**batch(texts))
    seen = []
    handle = find_layers(model)[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(**batch(texts))
    handle.remove()
    real = batch(texts)["attention_mask"].bool()
    assert steering.num_active == int((dense_acts(1, seen[0])[..., 3] > 0)[real].sum())


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_come_off_always(model: Any, saes: Path, texts: list[Tensor]) -> None:
    steering = steer(model, saes, FEATURES, gate="L1F3 < 1e9", sae_k=K)
    counts = []

    def fails() -> None:
        with steering:
            counts.append(hook_count(model))
            generate(model, {"input_ids": texts[0][None]})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert counts == [3]
    assert hook_count(model) == 0
    bad = steer(model, saes, FEATURES, strength=[1.0, 2.0], sae_k=K)
    with (
        pytest.raises(
            ModelStructureError, match=r"`strength` has 2 values, one for each row, but the model ran 3 rows"
        ),
        bad,
    ):
        generate(model, batch(texts))
    assert hook_count(model) == 0
    with steering:
        with pytest.raises(SteeringError, match=r"This block is already steering"):
            steering.__enter__()
        generate(model, {"input_ids": texts[0][None]})
    assert hook_count(model) == 0


def test_a_block_that_steers_nothing_says_so(model: Any, saes: Path, texts: list[Tensor]) -> None:
    with (
        pytest.raises(SteeringError, match=r"no forward of this `Qwen3ForCausalLM` ran in the block"),
        steer(model, saes, FEATURES, sae_k=K),
    ):
        generate(tiny_model().eval(), batch(texts))
    with (
        pytest.raises(SteeringError, match=r"4 forwards ran, but none had a position that `phases` and `positions`"),
        steer(model, saes, FEATURES, phases=("prompt",), positions=slice(50, None), sae_k=K),
    ):
        generate(model, batch(texts))
    silent = min(range(D_SAE), key=lambda i: float(random_sae(101)["b_enc"][i]))
    with (
        pytest.warns(QScopeWarning, match=r"No ablated feature was active at any steered token"),
        steer(model, saes, [f"L1F{silent}"], mode="ablate", positions=(0,), sae_k=K),
    ):
        generate(model, {"input_ids": torch.tensor([[2, 3]])}, steps=1)


def test_assisted_decoding_is_steered_or_refused(model: Any, saes: Path, texts: list[Tensor]) -> None:
    prompt = texts[0][None].repeat(1, 2)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with steer(model, saes, FEATURES, strength=2.0, sae_k=K):
        plain = model.generate(prompt, **settings)
    with steer(model, saes, FEATURES, strength=2.0, sae_k=K):
        assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **settings), plain)
    with (
        pytest.raises(
            SteeringError, match=r"Of a forward of \d tokens after \d+ cached ones it cannot be told what is prompt"
        ),
        steer(model, saes, FEATURES, strength=2.0, phases=("generation",), sae_k=K),
    ):
        model.generate(prompt, prompt_lookup_num_tokens=3, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "push"}, ConfigError, r"`mode` is 'push'; choose one of add, ablate, clamp"),
        ({"unit": "kg"}, ConfigError, r"`unit` is 'kg'; choose one of raw, norm"),
        ({"unit": "norm", "mode": "clamp"}, ConfigError, r"`unit='norm'` is for `mode='add'`"),
        ({"phases": ("decode",)}, ConfigError, r"`phases` is \('decode',\); name 'prompt' or 'generation'"),
        ({"phases": ()}, ConfigError, r"`phases` is \(\)"),
        ({"positions": "all"}, ConfigError, r"`positions` is 'all'; it is a slice"),
        ({"positions": ()}, ConfigError, r"`positions` is empty"),
        ({"positions": slice(None, None, -1)}, ConfigError, r"a slice has whole numbers, and a step from 1"),
        ({"strength": float("nan")}, ConfigError, r"`strength` is nan; it is a finite number"),
        ({"gate": "L3F1 > 1"}, ConfigError, r"The gate reads layer 3, but layer 1 is steered"),
        (
            {"gate": "L1F1 > 1", "gate_reads": "book"},
            ConfigError,
            r"`gate_reads` is 'book'; choose one of prompt, text",
        ),
        (
            {"features": {"L1F3": 0.0}},
            SteeringError,
            r"directions of L1F3 add up to zero, so nothing would be steered",
        ),
        ({"features": ["L1F999"]}, FeatureSetError, r"999"),
        (
            {"features": FeatureSet.from_names(["L1F3"], sae_fingerprints={1: "0a0a"})},
            FeatureSetError,
            r"fingerprint",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    model: Any, saes: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        steer(model, saes, **{"features": FEATURES, "sae_k": K, **settings})
    assert hook_count(model) == 0


def test_saes_of_another_width_are_refused(model: Any, tmp_path: Path) -> None:
    suite = SAESuite.from_pretrained(write_saes(tmp_path, [1], d_model=16), k=K)
    with pytest.raises(
        ModelStructureError, match=r"reads residuals of width 16, but `Qwen3ForCausalLM` has `hidden_size=32`"
    ):
        steer(model, suite, ["L1F3"])


def test_lora_is_steered_as_its_merged_model(model: Any, saes: Path, texts: list[Tensor]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapted = get_peft_model(tiny_model().eval(), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    adapted.generation_config = model.generation_config
    with steer(adapted, saes, FEATURES, strength=2.0, sae_k=K):
        found = generate(adapted, batch(texts))
    merged = adapted.merge_and_unload()
    merged.generation_config = model.generation_config
    with steer(merged, saes, FEATURES, strength=2.0, sae_k=K):
        assert torch.allclose(generate(merged, batch(texts)), found, atol=1e-3)


def test_a_pipeline_is_steered_as_generate_is(model: Any, saes: Path) -> None:
    from transformers import pipeline

    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    prompts = ["w5 w6 w7 w8", "w9 w10"]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with steer(model, saes, FEATURES, strength=3.0, sae_k=K) as steering:
            found = [made[0]["generated_text"] for made in write(prompts, **settings)]
        assert steering.num_edits == 4 + 2 + 2 * 4
        with steer(model, saes, FEATURES, strength=3.0, sae_k=K):
            wanted = model.generate(**inputs, **settings)
        plain = [made[0]["generated_text"] for made in write(prompts, **settings)]
    # A pipeline sets the new text behind the prompt as it was written, without the space of this tokenizer.
    new = tokenizer.batch_decode(wanted[:, -5:], skip_special_tokens=True)
    assert found == [prompt + text for prompt, text in zip(prompts, new, strict=True)]
    assert found != plain


def test_rows_that_are_no_beams_need_a_strength_each(model: Any, saes: Path, texts: list[Tensor]) -> None:
    inputs = {"input_ids": torch.stack([texts[0][:3], texts[0][:3], texts[1][:3], texts[2][:3]])}
    with (
        pytest.raises(ModelStructureError, match=r"ran 4 rows that are not 2 beams or return sequences of each of 2"),
        steer(model, saes, FEATURES, strength=[3.0, 0.0], sae_k=K),
    ):
        generate(model, inputs)
    assert hook_count(model) == 0
    two = {"input_ids": inputs["input_ids"][[0, 2]]}
    torch.manual_seed(0)
    with steer(model, saes, FEATURES, strength=[3.0, 0.0], sae_k=K) as steering:
        model.generate(**two, num_return_sequences=3, do_sample=True, max_new_tokens=3, pad_token_id=0)
    assert steering.num_edits == 3 * (3 + 2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_that_goes_on_from_the_last_one_is_a_text_of_its_own(
    model: Any, saes: Path, texts: list[Tensor], use_cache: bool
) -> None:
    """A block remembers no text of an earlier use; with a cache, none of an earlier call."""
    longer = torch.cat([texts[0], texts[1][:1]])
    counts = []
    with steer(model, saes, FEATURES, phases="prompt", sae_k=K) as steering:
        for text in (texts[0], longer):
            generate(model, {"input_ids": text[None]}, steps=1)
            counts.append(steering.num_edits)
    assert counts == [len(texts[0]) - 1, len(texts[0]) - 1 + len(longer) - 1]
    with steering, torch.no_grad():
        model(input_ids=texts[0][None], use_cache=use_cache)
    with steering, torch.no_grad():
        model(input_ids=longer[None], use_cache=use_cache)
    assert steering.num_edits == len(longer) - 1


@pytest.mark.parametrize("mode", ["add", "ablate", "clamp"])
def test_autocast_rounds_no_edit(model: Any, saes: Path, texts: list[Tensor], mode: str) -> None:
    features = MANY if mode == "ablate" else FEATURES
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    wanted = steer(model, saes, features, mode=mode, sae_k=K).directions[1].delta(x, 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = steer(model, saes, features, mode=mode, sae_k=K).directions[1].delta(x, 1.0)[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("strength", ["3", True, [[1.0, 2.0]], [], [1.0, float("inf")], None], ids=str)
def test_strengths_are_numbers(model: Any, saes: Path, strength: Any) -> None:
    with pytest.raises(ConfigError, match=r"`strength` is .*; it is a finite number, or one for each row"):
        steer(model, saes, FEATURES, strength=strength, sae_k=K)
