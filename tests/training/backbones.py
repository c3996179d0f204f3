"""Tiny random models of every family that Qwen-Scope has SAEs for, and what an SFT step on them computes.

The three terms of the loss (text, router, penalty) are written out without any trainer, from tests/training/reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from trl import SFTConfig, SFTTrainer

from tests.hooks.test_architectures import HYBRID, MOE
from tests.tiny import D_MODEL, NUM_LAYERS, tiny_config, tiny_tokenizer
from tests.training.harness import arguments, sft_dataset
from tests.training.reference import (
    Batch,
    cross_entropy_sum,
    penalised_positions,
    penalty_sum,
    router_loss,
    run_with_router,
)
from tests.training.test_equality import LAYERS, WEIGHT, lora, reference_penalty

HYBRID_MOE = {**HYBRID, **MOE, "shared_expert_intermediate_size": 16}
VISION = {"depth": NUM_LAYERS, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": D_MODEL}
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
"""The fused weights of all experts, and the router: parameters outside any linear layer since transformers 5."""
# Attention, its linear form, and dense or shared MLPs; what a family lacks is passed over.
TARGETS = ["q_proj", "v_proj", "in_proj_qkv", "in_proj_b", "out_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """How to build one family.

    Args:
        model_type: As in transformers.
        sizes: Beside those of `tests.tiny`.
        auto: The class that builds it; the multimodal configurations give another model to each.
    """

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    auto: Any = AutoModelForCausalLM

    @property
    def is_multimodal(self) -> bool:
        return self.model_type in ("qwen3_5", "qwen3_5_moe")


FAMILIES = {
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3_moe", MOE),
    "qwen3_5_text": Family("qwen3_5_text", HYBRID),
    "qwen3_5_moe_text": Family("qwen3_5_moe_text", HYBRID_MOE),
    "qwen3_5, multimodal": Family("qwen3_5", HYBRID, AutoModelForImageTextToText),
    "qwen3_5_moe, multimodal": Family("qwen3_5_moe", HYBRID_MOE, AutoModelForImageTextToText),
    "qwen3_5, as causal LM": Family("qwen3_5", HYBRID),
    "qwen3_5_moe, as causal LM": Family("qwen3_5_moe", HYBRID_MOE),
}
MIXTURES = [name for name, family in FAMILIES.items() if "num_experts" in family.sizes]


def backbone(name: str, **changes: Any) -> Any:
    """The family's model, always with the same weights; skips where transformers is too old for it."""
    family = FAMILIES[name]
    if family.model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {family.model_type}")
    sizes = {"initializer_range": 0.1, **family.sizes, **changes}
    if family.is_multimodal:
        text = tiny_config(f"{family.model_type}_text", **sizes)
        config = AutoConfig.for_model(family.model_type, text_config=text.to_dict(), vision_config=VISION)
    else:
        config = tiny_config(family.model_type, **sizes)
    torch.manual_seed(0)
    model = family.auto.from_config(config).float().train()
    # A rollout may contain the padding token; its embedding of zeros would leave all experts exactly tied.
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_(std=0.1)
    return model


def adapted(name: str, **changes: Any) -> Any:
    """The family's model with LoRA, always with the same weights."""
    return lora(backbone(name, **changes), target_modules=TARGETS)


def adapted_experts(name: str, **changes: Any) -> Any:
    """The family's model with LoRA on its experts and routers; skips where every expert is a layer of its own."""
    model = backbone(name, **changes)
    if not any(parameter.endswith(EXPERTS[0]) for parameter, _ in model.named_parameters()):
        pytest.skip("this transformers has linear layers in every expert")
    return lora(model, target_modules=["q_proj"], target_parameters=EXPERTS)


def sft(model: Any, callbacks: Sequence[Any], tmp_path: Path, **changes: Any) -> SFTTrainer:
    """Ten rows in batches of two: with four batches a step, a step of four and a last one of one."""
    settings = {"gradient_accumulation_steps": 4, "output_dir": str(tmp_path), **changes}
    return SFTTrainer(
        model,
        args=arguments(SFTConfig, **settings),
        train_dataset=sft_dataset(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


HAS_ROUTER_SETTING = "router_aux_loss_coef" in SFTConfig.__dataclass_fields__
"""Since TRL has it, it adds the router loss of a mixture unasked, with the model's own weight, 0.001."""


@dataclass
class Terms:
    """One optimizer step: its loss, term by term, and what is logged of the terms without their weights.

    Args:
        task: Cross entropy.
        router: Router loss times its weight; 0 without one.
        penalty: Penalty times `WEIGHT`.
        mean_router: Mean of the batches' router losses.
        mean_penalty: Mean penalty of the penalised tokens.
    """

    task: torch.Tensor
    router: torch.Tensor
    penalty: torch.Tensor
    mean_router: float
    mean_penalty: float


def sft_terms(name: str, model: Any, batches: Sequence[Batch], router_weight: float) -> Terms:
    """The loss of one optimizer step, without a trainer.

    Text models: both sums over tokens are divided by the step's trained tokens. The multimodal classes take no token
    count (`accepts_loss_kwargs = False`), so transformers averages the means of their micro-batches.
    """
    of_means = FAMILIES[name].auto is AutoModelForImageTextToText
    # Before, the model added the router loss to each micro-batch's own loss, which nothing divided afterwards.
    is_divided = of_means or Version(trl.__version__) >= Version("1.15")
    trained = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    tasks, routers, penalties, sums, tokens = [], [], [], [], 0
    for batch, count in zip(batches, trained, strict=True):
        output, residuals, scores = run_with_router(model, batch, LAYERS)
        share = 1 / (count * len(batches)) if of_means else 1 / sum(trained)
        tasks.append(cross_entropy_sum(output.logits, batch["labels"]) * share)
        positions = penalised_positions(batch, batch["labels"] != -100)
        sums.append(penalty_sum(reference_penalty().per_token(residuals), positions))
        tokens += len(positions)
        penalties.append(WEIGHT * sums[-1] * (1 / (len(positions) * len(batches)) if of_means else share))
        if name in MIXTURES:
            routers.append(router_loss(scores, batch["attention_mask"].flatten().bool().tolist(), k=2))
    zero = 0 * tasks[0]
    router = router_weight * sum(routers, zero)
    return Terms(
        task=sum(tasks, zero),
        router=router / len(batches) if is_divided else router,
        penalty=sum(penalties, zero),
        mean_router=float(sum(routers, zero).detach()) / len(batches),
        mean_penalty=float(sum(sums, zero).detach()) / tokens,
    )


Make = Callable[[], Any]
