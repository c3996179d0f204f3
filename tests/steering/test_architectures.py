"""Steering by phases on every kind of decoder, linear attention among them: as a loop without a cache does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qscope_trl.steering.steer import steer
from tests.hooks.test_architectures import ARCHITECTURES, build
from tests.steering.test_steer import FEATURES, batch, by_hand, columns, generate, span
from tests.tiny import K


@pytest.mark.parametrize("phases", [("prompt",), ("generation",)], ids="+".join)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_phases_reach_the_text(name: str, phases: tuple[str, ...], saes: Path) -> None:
    model = build(name)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(2, 90, (5,), generator=generator)

    def delta(strength: float) -> Any:
        def change(layer: int, x: torch.Tensor, prompt: int, _row: int) -> torch.Tensor:
            _, weights, W = columns(layer, FEATURES)
            return strength * (W @ weights).expand(len(x), -1) * span(phases)(len(x), prompt)

        return change

    with steer(model, saes, FEATURES, strength=3.0, phases=phases, sae_k=K):
        found = generate(model, batch([text]), steps=4)[0]
    wanted, plain = by_hand(model, text, delta(3.0), 4), by_hand(model, text, delta(0.0), 4)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 1e-3 * scale
    # Each phase alone moves every new token's logits, whatever the layers above the steered one are made of.
    assert ((wanted - plain).abs().amax(-1) > 5e-3 * scale).all()
