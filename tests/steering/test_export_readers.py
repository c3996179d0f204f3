"""Exported vectors in the programs that read them; skipped where one is not installed.

`pip install lm_eval llama-cpp-python gguf`, then `python -m pytest tests/steering/test_export_readers.py -rP` shows
the figures of docs/steer.md. EasySteer needs vLLM and a GPU; its file format is tested in test_exports.py.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qscope_trl.steering.exports import export
from qscope_trl.steering.steer import steer
from tests.tiny import D_MODEL, NUM_LAYERS, VOCAB, K, tiny_model, tiny_tokenizer, write_saes

FEATURES = {"L1F3": 1.0, "L1F9": -0.5, "L3F40": 0.7}
STRENGTH = 2.5
LENGTH = 9


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def steered(model: Any, saes: Path, ids: Tensor, features: Any) -> Tensor:
    with torch.no_grad():
        plain = model(ids).logits
        with steer(model, saes, features, strength=STRENGTH, sae_k=K):
            logits = model(ids).logits
    assert (logits - plain).abs().max() > 0.1
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lm_eval_steers_bit_for_bit_as_steer_does(saes: Path, ids: Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    hf_steered = pytest.importorskip("lm_eval.models.hf_steered", reason="lm-evaluation-harness is not installed")
    tiny_model().to(dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = export(tmp_path / "v.pt", "lm_eval", saes, FEATURES, strength=STRENGTH)
    harness = hf_steered.SteeredModel(
        pretrained=str(tmp_path / "model"), steer_path=str(path), device="cpu", dtype=str(dtype).split(".")[1]
    )
    ours, theirs = steered(harness.model, saes, ids, FEATURES), harness._model_call(ids)
    sys.stdout.write(f"largest difference of a logit, {dtype}: {float((theirs - ours).abs().max()):.1e}\n")
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("features", [["L1F3"], ["L2F40"], ["L3F7"], FEATURES], ids=str)
def test_llama_cpp_steers_after_the_same_layer(saes: Path, ids: Tensor, tmp_path: Path, features: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = tiny_model().eval()
    write_gguf_model(model, tmp_path / "model.gguf")
    directions = control_vector(export(tmp_path / "v.gguf", "gguf", saes, features, strength=STRENGTH, model=model))
    for row in ids:
        ours = steered(model, saes, row[None], features)[0]
        theirs = llama_logits(llama_cpp, tmp_path / "model.gguf", row, directions)
        difference = float((theirs - ours).abs().max() / ours.abs().max())
        sys.stdout.write(f"largest difference over the largest logit: {difference:.1e}\n")
        assert difference < 1e-5


def control_vector(path: Path) -> np.ndarray[Any, Any]:
    """As llama.cpp's `common_control_vector_load_one`: `direction.N` goes to row N - 1."""
    from gguf import GGUFReader

    rows = np.zeros((NUM_LAYERS, D_MODEL), np.float32)
    for tensor in GGUFReader(path).tensors:
        rows[int(tensor.name.split(".")[1]) - 1] += tensor.data
    return rows


def write_gguf_model(model: Any, path: Path) -> None:
    from gguf import GGUFWriter

    config, weights = model.config, model.state_dict()
    writer = GGUFWriter(path, "qwen3")
    writer.add_context_length(256)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    parts = {
        "input_layernorm": "attn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(NUM_LAYERS):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        writer.add_tensor(f"{theirs}.weight", weights[f"{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_logits(llama: Any, path: Path, row: Tensor, directions: np.ndarray[Any, Any]) -> Tensor:
    """Logits of every token, with the control vector of blocks 1 and up; an fp32 cache."""
    llama.llama_backend_init()
    loading = llama.llama_model_default_params()
    loading.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), loading)
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = settings.flash_attn_type = 0
    context = llama.llama_init_from_model(model, settings)
    data = directions.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama.llama_set_adapter_cvec(context, data, directions.size, D_MODEL, 1, NUM_LAYERS) == 0
    batch = llama.llama_batch_init(LENGTH, 0, 1)
    batch.n_tokens = LENGTH
    for place, token in enumerate(row.tolist()):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert llama.llama_decode(context, batch) == 0
    found = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(LENGTH, VOCAB)).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return torch.from_numpy(found)
