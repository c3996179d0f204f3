"""`qscope plan` against traced steps of the real-size backbones, on tensors without data.

Each configuration of `configs/backbones` (and variants of it) is trained for two optimizer steps under
`FakeTensorMode`: the whole model, TRL's fused output head, the penalty, backward, clipping, AdamW. Every operation is
watched and the largest sum of live bytes is compared with the plan's. FSDP2 runs on a process group without other
processes, wrapped as accelerate wraps it. What a GPU does otherwise is put in its place: TRL's Triton kernels work in
the tile's own memory, so their torch stand-ins here allocate nothing. Watching has one effect of its own: autograd
adds the two gradients of a tied embedding (Qwen3-1.7B, Qwen3.5-2B) in place, but not while operations are watched, so
the trace holds one more of them. Not traced: DDP's buckets (runs marked ddp in the
configurations are compared on one process), DeepSpeed, kernels' own workspaces, the allocator.

    python benchmarks/plan_accuracy.py [--only qwen3-8b] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import RESULTS, environment, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GIB = 2**30
# name: (configuration, engine, GPUs, changed settings)
CASES: dict[str, tuple[str, str, int, list[str]]] = {
    "1.7B, full": ("qwen3-1.7b", "single", 1, []),
    "1.7B, full, bf16 weights, accumulation 1": (
        "qwen3-1.7b", "single", 1, ["--dtype", "bfloat16", "--gradient_accumulation_steps", "1"],
    ),
    "1.7B, full, no checkpointing": (
        "qwen3-1.7b", "single", 1, ["--gradient_checkpointing", "false", "--per_device_train_batch_size", "1"],
    ),
    "8B, LoRA": ("qwen3-8b", "single", 1, []),
    "8B, LoRA, 8192 tokens": ("qwen3-8b", "single", 1, ["--max_length", "8192"]),
    "8B, LoRA, no checkpointing": ("qwen3-8b", "single", 1, ["--gradient_checkpointing", "false"]),
    "8B, full": (
        "qwen3-8b", "fsdp2", 8, ["--use_peft", "false", "--dtype", "float32"],
    ),
    "30B-A3B, LoRA": ("qwen3-30b-a3b", "fsdp2", 8, []),
    "30B-A3B, LoRA, one GPU": ("qwen3-30b-a3b", "single", 1, []),
    "3.5-2B, full": ("qwen3.5-2b", "single", 1, []),
    "3.5-9B, LoRA": ("qwen3.5-9b", "single", 1, []),
    "3.5-27B, LoRA": ("qwen3.5-27b", "fsdp2", 8, []),
    "3.5-35B-A3B, LoRA": ("qwen3.5-35b-a3b", "fsdp2", 8, []),
}  # fmt: skip


def planned(config: str, engine: str, number: int, changes: list[str], folder: str) -> tuple[Any, Any]:
    from qscope_trl.config.plan import PlanConfig
    from qscope_trl.planning.engines import Engine
    from qscope_trl.planning.run import plan, settings_of

    path = ROOT / "configs" / "backbones" / f"{config}.yaml"
    options = PlanConfig(config=str(path), layers="1,2" if "2b" in config else "20,21")
    settings = settings_of("sft", options, [*changes, "--model_name_or_path", folder])
    return plan(settings, "sft", options, Engine(engine, number)), settings


def without_mask(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One row has no padding, so attention needs no mask; without data, transformers cannot see that and makes one."""
    return args, {**kwargs, "attention_mask": None}


