"""Refusals, and the self-check of the first step: no penalty is silently without effect."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from transformers import Trainer, TrainerCallback

from qscope_trl import PenaltyAttachment, attach
from qscope_trl.errors import AttachError, DataError, PenaltySelfCheckError, QScopeWarning
from tests.tiny import K, tiny_model
from tests.training.harness import pad_collate, train
from tests.training.penalty_harness import NAMES, callback, hook_count, make_trainer, plain_trainer, sae_callbacks
from tests.training.test_equality import lora


def test_lora_only_above_the_layer_is_refused(saes: Path, tmp_path: Path) -> None:
    model = lora(tiny_model(), layers_to_transform=[3])
    with pytest.raises(AttachError, match=r"No trainable parameter lies at or below layer 1"):
        make_trainer(tmp_path, [callback(saes)], model)
    make_trainer(tmp_path, [callback(saes, weight=0.0)], model)  # measuring is fine
    make_trainer(tmp_path, [callback(saes, ["L3F1"])], model)  # so is a layer that LoRA reaches


def test_data_parallel_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = SimpleNamespace(model=tiny_model(), args=SimpleNamespace(n_gpu=2), compute_loss=print)
    with pytest.raises(AttachError, match=r"DataParallel over 2 GPUs"):
        callback(saes).attach(trainer)


def test_sequence_parallelism_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    trainer.accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(sp_enabled=True, sp_backend="deepspeed", cp_enabled=False)
    )
    with pytest.raises(AttachError, match=r"splits sequences over processes"):
        callback(saes).attach(trainer)


def test_prompt_learning_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    trainer.model.peft_config = {"default": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}
    with pytest.raises(AttachError, match=r"Adapter `default` learns virtual tokens \(PromptTuningConfig\)"):
        callback(saes).attach(trainer)


def test_trainer_without_compute_loss_or_callbacks_is_refused(saes: Path) -> None:
    trainer = SimpleNamespace(model=tiny_model(), args=SimpleNamespace(n_gpu=1))
    with pytest.raises(AttachError, match=r"has no `compute_loss`"):
        callback(saes).attach(trainer)
    trainer.compute_loss = print
    with pytest.raises(AttachError, match=r"has no `add_callback`, so no step can be checked"):
        callback(saes).attach(trainer)


class BypassingTrainer(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_trainer_that_bypasses_compute_loss_is_caught(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(BypassingTrainer, tmp_path, callback(saes))
    with pytest.raises(PenaltySelfCheckError, match=r"`BypassingTrainer` .* without calling `compute_loss`"):
        train(trainer)
    assert hook_count(trainer.model) == 0


def test_attach_without_the_callback_is_checked_too(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(BypassingTrainer, tmp_path, None)
    before = list(trainer.callback_handler.callbacks)
    attached = attach(trainer, saes, NAMES, penalty_weight=0.5, sae_k=K)
    with pytest.raises(PenaltySelfCheckError, match=r"`BypassingTrainer` .* without calling `compute_loss`"):
        train(trainer)
    assert not attached.is_attached
    assert hook_count(trainer.model) == 0
    assert trainer.callback_handler.callbacks == before


@pytest.mark.parametrize("by", ["callback", "attach"])
def test_each_step_is_checked_once(by: str, saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = PenaltyAttachment.after_optimizer_step
    monkeypatch.setattr(
        PenaltyAttachment, "after_optimizer_step", lambda self: (calls.append(self.is_attached), original(self))
    )
    trainer = plain_trainer(Trainer, tmp_path, callback(saes) if by == "callback" else None)
    if by == "attach":
        with attach(trainer, saes, NAMES, penalty_weight=0.5, sae_k=K):
            train(trainer)
    else:
        train(trainer)
    assert calls == [True] * 5
    assert not sae_callbacks(trainer)


def test_detaching_inside_a_callback_skips_no_other_callback(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(Trainer, tmp_path, None)
    attached = attach(trainer, saes, NAMES, penalty_weight=0.5, sae_k=K)
    ended = []

    class Ends(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            ended.append(self)
            attached.detach()

    trainer.add_callback(Ends())
    trainer.add_callback(Ends())
    train(trainer)
    assert len(ended) == 2
    assert not sae_callbacks(trainer)


def test_evaluation_before_training_is_no_training_loss(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(
        BypassingTrainer, tmp_path, callback(saes), eval_on_start=True, eval_strategy="steps", eval_steps=1
    )
    with pytest.raises(PenaltySelfCheckError, match=r"`BypassingTrainer` .* without calling `compute_loss`"):
        train(trainer)


class DiscardingTrainer(BypassingTrainer):
    """Calls `compute_loss` for nothing and trains on a loss of its own."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("by", ["callback", "attach"])
