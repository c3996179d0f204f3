"""Every family that Qwen-Scope has SAEs for: dense, mixture of experts, hybrid linear attention, multimodal wrappers.

SFT and GRPO with LoRA and gradient checkpointing, against autograd without any trainer; scores of rollouts against a
fresh forward. The router loss of the mixtures has its own file, `test_router_loss.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qscope_trl import FeatureReward, SAEGRPOTrainer, SAEPenaltyCallback, SAESuite
from tests.tiny import largest_relative_difference, reported_difference, tiny_tokenizer
from tests.training.backbones import (
    FAMILIES,
    HAS_ROUTER_SETTING,
    MIXTURES,
    Make,
    adapted,
    adapted_experts,
    backbone,
    sft,
    sft_terms,
)
from tests.training.harness import GradientRecorder, record_batches, train
from tests.training.reference import gradients
from tests.training.rollout_harness import Recorder, features, fresh_values, grpo_trainer, parity, token_scores
from tests.training.test_equality import WEIGHT, checkpointing, feature_set, suite
from tests.training.test_equality_grpo import penalty_gradients, record_inputs
from tests.training.test_scores import TOLERANCE as SCORE_TOLERANCE

pytestmark = pytest.mark.pinned

__all__ = ["suite"]  # a fixture

# fp32. The two sides add the same terms in another order, and the linear attention's exponentials of sums amplify
# that: without any penalty its gradients differ by as much. Seen: up to 2e-6.
TOLERANCE = 4e-6
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA, checkpointed": (adapted, checkpointing(False)),
    "LoRA, checkpointed reentrantly": (adapted, checkpointing(True)),
    "full weights, checkpointed": (backbone, checkpointing(False)),
}


def assert_sft_gradients(family: str, make: Make, suite: SAESuite, tmp_path: Path, settings: dict[str, Any]) -> None:
    # Reentrant checkpointing runs the routers without gradient first, and transformers takes their logits from there:
    # the router loss is logged, and trains nothing. It is left out then, which TRL can do since it has a setting.
    router_weight = 0.001 if family in MIXTURES and HAS_ROUTER_SETTING else 0.0
    if router_weight and settings == checkpointing(True):
        settings, router_weight = {**settings, "router_aux_loss_coef": 0.0}, 0.0
    recorder = GradientRecorder()
    trainer = sft(make(), [SAEPenaltyCallback(suite, feature_set(), WEIGHT), recorder], tmp_path, **settings)
    batches = record_batches(trainer)
    train(trainer)
    assert all(layer.gradient_checkpointing for layer in trainer.model.get_decoder().layers)
    model = make()  # the same seeds, untouched by any trainer
    assert len(recorder.steps) == 2
    for found, window in zip(recorder.steps, (batches[:4], batches[4:]), strict=True):
        terms = sft_terms(family, model, window, router_weight)
        wanted = gradients(model, terms.task + terms.router + terms.penalty)
        assert reported_difference(found, wanted) < TOLERANCE
        without = gradients(model, terms.task + terms.router)
        assert largest_relative_difference(without, wanted) > 0.05, "without the penalty it would pass as well"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_gradients_equal_autograd(family: str, mode: str, suite: SAESuite, tmp_path: Path) -> None:
    make, settings = MODES[mode]
    assert_sft_gradients(family, lambda: make(family), suite, tmp_path, settings)


@pytest.mark.parametrize("family", MIXTURES)
def test_sft_gradients_of_adapted_experts_and_routers_equal_autograd(
    family: str, suite: SAESuite, tmp_path: Path
) -> None:
    trained = [name for name, p in adapted_experts(family).named_parameters() if p.requires_grad]
    assert sum("experts" in name for name in trained) > 0
    assert sum("mlp.gate" in name for name in trained) > 0
    assert_sft_gradients(family, lambda: adapted_experts(family), suite, tmp_path, checkpointing(False))


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_gradients_equal_task_plus_autograd(family: str, suite: SAESuite, tmp_path: Path) -> None:
    recorders, batches = [GradientRecorder(), GradientRecorder()], []
    for callbacks in ([recorders[0]], [SAEPenaltyCallback(suite, feature_set(), WEIGHT), recorders[1]]):
        torch.manual_seed(0)
        trainer = grpo_trainer(
            tmp_path,
            [parity],
            model=adapted(family),
            callbacks=callbacks,
            gradient_accumulation_steps=2,
            max_steps=1,
            **checkpointing(False),
        )
        batches = record_inputs(trainer)
        train(trainer)
    (before,), (found,) = recorders[0].steps, recorders[1].steps
    assert len(batches) == 2
    penalty = penalty_gradients(trainer, adapted(family), batches)
    # TRL may add a frozen copy of the adapters; only what both models train is compared.
    wanted = {name: before[name] + penalty[name] for name in penalty}
    assert reported_difference({name: found[name] for name in penalty}, wanted) < TOLERANCE
    assert largest_relative_difference({name: before[name] for name in penalty}, wanted) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_read_what_a_fresh_forward_reads_and_a_step_trains(
    family: str, suite: SAESuite, tmp_path: Path
) -> None:
    recorder = Recorder()
    rewards = [
        FeatureReward(features(), suite, name=reader, reader=reader, aggregation="mean")
        for reader in ("policy", "frozen")
    ]
    trainer = grpo_trainer(
        tmp_path,
        [parity, recorder, *rewards],
        kind=SAEGRPOTrainer,
        model=adapted(family),
        max_steps=1,
        learning_rate=0.1,
        **checkpointing(False),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    given: dict[str, list[float]] = {}
    for reward in rewards:
        given[reward.name] = []
    original = trainer._calculate_rewards

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        for column, reward in enumerate(rewards, start=2):
            given[reward.name] += output[:, column].tolist()
        return output

    trainer._calculate_rewards = watch
    train(trainer)
    (call,) = recorder.calls
    policy = adapted(family)
    frozen = adapted(family) if "ref" in trainer.model.peft_config else backbone(family)
    tokenizer = tiny_tokenizer()
    for row, (prompt, completion) in enumerate(zip(call["prompts"], call["completion_ids"], strict=True)):
        ids = tokenizer(prompt).input_ids
        for reader, model in (("policy", policy), ("frozen", frozen)):
            wanted = fresh_values(model, ids, completion)
            found = call["sae_activations"][row][reader]
            assert float((found.values_CS - wanted).abs().max() / wanted.abs().max()) < SCORE_TOLERANCE
            assert given[reader][row] == pytest.approx(-float(token_scores(wanted).mean()), rel=1e-4)
    assert len(call["prompts"]) == 4
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert moved
    assert all("lora_" in name for name in moved)
