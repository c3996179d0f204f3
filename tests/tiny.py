"""Tiny random models, tokenizers, SAEs and datasets that every test builds from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 96
D_MODEL = 32
NUM_LAYERS = 4
D_SAE = 128
K = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w2 ... w95` by white space, `<pad>` 0 and `<eos>` 1."""
    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Older transformers also give `token_type_ids` by default, which no decoder takes.
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_input_names=names
    )


def tiny_config(model_type: str = "qwen3", **changes: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**_SIZES, **changes})


def tiny_model(model_type: str = "qwen3", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model whose weights are large enough for clear gradients."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, initializer_range=0.1, **changes))
    return model.float().train()


def random_sae(seed: int, d_model: int = D_MODEL, d_sae: int = D_SAE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5
    return {
        "W_enc": W_enc,
        "W_dec": W_enc.T.contiguous(),
        "b_enc": 0.1 * torch.randn(d_sae, generator=generator),
        "b_dec": 0.1 * torch.randn(d_model, generator=generator),
    }


def write_saes(folder: Path, layers: range | list[int] = range(NUM_LAYERS), **sizes: int) -> Path:
    """A folder of Qwen-Scope files; `k` must be passed when opening, as the folder's name says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        torch.save(random_sae(100 + layer, **sizes), folder / f"layer{layer}.sae.pt")
    return folder


def sentence(generator: torch.Generator, length: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(2, VOCAB, (length,), generator=generator).tolist())


def prompt_completion_rows(count: int, seed: int = 0, longest: int = 9) -> list[dict[str, str]]:
    """Rows of uneven length: prompts of 2-5 words, completions of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        first, second = torch.randint(0, 1000, (2,), generator=generator).tolist()
        rows.append(
            {
                "prompt": sentence(generator, 2 + first % 4),
                "completion": " " + sentence(generator, 1 + second % longest),
            }
        )
    return rows


def reported_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The same, shown by `pytest -rP`: the figures of docs/scaling.md."""
    value = largest_relative_difference(found, wanted)
    name = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].removesuffix(" (call)")
    sys.stdout.write(f"equality {name} {value:.1e}\n")
    return value


def largest_relative_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of any entry over the largest wanted entry."""
    assert found.keys() == wanted.keys()
    scale = max(float(value.abs().max()) for value in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale
