"""Steering while training, against gradients computed with plain hooks and autograd, and what is left of it after."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from qscope_trl import FeatureSet
from qscope_trl.errors import AttachError, CheckpointError, ConfigError, FeatureSetError, SteeringError
from qscope_trl.hooks.layers import find_layers
from qscope_trl.training.steering_callbacks import ConceptAblation, PreventativeSteering, TrainingEdit
from tests.tiny import D_MODEL, K, largest_relative_difference, random_sae, tiny_model, write_saes
from tests.training.adapters import adapter_config, saved_tensors
from tests.training.harness import GradientRecorder, arguments, pad_collate, record_batches, tokenized_rows, train
from tests.training.penalty_harness import callback as penalty
from tests.training.penalty_harness import hook_count, make_trainer, plain_trainer
from tests.training.reference import cross_entropy_sum, gradients
from tests.training.rollout_harness import grpo_trainer, parity
from tests.training.test_equality import checkpointing, lora

FEATURES = {"L1F3": 1.0, "L1F9": -0.5, "L2F40": 0.7}
STRENGTH = 3.0
# fp32: the two sides add the same terms in another order, over a deep graph. Seen: up to 5e-7.
TOLERANCE = 2e-6


def steering(saes: Path, strength: float = STRENGTH) -> PreventativeSteering:
    return PreventativeSteering(FEATURES, saes, strength=strength)


def ablation(saes: Path) -> ConceptAblation:
    return ConceptAblation(FEATURES, saes)


KINDS: dict[str, Callable[[Path], TrainingEdit]] = {"steering": steering, "ablation": ablation}


def build(tmp_path: Path, callbacks: list[TrainerCallback], model: Any = None, **changes: Any) -> Trainer:
    settings = {"learning_rate": 1e-2, "max_steps": 2, "output_dir": str(tmp_path), **changes}
    return Trainer(
        tiny_model() if model is None else model,
        args=arguments(TrainingArguments, remove_unused_columns=False, **settings),
        train_dataset=tokenized_rows(8),
        eval_dataset=tokenized_rows(4, seed=3),
        data_collator=pad_collate,
        callbacks=callbacks,
    )


def hooks_on_layers(model: Any) -> int:
    """On the decoder and its layers; transformers leaves one on the embeddings under checkpointing."""
    modules = [model.get_decoder(), *find_layers(model)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def by_hand(kind: str, layer: int, x: Tensor) -> Tensor:
    W_dec = random_sae(100 + layer)["W_dec"]
    if kind == "none":
        return x
    if kind == "steering":
        return x + (STRENGTH * (W_dec[:, 3] - 0.5 * W_dec[:, 9]) if layer == 1 else STRENGTH * 0.7 * W_dec[:, 40])
    columns = W_dec[:, [3, 9] if layer == 1 else [40]].double()
    return x - x @ (columns @ torch.linalg.pinv(columns)).float()


def steered_loss(model: Any, kind: str, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the cross entropy over trained tokens."""
    handles = [
        find_layers(model)[layer].register_forward_hook(
            lambda _m, _a, out, layer=layer: by_hand(kind, layer, out[0] if isinstance(out, tuple) else out)
        )
        for layer in (1, 2)
    ]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    for handle in handles:
        handle.remove()
    return cross_entropy_sum(logits, batch["labels"])


