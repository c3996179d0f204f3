"""What GRPO needs besides its training step: generation with its cache, and forwards without gradient over rollouts.

Left out: vLLM's own memory beyond the share of the GPU that it is given, and the logits of speculative decoding.
"""

from __future__ import annotations

from typing import Any

from qscope_trl.hooks.layers import text_config
from qscope_trl.planning.engines import Engine
from qscope_trl.planning.memory import Moment, Scratch, States, Traces
from qscope_trl.planning.model import ModelFacts

# Logits of the next token while it is sampled: the model's, an fp32 copy, its softmax and the sorted ones of top-p.
_SAMPLED_COPIES = 4


def cache_bytes(config: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Keys and values of attention layers, and states of linear-attention layers, which do not grow.

    Args:
        config: Text configuration of the model.
        rows: Sequences generated at a time.
        tokens: Tokens of a sequence, prompt included.
        itemsize: Bytes of a cached number.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) or tokens
    total = 0
    for kind in kinds:
        if kind == "linear_attention":
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            values = config.linear_num_value_heads * config.linear_value_head_dim
            convolved = (2 * keys + values) * config.linear_conv_kernel_dim * itemsize
            total += convolved + 4 * values * config.linear_key_head_dim
        else:
            seen = min(tokens, window) if kind == "sliding_attention" else tokens
            total += 2 * heads * head_dim * seen * itemsize
    return rows * total


def rollout_moments(
    model: Any, facts: ModelFacts, engine: Engine, kept: States, traces: Traces, loss: Scratch, scoring: Scratch,
    args: Any, *, batch: int, prompt: int, itemsize: int, layers_read: int, resident: int, reference: int,
) -> list[Moment]:  # fmt: skip
    """Generation, and the forwards over whole rollouts that follow it.

    Args:
        model: The model.
        facts: Its parameters.
        engine: ZeRO-3 gathers the whole model to generate, and to merge adapters for vLLM; FSDP2 layer by layer.
        kept: From `memory.states`.
        traces: Of one micro-batch of prompts and completions.
        loss: Of the training step; without gradient its forward is what remains.
        scoring: What reading features from a micro-batch needs.
        args: `trl.GRPOConfig`.
        batch: Rows of a micro-batch.
        prompt: Tokens of the longest prompt.
        itemsize: Bytes of a number in the residuals.
        layers_read: Layers whose residuals are captured.
        resident: Bytes of rows and encoders.
        reference: Bytes of a reference model.
    """
    rows = batch * args.steps_per_generation
    length = prompt + args.max_completion_length
    base = {
        "weights": kept.weights,
        "gradients": 0,
        "optimizer": kept.optimizer,
        "communication": kept.buckets + kept.gathered,
        "activations": 0,
        "loss": 0,
        "penalty": resident + scoring.resident,
        "reference model": reference,
        "generation": 0,
    }
    found = []
    residual = traces.layers[0].output
    forward = traces.embedded + traces.shared + residual + max(t.inference_peak for t in traces.layers)
    captured = layers_read * residual
    found.append(
        Moment(
            "forward over rollouts",
            {**base, "activations": forward, "penalty": base["penalty"] + captured + scoring.forward},
        )
    )
    found.append(
        Moment(
            "log-probabilities of rollouts",
            {
                **base,
                "activations": traces.embedded + traces.shared + residual,
                "loss": loss.forward,
                "penalty": base["penalty"] + captured,
            },
        )
    )
    whole = itemsize * facts.num_parameters
    if getattr(args, "use_vllm", False):
        gathers = engine.name == "zero3" and hasattr(model, "peft_config")
        gathered = max(kept.gathered, whole) if gathers else kept.gathered
        return [*found, Moment("generation", {**base, "communication": kept.buckets + gathered})]
    cache = cache_bytes(text_config(model), rows, length, itemsize)
    # A layer's cache is copied when it grows by a token.
    grown = cache // max(1, len(facts.layers))
    gathered = kept.gathered
    if engine.name == "zero3" and getattr(args, "ds3_gather_for_generation", True):
        gathered = whole
    prefill = max(t.inference_peak for t in traces.layers) * rows * prompt // max(1, batch * length)
    sampled = _SAMPLED_COPIES * 4 * rows * facts.vocab_size
    generation = {**base, "communication": kept.buckets + gathered, "generation": cache + grown + sampled}
    generation["activations"] = prefill + 2 * rows * prompt * facts.d_model * itemsize
    return [*found, Moment("generation", generation)]


def add_vllm(moments: list[Moment], args: Any, gpu_memory: float) -> tuple[list[Moment], int]:
    """Add vLLM's share of the GPU where it runs in the training processes.

    It takes its share at the start and keeps it, through the training step too. With `vllm_enable_sleep_mode` it gives
    weights and cache back after each generation.

    Args:
        moments: Of steps and rollouts.
        args: `trl.GRPOConfig`.
        gpu_memory: Of one GPU in GiB.

    Returns:
        The moments, and the bytes that vLLM holds all the time.
    """
    if not getattr(args, "use_vllm", False) or args.vllm_mode != "colocate":
        return moments, 0
    share = int(args.vllm_gpu_memory_utilization * gpu_memory * 2**30)
    sleeps = getattr(args, "vllm_enable_sleep_mode", False)
    found = [
        moment if sleeps and moment.name != "generation" else
        moment._replace(parts={**moment.parts, "generation": share})
        for moment in moments
    ]  # fmt: skip
    return found, 0 if sleeps else share
