"""Drift while training: right figures on whatever is trained, and training as it would be without."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOTrainer

from qscope_trl import FeatureReward, SAESuite
from qscope_trl.monitor.drift import MIN_FIRINGS
from qscope_trl.sae.topk_sae import TopKSAE
from qscope_trl.training import drift_probe
from qscope_trl.training.drift import DriftMonitor
from tests.analysis.dense import decoded, dense, unexplained
from tests.tiny import K, random_sae, tiny_model, tiny_tokenizer
from tests.training.drift_harness import LAYERS, NO_LIMITS, make, monitor, rows, texts
from tests.training.harness import GradientRecorder, arguments, sft_dataset, tokenized_rows, train
from tests.training.penalty_harness import callback, hook_count, make_trainer
from tests.training.reference import run
from tests.training.rollout_harness import features, grpo_trainer, parity

__all__ = ["texts"]  # a fixture


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
