"""QLoRA: the penalty on a model with 4-bit weights, and the way there from `qscope sft` and `qscope grpo`.

bitsandbytes runs 4-bit layers on a CPU; without it the numeric tests are skipped. Measured with bitsandbytes 0.50.2.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qscope_trl import SAEPenaltyCallback, SAESuite
from qscope_trl.errors import ConfigError
from qscope_trl.training import grpo_run
from qscope_trl.training import sft as sft_run
from qscope_trl.training.launch import trainer_kwargs
from tests.tiny import (
    largest_relative_difference,
    prompt_completion_rows,
    reported_difference,
    tiny_model,
    tiny_tokenizer,
    write_saes,
)
from tests.training.adapters import assert_nothing_of_ours, logits, saved_tensors, trained
from tests.training.backbones import sft, sft_terms
from tests.training.harness import GradientRecorder, record_batches, train
from tests.training.reference import gradients
from tests.training.test_backbones import TOLERANCE
from tests.training.test_equality import WEIGHT, checkpointing, feature_set, lora, suite

__all__ = ["suite"]  # a fixture

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
# bfloat16 has 8 bits: adapters' gradients are rounded once a micro-batch here, once a step in the reference.
BF16_TOLERANCE = 2e-2


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, SAEs and data on disk."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "saes")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_completion_rows(8)))
    return folder


def four_bit(folder: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    assert "4bit" in type(model.model.layers[0].self_attn.q_proj).__name__
    return model.train()


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["QLoRA", "QDoRA"])
def test_gradients_of_adapters_on_four_bit_weights_equal_autograd(
    changes: dict[str, Any], dtype: torch.dtype, folder: Path, suite: SAESuite, tmp_path: Path
) -> None:
    def make() -> Any:
        return lora(four_bit(folder), **changes)

    def cast(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16).to(dtype)

    recorder = GradientRecorder()
    callback = SAEPenaltyCallback(suite, feature_set(), WEIGHT)
    trainer = sft(make(), [callback, recorder], tmp_path, **checkpointing(False))
    # TRL's choice is bfloat16 for them; full precision as well, where the comparison can be sharp.
    cast(trainer.model)
    batches = record_batches(trainer)
    train(trainer)
    model = make()
    cast(model)
    assert len(recorder.steps) == 2
    for found, window in zip(recorder.steps, (batches[:4], batches[4:]), strict=True):
        terms = sft_terms("qwen3", model, window, 0.0)
        wanted = gradients(model, terms.task + terms.penalty)
        assert {gradient.dtype for gradient in found.values()} == {dtype}
        tolerance = TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
        assert reported_difference(found, wanted) < tolerance
        assert largest_relative_difference(gradients(model, terms.task), wanted) > 0.05


@needs_bitsandbytes
def test_saved_adapter_on_fresh_four_bit_weights_gives_the_trained_models_logits(folder: Path, tmp_path: Path) -> None:
    ours = trained(tmp_path / "ours", folder / "saes", "LoRA", four_bit(folder))
    plain = trained(tmp_path / "plain", None, "LoRA", four_bit(folder))
    reloaded = PeftModel.from_pretrained(four_bit(folder), tmp_path / "ours")
    # PEFT reads adapters as full precision, TRL trains them in bfloat16.
    as_trained = {name: parameter.dtype for name, parameter in ours.model.named_parameters()}
    for name, parameter in reloaded.named_parameters():
        parameter.data = parameter.data.to(as_trained[name])
    assert torch.equal(logits(reloaded), logits(ours.model))
    assert float((logits(plain.model) - logits(ours.model)).abs().max()) > 1e-2, "the penalty changed nothing"
    assert saved_tensors(tmp_path / "ours").keys() == saved_tensors(tmp_path / "plain").keys()
    assert_nothing_of_ours(ours, plain)


# --- the command line ------------------------------------------------------------------------------------------------

QUANTISED = ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "--dtype", "bfloat16"]
ADAPTED = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "down_proj"]


def argv(folder: Path, *more: str) -> list[str]:
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "train.jsonl",
        "sae_path": folder / "saes",
        "sae_k": 8,
        "sae_features": "L1F3",
        "output_dir": folder / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": "false",
        "dataloader_pin_memory": "false",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + list(more)


class TakesQuantisation:
    def __init__(self, model: Any, args: Any, quantization_config: Any = None) -> None: ...


class TakesNone:
    def __init__(self, model: Any, args: Any) -> None: ...


@pytest.mark.parametrize("kind", [TakesQuantisation, TakesNone])
def test_four_bit_settings_go_where_the_trainer_looks_for_them(
    kind: type, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sft_run.parse(argv(folder, *QUANTISED, *ADAPTED)).model
    args = SimpleNamespace(model_init_kwargs=None, trust_remote_code=False)
    if not HAS_BITSANDBYTES:
        # transformers before 5 asks for its version as soon as a configuration is made.
        monkeypatch.setattr(trl.trainer.utils, "BitsAndBytesConfig", lambda **given: SimpleNamespace(**given))
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    extra = trainer_kwargs(trl, kind, model, args)
    assert extra.pop("peft_config").r == 4
    where = extra if kind is TakesQuantisation else args.model_init_kwargs
    found = where.pop("quantization_config")
    assert found.load_in_4bit
    assert found.bnb_4bit_quant_type == "fp4"
    assert found.bnb_4bit_use_double_quant
    assert found.bnb_4bit_compute_dtype in ("bfloat16", torch.bfloat16)
    assert args.model_init_kwargs["dtype"] == "bfloat16"
    assert extra == {}
    assert "quantization_config" not in args.model_init_kwargs


GRPO = ["--reward_features", "L1F3", "--per_device_train_batch_size", "4", "--num_generations", "4"]


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize(("command", "more"), [(sft_run, []), (grpo_run, GRPO)], ids=["sft", "grpo"])
def test_missing_bitsandbytes_is_said(command: Any, more: list[str], folder: Path) -> None:
    settings = command.parse(argv(folder, *QUANTISED, *ADAPTED, *more))
    with pytest.raises(ConfigError, match="bitsandbytes"):
        command.build_trainer(settings)


@needs_bitsandbytes
def test_sft_command_trains_four_bit_weights_with_the_penalty(folder: Path) -> None:
    trainer = sft_run.build_trainer(sft_run.parse(argv(folder, *QUANTISED, *ADAPTED)))
    layer = trainer.model.get_decoder().layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert (layer.weight.quant_type, layer.compute_dtype) == ("fp4", torch.bfloat16)
    train(trainer)
    logged = [entry["sae/penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert min(logged) > 0


@needs_bitsandbytes
def test_sft_command_refuses_four_bit_weights_without_adapters(folder: Path) -> None:
    settings = sft_run.parse(argv(folder, *QUANTISED))
    with pytest.raises(ConfigError, match=r"No trainer for '.*model' with these settings: .*quantized"):
        sft_run.build_trainer(settings)
