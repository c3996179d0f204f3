"""A rule as reward and as monitor of rollouts: decided as a plain computation on the generated tokens decides."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from qscope_trl import FeatureId, FeatureReward, SAEGRPOTrainer
from qscope_trl.errors import ConfigError, RuleError
from qscope_trl.rules import compile_rule
from qscope_trl.training.generations import RolloutActivations
from qscope_trl.training.rule_reward import RuleReward
from tests.rules.random_rules import AGGREGATIONS, FEATURES, LAYERS, SETS, random_rule
from tests.tiny import K, random_sae, tiny_model, tiny_tokenizer
from tests.training.harness import train
from tests.training.reference import run
from tests.training.rollout_harness import Recorder, grpo_trainer, parity

IDS = tuple(FeatureId(layer, index) for layer in LAYERS for index in range(FEATURES))
RULE = "any(L2: 40, 7; mean(L1F3) > 0.05) and not last(L1F90) or rate(L2F7) > 0.4"


def rollout(acts: np.ndarray, generated: list[int]) -> RolloutActivations:
    values = torch.tensor(acts, dtype=torch.float32)
    return RolloutActivations(IDS, values, values > 0, values.sum(-1), torch.tensor(generated).bool())


def test_random_rules_decide_on_the_generated_tokens_alone(saes: Path) -> None:
    rng, generator = random.Random(0), np.random.default_rng(0)
    outcomes = []
    for _ in range(60):
        meaning = random_rule(rng, 2)
        rule = compile_rule(meaning.text, sets=SETS)
        acts = generator.random((6, len(IDS))).astype(np.float32) * (generator.random((6, len(IDS))) < 0.3)
        generated = [1, 0, 1, 1, 0, 1]
        kept = acts[np.array(generated) == 1]
        found = {
            "max": kept.max(0),
            "mean": kept.astype(np.float64).mean(0).astype(np.float32),
            "last": kept[-1],
            "rate": (kept > 0).mean(0).astype(np.float32),
        }
        document = {
            (i.layer, i.index, name): float(found[name][place]) for place, i in enumerate(IDS) for name in AGGREGATIONS
        }
        chosen = RuleReward(rule, saes)
        # Features are read in the order of the reward's set.
        order = [IDS.index(feature) for feature in chosen.features.ids]
        read = rollout(acts, generated)
        read = RolloutActivations(
            chosen.features.ids, read.values_CS[:, order], read.active_CS[:, order], read.score_C, read.generated_C
        )
        assert chosen.holds(read) is meaning.holds(document), meaning.text
        assert chosen.score(read) == float(meaning.holds(document))
        margin = RuleReward(rule, saes, value="margin").score(read)
        assert margin == pytest.approx(meaning.margin(document), abs=1e-9)
        outcomes.append(meaning.holds(document))
    assert 5 < sum(outcomes) < 55


def test_what_cannot_be_scored_is_none(saes: Path) -> None:
    chosen = RuleReward("L1F0", saes)
    nothing = RolloutActivations(
        (FeatureId(1, 0),), torch.ones(2, 1), torch.ones(2, 1).bool(), torch.ones(2), torch.zeros(2).bool()
    )
    assert chosen.score(None) is chosen.holds(None) is None
    assert chosen.score(nothing) is chosen.holds(nothing) is None
    assert chosen(sae_activations=[None, {"rule_reward": nothing}]) == [None, None]


def test_reward_is_the_signed_scaled_decision(saes: Path) -> None:
    def rows(name: str) -> list[Any]:
        return [
            {name: RolloutActivations((FeatureId(1, 0),), v, v > 0, v[:, 0], torch.ones(2).bool())}
            for v in (torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1))
        ]

    assert RuleReward("L1F0 > 0.5", saes)(sae_activations=rows("rule_reward")) == [-1.0, 0.0]
    wanted = RuleReward("L1F0 > 0.5", saes, sign=1, scale=0.5, value="margin", name="m")
    assert wanted(sae_activations=rows("m")) == [0.75, -0.25]
    warm = RuleReward("L1F0", saes, schedule="warmup", schedule_steps=4)
    state = SimpleNamespace(global_step=0, max_steps=100)
    assert warm(sae_activations=rows("rule_reward"), trainer_state=state) == [-0.25, 0.0]


def plain_decision(model: Any, prompt: list[int], completion: list[int]) -> bool:
    """`RULE` written out in Python, on a forward of this rollout alone."""
    with torch.no_grad():
        _, residuals = run(model, {"input_ids": torch.tensor([prompt + completion])}, [1, 2])
    acts = {}
    for layer, index in ((2, 40), (2, 7), (1, 3), (1, 90)):
        sae = random_sae(100 + layer)
        f = residuals[layer][0] @ sae["W_enc"].T + sae["b_enc"]
        kth = f.sort(dim=-1, descending=True).values[:, K - 1]
        mine = f[:, index]
        acts[layer, index] = torch.where((mine >= kth) & (mine > 0), mine, 0)[len(prompt) :]
    fires = acts[2, 40].max() > 0 or acts[2, 7].max() > 0 or acts[1, 3].mean() > 0.05
    return bool((fires and not acts[1, 90][-1] > 0) or (acts[2, 7] > 0).float().mean() > 0.4)


@pytest.mark.parametrize("kind", [GRPOTrainer, SAEGRPOTrainer])
def test_rewards_of_a_trainer_equal_plain_forwards(kind: type, saes: Path, tmp_path: Path) -> None:
    given: list[float | None] = []
    model, recorder = tiny_model(), Recorder()

    class Watched(RuleReward):
        def __call__(self, **kwargs: Any) -> list[float | None]:
            found = super().__call__(**kwargs)
            given.extend(found)
            return found

    reward = Watched(RULE, saes, sae_k=K, reader="policy", scale=2.0, name="rule")
    trainer = grpo_trainer(tmp_path, [recorder, parity, reward], kind=kind, model=model, max_steps=2)
    train(trainer)
    tokenizer = tiny_tokenizer()
    wanted = [
        plain_decision(model, tokenizer(prompt).input_ids, ids)
        for call in recorder.calls
        for prompt, ids in zip(call["prompts"], call["completion_ids"], strict=True)
    ]
    assert 0 < sum(wanted) < len(wanted)
    assert given == [-2.0 * held for held in wanted]
    logged = [entry for entry in trainer.state.log_history if "sae/rule/rule" in entry]
    if logged:  # TRL before 1.0 has no `log_metric`
        assert np.mean([e["sae/rule/rule"] for e in logged]) == pytest.approx(np.mean(wanted))
        assert all(e["rewards/rule/mean"] == pytest.approx(-2 * e["sae/rule/rule"]) for e in logged)
        assert all(f"sae/rule/{feature}/firing_rate" in logged[0] for feature in reward.features.ids)


def test_a_rule_with_scale_zero_only_watches(saes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = grpo_trainer(tmp_path, [parity], learning_rate=0.1)
    train(alone)
    torch.manual_seed(0)
    watch = RuleReward(RULE, saes, sae_k=K, reader="policy", scale=0, name="watch")
    watched = grpo_trainer(tmp_path, [parity, watch], learning_rate=0.1)
    train(watched)
    for mine, theirs in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    logged = {key for entry in watched.state.log_history for key in entry}
    if hasattr(watched, "_log_completion_extra"):
        assert "sae/rule/watch" in logged


def test_figures_are_those_of_all_processes(saes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, the other with twice the rollouts of this one."""

    class Trainer:
        accelerator = SimpleNamespace(
            num_processes=2, device="cpu", reduce=lambda sums, reduction: sums + torch.tensor([3.0, 4.0])
        )

        def __init__(self) -> None:
            self.found: dict[str, float] = {}

        def log_metric(self, name: str, value: float) -> None:
            self.found[name] = value

    chosen, trainer = RuleReward("L1F0", saes, value="margin"), Trainer()
    monkeypatch.setattr(FeatureReward, "_log", lambda *args: None)  # has its own tests
    value = torch.tensor([[1.0]])
    one = RolloutActivations((FeatureId(1, 0),), value, value > 0, value[:, 0], torch.ones(1).bool())
    silent = RolloutActivations((FeatureId(1, 0),), 0 * value, value < 0, 0 * value[:, 0], torch.ones(1).bool())
    chosen._log([one, silent, None], [1.0, 0.0, None], trainer.log_metric)
    assert trainer.found == {"sae/rule/rule_reward": pytest.approx((1 + 3) / (2 + 4))}


