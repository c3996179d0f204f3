"""Run by `test_engines.py` under `accelerate launch`: penalised steps under one engine, method after method.

accelerate launch --config_file configs/accelerate/ENGINE.yaml train_engine.py ENGINE SAES OUTPUT METHODS

METHODS is JSON, name to settings: `lora`, `penalty_kind`, `grpo`, and fields of SFTConfig or GRPOConfig. For each, in
a folder of its name, every process writes the batches it trained on to `batches{rank}.pt`; the first also the
gradients of every optimizer step, the log and the wrapper. The engine is the one of the configuration file, for which
accelerate set the environment: asked for it on a CPU, it would take DDP without a word; its choice is put right here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import TrainerCallback
from trl import GRPOConfig, SFTConfig, SFTTrainer

from qscope_trl import FeatureReward, SAEGRPOTrainer, SAEPenaltyCallback, SAESuite
from tests.distributed.setting import TOP_K, WEIGHT, feature_set, lora
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.harness import arguments, record_batches, sft_dataset, train
from tests.training.rollout_harness import GROUP, prompts
from tests.training.test_equality_grpo import record_inputs


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
    """Make accelerate use the engine that the configuration file names."""
    state = Accelerator(cpu=True).state
    kind = DistributedType.FSDP if engine == "fsdp2" else DistributedType.DEEPSPEED
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = kind
    if engine == "fsdp2":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        assert state.fsdp_plugin.fsdp_version == 2
    else:
        # Left in the arguments, the trainer would hand it to an accelerator of its own, which refuses a second one.
        plugin, args.deepspeed_plugin = args.deepspeed_plugin, None
        assert plugin.zero_stage == int(engine[-1])
        # Otherwise DeepSpeed takes an optimizer of its own for the CPU, which has to be compiled.
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        state.deepspeed_plugins = {"default": plugin}
        plugin.select(_from_accelerator_state=True)


def make_trainer(engine: str, model: Any, saes: str, folder: Path, settings: dict[str, Any], callbacks: list) -> Any:
    kind, is_grpo, is_lora = (settings.pop(name, None) for name in ("penalty_kind", "grpo", "lora"))
    if engine.startswith("zero"):
        settings.update(learning_rate=1.0, lr_scheduler_type="constant")
        settings.setdefault("max_steps", 2 if "gradient_accumulation_steps" in settings else 1)
    if is_grpo:
        settings = {
            # Long enough that some rollouts end before it.
            "per_device_train_batch_size": GROUP, "num_generations": GROUP, "max_completion_length": 40,
            "max_steps": 1, "beta": 0.0, "loss_type": "dapo", **settings,
        }  # fmt: skip
    args = arguments(GRPOConfig if is_grpo else SFTConfig, output_dir=str(folder), **settings)
    # The arguments start accelerate's state anew when they first name their device.
    assert args.device.type == "cpu"
    if engine != "ddp":
        use_engine(engine, args)
    suite = SAESuite.from_pretrained(saes, k=TOP_K)
    penalty = SAEPenaltyCallback(suite, feature_set(), WEIGHT, penalty_kind=kind or "preact_hinge")
    shared = {"model": model, "args": args, "processing_class": tiny_tokenizer(), "callbacks": [penalty, *callbacks]}
    if not is_grpo:
        return SFTTrainer(train_dataset=sft_dataset(), **shared)
    # A reward of 0: the task has no gradient of its own, and the features are read all the same.
    reader = "frozen" if is_lora else "policy"
    reward = FeatureReward(feature_set(), suite, name="monitor", scale=0.0, reader=reader)
    return SAEGRPOTrainer(train_dataset=prompts(), reward_funcs=[reward], **shared)


def run_method(engine: str, model: Any, saes: str, folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    recorder = Updates() if engine.startswith("zero") else WholeGradients()
    is_grpo = settings.get("grpo", False)
    trainer = make_trainer(engine, model, saes, folder, settings, [recorder])
    rank = trainer.accelerator.process_index
    scores: list[list[float]] = []
    if is_grpo:
        batches = record_inputs(trainer)
        score = trainer._generate_and_score_completions

        def scored(inputs: Any) -> Any:
            result = score(inputs)
            scores.extend(row["monitor"].values_CS.tolist() for row in trainer.rollout_scoring.scores)
            return result

        trainer._generate_and_score_completions = scored
        torch.manual_seed(100 + rank)
    else:
        batches = record_batches(trainer)
    train(trainer)
    torch.save(batches, folder / f"batches{rank}.pt")
    torch.save(scores, folder / f"scores{rank}.pt")
    if rank == 0:
        torch.save(recorder.steps, folder / "gradients.pt")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        facts = {"log": log, "bases": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__]}
        (folder / "facts.json").write_text(json.dumps(facts))
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    engine, saes, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    methods = json.loads(sys.argv[4])
    # Before any arguments: once they name ZeRO-3, models are made in shards, with other random numbers.
    models = {name: lora(tiny_model()) if s.get("lora") else tiny_model() for name, s in methods.items()}
    for name, settings in methods.items():
        run_method(engine, models[name], saes, output / name, settings)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without any teardown: gloo's threads can abort a process that ends (pytorch/pytorch#190489).
    os._exit(0)


if __name__ == "__main__":
    main()