@contextlib.contextmanager
def triton_stand_ins() -> Iterator[None]:
    """TRL's tiles folded in place, as on a GPU."""
    from trl.kernels import chunked_logprob

    def forward(_tile: Any, _stride: Any, _targets: Any, most: Any, total: Any, *_: Any, **_flags: Any) -> None:
        most.zero_()
        total.fill_(1.0)

    def backward(tile: Any, *_: Any, **_flags: Any) -> None:
        tile.zero_()

    def add(total: Any, *_: Any) -> None:
        total.zero_()

    replaced = {"_forward_tile": forward, "_backward_tile": backward, "_addmm_fp32": add}
    before = {name: getattr(chunked_logprob, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(chunked_logprob, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(chunked_logprob, name, function)


def traced(settings: Any, engine: str, number: int, layers: list[int]) -> tuple[int, float]:
    """Largest sum of live bytes of two steps, and seconds."""
    import torch
    import trl
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl.trainer.utils import add_fused_lm_head

    from qscope_trl.hooks.layers import d_model, find_layers, text_config
    from qscope_trl.planning.engines import Engine
    from qscope_trl.planning.model import build_model
    from qscope_trl.planning.trace import without_data
    from qscope_trl.training.penalty import LayerFeatures, preact_hinge
    from tests.planning.live_bytes import LiveTensors

    args = settings.training
    start = time.perf_counter()
    adapters = trl.get_peft_config(settings.model) if settings.model.use_peft else None
    model = build_model(settings.model, args, Engine(engine, number), adapters)
    with contextlib.ExitStack() as stack:
        mesh = fake_mesh(number, stack) if engine == "fsdp2" else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(triton_stand_ins())
        without_data(model)
        add_fused_lm_head(
            model.get_base_model() if adapters is not None else model, outputs=("log_probs", "entropy", "is_top1")
        )
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if adapters is not None:
                model.enable_input_require_grads()
        if mesh is not None:
            shard(model, mesh)
        width, captured = d_model(model), {}
        rows = {
            layer: LayerFeatures(
                (), torch.empty(10, width), torch.empty(10), torch.empty(1, 10), torch.empty(10), None, None
            )
            for layer in layers
        }
        for layer in layers:
            find_layers(model)[layer].register_forward_hook(
                lambda _module, _inputs, output, layer=layer: captured.__setitem__(layer, output)
            )
        if args.per_device_train_batch_size == 1:
            for layer in find_layers(model):
                layer.register_forward_pre_hook(without_mask, with_kwargs=True)
        config = text_config(model)
        has_router = hasattr(config, "output_router_logits")
        if has_router:
            config.output_router_logits = True
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        length = (args.per_device_train_batch_size, args.max_length)
        batch = {"input_ids": torch.zeros(length, dtype=torch.int64), "labels": torch.zeros(length, dtype=torch.int64)}
        existing = [local(t) for t in (*model.parameters(), *model.buffers())]
        with LiveTensors(existing) as live:
            for count in (1, 2 if args.gradient_accumulation_steps > 1 else 1):
                for _ in range(count):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        outputs = model(
                            **batch, fused_lm_head=True, **({"output_router_logits": True} if has_router else {})
                        )
                    loss = -outputs.log_probs.sum() / 100
                    if outputs.aux_loss is not None:
                        loss = loss + 0.001 * outputs.aux_loss
                    for layer, residual in captured.items():
                        loss = loss + preact_hinge(residual, rows[layer]).penalty_BT.sum()
                    captured.clear()
                    del outputs
                    loss.backward()
                    del loss
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            most = live.most
        del optimizer, parameters, model
    gc.collect()
    return most, time.perf_counter() - start


def local(tensor: Any) -> Any:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fake_mesh(number: int, stack: contextlib.ExitStack) -> Any:
    """A mesh of which only this process exists."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    stack.callback(dist.destroy_process_group)
    return dist.init_device_mesh("cpu", (number,))


def shard(model: Any, mesh: Any) -> None:
    """FSDP2 as accelerate's `fsdp2_prepare_model` applies it: layers, embeddings, norm with head, and the rest."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from qscope_trl.hooks.layers import find_decoder, find_layers

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    kwargs = {"mesh": mesh, "mp_policy": policy}
    blocks = set(getattr(model, "_no_split_modules", None) or [])
    layers = find_layers(model)
    for module in model.modules():
        if type(module).__name__ in blocks and module not in layers:
            fully_shard(module, **kwargs)
    for layer in layers:
        fully_shard(layer, **kwargs)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    norm = find_decoder(model).norm
    if inputs.weight is outputs.weight:
        fully_shard([norm, inputs, outputs], reshard_after_forward=False, **kwargs)
    else:
        fully_shard(inputs, **kwargs)
        fully_shard([norm, outputs], reshard_after_forward=False, **kwargs)
    fully_shard(model, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a case's name or configuration")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["HF_HUB_OFFLINE"] = "1"
    found, rows = [], []
    for name, (config, engine, number, changes) in CASES.items():
        if options.only not in name and options.only not in config:
            continue
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(ROOT / "tests" / "planning" / "backbones" / f"{config}.json", Path(folder) / "config.json")
            start = time.perf_counter()
            plan, settings = planned(config, engine, number, changes, folder)
            seconds = time.perf_counter() - start
            layers = list(plan.saes.layers) if plan.saes else []
            most, traced_seconds = traced(settings, engine, number, layers)
        ratio = plan.peak.total / most
        found.append(
            {
                "case": name, "config": config, "engine": engine, "processes": number, "changes": changes,
                "planned": plan.peak.total, "traced": most, "ratio": ratio, "peak": plan.peak.name,
                "parts": plan.peak.parts, "plan_seconds": seconds, "trace_seconds": traced_seconds,
            }
        )  # fmt: skip
        where = engine if number == 1 else f"{engine}, {number} GPUs"
        rows.append([name, where, f"{plan.peak.total / GIB:.2f}", f"{most / GIB:.2f}", f"{100 * (ratio - 1):+.1f} %",
                     plan.peak.name, f"{seconds:.1f}", f"{traced_seconds:.0f}"])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    if options.only:
        return
    report = {
        "what": "Bytes on one GPU at the peak of a training step, planned by `qscope plan` (without its "
        "margin) and traced operation by operation on tensors without data; `benchmarks/plan_accuracy.py`.",
        "environment": environment("transformers", "trl", "peft", "accelerate"),
        "cases": found,
    }
    header = ["Run", "engine", "planned, GiB", "traced, GiB", "difference", "peak at", "plan, s", "trace, s"]
    print(write(options.output, "plan_accuracy", report, header, rows))


if __name__ == "__main__":
    main()
