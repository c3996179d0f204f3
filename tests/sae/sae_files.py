"""SAE files of every format with random weights, and what each format's definition says about them, in fp64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, D_SAE, K = 12, 1024, 8
QWEN_NAME = f"SAE-Res-Tiny-W1K-L0_{K}"


@dataclass(frozen=True)
class Weights:
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(**{name: value.to(dtype) for name, value in vars(self).items()})

    def four(self) -> dict[str, Tensor]:
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}


def random_weights(seed: int = 0, d_model: int = D_MODEL, d_sae: int = D_SAE) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Weights(draw(d_sae, d_model), draw(d_model, d_sae), draw(d_sae), draw(d_model), draw(d_sae).abs())


def residuals(num_tokens: int = 40, d_model: int = D_MODEL, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, d_model, generator=torch.Generator().manual_seed(seed))


def write_qwen(folder: Path, layer: int, weights: Weights, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"layer{layer}.sae.pt"
    content = weights.four() | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def write_saelens(folder: Path, weights: Weights, config: dict[str, Any], **changes: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": weights.W_enc.T.contiguous(),
        "W_dec": weights.W_dec.T.contiguous(),
        "b_enc": weights.b_enc,
        "b_dec": weights.b_dec,
        **changes,
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder / "sae_weights.safetensors"


def saelens_config(layer: int = 5, **changes: Any) -> dict[str, Any]:
    hook = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    return {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "architecture": "topk",
        "k": K,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": hook,
        **changes,
    }


def write_sparsify(folder: Path, weights: Weights, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": weights.W_enc,
        "encoder.bias": weights.b_enc,
        "W_dec": weights.W_dec.T.contiguous(),
        "b_dec": weights.b_dec,
    }
    save_file(tensors, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "num_latents": 0,
        "expansion_factor": 32,
        "k": K,
        "transcode": False,
        "d_in": D_MODEL,
    }
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder / "sae.safetensors"


def topk_relu(f: Tensor, k: int) -> Tensor:
    """All but the k largest of each row to zero, then ReLU."""
    values, indices = f.topk(k, dim=-1)
    return torch.zeros_like(f).scatter(-1, indices, values.relu())
