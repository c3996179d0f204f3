"""The dashboard: what it shows equals what an independent reading shows, training is as it would be without."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from qscope_trl import SAEPenaltyCallback
from qscope_trl.errors import AttachError, ConfigError, DataError, QScopeWarning
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.training import dashboard as module
from qscope_trl.training import opening
from qscope_trl.training.dashboard import FeatureDashboard
from tests.forked import run_forked
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer
from tests.training.harness import arguments, pad_collate, tokenized_rows, train
from tests.training.reference import run

PENALISED, MONITORS = ["L2F40", "L1F3"], ["L1F90"]
NAMES = [*PENALISED, *MONITORS]
SETTINGS: dict[str, Any] = {
    "every": 2,
    "behaviour": "regex:w1",
    "num_samples": 5,
    "max_new_tokens": 6,
    "batch_size": 4,
    "top": 3,
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return [sentence(generator, 3 + n) for n in range(12)]


PROMPTS = ["w3 w4 w5", "w9", "w70 w71"]


def penalty(saes: Path, weight: float = 0.1) -> SAEPenaltyCallback:
    return SAEPenaltyCallback(saes, PENALISED, weight, monitor_features=MONITORS, sae_k=K)


def make(folder: Path, callbacks: list[Any], **changes: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {"learning_rate": 0.5, "max_steps": 4, "output_dir": str(folder), **changes}
    return Trainer(
        model=tiny_model(attention_dropout=0.1),
        args=arguments(**settings),
        train_dataset=tokenized_rows(),
        data_collator=pad_collate,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def acts(model: Any, ids: list[int]) -> dict[str, list[float]]:
    """Activations after TopK at every token but the first, by a plain forward and a full sort."""
    with torch.no_grad():
        _, residuals = run(model.eval(), {"input_ids": torch.tensor([ids])}, [1, 2])
    found = {}
    for name in NAMES:
        layer, index = map(int, name[1:].split("F"))
        sae = random_sae(100 + layer)
        every = residuals[layer][0] @ sae["W_enc"].T + sae["b_enc"]
        kth = every.sort(dim=-1, descending=True).values[:, K - 1]
        f = every[:, index]
        found[name] = torch.where((f >= kth) & (f > 0), f, 0)[1:].tolist()
    return found


@pytest.fixture(scope="module")
def watched(
    saes: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, RunRecord, dict[int, Any]]:
    """A run with its record, and the model's weights at each measurement."""
    folder = tmp_path_factory.mktemp("run")
    states: dict[int, Any] = {}

    class Weights(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            states.setdefault(state.global_step, {k: v.clone() for k, v in model.state_dict().items()})

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            states[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}

    callbacks = [penalty(saes), FeatureDashboard(PROMPTS, texts, **SETTINGS), Weights()]
    trainer = make(folder, callbacks, learning_rate=0.05)
    train(trainer)
    return trainer, RunRecord(folder), states


def model_at(states: dict[int, Any], step: int) -> Any:
    model = tiny_model(attention_dropout=0.1)
    model.load_state_dict(states[step])
    return model.eval()


@pytest.mark.parametrize("step", [0, 2, 4])
def test_histograms_are_those_of_an_independent_reading(watched: Any, texts: list[str], step: int) -> None:
    _, record, states = watched
    rows = {row["feature"]: row for row in record.rows("histograms") if row["step"] == step}
    assert {name: row["kind"] for name, row in rows.items()} == {
        **dict.fromkeys(PENALISED, "penalised"),
        **dict.fromkeys(MONITORS, "monitor"),
    }
    model = model_at(states, step)
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    found = [acts(model, one) for one in ids]
    for name, row in rows.items():
        values = np.array([value for one in found for value in one[name]])
        assert row["num_tokens"] == len(values) == sum(len(one) - 1 for one in ids)
        assert sum(row["counts"]) == (values > 0).sum()
        assert row["counts"] == np.histogram(values[values > 0], bins=row["edges"])[0].tolist()
        assert row["edges"][-1] >= values.max()
    assert any(sum(row["counts"]) > 3 for row in rows.values())


def test_the_same_texts_are_shown_throughout_with_the_values_of_their_tokens(watched: Any, texts: list[str]) -> None:
    _, record, states = watched
    rows = record.rows("texts")
    shown = [row["index"] for row in rows if row["step"] == 0]
    assert len(shown) == SETTINGS["top"]
    assert [(row["step"], row["index"]) for row in rows] == [(step, n) for step in (0, 2, 4) for n in shown]
    for row in rows:
        wanted = acts(model_at(states, row["step"]), tiny_tokenizer()(texts[row["index"]])["input_ids"])
        assert "".join(row["tokens"]) == texts[row["index"]]
        assert list(row["values"]) == NAMES
        for name in NAMES:
            first, *rest = row["values"][name]
            assert first is None
            assert rest == pytest.approx(wanted[name], rel=2e-3, abs=1e-6)
    # The first feature's strongest text is among them.
    strengths = [max(acts(model_at(states, 0), tiny_tokenizer()(text)["input_ids"])["L2F40"]) for text in texts]
    assert int(np.argmax(strengths)) in shown


def test_generations_come_from_each_prompt_in_turn_and_are_read_and_judged(watched: Any) -> None:
    trainer, record, states = watched
    rows = record.rows("samples")
    assert [row["step"] for row in rows] == [0] * 5 + [2] * 5 + [4] * 5
    rates = {}
    for row in rows:
        prompt = PROMPTS[row["index"] % 3]
        assert row["prompt"] == prompt
        assert row["is_shown"] is ("w1" in row["text"])
        assert row["detector"] == "regex:w1"
        ids = tiny_tokenizer()(" ".join([prompt, *row["tokens"]]))["input_ids"]
        wanted = acts(model_at(states, row["step"]), ids)
        for name in NAMES:
            first = len(prompt.split()) - 1
            assert row["values"][name] == pytest.approx(wanted[name][first:], rel=2e-3, abs=1e-6)
        rates.setdefault(row["step"], []).append(row["is_shown"])
    logged = {e["step"]: e["sae/text/rate"] for e in trainer.state.log_history if "sae/text/rate" in e}
    assert logged == {step: sum(shown) / 5 for step, shown in rates.items()}
    assert len(set(logged.values())) > 1
    recorded = {row["step"]: row["sae/text/rate"] for row in record.rows("log") if "sae/text/rate" in row}
    assert recorded == logged


def test_greedy_generations_are_the_models_own(saes: Path, texts: list[str], tmp_path: Path) -> None:
    settings = {**SETTINGS, "temperature": 0.0, "num_samples": 3, "every": 9}
    model = tiny_model(attention_dropout=0.1).eval()
    train(make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, texts, **settings)], max_steps=1))
    rows = [row for row in RunRecord(tmp_path).rows("samples") if row["step"] == 0]
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert row["text"] == tiny_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class States(TrainerCallback):  # type: ignore[misc]
    """Random states and modes at every event, after all other callbacks but the record."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _see(self, model: Any) -> None:
        modes = tuple(module.training for module in model.modules())
        self.seen.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), modes))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._see(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._see(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_is_the_same_with_and_without(
    saes: Path, texts: list[str], tmp_path: Path, checkpointing: bool
) -> None:
    """Dropout is on and texts are sampled, so that a drawn number would show; one module is out of training mode."""
    trainers, seen = [], []
    for name, more in (("with", [FeatureDashboard(PROMPTS, texts, **{**SETTINGS, "every": 1})]), ("without", [])):
        states = States()
        trainer = make(
            tmp_path / name, [penalty(saes), *more, states], logging_steps=3, gradient_checkpointing=checkpointing
        )
        trainer.model.model.layers[0].mlp.eval()
        random.seed(0)
        np.random.seed(0)
        train(trainer)
        trainers.append(trainer)
        seen.append(states.seen)
    assert seen[0] == seen[1]
    for mine, theirs in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    losses = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in trainers]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [3]
    hooks = [[len(module._forward_hooks) for module in t.model.modules()] for t in trainers]
    assert hooks[0] == hooks[1]
    assert checkpointing or not any(hooks[0])


def test_by_default_a_tenth_of_the_run_lies_between_measurements(saes: Path, texts: list[str], tmp_path: Path) -> None:
    settings = {**SETTINGS, "every": None, "num_samples": 0, "behaviour": None}
    train(make(tmp_path, [penalty(saes), FeatureDashboard((), texts, **settings)], max_steps=12))
    record = RunRecord(tmp_path)
    assert sorted({row["step"] for row in record.rows("histograms")}) == [0, 2, 4, 6, 8, 10, 12]
    assert record.rows("samples") == []


def test_texts_are_by_default_those_of_the_training_data(saes: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard((), num_samples=0)], max_steps=1)
    train(trainer)
    wanted = sum(len(row["input_ids"]) - 1 for row in tokenized_rows())
    assert {row["num_tokens"] for row in RunRecord(tmp_path).rows("histograms")} == {wanted}


def test_without_a_penalty_features_are_named_and_the_record_begins(
    saes: Path, texts: list[str], tmp_path: Path
) -> None:
    own = FeatureDashboard(
        PROMPTS, texts, saes=saes, features=["L1F3"], monitor_features=["L2F40"], sae_k=K, **SETTINGS
    )
    trainer = make(tmp_path, [own], max_steps=1)
    train(trainer)
    record = RunRecord(tmp_path)
    kinds = {row["feature"]: row["kind"] for row in record.rows("histograms")}
    assert kinds == {"L1F3": "penalised", "L2F40": "monitor"}
    assert record.get("end") is not None
    assert all(type(item).__name__ != "RunRecorder" for item in trainer.callback_handler.callbacks)


def test_a_resumed_run_goes_on_with_the_texts_of_its_record(saes: Path, texts: list[str], tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, texts, **SETTINGS)], **settings))
    before = RunRecord(tmp_path).rows("texts")
    again = make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, texts, **SETTINGS)], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = RunRecord(tmp_path).rows("texts")
    assert [(row["step"], row["index"]) for row in after] == [(row["step"], row["index"]) for row in before]
    assert after == before


def test_a_step_that_cannot_be_read_is_left_out_and_training_goes_on(
    saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise DataError("The residuals of layer 1 are not finite.")

    monkeypatch.setattr("qscope_trl.training.dashboard_reading.residual_batches", refuse)
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, texts, **SETTINGS)], max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(item.message) for item in caught if item.category is QScopeWarning]
    assert [line for line in said if "shows nothing" in line] == [
        f"`FeatureDashboard` shows nothing at step {step}: The residuals of layer 1 are not finite. Training goes on."
        for step in (0, 1)
    ]
    assert trainer.state.global_step == 1
    assert RunRecord(tmp_path).rows("histograms") == []


def test_only_the_main_process_reads_and_writes_and_all_log_the_same(
    saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes: it reads nothing and takes the rate from the first."""
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, texts, **SETTINGS)], max_steps=2)
    sent: list[Any] = []

    def broadcast(values: list[Any]) -> None:
        sent.append(values[0])
        values[0] = 0.75

    monkeypatch.setattr(opening, "broadcast_object_list", broadcast)
    monkeypatch.setattr(module.FeatureValues, "__call__", lambda *_: pytest.fail("this process reads nothing"))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(type(trainer.accelerator), "reduce", lambda self, tensor, reduction: tensor)
    dashboard = next(item for item in trainer.callback_handler.callbacks if isinstance(item, FeatureDashboard))
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=False)
    with monkeypatch.context() as inner:
        inner.setattr(module, "calling_trainer", lambda _: trainer)
        dashboard.on_train_begin(trainer.args, state, trainer.control)  # type: ignore[arg-type]
    dashboard.on_step_begin(trainer.args, state, trainer.control)  # type: ignore[arg-type]
    assert sent == [None]
    assert [entry["sae/text/rate"] for entry in trainer.state.log_history] == [0.75]
    dashboard.on_train_end(trainer.args, state, trainer.control)  # type: ignore[arg-type]


