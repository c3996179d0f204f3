"""Calibration against an independent divergence, and the search against functions whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qscope_trl.errors import ConfigError, DataError, SteeringError
from qscope_trl.hooks.layers import find_layers
from qscope_trl.steering.calibration import _search, calibrate, mean_kl
from qscope_trl.steering.steer import steer
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes

FEATURES = {"L1F3": 1.0, "L2F9": -0.5}


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [sentence(generator, length) for length in (9, 2, 14, 5)]


def kl_by_hand(model: Any, texts: list[str], strength: float, unit: str = "raw") -> float:
    """One text at a time, unpadded, in fp64 probabilities."""
    tokenizer, found = tiny_tokenizer(), []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])

        def logits(ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=ids).logits[0, 1:].double()

        def edit(layer: int, feature: int, weight: float) -> Any:
            vector = weight * random_sae(100 + layer)["W_dec"][:, feature]

            def replace(_m: Any, _a: Any, x: torch.Tensor) -> torch.Tensor:
                if unit == "raw":
                    return x + strength * vector
                return x + strength * x.norm(dim=-1, keepdim=True) * vector / vector.norm()

            return find_layers(model)[layer].register_forward_hook(replace)

        p = logits().softmax(-1)
        handles = [edit(1, 3, 1.0), edit(2, 9, -0.5)]
        q = logits().softmax(-1)
        for handle in handles:
            handle.remove()
        found += (p * (p / q).log()).sum(-1).tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize("unit", ["raw", "norm"])
@pytest.mark.parametrize(("target", "negative"), [(0.1, False), (0.002, False), (0.1, True)])
def test_the_strength_found_has_the_divergence_asked_for(
    model: Any, saes: Path, texts: list[str], target: float, negative: bool, unit: str
) -> None:
    found = calibrate(
        model, tiny_tokenizer(), saes, FEATURES, texts, target, unit=unit, negative=negative, batch_size=3,
        show_progress=False, sae_k=K,
    )  # fmt: skip
    wanted = kl_by_hand(model.eval(), texts, found.strength, unit)
    assert wanted == pytest.approx(target, rel=0.011)
    assert found.kl == pytest.approx(wanted, rel=1e-3)
    assert (found.strength < 0) is negative
    assert found.num_tokens == 8 + 1 + 13 + 4
    assert (found.strength, found.kl) in found.tried
    # And a block of `steer` with it does that.
    ids = torch.tensor([tiny_tokenizer()(texts[2])["input_ids"]])
    with torch.no_grad():
        p = model(input_ids=ids).logits[0, 1:].double().softmax(-1)
        with steer(model, saes, FEATURES, strength=found.strength, unit=unit, sae_k=K):
            q = model(input_ids=ids).logits[0, 1:].double().softmax(-1)
    block = float((p * (p / q).log()).sum(-1).mean())
    assert block == pytest.approx(kl_by_hand(model, texts[2:3], found.strength, unit), rel=1e-3)


def test_the_divergence_does_not_depend_on_the_batch_and_the_model_is_left_as_it_was(
    model: Any, saes: Path, texts: list[str]
) -> None:
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    opened = steer(model, saes, FEATURES, sae_k=K)
    model.train()
    found = [mean_kl(model, opened, 3.0, ids, batch_size) for batch_size in (1, 2, 4)]
    assert model.training
    assert found == pytest.approx([kl_by_hand(model.eval(), texts, 3.0)] * 3, rel=1e-4)
    assert mean_kl(model, opened, 0.0, ids) == 0
    assert not any(layer._forward_hooks for layer in find_layers(model))


@pytest.mark.parametrize(
    ("measure", "root"),
    [
        (lambda s: 3.0 * s**2, (0.5 / 3) ** 0.5),
        (lambda s: s, 0.5),
        (lambda s: s**6, 0.5 ** (1 / 6)),
        (lambda s: s**2 / (1 + s**2), 1.0),
        (lambda s: 1e-8 * s**2, (0.5e8) ** 0.5),
        (lambda s: 0.0 if s < 7 else (s - 7) ** 2, 7 + 0.5**0.5),
        (lambda s: 400.0 * s**2, (0.5 / 400) ** 0.5),
    ],
    ids=["square", "linear", "steep", "saturating", "flat", "threshold", "early"],
)
def test_the_search_finds_the_root_of_growing_functions(measure: Any, root: float) -> None:
    tried = _search(measure, 0.5, 10.0, 0.001, 60, False)
    assert tried[-1][1] == pytest.approx(0.5, rel=0.001)
    assert tried[-1][0] == pytest.approx(root, rel=0.001)
    assert len(tried) <= 25


def test_what_cannot_be_reached_raises(model: Any, saes: Path, texts: list[str]) -> None:
    def run(target: float = 0.5, texts: list[str] = texts, **settings: Any) -> Any:
        return calibrate(
            model, tiny_tokenizer(), saes, FEATURES, texts, target, show_progress=False, sae_k=K, **settings
        )

    with pytest.raises(SteeringError, match=r"A KL divergence of 500 is not reached: the largest found is [\d.]+"):
        run(500)
    with pytest.raises(SteeringError, match=r"After 1 strengths the closest KL divergence to 0.1 is"):
        run(0.1, max_tries=1, tolerance=1e-6)
    with pytest.raises(ConfigError, match="`target_kl` is 0; it is a divergence in nats above 0"):
        run(0)
    with pytest.raises(ConfigError, match=r"`tolerance` is 2\.0 and `max_tries` is 40"):
        run(tolerance=2.0)
    with pytest.raises(DataError, match="none of the 2 texts has a token after its first"):
        run(texts=["w5", ""])
    with pytest.raises(SteeringError, match="is too small to be met: at strength 1e-05 it is 1 still"):
        _search(lambda s: 1.0, 0.5, 10.0, 0.01, 60, False)
    with pytest.raises(SteeringError, match=r"At strength 0.2 the KL divergence is nan"):
        _search(lambda s: float("nan"), 0.5, 10.0, 0.01, 60, False)
