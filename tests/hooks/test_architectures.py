"""Residuals are the decoder layers' outputs, on every supported architecture and under every wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from qscope_trl import ResidualHook
from qscope_trl.errors import ModelStructureError
from qscope_trl.hooks.layers import d_model, find_decoder, find_layers
from tests.tiny import D_MODEL, NUM_LAYERS, VOCAB, tiny_config, tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
HYBRID = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": {**HYBRID, **MOE, "shared_expert_intermediate_size": 16},
    "llama": {},
    "mistral": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "gpt2": {"n_embd": D_MODEL, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
}
# GPT-2 names its sizes itself and refuses to be told twice.
GPT2_UNUSED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def build(name: str) -> Any:
    if name not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers has no {name} yet")
    config = tiny_config(name, **ARCHITECTURES[name]) if name != "gpt2" else AutoConfig.for_model(
        name, vocab_size=VOCAB, **ARCHITECTURES[name]
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residual_is_the_layers_output(name: str) -> None:
    model = build(name)
    with ResidualHook(model, range(NUM_LAYERS)) as hook, hook.listen() as captures:
        output = model(input_ids=ids(), output_hidden_states=True, use_cache=False)
    assert len(find_layers(model)) == NUM_LAYERS
    assert d_model(model) == D_MODEL
    assert len(captures) == 1
    capture = captures[0]
    assert sorted(capture.residuals) == list(range(NUM_LAYERS))
    # hidden_states[n + 1] is layer n's output, but for the last one, which is after the final norm.
    for layer in range(NUM_LAYERS - 1):
        assert torch.equal(capture.residuals[layer], output.hidden_states[layer + 1])
    last = capture.residuals[NUM_LAYERS - 1]
    norm = next(m for n, m in find_decoder(model).named_children() if n in ("norm", "ln_f", "final_layer_norm"))
    torch.testing.assert_close(norm(last), output.hidden_states[-1])
    assert not torch.equal(last, output.hidden_states[-1])


def test_multimodal_wrapper_is_read_at_its_language_model() -> None:
    pytest.importorskip("transformers.models.qwen3_5", reason="transformers has no qwen3_5 yet")
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config=tiny_config("qwen3_5_text", **HYBRID).to_dict(),
        # As many vision blocks as decoder layers: structure alone must not confuse them.
        vision_config={"depth": NUM_LAYERS, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": D_MODEL},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert find_layers(model)[0] is model.model.language_model.layers[0]
    with ResidualHook(model, [1]) as hook, hook.listen() as captures:
        model(input_ids=ids(), use_cache=False)
    assert captures[0].residuals[1].shape == (2, 7, D_MODEL)
    # The decoder gets embeddings; what they are embeddings of is known all the same.
    assert torch.equal(captures[0].input_ids, ids())


def test_engine_with_a_configuration_of_its_own_is_unwrapped() -> None:
    """As DeepSpeed's engine: `module` holds the model, `config` is not the model's."""

    class Engine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.config = module, {"train_batch_size": 1}

    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    assert find_layers(Engine(model))[0] is model.model.layers[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_are_found_under_peft_and_compile_and_data_parallel_wrappers() -> None:
    model = tiny_model()
    layer = model.model.layers[0]
    assert find_layers(torch.nn.DataParallel(model))[0] is layer
    assert find_layers(torch.compile(model))[0] is layer
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert find_layers(peft_model)[0] is layer
    assert find_layers(torch.compile(torch.nn.DataParallel(peft_model)))[0] is layer
    with ResidualHook(peft_model, [0]) as hook, hook.listen() as captures:
        peft_model(input_ids=ids(), labels=ids())
    assert torch.equal(captures[0].labels, ids())


def test_hooks_do_nothing_outside_listen_and_leave_nothing() -> None:
    model = tiny_model()
    hook = ResidualHook(model, [0, 2]).attach()
    model(input_ids=ids())
    with hook.listen() as captures:
        pass
    assert captures == []
    hook.detach()
    hook.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attach_is_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no hook here")

    monkeypatch.setattr(model.model.layers[2], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hook here"):
        ResidualHook(model, [0, 1, 2]).attach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_capture_tells_grad_mode_of_each_forward() -> None:
    model = tiny_model()
    with ResidualHook(model, [1]) as hook, hook.listen() as captures:
        model(input_ids=ids())
        with torch.no_grad():
            model(input_ids=ids())
    assert [capture.has_grad for capture in captures] == [True, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hooked_model_compiles_to_one_graph_and_stays_compiled() -> None:
    torch._dynamo.reset()
    model = tiny_model()
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with ResidualHook(compiled, [1, 3]) as hook:
        for _ in range(4):
            with hook.listen() as captures:
                compiled(input_ids=ids(), use_cache=False)
            assert sorted(captures[0].residuals) == [1, 3]
            assert captures[0].residuals[3].requires_grad
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_missing_layer_is_refused() -> None:
    with pytest.raises(ModelStructureError, match=r"No decoder layer 4 in `Qwen3ForCausalLM`: it has layers 0-3"):
        ResidualHook(tiny_model(), [4])


def test_model_without_matching_layers_is_refused() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelStructureError, match=r"No decoder with 7 layers in `Qwen3ForCausalLM`"):
        find_decoder(model)
