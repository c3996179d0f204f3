"""What attaching promises: nothing changes at weight 0, nothing remains afterwards, every misuse speaks up."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from qscope_trl import FeatureSet, GroupCollator, SAESuite, attach
from qscope_trl.errors import (
    AttachError,
    CheckpointError,
    ConfigError,
    DataError,
    FeatureSetError,
    ModelStructureError,
    QScopeWarning,
)
from qscope_trl.features import Feature
from qscope_trl.training.penalty import PENALTIES
from tests.tiny import D_MODEL, D_SAE, K, tiny_model, write_saes
from tests.training.harness import arguments, pad_collate, tokenized_rows, train
from tests.training.penalty_harness import NAMES, callback, hook_count, make_trainer, plain_trainer


def is_trained(row: dict[str, list[int]], position: int) -> bool:
    """Prepared SFT rows carry labels, or in older TRL a completion mask."""
    return row["labels"][position] != -100 if "labels" in row else bool(row["completion_mask"][position])


# --- weight 0, removal, restoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PENALTIES)
def test_weight_zero_trains_bit_for_bit_like_the_plain_trainer(saes: Path, tmp_path: Path, kind: str) -> None:
    plain = make_trainer(tmp_path, [])
    train(plain)
    measured = make_trainer(tmp_path, [callback(saes, weight=0.0, penalty_kind=kind)])
    train(measured)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, measured.model.state_dict()[name]), name
    assert [e["loss"] for e in plain.state.log_history if "loss" in e] == [
        e["loss"] for e in measured.state.log_history if "loss" in e
    ]
    assert all("sae/penalty" in e for e in measured.state.log_history if "loss" in e)


def test_positive_weight_lowers_the_penalty(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes, weight=1.0)], num_train_epochs=6)
    train(trainer)
    penalties = [e["sae/penalty"] for e in trainer.state.log_history if "loss" in e]
    assert sum(penalties[-5:]) < 0.5 * sum(penalties[:5])


def test_training_leaves_no_hook_and_no_wrapper(saes: Path, tmp_path: Path) -> None:
    model = tiny_model()
    before = hook_count(model)
    trainer = make_trainer(tmp_path, [cb := callback(saes)], model)
    assert hook_count(model) > before
    assert cb.attachment.is_attached
    train(trainer)
    assert hook_count(model) == before
    assert "compute_loss" not in vars(trainer)
    assert "log" not in vars(trainer)
    assert not any("sae" in name for name in model.state_dict())


def test_a_failing_step_leaves_no_hook(saes: Path, tmp_path: Path) -> None:
    model = tiny_model()
    before = hook_count(model)
    trainer = make_trainer(tmp_path, [callback(saes)], model)

    def explode(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("boom")

    trainer.model.get_decoder().layers[2].mlp.forward = explode
    with pytest.raises(RuntimeError, match="boom"):
        train(trainer)
    assert hook_count(model) == before


def test_attach_as_context_manager_takes_everything_off_after_an_error(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    before = hook_count(trainer.model)
    attached = attach(trainer, saes, NAMES, penalty_weight=0.1, sae_k=K)
    assert attached.is_attached

    def interrupted() -> None:
        with attached:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not attached.is_attached
    assert hook_count(trainer.model) == before


class ShortOfMemory(Trainer):
    """Has memory for one row at a time."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("by", ["callback", "attach"])
def test_the_penalty_stays_when_the_batch_size_is_halved(by: str, saes: Path, tmp_path: Path) -> None:
    cb = callback(saes) if by == "callback" else None
    trainer = plain_trainer(ShortOfMemory, tmp_path, cb, auto_find_batch_size=True)
    if by == "attach":
        with attach(trainer, saes, NAMES, penalty_weight=0.5, sae_k=K):
            train(trainer)
    else:
        train(trainer)
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 10
    assert all("sae/penalty" in e for e in logged)
    assert hook_count(trainer.model) == 0


def test_attach_gives_the_same_run_as_the_callback(saes: Path, tmp_path: Path) -> None:
    one = make_trainer(tmp_path, [callback(saes)])
    train(one)
    two = make_trainer(tmp_path, [])
    with attach(two, saes, NAMES, penalty_weight=0.5, sae_k=K):
        train(two)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name


def test_model_init_moves_the_hooks_to_the_new_model(saes: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        args=arguments(TrainingArguments, output_dir=str(tmp_path), remove_unused_columns=False),
        model_init=lambda: tiny_model(),
        train_dataset=tokenized_rows(),
        data_collator=pad_collate,
        callbacks=[callback(saes)],
    )
    train(trainer)
    assert all("sae/penalty" in e for e in trainer.state.log_history if "loss" in e)
    assert hook_count(trainer.model) == 0


