"""Drift while training: right figures at the right steps, at a bounded cost, and training as it would be without."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig, DPOTrainer, GRPOTrainer

from qscope_trl import FeatureReward, SAESuite
from qscope_trl.errors import AttachError, ConfigError, DataError, QScopeWarning
from qscope_trl.monitor.drift import MIN_FIRINGS, DriftLimits, load_reference, save_reference
from qscope_trl.sae.topk_sae import TopKSAE
from qscope_trl.training import drift, drift_measure, drift_probe, opening
from qscope_trl.training.drift import DriftMonitor, Pace
from qscope_trl.training.drift_measure import REFERENCE_FILE
from tests.analysis.dense import decoded, dense, unexplained
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes
from tests.training.harness import GradientRecorder, arguments, pad_collate, sft_dataset, tokenized_rows, train
from tests.training.penalty_harness import callback, hook_count, make_trainer
from tests.training.reference import run
from tests.training.rollout_harness import features, grpo_trainer, parity

LAYERS = [1, 2]
NO_LIMITS = DriftLimits(max_fvu_ratio=None, min_jaccard=None, min_residual_cosine=None, max_dead_rate=None)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return ["", *(sentence(generator, 25 + n % 9) for n in range(10))]


def make(tmp_path: Path, callbacks: list[Any], model: Any = None, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {"learning_rate": 1.0, "max_steps": 4, "max_grad_norm": 1.0, "output_dir": str(tmp_path), **changes}
    return Trainer(
        model=tiny_model(attention_dropout=0.1) if model is None else model,
        args=arguments(**settings),
        train_dataset=tokenized_rows(),
        data_collator=pad_collate,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sae_record" / "drift.jsonl").read_text().splitlines()]


def monitor(texts: list[str], saes: Any, **changes: Any) -> DriftMonitor:
    return DriftMonitor(texts, saes, **{"layers": LAYERS, "sae_k": K, "limits": NO_LIMITS, **changes})


@torch.no_grad()
def shown(model: Any, texts: list[str]) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Residuals of all tokens but the first of each text, and log-probabilities, fp64; one text at a time."""
    model.eval()
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    logits = []
    for text in texts:
        ids = tiny_tokenizer()(text).input_ids
        if ids:
            output, residuals = run(model, {"input_ids": torch.tensor([ids])}, LAYERS)
            logits.append(output.logits[0, 1:].double().log_softmax(-1))
            for layer in LAYERS:
                found[layer].append(residuals[layer][0, 1:])
    return {layer: torch.cat(part).double().numpy() for layer, part in found.items()}, torch.cat(logits).numpy()


def wanted(before: Any, after: Any) -> tuple[dict[str, dict[str, float]], float]:
    figures = {}
    for layer in LAYERS:
        sae = TopKSAE(**random_sae(100 + layer), k=K)
        x, y = before[0][layer], after[0][layer]
        a, b = (dense(sae, torch.from_numpy(side)) for side in (x, y))
        both, either = (a > 0) & (b > 0), (a > 0) | (b > 0)
        alive = (a > 0).sum(0) >= MIN_FIRINGS
        fvu = unexplained(y, decoded(sae, b))

        def cosine(u: np.ndarray, v: np.ndarray) -> float:
            return float(((u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)).mean())

        figures[str(layer)] = {
            "fvu": fvu,
            "fvu_ratio": fvu / unexplained(x, decoded(sae, a)),
            "l0": (b > 0).sum(1).mean(),
            "dead_rate": (b[:, alive] == 0).all(0).mean(),
            "jaccard": (both.sum(1) / either.sum(1)).mean(),
            "activation_cosine": cosine(a, b),
            "residual_cosine": cosine(x, y),
        }
    log_p, log_q = before[1], after[1]
    return figures, float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_figures_equal_an_independent_computation(
    batch_size: int, saes: Path, texts: list[str], tmp_path: Path
) -> None:
    before = shown(tiny_model(), texts)
    trainer = make(tmp_path, [monitor(texts, saes, every=2, batch_size=batch_size)], tiny_model())
    train(trainer)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 2, 4]
    figures, kl = wanted(before, shown(trainer.model, texts))
    for layer, values in figures.items():
        assert found[-1]["layers"][layer] == pytest.approx(values, rel=1e-4)
        assert 0.1 < values["jaccard"] < 0.95
    assert found[-1]["kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 0.01
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items() if entry["step"] == 4}
    for name in ("fvu", "l0", "dead_rate", "jaccard", "activation_cosine", "residual_cosine"):
        assert logged[f"sae/drift/L2/{name}"] == found[-1]["layers"]["2"][name]
    assert logged["sae/drift/kl"] == found[-1]["kl"]