@pytest.mark.distributed
def test_two_processes_write_one_record_log_one_rate_and_train_as_without(saes: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes_dashboard.py")
    done = run_forked(script, str(saes), str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["with"]["processes"] == 2
    assert list(ranks[0]["with"]["rates"]) == ["0", "2", "4"]
    assert ranks[0]["with"]["weights"] == ranks[0]["without"]["weights"]
    rows = RunRecord(tmp_path / "with").rows("samples")
    assert [(row["step"], row["index"]) for row in rows] == [(step, n) for step in (0, 2, 4) for n in range(5)]


@pytest.mark.parametrize(("zero_stage", "fsdp"), [(3, False), (0, True)], ids=["zero3", "fsdp"])
def test_spread_weights_are_not_run_on_one_process(
    saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int, fsdp: bool
) -> None:
    trainer = make(tmp_path, [penalty(saes)], max_steps=1)
    monkeypatch.setattr(module.FeatureValues, "__call__", lambda *_: pytest.fail("the model was run"))
    monkeypatch.setattr(module, "calling_trainer", lambda _: trainer)
    plugin = SimpleNamespace(zero_stage=zero_stage)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=1)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", fsdp)
    dashboard = FeatureDashboard(PROMPTS, texts, **SETTINGS)
    state = SimpleNamespace(global_step=0, max_steps=1, is_world_process_zero=True)
    with pytest.warns(QScopeWarning, match=r"spread over processes \(FSDP, ZeRO-3 or tensor"):
        dashboard.on_train_begin(trainer.args, state, trainer.control)  # type: ignore[arg-type]
    dashboard.on_step_begin(trainer.args, state, trainer.control)  # type: ignore[arg-type]
    assert RunRecord(tmp_path).rows("samples") == []


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Training data without places: nothing may be taken from it."""

    def __iter__(self) -> Any:
        return iter(tokenized_rows())


def test_wrong_use_is_refused(saes: Path, texts: list[str], tmp_path: Path) -> None:
    for setting, value in (
        ("every", 0),
        ("num_samples", -1),
        ("max_new_tokens", 0),
        ("top", 0),
        ("max_length", 1),
        ("batch_size", 0),
    ):
        with pytest.raises(ConfigError, match=f"`{setting}` of the dashboard is {value}"):
            FeatureDashboard(**{setting: value})
    with pytest.raises(ConfigError, match="`temperature` of the dashboard is nan"):
        FeatureDashboard(temperature=float("nan"))
    with pytest.raises(ConfigError, match="`saes` and `features` of the dashboard come together"):
        FeatureDashboard(features=["L1F3"])
    with pytest.raises(ConfigError, match="`behaviour` is 'french'"):
        FeatureDashboard(behaviour="french")
    with pytest.raises(DataError, match="`texts` of the dashboard holds no text"):
        FeatureDashboard(texts=["", " "])
    with pytest.raises(AttachError, match="found no trainer above it"):
        FeatureDashboard().on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="has no features to show"):
        train(make(tmp_path, [FeatureDashboard(PROMPTS, texts)]))
    with pytest.raises(ConfigError, match="there are no prompts to generate from"):
        train(make(tmp_path, [penalty(saes), FeatureDashboard(None, texts, behaviour="chinese")]))
    with pytest.raises(DataError, match="a conversation, and its tokenizer has no chat template"):
        train(make(tmp_path, [penalty(saes), FeatureDashboard([[{"role": "user", "content": "w3"}]], texts)]))
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard(())])
    trainer.train_dataset = Stream()
    with pytest.raises(ConfigError, match="has no texts and no prompts"):
        train(trainer)
    trainer = make(tmp_path, [penalty(saes), FeatureDashboard(PROMPTS, texts)])
    trainer.processing_class = None
    with pytest.raises(AttachError, match="needs the trainer's tokenizer"):
        train(trainer)
