"""Training adapters with and without the penalty, and looking for what training may have left behind."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from trl import SFTConfig, SFTTrainer

from tests.tiny import VOCAB, tiny_model, tiny_tokenizer
from tests.training.harness import arguments, sft_dataset, train
from tests.training.penalty_harness import callback, hook_count

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "LoRA with whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def adapter_config(method: str) -> LoraConfig:
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **METHODS[method])


def trained(folder: Path, saes: Path | None, method: str, model: Any = None, **changes: Any) -> SFTTrainer:
    """Three steps, with the penalty if `saes` is given, saved to `folder`; all else is the same."""
    settings = {"learning_rate": 1e-2, "optim": "adamw_torch", "max_steps": 3, "output_dir": str(folder), **changes}
    torch.manual_seed(0)
    trainer = SFTTrainer(
        tiny_model() if model is None else model,
        args=arguments(SFTConfig, **settings),
        train_dataset=sft_dataset(),
        processing_class=tiny_tokenizer(),
        callbacks=[] if saes is None else [callback(saes, weight=5.0)],
        peft_config=adapter_config(method),
    )
    train(trainer)
    assert saes is None or all("sae/penalty" in e for e in trainer.state.log_history if "loss" in e)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older PEFT looks for the base model's folder, and there is none
        trainer.save_model(str(folder))
    return trainer


def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (3, 11), generator=torch.Generator().manual_seed(4))


def logits(model: Any) -> torch.Tensor:
    """In training mode, which changes nothing without dropout: in the other one, bitsandbytes repacks 4-bit weights on
    a CPU, for which tiny ones are too narrow.
    """
    with torch.no_grad():
        return model.train()(input_ids=ids()).logits


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every weight file in a folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors.update({f"{file.name}:{key}": opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    assert tensors
    return tensors


def attributes(model: torch.nn.Module) -> set[tuple[str, str]]:
    """Names of everything that hangs on any module of a model."""
    return {(path, name) for path, module in model.named_modules() for name in vars(module)}


def assert_nothing_of_ours(trainer: Any, plain: Any) -> None:
    """The trainer and its model have what the same trainer has that never saw the package."""
    assert hook_count(trainer.model) == hook_count(plain.model) == 0
    assert attributes(trainer.model) == attributes(plain.model)
    # `push_to_hub` comes after training, and writes the model card anew.
    assert vars(trainer).keys() - {"create_model_card"} == vars(plain).keys()
    # Modules, hooks and closures of the package would be named in here.
    assert b"qscope" not in pickle.dumps(trainer.model)
