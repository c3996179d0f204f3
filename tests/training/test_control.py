"""The control arm is the penalty on other features, and nothing else about it differs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from qscope_trl import FeatureSet, bundled
from qscope_trl.errors import AttachError, ConfigError, DataError
from qscope_trl.features import Feature
from qscope_trl.training import control, opening, sft
from qscope_trl.training.attach import attachment_of
from qscope_trl.training.callback import STATE_FILE
from tests.tiny import K, random_sae, tiny_model, tiny_tokenizer
from tests.training.harness import train
from tests.training.penalty_harness import callback, make_trainer, sae_callbacks

CHOSEN = FeatureSet(
    features=(Feature(layer=1, index=3, weight=2.0, threshold=0.1), Feature(layer=2, index=40, weight=0.5))
)
MONITORS = ["L2F41", "L3F9"]


def controlled(saes: Path, **settings: Any) -> Any:
    return callback(saes, CHOSEN, monitor_features=MONITORS, penalty_control="random", **settings)


def test_the_penalty_is_on_other_features_of_the_same_layers_with_the_same_weights(saes: Path, tmp_path: Path) -> None:
    cb = controlled(saes)
    make_trainer(tmp_path, [cb])
    drawn = cb.attachment.features
    assert [(f.layer, f.weight) for f in drawn.features] == [(1, 2.0), (2, 0.5)]
    assert not {*map(str, drawn.ids)} & {"L1F3", "L2F40", *MONITORS}
    assert cb.attachment.control_of == CHOSEN
    # The chosen features are measured as they would have been penalised: with their own thresholds.
    monitors = cb.attachment.monitor_features
    assert [str(i) for i in monitors.ids] == ["L1F3", "L2F40", *MONITORS]
    assert monitors.features[0] == CHOSEN.features[0]


def test_rates_and_thresholds_are_those_of_the_training_data(saes: Path, tmp_path: Path) -> None:
    cb = controlled(saes)
    trainer = make_trainer(tmp_path, [cb])
    model = tiny_model().eval()
    for feature in cb.attachment.features.features:
        sae, values, active = random_sae(100 + feature.layer), [], []
        for row in trainer.train_dataset:
            output = model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
            f = output.hidden_states[feature.layer + 1][0, 1:] @ sae["W_enc"].T + sae["b_enc"]
            values += f[:, feature.index].tolist()
            top = f.topk(K, dim=-1)
            active += ((top.indices == feature.index) & (top.values > 0)).any(-1).tolist()
        assert feature.threshold == pytest.approx(sum(values) / len(values), abs=1e-5)
        assert feature.evidence["token_rate"] == pytest.approx(sum(active) / len(active))


def test_training_is_that_on_the_drawn_features_bit_for_bit(saes: Path, tmp_path: Path) -> None:
    cb = controlled(saes)
    arm = make_trainer(tmp_path / "arm", [cb])
    train(arm)
    named = make_trainer(tmp_path / "named", [callback(saes, cb.attachment.features)])
    train(named)
    for name, value in arm.model.state_dict().items():
        assert torch.equal(value, named.model.state_dict()[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(arm.model.parameters(), tiny_model().parameters(), strict=True))


def test_the_draw_leaves_model_and_random_states_alone(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in trainer.model.named_parameters()}
    cb = controlled(saes)
    cb.attach(trainer)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in trainer.model.named_parameters())
    assert trainer.model.training
    cb.detach()
    assert sae_callbacks(trainer) == []


def test_the_trainers_seed_decides_the_draw(saes: Path, tmp_path: Path) -> None:
    drawn = []
    for seed in (1, 1, 2, 3):
        cb = controlled(saes)
        make_trainer(tmp_path, [cb], seed=seed, data_seed=0)
        drawn.append(cb.attachment.features)
    assert drawn[0] == drawn[1]
    assert any(other.ids != drawn[0].ids for other in drawn[2:])


def test_the_record_says_what_the_control_is_of_and_what_was_trained_on(saes: Path, tmp_path: Path) -> None:
    cb = controlled(saes)
    train(make_trainer(tmp_path, [cb]))
    run = json.loads((tmp_path / "sae_record" / "run.json").read_text())
    assert run["control"]["kind"] == "random"
    assert FeatureSet.from_dict(run["control"]["of"]) == CHOSEN
    assert FeatureSet.from_dict(run["features"]) == cb.attachment.features
    assert set(run["uses"]) == {str(i) for i in cb.attachment.features.ids}


def test_a_control_raises_no_alarm(saes: Path, tmp_path: Path) -> None:
    cb = controlled(saes)
    trainer = make_trainer(tmp_path, [cb])
    assert cb.attachment.metrics.alarm is None
    train(trainer)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("sae/monitor/L1F3/mean_pre_act" in entry and "sae/alarm" not in entry for entry in logged)


def test_a_resumed_control_keeps_the_features_of_its_checkpoint(saes: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    first = controlled(saes)
    train(make_trainer(tmp_path, [first], **settings))
    state = json.loads((tmp_path / "checkpoint-3" / STATE_FILE).read_text())
    assert FeatureSet.from_dict(state["control"]) == first.attachment.features
    # Another model, from which others would be drawn.
    again = controlled(saes)
    trainer = make_trainer(tmp_path, [again], model=tiny_model(seed=5), **settings)
    assert again.attachment.features != first.attachment.features
    train_resumed(trainer, tmp_path / "checkpoint-3")
    assert again.attachment.features == first.attachment.features
    assert again.attachment.control_of == CHOSEN
    drawn = str(first.attachment.features.ids[0])
    assert f"sae/{drawn}/mean_pre_act" in trainer.state.log_history[-2]


def train_resumed(trainer: Any, checkpoint: Path) -> None:
    trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7]),
        ({"input_ids": torch.tensor([5, 6])}, [5, 6]),
        ({"prompt_ids": [5, 6], "completion_ids": [7]}, [5, 6, 7]),
        ({"prompt_ids": [5], "chosen_ids": [8], "rejected_ids": [9]}, [5, 8]),
        ({"prompt": "w5 w6", "completion": " w7"}, [5, 6, 7]),
        ({"text": "w9"}, [9]),
        ({"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": None}]}, [5]),
    ],
    ids=["ids", "tensor", "prompt-completion", "preference", "texts", "text", "messages"],
)
def test_rows_of_trainers_are_read(row: dict[str, Any], wanted: list[int]) -> None:
    rows = [row] if len(wanted) > 1 else [row, {"input_ids": [2, 3]}]
    trainer = SimpleNamespace(train_dataset=rows, processing_class=tiny_tokenizer())
    assert control.training_ids(trainer)[0] == wanted


def test_of_many_rows_evenly_spaced_ones_are_read_and_of_a_stream_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "NUM_TEXTS", 3)
    data = Dataset.from_list([{"input_ids": [n, n]} for n in range(2, 12)])
    for dataset, wanted in ((data, [2, 5, 8]), (data.to_iterable_dataset(), [2, 3, 4])):
        trainer = SimpleNamespace(train_dataset=dataset, processing_class=None)
        assert [ids[0] for ids in control.training_ids(trainer)] == wanted


def test_a_control_without_data_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer, cb = make_trainer(tmp_path, []), controlled(saes)
    data, trainer.train_dataset = trainer.train_dataset, None
    with pytest.raises(AttachError, match="draws features on the training data, and the trainer has no"):
        cb.attach(trainer)
    trainer.train_dataset = Dataset.from_list([{"pixels": [1.0]}])
    with pytest.raises(DataError, match="finds no text in the training data, whose columns are: `pixels`"):
        cb.attach(trainer)
    assert sae_callbacks(trainer) == []
    # A second try draws, too, instead of penalising the chosen features.
    trainer.train_dataset = data
    assert cb.attach(trainer).attachment.control_of == CHOSEN


def test_a_control_on_weights_that_are_spread_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    next(trainer.model.parameters()).ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(AttachError, match=r"weights are spread over processes .*matched_random_features"):
        controlled(saes).attach(trainer)


def test_a_control_of_another_kind_is_refused(saes: Path) -> None:
    with pytest.raises(ConfigError, match="`penalty_control` is 'shuffled'; choose one of none, random"):
        callback(saes, CHOSEN, penalty_control="shuffled")


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("fails", [False, True], ids=["a set", "an error"])
def test_other_processes_take_what_the_main_one_drew(
    is_main: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UnsendableError(Exception):
        """As some libraries' errors, which cannot be pickled: the others would wait for ever."""

        def __reduce__(self) -> Any:
            raise TypeError

    def draw(*args: Any) -> FeatureSet:
        if fails:
            raise UnsendableError("no text")
        return CHOSEN

    sent = [None, "UnsendableError: no text"] if fails else [CHOSEN, None]

    def broadcast(found: list[Any]) -> None:
        assert found == (sent if is_main else [None, None])
        pickle.dumps(found)
        found[:] = sent

    monkeypatch.setattr(control, "_draw", draw)
    monkeypatch.setattr(opening, "broadcast_object_list", broadcast)
    accelerator = SimpleNamespace(num_processes=2)
    trainer: Any = SimpleNamespace(accelerator=accelerator, is_world_process_zero=lambda: is_main)
    suite: Any = None
    if fails:
        with pytest.raises(UnsendableError if is_main else AttachError, match="no text"):
            control.draw_control(trainer, suite, CHOSEN, None)
    else:
        assert control.draw_control(trainer, suite, CHOSEN, None) is CHOSEN


def test_the_command_draws_a_control_and_switches_the_alarm_off(tmp_path: Path) -> None:
    shared = [
        "--model_name_or_path", str(bundled.MODEL), "--dataset_name", bundled.data_path("demo:sft_validation"),
        "--sae_path", str(bundled.saes()), "--sae_features", "L0F124", "--monitor_features", "L3F740",
        "--penalty_weight", "0.1", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false",
        "--max_steps", "1", "--report_to", "none",
    ]  # fmt: skip
    flags = (["--penalty_control", "random"], ["--monitor_alarm", "false"], [])
    found = [attachment_of(sft.build_trainer(sft.parse([*shared, *more]))) for more in flags]
    assert [str(i) for one in found for i in one.features.ids][1:] == ["L0F124", "L0F124"]
    assert "L0F124" not in map(str, found[0].features.ids)
    assert [str(i) for i in found[0].monitor_features.ids] == ["L0F124", "L3F740"]
    assert [one.metrics.alarm is None for one in found] == [True, True, False]