def test_trainer_that_discards_the_loss_is_caught(by: str, saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(DiscardingTrainer, tmp_path, callback(saes) if by == "callback" else None)
    if by == "attach":
        attach(trainer, saes, NAMES, penalty_weight=0.5, sae_k=K)
    with pytest.raises(PenaltySelfCheckError, match=r"`DiscardingTrainer` .* no backward reached the penalty"):
        train(trainer)
    assert trainer.state.global_step == 1
    assert hook_count(trainer.model) == 0
    assert not sae_callbacks(trainer)


class PeekingTrainer(Trainer):
    """Looks at one loss more in every micro-batch before it trains on another."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.compute_loss(model, self._prepare_inputs(dict(inputs)), num_items_in_batch=num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


class SparingTrainer(Trainer):
    """Leaves the first micro-batch of all out of training."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.accelerator.sync_gradients:
            return super().training_step(model, inputs, num_items_in_batch)
        return self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch).detach()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Trainer, {"gradient_accumulation_steps": 2}),
        (Trainer, {"gradient_accumulation_steps": 8}),  # the only step is a partial one
        (PeekingTrainer, {}),
        (SparingTrainer, {"gradient_accumulation_steps": 2}),
        (Trainer, {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}),
    ],
)
def test_what_trains_passes_the_check(
    kind: type[Trainer], changes: dict[str, Any], saes: Path, tmp_path: Path
) -> None:
    trainer = plain_trainer(kind, tmp_path, callback(saes), **changes)
    train(trainer)
    assert all("sae/penalty" in e for e in trainer.state.log_history if "loss" in e)


def test_measuring_alone_needs_no_gradient(saes: Path, tmp_path: Path) -> None:
    train(plain_trainer(DiscardingTrainer, tmp_path, callback(saes, weight=0.0)))


def test_penalty_without_a_graph_is_caught(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(Trainer, tmp_path, callback(saes))
    trainer.model.requires_grad_(False)
    trainer.model.get_decoder().layers[3].requires_grad_(True)
    with pytest.raises(PenaltySelfCheckError, match=r"The penalty of the first training step carries no gradient"):
        train(trainer)
    assert hook_count(trainer.model) == 0


class MutingTrainer(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = 0 * self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def test_gradient_zero_is_said_once(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(MutingTrainer, tmp_path, callback(saes))
    with pytest.warns(QScopeWarning, match=r"reached the SAE penalty with gradient 0 in the first step") as said:
        trainer.train()
    assert len([w for w in said if issubclass(w.category, QScopeWarning)]) == 1


class NoGradTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        with torch.no_grad():
            model(**inputs)
        return self.model.lm_head.weight.sum()


def test_step_without_a_gradient_capture_is_caught(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(PenaltySelfCheckError, match=r"ran the model without gradients only"):
        train(plain_trainer(NoGradTrainer, tmp_path, callback(saes)))


class SkippingTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return self.model.lm_head(self.model.get_input_embeddings()(inputs["input_ids"])).mean()


def test_step_without_any_capture_is_caught(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(PenaltySelfCheckError, match=r"without a residual of layers \[1, 2\]: the hooks did not fire"):
        train(plain_trainer(SkippingTrainer, tmp_path, callback(saes)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_compiled_before_attaching_is_caught(saes: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model(), backend="eager")
    train(plain_trainer(Trainer, tmp_path, TrainerCallback(), compiled))
    with pytest.raises(PenaltySelfCheckError, match=r"compiled before the penalty was attached"):
        train(plain_trainer(Trainer, tmp_path, callback(saes), compiled))
    torch._dynamo.reset()


def test_batch_without_trained_tokens_asks_for_all(saes: Path, tmp_path: Path) -> None:
    class Unlabelled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.mean()

    trainer = plain_trainer(Unlabelled, tmp_path, callback(saes))
    trainer.data_collator = lambda rows: {k: v for k, v in pad_collate(rows).items() if k != "labels"}
    with pytest.raises(DataError, match=r"`penalty_tokens='labels'` has no meaning here. Set `penalty_tokens='all'`"):
        train(trainer)
    trainer = plain_trainer(Unlabelled, tmp_path, callback(saes, penalty_tokens="all"))
    train(trainer)
    assert all(e["sae/penalty"] > 0 for e in trainer.state.log_history if "loss" in e)