@pytest.mark.parametrize("how", ["plain", "lora", "bf16"])
def test_nothing_drifts_where_nothing_trains(how: str, saes: Path, texts: list[str], tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])) if how == "lora" else tiny_model()
    train(make(tmp_path, [monitor(texts, saes, every=2)], model, learning_rate=0.0, bf16=how == "bf16"))
    for row in rows(tmp_path):
        assert row["kl"] == 0
        for one in row["layers"].values():
            same = (one["fvu_ratio"], one["jaccard"], one["dead_rate"])
            assert same == (1, 1, 0)
            assert one["residual_cosine"] == pytest.approx(1, abs=1e-12)
            assert one["activation_cosine"] == pytest.approx(1, abs=1e-12)


class Watch(TrainerCallback):
    """Modes of all modules, the random state and `should_log` at the end of every step; placed after the monitor."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        modes = [module.training for module in model.modules()]
        self.seen.append((modes, torch.get_rng_state().tolist(), control.should_log, hook_count(model)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_with_and_without(
    checkpointing: bool, saes: Path, texts: list[str], tmp_path: Path
) -> None:
    """Dropout is on, so that a drawn random number would show; one module is kept in evaluation mode."""
    seen, gradients, losses = [], [], []
    for callbacks in ([monitor(texts, saes, every=1)], []):
        watch, recorder = Watch(), GradientRecorder()
        trainer = make(
            tmp_path, [*callbacks, watch, recorder], gradient_checkpointing=checkpointing, logging_steps=3,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        train(trainer)
        seen.append([*watch.seen, hook_count(trainer.model)])
        gradients.append(recorder.steps)
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert seen[0] == seen[1]
    assert losses[0] == losses[1]
    for mine, theirs in zip(*gradients, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_modules_are_left_in_their_modes_also_after_an_error() -> None:
    model = tiny_model()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        with drift_probe.evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == modes


@pytest.mark.slow
def test_a_compiled_model_is_read_and_compiled_once(saes: Path, texts: list[str], tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = shown(tiny_model(), texts)
    trainer = make(
        tmp_path, [monitor(texts, saes, every=1)], tiny_model(), torch_compile=True, torch_compile_backend="eager",
        max_steps=3,
    )  # fmt: skip
    trainer.train_dataset = tokenized_rows(1) * 6
    train(trainer)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    figures, kl = wanted(before, shown(trainer.model, texts))
    assert rows(tmp_path)[-1]["layers"]["2"] == pytest.approx(figures["2"], rel=1e-4)
    assert rows(tmp_path)[-1]["kl"] == pytest.approx(kl, rel=1e-3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    alone = make(tmp_path, [], tiny_model(), torch_compile=True, torch_compile_backend="eager", max_steps=3)
    alone.train_dataset = tokenized_rows(1) * 6
    train(alone)
    assert compiled == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# --- what is watched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before the penalty", "after it"])
def test_saes_and_layers_are_those_of_the_penalty(first: bool, saes: Path, texts: list[str], tmp_path: Path) -> None:
    penalty = callback(saes, ["L1F3"], monitor_features=["L3F9"])
    watcher = DriftMonitor(texts, limits=NO_LIMITS)
    trainer = make_trainer(tmp_path, [watcher, penalty] if first else [penalty, watcher], max_steps=2)
    train(trainer)
    assert list(rows(tmp_path)[-1]["layers"]) == ["1", "3"]
    run_file = json.loads((tmp_path / "sae_record" / "run.json").read_text())
    facts = run_file["drift"]
    assert (facts["layers"], facts["num_texts"], facts["on_drift"]) == ([1, 3], 10, "warn")
    assert facts["num_tokens"] == sum(len(tiny_tokenizer()(text).input_ids) - 1 for text in texts if text)
    assert facts["reference_mib"] > 0


def test_saes_of_a_feature_reward_are_watched_in_grpo(saes: Path, texts: list[str], tmp_path: Path) -> None:
    reward = FeatureReward(features(), SAESuite.from_pretrained(saes, k=K), reader="policy")
    trainer = grpo_trainer(
        tmp_path, [parity, reward], kind=GRPOTrainer, callbacks=[DriftMonitor(texts, limits=NO_LIMITS)], max_steps=2,
        learning_rate=1e-2,
    )  # fmt: skip
    train(trainer)
    [first, last] = rows(tmp_path)
    assert list(last["layers"]) == ["1", "2"]
    assert first["layers"]["2"]["jaccard"] == 1 > last["layers"]["2"]["jaccard"]


def test_dpo_with_lora_is_watched(saes: Path, texts: list[str], tmp_path: Path) -> None:
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " w5 w6"} for r in sft_dataset()]
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            tiny_model(),
            args=arguments(DPOConfig, output_dir=str(tmp_path), max_steps=2, learning_rate=0.5),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(target_modules=["q_proj", "down_proj"]),
            callbacks=[monitor(texts, saes)],
        )
    train(trainer)
    [first, last] = rows(tmp_path)
    assert first["kl"] == 0 < last["kl"]


def test_the_probe_is_bounded(saes: Path, texts: list[str], tmp_path: Path) -> None:
    watcher = monitor(texts, saes, max_length=12, max_tokens=25)
    train(make(tmp_path, [watcher], max_steps=1))
    facts = json.loads((tmp_path / "sae_record" / "run.json").read_text())["drift"]
    assert (facts["num_texts"], facts["num_tokens"]) == (3, 25)
    found = drift_probe.choose_tokens(tiny_tokenizer(), texts, 12, 25)
    assert found == [tiny_tokenizer()(text).input_ids[:n] for text, n in zip(texts[1:4], (12, 12, 4), strict=True)]


def test_a_model_without_a_vocabulary_has_no_divergence(saes: Path, texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from tests.tiny import tiny_config

    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1)).float()
    trainer = make(tmp_path, [monitor(texts, saes)], model, max_steps=1)
    trainer.train_dataset = [{"input_ids": row["input_ids"], "labels": 1.0} for row in tokenized_rows()]
    trainer.data_collator = lambda batch: {
        "input_ids": torch.tensor([row["input_ids"][:3] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }
    train(trainer)
    assert all(row["kl"] is None for row in rows(tmp_path))
    assert not any("sae/drift/kl" in entry for entry in trainer.state.log_history)


def test_the_penaltys_averages_are_those_without_a_monitor(saes: Path, texts: list[str], tmp_path: Path) -> None:
    """A log event of ours between its own must not close them."""
    found = []
    for watchers in ([DriftMonitor(texts, every=1, limits=NO_LIMITS)], []):
        trainer = make_trainer(tmp_path, [callback(saes), *watchers], max_steps=4, logging_steps=2)
        train(trainer)
        ends = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append([{k: v for k, v in entry.items() if k != "epoch"} for entry in ends])
        assert sum("sae/drift/kl" in entry for entry in trainer.state.log_history) == 5 * len(watchers)
    assert found[0] == found[1]
    assert "sae/L2F40/firing_rate" in found[0][1]


def test_ids_go_where_the_embeddings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `device_map` over several devices; made up, as there is one here."""
    trainer = make(Path("unused"), [])
    monkeypatch.setattr(trainer.accelerator.state, "device", torch.device("cuda:1"))
    assert drift_probe._input_device(trainer) == torch.device("cuda:1")
    trainer.model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": 1}
    assert drift_probe._input_device(trainer) == torch.device("cpu")


