"""Run by `test_engines.py` under torchrun: a few penalised SFT steps under one engine.

python -m torch.distributed.run --nproc_per_node 2 train_engine.py SAES OUTPUT SETTINGS

SETTINGS is JSON: `engine` (`ddp` or `fsdp2`), `lora`, and fields of SFTConfig. Each process writes the batches it
trained on to `batches{rank}.pt`; the first writes the gradients of every optimizer step, the log and the wrapper.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qscope_trl import SAEPenaltyCallback, SAESuite
from tests.distributed.setting import TOP_K, WEIGHT, feature_set, lora
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.harness import arguments, record_batches, sft_dataset, train


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A gradient gathered from all processes, where FSDP2 shards it."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().clone()


class WholeGradients(TrainerCallback):
    """Gathers every parameter's gradient just before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(
            {
                name.removeprefix("module."): torch.zeros_like(p) if p.grad is None else whole(p.grad)
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )


class Updates(WholeGradients):
    """Gradients as the updates of plain SGD with learning rate 1: DeepSpeed steps in its backward and keeps none."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Too late: the weights have moved."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = self.weights(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        after = self.weights(model)
        self.steps.append({name: weight - after[name] for name, weight in self.before.items()})

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        import deepspeed

        named = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: p.detach().clone() for name, p in named.items()}


def use_engine(engine: str, args: Any) -> None:
    """Make accelerate use an engine on the CPU: asked for it there, it silently takes DDP."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = Accelerator(cpu=True).state
    kind = DistributedType.FSDP if engine == "fsdp2" else DistributedType.DEEPSPEED
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = kind
    if engine == "fsdp2":
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        )
    else:
        # Left in the arguments, the trainer would hand it to an accelerator of its own, which refuses a second one.
        plugin, args.deepspeed_plugin = args.deepspeed_plugin, None
        state.deepspeed_plugins = {"default": plugin}
        plugin.select(_from_accelerator_state=True)


def zero_config(stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed needs to train as the other engines do here: fp32, plain SGD."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": settings.get("gradient_accumulation_steps", 1),
        "gradient_clipping": settings.get("max_grad_norm", 0.0),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def main() -> None:
    saes, output = sys.argv[1], Path(sys.argv[2])
    settings = json.loads(sys.argv[3])
    engine, use_lora = settings.pop("engine"), settings.pop("lora", False)
    # Before the arguments: once they name ZeRO-3, models are made in shards, with other random numbers.
    model = lora(tiny_model()) if use_lora else tiny_model()
    if engine.startswith("zero"):
        settings.update(deepspeed=zero_config(int(engine[-1]), settings), learning_rate=1.0, max_steps=1)
    args = arguments(SFTConfig, output_dir=str(output), **settings)
    # The arguments start accelerate's state anew when they first name their device.
    assert args.device.type == "cpu"
    if engine != "ddp":
        use_engine(engine, args)
    recorder = Updates() if engine.startswith("zero") else WholeGradients()
    callback = SAEPenaltyCallback(SAESuite.from_pretrained(saes, k=TOP_K), feature_set(), WEIGHT)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=sft_dataset(),
        processing_class=tiny_tokenizer(),
        callbacks=[callback, recorder],
    )
    batches = record_batches(trainer)
    train(trainer)
    rank = trainer.accelerator.process_index
    torch.save(batches, output / f"batches{rank}.pt")
    if rank == 0:
        torch.save(recorder.steps, output / "gradients.pt")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        facts = {"wrapper": type(trainer.model_wrapped).__mro__[0].__name__, "log": log}
        facts["bases"] = [kind.__name__ for kind in type(trainer.model_wrapped).__mro__]
        (output / "facts.json").write_text(json.dumps(facts))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without any teardown: gloo's threads can abort a process that ends (pytorch/pytorch#190489).
    os._exit(0)


main()
