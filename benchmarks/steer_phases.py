"""How much steering the prompt, the generation, or both moves the first new token, on tiny random models.

Qwen3 (all attention) and the Qwen3.5 families (three layers of linear attention, one of full attention), 4 layers,
d_model 32, 16 prompts of 12 tokens, features of layers 1 and 2 at strength 3. The figure is the change of the first
new token's logits relative to their norm.

    python benchmarks/steer_phases.py      # seconds
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from reporting import RESULTS, environment, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qscope_trl import steer  # noqa: E402
from tests.hooks.test_architectures import build  # noqa: E402
from tests.tiny import K, write_saes  # noqa: E402

MODELS = {"Qwen3": "qwen3", "Qwen3.5": "qwen3_5_text", "Qwen3.5-MoE": "qwen3_5_moe_text"}
PHASES = (("prompt",), ("generation",), ("prompt", "generation"))
FEATURES = {"L1F3": 1.0, "L1F9": -0.5, "L2F40": 0.7}


def first_logits(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the first new token, `(B, V)`."""
    made = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=1, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return made.logits[0]


def main() -> None:
    """Measure, print, write down."""
    ids_BT = torch.randint(2, 90, (16, 12), generator=torch.Generator().manual_seed(0))
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        saes = write_saes(Path(folder) / "saes")
        for name, kind in MODELS.items():
            model = build(kind)
            plain = first_logits(model, ids_BT)
            figures[name] = []
            for phases in PHASES:
                with steer(model, saes, FEATURES, strength=3.0, phases=phases, sae_k=K):
                    change = first_logits(model, ids_BT) - plain
                figures[name].append(float((change.norm(dim=-1) / plain.norm(dim=-1)).mean()))
    report = {
        "what": "Change of the first new token's logits, relative to their norm, by the phase that is steered.",
        "environment": environment("transformers"),
        "figures": figures,
    }
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in figures.items()]
    print(write(RESULTS, "steer_phases", report, ["model", "prompt alone", "generation alone", "both"], rows))


if __name__ == "__main__":
    main()