def test_an_unused_trainer_is_collected(saes: Path, tmp_path: Path) -> None:
    """The attachment and its trainer refer to each other, but nothing global holds them."""
    import weakref

    trainer = make_trainer(tmp_path, [callback(saes)])
    watch = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert watch() is None


# --- evaluation and metrics ------------------------------------------------------------------------------------------


def test_evaluation_loss_is_unchanged_and_the_penalty_is_reported(saes: Path, tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, []).evaluate()
    measured = make_trainer(tmp_path, [callback(saes, weight=3.0)]).evaluate()
    assert measured["eval_loss"] == plain["eval_loss"]
    assert measured["eval_sae/penalty"] > 0
    assert "eval_sae/L1F3/mean_pre_act" in measured


def test_evaluation_during_training_reports_the_penalty(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes)], eval_strategy="steps", eval_steps=2)
    train(trainer)
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluations) >= 2
    assert all(e["eval_sae/penalty"] > 0 for e in evaluations)


def test_predictions_do_not_leak_into_the_next_evaluation(saes: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(Trainer, tmp_path, callback(saes))
    alone = trainer.evaluate(tokenized_rows(4, seed=3))
    trainer.predict(tokenized_rows(6, seed=4))
    after = trainer.evaluate(tokenized_rows(4, seed=3))
    assert after["eval_sae/penalty"] == alone["eval_sae/penalty"] > 0


def test_logged_means_equal_a_direct_computation(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback(saes, weight=0.0)], learning_rate=0.0, logging_steps=5)
    train(trainer)
    logged = next(e for e in trainer.state.log_history if "loss" in e)
    sae = torch.load(saes / "layer1.sae.pt")
    model, values = tiny_model(), []
    for row in trainer.train_dataset:
        residual = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
        f = (residual @ sae["W_enc"][3] + sae["b_enc"][3]).tolist()
        values += [f[t - 1] for t in range(2, len(row["input_ids"])) if is_trained(row, t)]
    assert logged["sae/L1F3/mean_pre_act"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert logged["sae/L1F3/firing_rate"] == pytest.approx(sum(v > 0 for v in values) / len(values))
    hinge = sum(max(v, 0.0) for v in values) / len(values)
    assert logged["sae/penalty"] == pytest.approx(logged["sae/L1/penalty"] + logged["sae/L2/penalty"])
    assert logged["sae/L1/penalty"] == pytest.approx(hinge, abs=1e-5)


def test_monitors_are_measured_and_never_penalised(saes: Path, tmp_path: Path) -> None:
    without = make_trainer(tmp_path, [callback(saes)])
    train(without)
    monitored = make_trainer(tmp_path, [callback(saes, monitor_features=["L2F9", "L3F1"])])
    train(monitored)
    for name, value in without.model.state_dict().items():
        assert torch.equal(value, monitored.model.state_dict()[name]), name
    logged = [e for e in monitored.state.log_history if "loss" in e]
    assert all({"sae/monitor/L2F9/mean_pre_act", "sae/monitor/L3F1/firing_rate"} <= e.keys() for e in logged)


# --- groups ----------------------------------------------------------------------------------------------------------


def grouped(**changes: Any) -> FeatureSet:
    thresholds = {"en": -0.3, "de": 0.2}
    return FeatureSet(features=(Feature(layer=1, index=3, threshold=0.05, group_thresholds=thresholds),), **changes)


def group_of(ids: list[int]) -> str:
    return ("en", "de", "zh")[ids[0] % 3]


def expected_group_penalty(saes: Path, rows: Any, thresholds: dict[str, float | None]) -> float:
    sae, model = torch.load(saes / "layer1.sae.pt"), tiny_model()
    total, count = 0.0, 0
    for row in rows:
        threshold = thresholds[group_of(row["input_ids"])]
        if threshold is None:
            continue
        residual = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
        f = (residual @ sae["W_enc"][3] + sae["b_enc"][3]).tolist()
        hinge = [max(f[t - 1] - threshold, 0.0) for t in range(2, len(f)) if is_trained(row, t)]
        total, count = total + sum(hinge), count + len(hinge)
    return total / count


@pytest.mark.parametrize("by", ["group_fn", "padding-free", "column"])
def test_groups_choose_thresholds_and_the_target_is_exempt(saes: Path, tmp_path: Path, by: str) -> None:
    features = grouped(target_group="zh")
    settings: dict[str, Any] = {"learning_rate": 0.0, "logging_steps": 5}
    if by == "padding-free":
        settings.update(padding_free=True, max_length=None)
    fn = None if by == "column" else group_of
    cb = callback(saes, features, group_fn=fn)
    if by == "column":
        rows = [{**row, "language": group_of(row["input_ids"])} for row in tokenized_rows()]
        trainer: Any = Trainer(
            tiny_model(),
            args=arguments(TrainingArguments, output_dir=str(tmp_path), remove_unused_columns=False, **settings),
            train_dataset=Dataset.from_list(rows),
            data_collator=GroupCollator(pad_collate, "language"),
            callbacks=[cb],
        )
    else:
        trainer = make_trainer(tmp_path, [cb], **settings)
    train(trainer)
    logged = next(e for e in trainer.state.log_history if "loss" in e)
    wanted = expected_group_penalty(saes, trainer.train_dataset, {"en": -0.3, "de": 0.2, "zh": None})
    assert logged["sae/penalty"] == pytest.approx(wanted, rel=1e-4)


def test_group_column_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column `language`; it has `input_ids`, `labels`"):
        GroupCollator(pad_collate, "language")([{"input_ids": [1], "labels": [1]}])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_unknown_setting_is_refused_with_a_suggestion(saes: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown setting `penalty_kid`. Did you mean `penalty_kind`"):
        callback(saes, penalty_kid="topk_act")


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_negative_or_nan_weight_is_refused(saes: Path, weight: float) -> None:
    with pytest.raises(ConfigError, match=r"`penalty_weight` is .*finite number from 0"):
        callback(saes, weight=weight)


def test_missing_layer_in_the_saes_is_refused(tmp_path: Path) -> None:
    folder = write_saes(tmp_path / "saes", [0, 1])
    with pytest.raises(CheckpointError, match=r"No SAE for layer 2"):
        make_trainer(tmp_path, [callback(folder)])


def test_layer_beyond_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_saes(tmp_path / "saes", [1, 9])
    with pytest.raises(FeatureSetError, match=r"L9F3 is out of range: the model has 4 decoder layers"):
        make_trainer(tmp_path, [callback(folder, ["L9F3"])])


def test_wrong_width_is_refused_and_nothing_is_attached(tmp_path: Path) -> None:
    folder = write_saes(tmp_path / "saes", d_model=D_MODEL * 2)
    model = tiny_model()
    with pytest.raises(AttachError, match=r"width 64, but `Qwen3ForCausalLM` has `hidden_size=32`"):
        make_trainer(tmp_path, [callback(folder)], model)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["say_if_nothing_is_held_out", "describe_penalty"])
def test_an_error_halfway_leaves_nothing_attached(
    name: str, saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a warning that a user has made an error."""

    def fail(*args: Any) -> None:
        raise QScopeWarning("2 of the monitors were trained on before")

    trainer = make_trainer(tmp_path, [])
    before = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    cb = callback(saes)
    with monkeypatch.context() as patched:
        patched.setattr(f"qscope_trl.training.attach.{name}", fail)
        with pytest.raises(QScopeWarning, match="2 of the monitors"):
            cb.attach(trainer)
    assert hook_count(trainer.model) == 0
    assert not cb.attachment.is_attached
    assert (set(vars(trainer)), list(trainer.callback_handler.callbacks)) == before
    cb.attach(trainer)
    assert cb.attachment.is_attached


def test_feature_index_beyond_the_sae_is_refused(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureSetError, match=rf"L1F{D_SAE} is out of range: the SAE has `d_sae={D_SAE}`"):
        make_trainer(tmp_path, [callback(saes, [f"L1F{D_SAE}"])])


def test_feature_set_of_another_model_is_refused(saes: Path, tmp_path: Path) -> None:
    features = FeatureSet.from_names(NAMES, model="other/model", sae="other/sae", d_model=4096)
    with pytest.raises(FeatureSetError, match=r"made for `d_model=4096` \(model 'other/model'"):
        make_trainer(tmp_path, [callback(saes, features)])


def test_feature_set_of_another_sae_of_the_same_shape_is_refused(saes: Path, tmp_path: Path) -> None:
    suite = SAESuite.from_pretrained(saes, k=K)
    prints = {1: suite.fingerprint(1), 2: suite.fingerprint(3)}
    features = FeatureSet.from_names(NAMES, sae="mine", sae_fingerprints=prints)
    with pytest.raises(FeatureSetError, match=r"SAE of layer 2 .* is not the one this FeatureSet was made with"):
        make_trainer(tmp_path, [callback(saes, features)])


def test_model_without_decoder_layers_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        model=torch.nn.Linear(2, 2), args=SimpleNamespace(n_gpu=1), compute_loss=print, add_callback=print
    )
    with pytest.raises(ModelStructureError, match=r"`Linear` has no transformers `config`"):
        callback(saes).attach(trainer)
