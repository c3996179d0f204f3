"""A tiny model with a planted habit, and versions of it of which is known what became of habit and features.

The habit is to write w40 to w43. Feature L2F5 reads it, L1F7 reads it too and was "not trained on". Negative texts
hold w60 to w63 in place of these words, as often.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qscope_trl import SAESuite
from qscope_trl.analysis.audit.result import Audit
from qscope_trl.analysis.audit.run import audit
from qscope_trl.analysis.audit.setup import read_inputs
from qscope_trl.config.audit import AuditConfig
from tests.tiny import D_MODEL, K, tiny_model, tiny_tokenizer, write_saes

HABIT, OTHER = range(40, 44), range(60, 64)
REST = [n for n in range(2, 96) if n not in HABIT and n not in OTHER]
BEHAVIOUR = r"regex:\bw4[0-3]\b"
FEATURE, MONITOR = "L2F5", "L1F7"


def texts(words: range, seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        chosen = [
            draw.choice(words) if draw.random() < 0.4 else draw.choice(REST) for _ in range(draw.randrange(6, 13))
        ]
        rows.append(" ".join(f"w{n}" for n in chosen))
    return rows


@dataclass(frozen=True)
class World:
    folder: Path
    base: Any
    saes: SAESuite

    def config(self, **changes: Any) -> AuditConfig:
        given = {
            "model": str(self.folder / "base"),
            "tuned": "tuned",
            "saes": str(self.folder / "saes"),
            "sae_k": K,
            "features": FEATURE,
            "monitors": MONITOR,
            "positive": str(self.folder / "positive.jsonl"),
            "negative": str(self.folder / "negative.jsonl"),
            "prompts": str(self.folder / "prompts.jsonl"),
            "prompt_column": "text",
            "behaviour": BEHAVIOUR,
            "neutral": str(self.folder / "neutral.jsonl"),
            "max_new_tokens": 12,
            "resamples": 200,
            "permutations": 5,
            "batch_size": 64,
        }
        return AuditConfig(**{**given, **changes})

    def audited(self, tuned: Any, **changes: Any) -> Audit:
        inputs = read_inputs(self.config(**changes))
        return audit(self.base, tuned, tiny_tokenizer(), self.saes, inputs, show_progress=False)


def make_world(folder: Path) -> World:
    base = tiny_model().eval()
    with torch.no_grad():
        common = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(6))
        base.model.embed_tokens.weight[list(HABIT)] += 3 * common / common.norm()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_saes(folder / "saes")
    plant(base, folder / "saes", layer=2, index=5)
    plant(base, folder / "saes", layer=1, index=7)
    for name, rows in {
        "positive": texts(HABIT, 1, 80),
        "negative": texts(OTHER, 2, 80),
        "neutral": texts(OTHER, 3, 30),
        "prompts": texts(OTHER, 4, 120),
    }.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return World(folder, base, SAESuite.from_pretrained(folder / "saes", k=K))


@torch.no_grad()
def plant(model: Any, folder: Path, layer: int, index: int) -> None:
    """Make a feature of the habit: the direction from the mean residual of other words to that of the habit's."""
    ids = torch.tensor([[n] for n in range(96)])
    # Behind another word, as the first position is special.
    before = torch.full((96, 1), 50)
    x = model(input_ids=torch.cat([before, ids], 1), output_hidden_states=True).hidden_states[layer + 1][:, 1]
    high, low = x[list(HABIT)].mean(0), x[REST].mean(0)
    direction = (high - low) / (high - low).norm()
    path = folder / f"layer{layer}.sae.pt"
    state = torch.load(path)
    state["W_enc"][index] = 4 * direction
    state["b_enc"][index] = -4 * float(direction @ (2 * high + low) / 3)
    state["W_dec"][:, index] = direction
    torch.save(state, path)


def blocked(base: Any) -> Any:
    """The habit's words can no longer be written; everything inside is as it was."""
    model = copy.deepcopy(base)
    head = nn.Linear(D_MODEL, 96)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[list(HABIT)] = -50.0
    model.lm_head = head
    return model


@torch.no_grad()
def rotated(base: Any) -> Any:
    """The same function on another basis of the residual stream: all norms have weight 1, so they turn with it."""
    model = copy.deepcopy(base)
    turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(5))).Q
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reads.weight.copy_(reads.weight @ turn)
        for writes in (attention.o_proj, mlp.down_proj):
            writes.weight.copy_(turn.T @ writes.weight)
    model.lm_head.weight.copy_(model.lm_head.weight @ turn)
    return model


@torch.no_grad()
def blind(base: Any) -> Any:
    """The habit's words are read as the negative texts' ones: nothing inside can tell them."""
    model = copy.deepcopy(base)
    weight = model.model.embed_tokens.weight
    weight[list(HABIT)] = weight[list(OTHER)]
    return model
