"""NaN and infinite activations: the batch is named and the step not made, or their tokens are left out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from qscope_trl import FeatureReward, PenaltyAttachment, QScopeWarning, SAEGRPOTrainer
from qscope_trl.errors import ConfigError, NonFiniteError
from qscope_trl.hooks.residual import Capture
from tests.tiny import D_MODEL, K, tiny_model
from tests.training.harness import train
from tests.training.penalty_harness import NAMES, callback, hook_count, plain_trainer, sae_callbacks
from tests.training.rollout_harness import grpo_trainer, parity

BROKEN = 7
"""A token whose embedding is not finite."""


class RowsApart(Trainer):
    """Trains on one row of each batch, so that the model's own loss stays finite."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        loss = torch.nn.functional.cross_entropy(logits[-1, :-1], inputs["labels"][-1, 1:])
        return (loss, {"logits": logits}) if return_outputs else loss


def rows(*broken: int) -> list[dict[str, list[int]]]:
    """Eight rows, two a micro-batch, of which some hold the broken token at position 3."""
    found = []
    for n in range(8):
        ids = [20 + n, 21, 22, BROKEN if n in broken else 23, 24, 25]
        found.append({"input_ids": ids, "labels": ids})
    return found


def make(
    saes: Path, tmp_path: Path, *broken: int, value: float = float("nan"), features: Any = NAMES, **settings: Any
) -> Any:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = value
    cb = callback(saes, features, monitor_features=["L3F9"], **settings)
    trainer = plain_trainer(
        RowsApart, tmp_path, cb, model, gradient_accumulation_steps=2, learning_rate=0.1, max_steps=2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train_dataset = rows(*broken)
    trainer._get_train_sampler = lambda *_args: None
    return trainer


@pytest.mark.parametrize("kind", ["preact_hinge", "topk_act"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_is_not_made_and_the_batch_is_named(saes: Path, tmp_path: Path, value: float, kind: str) -> None:
    """Also where no feature with an index below k is chosen: ties of NaN are ranked by index."""
    trainer = make(saes, tmp_path, 6, value=value, penalty_kind=kind, features=["L1F30", "L2F40"])
    weights: list[dict[str, torch.Tensor]] = []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return step(*args, **kwargs)

    trainer.training_step = training_step
    message = (
        r"Optimizer step 2: the activations of rows \[0\] of micro-batch 2 are NaN or infinite "
        r"\(row 0 begins with the tokens \[26, 21, 22, 7, 24, 25\]\)\. The step was not made"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(trainer)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, weights[-1][name]) or name.endswith("embed_tokens.weight")
    assert trainer.state.global_step == 1
    assert not sae_callbacks(trainer)
    assert hook_count(trainer.model) == 0


def test_clean_batches_raise_nothing(saes: Path, tmp_path: Path) -> None:
    trainer = make(saes, tmp_path)
    train(trainer)
    assert trainer.state.global_step == 2


def test_skip_leaves_their_tokens_out_of_loss_and_statistics_and_says_so(saes: Path, tmp_path: Path) -> None:
    """Activations from the broken token on are NaN: positions 3 and 4 of the row; 1 and 2 are penalised."""
    trainer = make(saes, tmp_path, 0, penalty_nonfinite="skip")
    # The broken token has broken the model's own gradient, and so all weights, after one step.
    trainer.args.max_steps = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if issubclass(w.category, QScopeWarning)]
    assert len(said) == 1
    assert said[0].startswith("Optimizer step 1: the activations of rows [0] of micro-batch 1 are NaN or infinite")
    assert said[0].endswith("They were left out of the penalty.")
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert all(torch.isfinite(torch.tensor(v)) for k, v in logged.items() if k.startswith("sae/"))
    assert logged["sae/penalty"] > 0


def test_the_penalty_of_the_other_tokens_and_its_gradient_are_those_without_the_broken_ones(saes: Path) -> None:
    attachment = PenaltyAttachment(saes, NAMES, sae_k=K, penalty_weight=1.0, penalty_tokens="all")
    captured = attachment._captured
    captured.layers, captured.monitors = attachment._open_features(tiny_model())
    clean = torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(0))
    broken = clean.clone()
    broken[1, 2:4] = float("nan")

    def run(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves = {layer: values.clone().requires_grad_() for layer in captured.layers}
        capture = Capture(residuals=dict(leaves), has_grad=True, attention_mask=mask)
        total, _ = captured.sum([capture], {}, None, "train")
        total.backward()
        return total.detach(), torch.stack([leaf.grad for leaf in leaves.values()])

    everything = torch.ones(2, 5, dtype=torch.long)
    masked = everything.clone()
    masked[1, 2:4] = 0
    wanted, found = run(clean, masked), run(broken, everything)
    assert float(wanted[0]) > 0
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert not found[1][:, 1, 2:4].any()


def test_a_penalty_of_weight_zero_only_says_so(saes: Path, tmp_path: Path) -> None:
    trainer = make(saes, tmp_path, 6, weight=0.0)
    with pytest.warns(QScopeWarning, match=r"Optimizer step 2: .* They were left out of the penalty"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_an_evaluation_shows_nan_as_nan(saes: Path, tmp_path: Path) -> None:
    trainer = make(saes, tmp_path)
    trainer.eval_dataset = rows(1)
    metrics = trainer.evaluate()
    assert metrics["eval_sae/L1F3/mean_pre_act"] != metrics["eval_sae/L1F3/mean_pre_act"]


def test_an_unknown_action_is_refused(saes: Path) -> None:
    with pytest.raises(ConfigError, match="`penalty_nonfinite` is 'ignore'; choose one of raise, skip"):
        callback(saes, penalty_nonfinite="ignore")


@pytest.mark.parametrize("kind", ["preact_hinge", "topk_act"])
def test_rollouts_with_nan_activations_are_refused_rather_than_rewarded(saes: Path, tmp_path: Path, kind: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    chosen = FeatureReward(["L1F30", "L2F40"], saes, sae_k=K, reader="policy", kind=kind)
    trainer = grpo_trainer(tmp_path, [parity, chosen], kind=SAEGRPOTrainer, model=model, top_k=1)
    trainer.generation_config.do_sample = False
    with pytest.raises(NonFiniteError, match=r"Step 1: the activations of rollouts are NaN or infinite \(rows \[0"):
        train(trainer)