# --- limits ------------------------------------------------------------------------------------------------------


def test_each_limit_is_spoken_of_once(saes: Path, texts: list[str], tmp_path: Path) -> None:
    limits = replace(NO_LIMITS, min_jaccard=0.97, max_kl=1e-6)
    trainer = make(tmp_path, [monitor(texts, saes, every=1, limits=limits)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if one.category is QScopeWarning]
    assert len(said) == 2
    assert "Step 1: the probe texts cross `min_jaccard`, which is 0.97 (" in said[0]
    assert "other features are active at the same tokens than on the frozen model, so the SAE may no longer" in said[0]
    assert "`max_kl`, which is 1e-06" in said[1]
    assert "next-token distributions are others than the frozen one's. Look at `sae/drift/`" in said[1]
    assert [row["action"] for row in rows(tmp_path)] == [None, *["warn"] * 4]
    assert {"L1/min_jaccard", "L2/min_jaccard", "max_kl"} >= set(rows(tmp_path)[-1]["crossed"]) > {"max_kl"}
    assert trainer.state.global_step == 4


def test_drift_stops_the_training_where_that_is_asked_for(saes: Path, texts: list[str], tmp_path: Path) -> None:
    limits = replace(NO_LIMITS, max_kl=1e-6)
    trainer = make(tmp_path, [monitor(texts, saes, every=2, limits=limits, on_drift="stop")], max_steps=8)
    with pytest.warns(QScopeWarning, match=r"Step 2: .*`max_kl`.* Training stops here: go back to an earlier"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [(row["step"], row["action"]) for row in rows(tmp_path)] == [(0, None), (2, "stop")]


class Reporter(TrainerCallback):
    """As trackio and MLflow do, it closes when training ends; what is logged then opens another run."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.is_closed = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert not self.is_closed
        self.steps += [state.global_step] if "sae/drift/kl" in logs else []

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.is_closed = True


@pytest.mark.parametrize("stops", [False, True])
def test_the_last_step_is_measured_before_reporters_close(
    stops: bool, saes: Path, texts: list[str], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or (stops and state.global_step == 3)

    reporter = Reporter()
    trainer = make(tmp_path, [reporter, Stop(), monitor(texts, saes, every=50)])
    train(trainer)
    assert reporter.steps == [0, 3 if stops else 4]
    # Its row of the record's log is there as well, though the record ends with the training.
    logged = [json.loads(line) for line in (tmp_path / "sae_record" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "sae/drift/kl" in row] == reporter.steps


def test_an_end_that_was_not_foreseen_is_measured_as_well(saes: Path, texts: list[str], tmp_path: Path) -> None:
    class StopAfterEvaluation(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer = make(tmp_path, [StopAfterEvaluation(), monitor(texts, saes, every=50)])
    trainer.eval_dataset = tokenized_rows(2)
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 2
    train(trainer)
    assert [row["step"] for row in rows(tmp_path)] == [0, 2]


# --- resuming ----------------------------------------------------------------------------------------------------


def train_from(trainer: Trainer, checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=QScopeWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_resumed_run_compares_with_the_model_it_began_with(saes: Path, texts: list[str], tmp_path: Path) -> None:
    def resumable(**changes: Any) -> Trainer:
        return make(
            tmp_path, [monitor(texts, saes, every=1, **changes)], tiny_model(), save_strategy="steps", save_steps=2
        )

    train(resumable())
    whole = rows(tmp_path)
    train_from(resumable(), tmp_path / "checkpoint-2")
    again = rows(tmp_path)
    assert [row["step"] for row in again] == [0, 1, 2, 2, 3, 4]
    for mine, theirs in zip([again[2], *again[3:]], whole[2:3] + whole[2:], strict=True):
        assert mine["layers"] == theirs["layers"]
        assert mine["kl"] == theirs["kl"] > 0

    with pytest.raises(ConfigError, match=r"has other texts or `max_tokens` than .* delete that file"):
        resumable(max_tokens=220).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = resumable()
    other.callback_handler.callbacks = [c for c in other.callback_handler.callbacks if type(c) is not DriftMonitor]
    other.add_callback(monitor(texts, saes, layers=[1]))
    with pytest.raises(ConfigError, match=r"has other layers than"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    # Into another folder: the reference is looked for beside the checkpoint, and written again.
    elsewhere = resumable()
    elsewhere.args.output_dir = str(tmp_path / "elsewhere")
    train_from(elsewhere, tmp_path / "checkpoint-2")
    assert rows(tmp_path / "elsewhere")[-1]["layers"] == whole[-1]["layers"]
    assert (tmp_path / "elsewhere" / "sae_record" / REFERENCE_FILE).is_file()

    # What another run has left in that folder is none of this one's.
    other = load_reference(tmp_path / "sae_record" / REFERENCE_FILE)
    foreign = {n: one._replace(residuals_ND=-one.residuals_ND) for n, one in other.layers.items()}
    save_reference(tmp_path / "elsewhere" / "sae_record" / REFERENCE_FILE, other._replace(layers=foreign))
    again_elsewhere = resumable()
    again_elsewhere.args.output_dir = str(tmp_path / "elsewhere")
    train_from(again_elsewhere, tmp_path / "checkpoint-2")
    assert rows(tmp_path / "elsewhere")[-1]["layers"] == whole[-1]["layers"]

    (tmp_path / "sae_record" / REFERENCE_FILE).unlink()
    anew = resumable()
    with pytest.warns(QScopeWarning, match=r"resumes at step 2, and the run's record holds no drift reference"):
        anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["kl"] for row in rows(tmp_path) if row["step"] == 2][-1] == 0


# --- cost --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(drift, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_the_interval_keeps_probes_below_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace()
    pace.see_probe(0.5, counts=False)

    def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            pace.begin_step()
            clock.now += seconds
            pace.end_step()
            clock.now += 7.0  # evaluation, saving, loading: none of it is the steps'

    steps(1, 30.0)  # the first, which compiles
    steps(3, 0.1)
    assert not pace.is_known
    assert pace.interval() is None
    assert pace.share is None
    steps(1, 0.1)
    interval = pace.interval()
    assert interval == 334  # 0.5 s at 1.5 % of 0.1 s a step
    steps(interval - 4, 0.1)
    pace.see_probe(0.5, counts=True)
    assert 0.014 < pace.share < drift.MAX_SHARE
    # Steps that have become slower are seen at the next choice, and a slower probe too, which has to be made up for.
    steps(50, 1.0)
    pace.see_probe(2.0, counts=True)
    assert pace.share == pytest.approx(2.5 / (334 * 0.1 + 50))
    assert pace.share > drift.MAX_SHARE
    assert pace.interval() == 217
    steps(217, 1.0)
    pace.see_probe(2.0, counts=True)
    assert pace.share < drift.MAX_SHARE


def test_probes_are_paid_for_where_the_first_steps_were_much_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the latest steps alone the share would still be 2.5 % at step 1000."""
    clock, pace, left = Clock(monkeypatch), Pace(), 4
    pace.see_probe(0.5, counts=False)
    shares = []
    for step in range(1500):
        pace.begin_step()
        clock.now += 10.0 if step < 5 else 0.1
        pace.end_step()
        left -= 1
        if left <= 0 and pace.is_known:
            pace.see_probe(0.5, counts=True)
            left = pace.interval()
        shares.append(pace.share or 0.0)
    assert 0.01 < max(shares[700:]) < drift.MAX_SHARE


def test_probes_come_at_the_interval_that_was_chosen(
    saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    class Ticks(TrainerCallback):
        """A step takes a second; the probe 0.044, for which 1.5 % needs three steps."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 1.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 90.0  # what others do at a step's end, such as generating, is none of its time

    watcher = monitor(texts, saes)
    original = drift.DriftProbe.measure

    def measure(self: Any) -> Any:
        clock.now += 0.044
        return original(self)

    monkeypatch.setattr(drift.DriftProbe, "measure", measure)
    trainer = make(tmp_path, [Ticks(), watcher], max_steps=12)
    train(trainer)
    found = rows(tmp_path)
    # Known after five steps, the first of which is not timed.
    assert [row["step"] for row in found] == [0, 5, 8, 11, 12]
    shares = {e["step"]: e["sae/drift/cost_share"] for e in trainer.state.log_history if "sae/drift/cost_share" in e}
    assert shares[5] == pytest.approx(0.044 / 4)
    assert shares[8] == pytest.approx(2 * 0.044 / 7)
    assert all(row["seconds"] == pytest.approx(0.044) for row in found)


def test_seconds_of_probes_are_in_the_overhead(saes: Path, texts: list[str], tmp_path: Path) -> None:
    train(make(tmp_path, [monitor(texts, saes, every=2)]))
    lines = (tmp_path / "sae_record" / "overhead.jsonl").read_text().splitlines()
    parts = sum(json.loads(line)["parts"].get("drift", 0.0) for line in lines)
    probes = sum(row["seconds"] for row in rows(tmp_path) if row["step"])
    assert parts == pytest.approx(probes, rel=0.2)


# --- other processes, and errors ---------------------------------------------------------------------------------


def test_only_the_main_process_runs_the_probe_unless_the_weights_are_spread() -> None:
    trainer = make(Path("unused"), [])
    assert not drift_probe.is_spread(trainer)
    assert drift_probe.has_logits(trainer)
    trainer.is_fsdp_enabled = True
    assert drift_probe.is_spread(trainer)
    trainer.is_fsdp_enabled = False
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    assert drift_probe.is_spread(trainer)
    assert not drift_probe.has_logits(trainer)


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("when", ["the reference", "the figures"])
def test_what_fails_on_the_main_process_ends_all_of_them(
    is_main: bool, when: str, saes: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for what the main process tells them, so it tells them that too."""
    probe = drift.DriftProbe(make(tmp_path, []), monitor(texts, saes)._settings)
    told: list[Any] = []

    def broadcast(found: list[Any]) -> None:
        told.append(list(found))
        if not is_main:
            found[:] = [None, "OutOfMemoryError: no memory"]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(opening, "broadcast_object_list", broadcast)
    monkeypatch.setattr(drift_measure, "run_probe", fail)
    probe.trainer = SimpleNamespace(
        model=probe.trainer.model, accelerator=SimpleNamespace(num_processes=2, state=None), args=probe.trainer.args,
        is_world_process_zero=lambda: is_main,
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError if is_main else AttachError, match="no memory"):
        probe.take_reference(0, stored=False) if when == "the reference" else probe.measure()
    assert told == [[None, "OutOfMemoryError: no memory" if is_main else None]]


def test_without_a_record_nothing_is_written(saes: Path, texts: list[str], tmp_path: Path) -> None:
    trainer = make(tmp_path, [monitor(texts, saes, record=False)])
    train(trainer)
    assert not (tmp_path / "sae_record").exists()
    assert any("sae/drift/kl" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("setting", ["every", "max_length", "max_tokens", "batch_size", "kl_top"])
def test_numbers_that_cannot_be_are_refused(setting: str, saes: Path, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"`{setting}` of `DriftMonitor` is -1; it is a whole number from"):
        DriftMonitor(texts, saes, **{setting: -1})


def test_wrong_use_is_refused(saes: Path, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`on_drift` is 'halt'; choose `warn` or `stop`"):
        DriftMonitor(texts, saes, on_drift="halt")  # type: ignore[arg-type]
    for wrong in (["", " "], "one text"):
        with pytest.raises(DataError, match="`texts` of `DriftMonitor` holds no text"):
            DriftMonitor(wrong, saes)
    with pytest.raises(AttachError, match=r"found no trainer .*`callbacks`"):
        monitor(texts, saes).on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    for error, message, watcher in (
        (AttachError, "was given no SAEs, and the trainer has neither", DriftMonitor(texts)),
        (ConfigError, "was given SAEs without `layers`", DriftMonitor(texts, saes)),
        (AttachError, r"is to watch layer 7, but the model has layers 0-3", monitor(texts, saes, layers=[7])),
        (DataError, "has a token after position 0", monitor(["w3", "w4"], saes)),
    ):
        with pytest.raises(error, match=message):
            train(make(tmp_path, [watcher]))
    with pytest.warns(QScopeWarning, match="has 24 tokens; below 200 its figures are rough"):
        make(tmp_path, [monitor(texts[:2], saes)], max_steps=1).train()
    trainer = make(tmp_path, [monitor(texts, saes)])
    trainer.processing_class = None
    with pytest.raises(AttachError, match="`DriftMonitor` needs the trainer's tokenizer"):
        train(trainer)
    narrow = write_saes(tmp_path / "narrow", d_model=16)
    with pytest.raises(AttachError, match=r"reads residuals of width 16, but .* has `hidden_size=32`"):
        train(make(tmp_path, [monitor(texts, narrow)]))