def plain_logits(model: Any) -> Tensor:
    ids = torch.randint(2, 90, (3, 11), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("is_sft", "settings", "make"),
    [
        (True, {}, tiny_model),
        (False, {"gradient_accumulation_steps": 2, **checkpointing(False)}, tiny_model),
        (False, checkpointing(True), lambda: lora(tiny_model())),
    ],
    ids=["SFT, full weights", "checkpointed, accumulated", "LoRA, checkpointed reentrantly"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_a_computation_by_hand(
    saes: Path, tmp_path: Path, kind: str, is_sft: bool, settings: dict[str, Any], make: Callable[[], Any]
) -> None:
    recorder = GradientRecorder()
    trainer = (make_trainer if is_sft else build)(
        tmp_path, [KINDS[kind](saes), recorder], make(), optim="sgd", learning_rate=0.0, max_steps=2, **settings
    )
    batches = record_batches(trainer)
    train(trainer)
    model = make()
    each = settings.get("gradient_accumulation_steps", 1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(recorder.steps) == len(losses) == 2
    for step, found in enumerate(recorder.steps):
        group = batches[step * each : (step + 1) * each]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        loss = sum(steered_loss(model, kind, batch) for batch in group) / count
        assert largest_relative_difference(found, gradients(model, loss)) < TOLERANCE
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        with torch.no_grad():
            plain = sum(steered_loss(model, "none", batch) for batch in group) / count
        assert abs(plain.item() - losses[step]) > 1e-4
    assert hooks_on_layers(trainer.model) == 0


def test_the_ablated_span_carries_no_gradient_from_above(saes: Path) -> None:
    edit = ablation(saes)
    columns = random_sae(101)["W_dec"][:, [3, 9, 3]]
    basis = edit.constant(columns, torch.ones(3), 1)
    assert basis.shape == (D_MODEL, 2)
    x = torch.randn(2, 5, D_MODEL, requires_grad=True)
    left = edit.edit(x, basis)
    assert (left @ columns).abs().max() < 1e-5
    left.square().sum().backward()
    assert x.grad is not None
    assert (x.grad @ columns).abs().max() < 1e-5
    half = edit.edit(x.detach().bfloat16(), basis)
    assert half.dtype == torch.bfloat16
    assert (half.float() - left).abs().max() < 0.02


@pytest.mark.slow
def test_torch_compile_traces_the_edit(saes: Path, tmp_path: Path) -> None:
    recorders = [GradientRecorder(), GradientRecorder()]
    torch._dynamo.reset()
    for recorder, changes in zip(
        recorders, ({"torch_compile": True, "torch_compile_backend": "eager"}, {}), strict=True
    ):
        train(
            build(tmp_path, [steering(saes), recorder], tiny_model(num_hidden_layers=3), learning_rate=0.0, **changes)
        )
    torch._dynamo.reset()
    assert len(recorders[0].steps) == 2
    for found, wanted in zip(recorders[0].steps, recorders[1].steps, strict=True):
        named = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        assert largest_relative_difference(named, wanted) < TOLERANCE


def test_strength_0_leaves_training_bit_identical(saes: Path, tmp_path: Path) -> None:
    models = []
    for callbacks in ([steering(saes, 0.0)], [steering(saes)], []):
        trainer = build(tmp_path, callbacks)
        train(trainer)
        models.append(trainer.model.state_dict())
    assert all(torch.equal(models[0][name], value) for name, value in models[2].items())
    assert not all(torch.equal(models[1][name], value) for name, value in models[2].items())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_of_the_plain_model(saes: Path, tmp_path: Path, kind: str) -> None:
    histories = []
    for callbacks in ([KINDS[kind](saes)], []):
        trainer = build(tmp_path, callbacks, learning_rate=0.0, eval_strategy="steps", eval_steps=1)
        train(trainer)
        trainer.evaluate()
        histories.append(trainer.state.log_history)
    losses = [[e["eval_loss"] for e in history if "eval_loss" in e] for history in histories]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    trained = [[e["loss"] for e in history if "loss" in e] for history in histories]
    assert min(abs(a - b) for a, b in zip(*trained, strict=True)) > 1e-3


def test_nothing_of_it_is_saved_or_left(saes: Path, tmp_path: Path) -> None:
    edits = [steering(saes), ablation(saes)]
    trainer = build(tmp_path, edits, save_strategy="steps", save_steps=2)
    assert all(edit.is_attached for edit in edits)
    assert hook_count(trainer.model) == 2 * 4
    train(trainer)
    assert not any(edit.is_attached for edit in edits)
    assert hook_count(trainer.model) == 0
    assert "training_step" not in vars(trainer)
    assert not any("qscope" in name for name in vars(trainer))
    assert b"qscope" not in pickle.dumps(trainer.model)
    trainer.save_model(str(tmp_path / "last"))
    for folder in (tmp_path / "last", tmp_path / "checkpoint-2"):
        saved = {name.split(":")[1] for name in saved_tensors(folder)}
        assert saved == set(trainer.model.state_dict())
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(plain_logits(loaded), plain_logits(trainer.model))


def test_a_second_run_is_steered_again(saes: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, [steering(saes)], learning_rate=0.0)
    losses = []
    for _ in range(2):
        train(trainer)
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]
    trainer.remove_callback(PreventativeSteering)
    train(trainer)
    assert losses[0] != [e["loss"] for e in trainer.state.log_history if "loss" in e]


def test_lora_is_saved_without_it(saes: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = build(tmp_path, [steering(saes)], lora(tiny_model()))
    before = plain_logits(trainer.model)
    train(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older PEFT looks for the base model's folder, and there is none
        trainer.save_model(str(tmp_path))
    assert all("lora" in name for name in saved_tensors(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.allclose(plain_logits(loaded), plain_logits(trainer.model), atol=1e-5)
    assert not torch.allclose(before, plain_logits(trainer.model), atol=1e-3)


def test_grpo_generates_and_refers_plainly_and_trains_steered(saes: Path, tmp_path: Path) -> None:
    completions, shown = [], []
    for edits in ([steering(saes)], []):
        model, kept, before, changes = tiny_model(), [], [], []
        layer = find_layers(model)[1]
        layer.register_forward_hook(lambda _m, _a, out, before=before: before.append(out.detach()))

        def reward(completion_ids: Any, kept: list[Any] = kept, **_: Any) -> list[float]:
            kept.extend(completion_ids)
            return parity(completion_ids)

        torch.manual_seed(0)
        trainer = grpo_trainer(
            tmp_path, [reward], model=model, callbacks=edits, max_steps=1, beta=0.1, peft_config=adapter_config("LoRA")
        )
        layer.register_forward_hook(
            lambda _m, _a, out, before=before, changes=changes: changes.append(
                (torch.is_grad_enabled(), out.detach() - before[-1])
            )
        )
        train(trainer)
        completions.append(kept)
        shown.append(changes)
    assert completions[0] == completions[1]
    vector = by_hand("steering", 1, torch.zeros(D_MODEL))
    assert [has_grad for has_grad, _ in shown[0]].count(True) == 1
    # The prompt, each token but the last, and the reference's pass.
    assert [has_grad for has_grad, _ in shown[0]].count(False) >= 7
    for has_grad, change in shown[0]:
        assert (change - vector * has_grad).abs().max() < 1e-5
    assert not any(change.any() for _, change in shown[1])


def test_a_penalty_reads_what_the_callbacks_before_it_left(saes: Path, tmp_path: Path) -> None:
    shown = []
    for order in ([], [steering(saes)], [None, steering(saes)]):
        callbacks = order if None in order else [*order, None]
        callbacks = [penalty(saes, weight=0.0) if item is None else item for item in callbacks]
        trainer = build(tmp_path, callbacks, learning_rate=0.0, max_steps=1)
        train(trainer)
        shown.append(trainer.state.log_history[0]["sae/L1F3/mean_pre_act"])
    sae = random_sae(101)
    assert shown[1] - shown[0] == pytest.approx(
        float(sae["W_enc"][3] @ by_hand("steering", 1, torch.zeros(D_MODEL))), rel=1e-4
    )
    assert shown[2] == pytest.approx(shown[0], rel=1e-6)


def test_hooks_come_off_when_a_step_fails(saes: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, [edit := steering(saes)])
    trainer.compute_loss = lambda *_a, **_k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(trainer)
    assert not edit.is_attached
    assert hook_count(trainer.model) == 0
    assert "training_step" not in vars(trainer)


def test_a_callback_that_was_removed_edits_nothing(saes: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, [edit := steering(saes)])
    trainer.remove_callback(edit)
    train(trainer)
    plain = build(tmp_path, [])
    train(plain)
    assert all(torch.equal(trainer.model.state_dict()[n], v) for n, v in plain.model.state_dict().items())
    assert hook_count(trainer.model) == 0


def test_a_callback_added_later_or_attached_by_hand_acts(saes: Path, tmp_path: Path) -> None:
    losses = []
    for way in ("given", "added", "attached"):
        trainer = build(tmp_path, [steering(saes)] if way == "given" else [])
        if way != "given":
            trainer.add_callback(edit := steering(saes))
            if way == "attached":
                edit.attach(trainer)
        train(trainer)
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1] == losses[2]


def test_forwards_outside_of_a_training_step_are_plain(saes: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, [edit := steering(saes)])
    ids = torch.tensor([[2, 3, 4]])
    inside = trainer.model.train()(ids).logits
    edit.detach()
    assert torch.equal(inside, trainer.model(ids).logits)
    edit.detach()


class NeverSteps(Trainer):
    """A trainer whose steps do not run its model."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(0.0)


def test_a_step_that_was_not_edited_stops_the_run(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=r"`NeverSteps` finished an optimizer step without a forward that was edi"):
        train(plain_trainer(NeverSteps, tmp_path, steering(saes), max_steps=1))


@pytest.mark.slow
def test_a_model_compiled_before_attaching_is_caught(saes: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model(num_hidden_layers=3), backend="eager")
    train(plain_trainer(Trainer, tmp_path, TrainerCallback(), compiled, max_steps=1))
    with pytest.raises(SteeringError, match=r"compiled before the callback was attached"):
        train(plain_trainer(Trainer, tmp_path, steering(saes), compiled, max_steps=1))
    torch._dynamo.reset()
    assert hook_count(compiled) == 0


def test_what_cannot_be_attached_is_refused(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"`PreventativeSteering` found no trainer above it"):
        steering(saes).on_train_begin(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    with pytest.raises(AttachError, match=r"`SimpleNamespace` has no `training_step`"):
        steering(saes).attach(SimpleNamespace(model=tiny_model()))
    several = SimpleNamespace(model=tiny_model(), training_step=len, args=SimpleNamespace(n_gpu=2))
    with pytest.raises(AttachError, match=r"uses DataParallel over 2 GPUs"):
        steering(saes).attach(several)
    with pytest.raises(ConfigError, match=r"`strength` is nan; it is one finite number"):
        steering(saes, float("nan"))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (["L1F999"], FeatureSetError, r"999"),
        (["L9F1"], CheckpointError, r"No SAE for layer 9"),
        ({"L1F3": 0.0}, SteeringError, r"directions of L1F3 add up to zero, so nothing would be added at layer 1"),
        (FeatureSet.from_names(["L1F3"], sae_fingerprints={1: "0a0a"}), FeatureSetError, r"fingerprint"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    saes: Path, tmp_path: Path, features: Any, error: type[Exception], message: str
) -> None:
    model = tiny_model()
    with pytest.raises(error, match=message):
        plain_trainer(Trainer, tmp_path, PreventativeSteering(features, saes, strength=1.0, sae_k=K), model)
    assert hook_count(model) == 0


def test_saes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    narrow = write_saes(tmp_path / "narrow", [1], d_model=16)
    with pytest.raises(AttachError, match=r"reads residuals of width 16, but `Qwen3ForCausalLM` has `hidden_size=32`"):
        plain_trainer(Trainer, tmp_path, ConceptAblation(["L1F3"], narrow))
    zero = random_sae(1)
    zero["W_dec"][:, 3] = 0
    (tmp_path / "zero").mkdir()
    torch.save(zero, tmp_path / "zero" / "layer1.sae.pt")
    with pytest.raises(SteeringError, match=r"directions of L1F3 are zero, so nothing would be ablated at layer 1"):
        plain_trainer(Trainer, tmp_path, ConceptAblation(["L1F3"], tmp_path / "zero"))
    wide = write_saes(tmp_path / "wide", [3])
    with pytest.raises(FeatureSetError, match=r"L3F1 is out of range: the model has 2 decoder layers"):
        plain_trainer(Trainer, tmp_path, ConceptAblation(["L3F1"], wide), tiny_model(num_hidden_layers=2))


def test_autocast_does_not_round_the_projection(saes: Path) -> None:
    """`bf16=True` runs the training step under autocast; what is left along the directions is fp32's rounding."""
    x = torch.randn(3, 4, D_MODEL, generator=torch.Generator().manual_seed(0))
    callback = ConceptAblation(["L1F3", "L1F9"], saes, sae_k=K)
    basis = callback.constant(random_sae(101)["W_dec"][:, [3, 9]], torch.ones(2), 1)
    with torch.autocast("cpu", torch.bfloat16):
        edited = callback.edit(x, basis)
    assert (edited @ basis).norm() < 1e-6 * (x @ basis).norm()
