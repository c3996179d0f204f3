"""Rules watched on fixed texts: right figures at the right steps, and training as it would be without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from qscope_trl import SAESuite
from qscope_trl.activations.feature_table import encode_table
from qscope_trl.errors import AttachError, ConfigError, DataError, RuleError
from qscope_trl.rules import compile_rule
from qscope_trl.training.rule_monitor import RuleMonitor
from tests.tiny import K, sentence, tiny_model, tiny_tokenizer
from tests.training.harness import arguments, pad_collate, tokenized_rows, train

RULES = {"loops": "any(L1: 3, 90; L2F40 > 0.2)", "calm": "not rate(L2F7) > 0.1"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return ["", *(sentence(generator, 3 + n) for n in range(12))]


def make(callbacks: list[Any], **changes: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {"learning_rate": 0.5, "max_steps": 4, "max_grad_norm": 1.0, **changes}
    return Trainer(
        model=tiny_model(attention_dropout=0.1),
        args=arguments(**settings),
        train_dataset=tokenized_rows(),
        eval_dataset=tokenized_rows(4),
        data_collator=pad_collate,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def shares(model: Any, saes: Path, texts: list[str]) -> dict[str, float]:
    suite = SAESuite.from_pretrained(saes, k=K)
    found = {}
    for name, text in RULES.items():
        rule = compile_rule(text)
        table = encode_table(model, tiny_tokenizer(), suite, texts, rule.features, show_progress=False)
        found[f"sae/rule/{name}"] = float(rule.evaluate(table).mean())
    return found


def test_shares_are_those_of_the_model_at_that_step(saes: Path, texts: list[str]) -> None:
    before = shares(tiny_model(attention_dropout=0.1), saes, texts)
    trainer = make([RuleMonitor(RULES, texts, saes, sae_k=K, every=2, batch_size=4)])
    train(trainer)
    entries = [entry for entry in trainer.state.log_history if "sae/rule/loops" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    for entry, wanted in ((entries[0], before), (entries[-1], shares(trainer.model, saes, texts))):
        assert {key: entry[key] for key in wanted} == pytest.approx(wanted)
    assert entries[0]["sae/rule/loops"] != entries[-1]["sae/rule/loops"]


def test_evaluations_are_measured_too_and_no_step_twice(saes: Path, texts: list[str]) -> None:
    trainer = make([RuleMonitor(RULES, texts, saes, sae_k=K)], eval_strategy="steps", eval_steps=3)
    train(trainer)
    steps = [entry["step"] for entry in trainer.state.log_history if "sae/rule/loops" in entry]
    assert steps == [0, 3, 4]


def test_training_is_the_same_with_and_without(saes: Path, texts: list[str]) -> None:
    """Dropout is on, so that a drawn random number would show."""
    watched = make([RuleMonitor(RULES, texts, saes, sae_k=K, every=1)])
    train(watched)
    assert watched.model.training
    alone = make([])
    train(alone)
    for mine, theirs in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (watched, alone)]
    assert losses[0] == losses[1]


def test_processes_share_the_texts(saes: Path, texts: list[str]) -> None:
    """The second of two processes; what it adds to the sums and how they are divided."""
    model = tiny_model()
    seen: list[torch.Tensor] = []

    def reduce(sums: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        seen.append(sums.clone())
        return sums + torch.tensor([1.0, 2.0, float(len(texts[::2]))])

    accelerator = SimpleNamespace(
        num_processes=2, process_index=1, device="cpu", reduce=reduce, state=SimpleNamespace(deepspeed_plugin=None)
    )
    trainer = SimpleNamespace(model=model, accelerator=accelerator, processing_class=tiny_tokenizer())
    found = RuleMonitor(RULES, texts, saes, sae_k=K).measure(trainer)
    mine = shares(model, saes, texts[1::2])
    count = len(texts[1::2])
    held = [round(mine[f"sae/rule/{name}"] * count) for name in RULES]
    assert seen[0].tolist() == [*held, count]
    assert list(found.values()) == pytest.approx([(held[0] + 1) / len(texts), (held[1] + 2) / len(texts)])


def test_spread_weights_are_refused(saes: Path, texts: list[str]) -> None:
    for zero_stage, fsdp in ((3, False), (0, True)):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage))
        trainer = SimpleNamespace(
            model=tiny_model(), accelerator=SimpleNamespace(state=state), is_fsdp_enabled=fsdp, processing_class=None
        )
        with pytest.raises(AttachError, match=r"weights are spread over the processes \(FSDP or ZeRO-3\)"):
            RuleMonitor(RULES, texts, saes, sae_k=K).measure(trainer)


def test_wrong_use_is_refused(saes: Path, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="`rules` is empty"):
        RuleMonitor({}, texts, saes)
    with pytest.raises(ConfigError, match="`every` is 0"):
        RuleMonitor(RULES, texts, saes, every=0)
    with pytest.raises(DataError, match="`texts` holds no text"):
        RuleMonitor(RULES, ["", " "], saes)
    with pytest.raises(RuleError, match="L1F500 is not there"):
        train(make([RuleMonitor({"x": "L1F500"}, texts, saes, sae_k=K)]))
    with pytest.raises(AttachError, match=r"found no trainer .*`measure\(trainer\)`"):
        RuleMonitor(RULES, texts, saes, sae_k=K).on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    trainer = make([RuleMonitor(RULES, texts, saes, sae_k=K)])
    trainer.processing_class = None
    with pytest.raises(AttachError, match="needs the trainer's tokenizer"):
        train(trainer)
