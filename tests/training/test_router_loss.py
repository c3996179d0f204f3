"""Mixtures of experts: text, router loss and penalty together, in the gradient and in the log, each counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from qscope_trl import SAEPenaltyCallback, SAESuite
from tests.tiny import largest_relative_difference
from tests.training.backbones import (
    HAS_ROUTER_SETTING,
    MIXTURES,
    adapted,
    adapted_experts,
    backbone,
    sft,
    sft_terms,
)
from tests.training.harness import GradientRecorder, record_batches, train
from tests.training.reference import gradients, router_loss, run_with_router
from tests.training.rollout_harness import grpo_trainer, parity
from tests.training.test_backbones import TOLERANCE
from tests.training.test_equality import LAYERS, WEIGHT, checkpointing, feature_set, reference_penalty, suite
from tests.training.test_equality_grpo import penalty_gradients, record_inputs

pytestmark = pytest.mark.pinned

__all__ = ["suite"]  # a fixture

COEFFICIENT = 0.5
"""Large enough for the router loss to show in every gradient; 0.001 is usual."""
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
"""In the model's configuration, where older TRL looks for it."""
# Whether TRL takes the weight as a setting of its own, or from the model.
SETTINGS: dict[str, Any] = {"router_aux_loss_coef": COEFFICIENT} if HAS_ROUTER_SETTING else {}
# transformers before 5 rounds the logged loss to four places.
ROUNDING = 5.1e-5 if Version(transformers.__version__) < Version("5") else 0.0
MAKERS = {"LoRA": adapted, "LoRA on experts and routers": adapted_experts, "full weights": backbone}


@pytest.mark.parametrize("weights", MAKERS)
@pytest.mark.parametrize("family", MIXTURES)
def test_sft_loss_is_text_plus_router_plus_penalty(family: str, weights: str, suite: SAESuite, tmp_path: Path) -> None:
    changes = {} if HAS_ROUTER_SETTING else ROUTED
    recorder = GradientRecorder()
    model = MAKERS[weights](family, **changes)
    callback = SAEPenaltyCallback(suite, feature_set(), WEIGHT)
    trainer = sft(model, [callback, recorder], tmp_path, **SETTINGS, **checkpointing(False))
    batches = record_batches(trainer)
    train(trainer)
    model = MAKERS[weights](family)  # the same seeds, untouched by any trainer
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(recorder.steps) == len(logged) == 2
    for found, entry, window in zip(recorder.steps, logged, (batches[:4], batches[4:]), strict=True):
        terms = sft_terms(family, model, window, COEFFICIENT)
        parts = [terms.task, terms.router, terms.penalty]
        wanted = gradients(model, sum(parts))
        assert largest_relative_difference(found, wanted) < TOLERANCE
        for part in parts:
            assert largest_relative_difference(gradients(model, sum(parts) - part), wanted) > 1e-3
        assert entry["loss"] == pytest.approx(float(sum(parts).detach()), rel=2e-6, abs=ROUNDING)
        assert entry["aux_loss"] == pytest.approx(terms.mean_router, rel=2e-6)
        assert entry["sae/penalty"] == pytest.approx(terms.mean_penalty, rel=2e-6)


def router_step(model: Any, window: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], float, float]:
    """Rollout by rollout and without padding: the gradient of the mean of the micro-batches' router losses, that mean
    itself, and the mean penalty of the tokens that predict a completion's.
    """
    total, penalties = torch.zeros(()), []
    for batch in window:
        routers: list[list[torch.Tensor]] = []
        for row in range(batch["prompt_ids"].shape[0]):
            prompt, completion = (
                batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
            )
            ids = torch.cat([prompt, completion])[None]
            _, residuals, scores = run_with_router(model, {"input_ids": ids}, LAYERS)
            routers.append(scores)
            penalties += reference_penalty().per_token(residuals)[0][max(1, len(prompt) - 1) : -1].tolist()
        joined = [torch.cat(of_layer) for of_layer in zip(*routers, strict=True)]
        total = total + router_loss(joined, [True] * len(joined[0]), k=2) / len(window)
    return gradients(model, total), float(total.detach()), sum(penalties) / len(penalties)


@pytest.mark.skipif(not HAS_ROUTER_SETTING, reason="this TRL's GRPOTrainer knows no router loss")
@pytest.mark.parametrize("family", MIXTURES)
def test_grpo_loss_is_task_plus_router_plus_penalty(family: str, suite: SAESuite, tmp_path: Path) -> None:
    recorders, logs = [GradientRecorder(), GradientRecorder()], []
    callback = SAEPenaltyCallback(suite, feature_set(), WEIGHT)
    for callbacks, coefficient in (([recorders[0]], 0.0), ([callback, recorders[1]], COEFFICIENT)):
        torch.manual_seed(0)
        trainer = grpo_trainer(
            tmp_path,
            [parity],
            model=adapted(family),
            callbacks=callbacks,
            gradient_accumulation_steps=2,
            max_steps=1,
            router_aux_loss_coef=coefficient,
            **checkpointing(False),
        )
        batches = record_inputs(trainer)
        train(trainer)
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    (task,), (found,) = recorders[0].steps, recorders[1].steps
    assert len(batches) == 2
    model = adapted(family)
    penalty = penalty_gradients(trainer, model, batches)
    router, mean_router, mean_penalty = router_step(model, batches)
    parts = [task, {name: COEFFICIENT * gradient for name, gradient in router.items()}, penalty]
    wanted = {name: sum(part[name] for part in parts) for name in penalty}
    assert largest_relative_difference({name: found[name] for name in penalty}, wanted) < TOLERANCE
    for part in parts:
        assert largest_relative_difference({name: wanted[name] - part[name] for name in penalty}, wanted) > 1e-3
    assert "aux_loss" not in logs[0]
    assert logs[1]["aux_loss"] == pytest.approx(mean_router, rel=2e-6)
    assert logs[1]["sae/penalty"] == pytest.approx(mean_penalty, rel=2e-6)
    wanted_loss = logs[0]["loss"] + COEFFICIENT * mean_router + WEIGHT * mean_penalty
    assert logs[1]["loss"] == pytest.approx(wanted_loss, rel=2e-6)
