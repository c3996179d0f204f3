"""What a model, a tokenizer and SAEs are, in a few digits: to tell whether two runs used the same ones.

Names do not say it (a folder changes, a fine-tuned model keeps its configuration), and hashing every byte of large
weights takes minutes. So evenly spaced values of every tensor are hashed. Left out: protection against forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE

_VALUES = 256


def sample_checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of SHA-256 over name, shape, dtype and 256 evenly spaced values of each tensor.

    Changes with any change of weights that reaches all of a tensor, as fine-tuning and merging adapters do; not
    surely with a change of single values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if flat.numel() and not flat.is_meta:
            step = max(1, flat.numel() // _VALUES)
            digest.update(flat[::step][:_VALUES].double().cpu().numpy().astype("<f8").tobytes())
    return digest.hexdigest()[:16]


def model_identity(model: nn.Module, *, name: str, revision: str | None) -> dict[str, Any]:
    """Name, revision and checksums of a transformers model.

    Args:
        model: The model, loaded.
        name: As the user gave it.
        revision: As the user gave it; the commit, where transformers knows it, is more exact.
    """
    config: Any = model.config
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_THE_MODEL}
    return {
        "name": name,
        "revision": getattr(config, "_commit_hash", None) or revision,
        "config_checksum": _hash_json(settings),
        "weights_checksum": sample_checksum(model.named_parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


# What says how a model is run or was loaded.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "_attn_implementation")


def tokenizer_checksum(tokenizer: Any) -> str:
    """16 hex digits of a hash over everything that decides token ids, and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set by calls, not by what the tokenizer is.
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    else:
        state = {"vocab": tokenizer.get_vocab(), "special": str(tokenizer.special_tokens_map)}
    return _hash_json({"state": state, "chat_template": getattr(tokenizer, "chat_template", None)})


def sae_identity(suite: SAESuite, saes: Mapping[int, TopKSAE]) -> dict[str, Any]:
    """Source, revision, and per layer what each SAE is.

    Args:
        suite: Where they come from.
        saes: Encoders, loaded.
    """
    return {
        "source": suite.source,
        "revision": suite.revision,
        "layers": {
            str(layer): {
                "fingerprint": suite.fingerprint(layer),
                "weights_checksum": sample_checksum([("W_enc", sae.W_enc), ("b_enc", sae.b_enc)]),
                "d_model": sae.d_model,
                "d_sae": sae.d_sae,
                "k": sae.k,
                "activation": sae.activation,
            }
            for layer, sae in saes.items()
        },
    }


def _hash_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