def test_features_that_are_not_there_stop_the_trainer(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"Line 1, column 9: L2F128 is not there.*\n.*\n"):
        train(grpo_trainer(tmp_path, [parity, RuleReward("L1F3 or L2F128", saes, sae_k=K, reader="policy")]))
    with pytest.raises(RuleError, match=r"L9F1 is not there: .* have no layer 9, but layers 0, 1, 2, 3"):
        train(grpo_trainer(tmp_path, [parity, RuleReward("L9F1", saes, sae_k=K, reader="policy")]))
    made = compile_rule("L1F3")
    object.__setattr__(made, "sae_fingerprints", {1: "0" * 16})
    with pytest.raises(RuleError, match="not the one this rule was made with"):
        train(grpo_trainer(tmp_path, [parity, RuleReward(made, saes, sae_k=K, reader="policy")]))


def test_a_pickled_rule_reward_is_the_same(saes: Path) -> None:
    again = pickle.loads(pickle.dumps(RuleReward(RULE, str(saes), sae_k=K, value="margin", scale=0.5)))
    assert (again.rule, again.value, again.scale) == (compile_rule(RULE), "margin", 0.5)


def test_unknown_settings_are_refused(saes: Path) -> None:
    with pytest.raises(ConfigError, match="`value` is 'share'; choose one of holds, margin"):
        RuleReward("L1F3", saes, value="share")
    with pytest.raises(ConfigError, match="`sign` is 2"):
        RuleReward("L1F3", saes, sign=2)
