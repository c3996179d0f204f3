"""Rollout policies: each formula against a group computed by hand, and against what TRL trains on."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig

from qscope_trl import FeatureReward, FeatureSet, RolloutPolicy, SAEGRPOTrainer, SAERLOOTrainer
from qscope_trl.errors import AttachError, ConfigError
from qscope_trl.features import Feature
from qscope_trl.training.rollouts import amplified, screened, zeroed
from qscope_trl.training.scores import RolloutScoring
from tests.tiny import K, tiny_model, tiny_tokenizer
from tests.training.harness import train
from tests.training.rollout_harness import (
    GROUP,
    PER_TOKEN,
    Recorder,
    Watching,
    features,
    fresh_values,
    group_advantages,
    grpo_trainer,
    parity,
    parity_advantages,
    policy,
    run_policy,
    token_scores,
)

NAN_AWARE = pytest.mark.skipif(Version(trl.__version__) < Version("1.7"), reason="counts a missing reward as 0")


# --- formulas, by hand -----------------------------------------------------------------------------------------------


def test_amplified_by_hand() -> None:
    advantages, scores = torch.tensor([-1.0, -1.0, -0.5, 2.0]), torch.tensor([0.0, 0.5, 10.0, 3.0])
    assert amplified(advantages, scores, strength=2.0, max_factor=4.0).tolist() == [-1.0, -2.0, -2.0, 2.0]


def test_amplified_per_token_by_hand() -> None:
    scores = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    found = amplified(torch.tensor([[-1.0], [1.0]]).expand(2, 2), scores, strength=1.0, max_factor=9.0)
    assert found.tolist() == [[-1.0, -2.0], [1.0, 1.0]]


def test_zeroed_by_hand() -> None:
    assert zeroed(torch.tensor([-1.0, 2.0, 1.0]), torch.tensor([0.2, 0.3, 0.1]), 0.2).tolist() == [-1.0, 0.0, 1.0]


def test_screened_by_hand() -> None:
    found = screened(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0]), 0.5)
    assert found[0].tolist() == [1.0, 2.0]
    assert found[1].isnan().all()


# --- in the trainer --------------------------------------------------------------------------------------------------


def rollout_scores(trainer: Any, chosen: RolloutPolicy) -> torch.Tensor:
    name = chosen._score.name
    return torch.tensor([float(row[name].score_C.mean()) for row in trainer.rollout_scoring.scores])


def read_token_scores(trainer: Any, chosen: RolloutPolicy, like: torch.Tensor) -> torch.Tensor:
    wanted = torch.zeros(like.shape)
    for number, row in enumerate(trainer.rollout_scoring.scores):
        score = row[chosen._score.name].score_C
        wanted[number, : len(score)] = score
    return wanted


def test_amplify_negative_scales_what_is_trained_on(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "amplify_negative", strength=2.0)
    trainer, watching = run_policy(tmp_path, [parity], chosen)
    plain, scores = parity_advantages(watching), rollout_scores(trainer, chosen)
    wanted = torch.where(plain < 0, plain * (1 + 2 * scores).clamp(max=5), plain)
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-2)


@PER_TOKEN
def test_token_credit_sits_on_the_tokens_that_fired(saes: Path, tmp_path: Path) -> None:
    strict = FeatureSet(features=[Feature(layer=2, index=7, threshold=0.5)])
    chosen = RolloutPolicy("amplify_negative", strict, saes, sae_k=K, reader="policy", credit="token")
    trainer, watching = run_policy(tmp_path, [parity], chosen)
    plain = parity_advantages(watching)[:, None]
    scores = read_token_scores(trainer, chosen, watching.outputs[0]["completion_mask"])
    wanted = torch.where(plain < 0, plain * (1 + scores).clamp(max=5), plain)
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)
    real = watching.outputs[0]["completion_mask"].bool()
    assert (scores[real] == 0).any()
    assert (scores[real] > 0).any()


def test_zero_advantage_silences_flagged_rollouts(saes: Path, tmp_path: Path) -> None:
    probe = policy(saes, "zero_advantage", cutoff=1e9)
    cutoff = float(rollout_scores(run_policy(tmp_path, [parity], probe)[0], probe).median())
    chosen = policy(saes, "zero_advantage", cutoff=cutoff)
    trainer, watching = run_policy(tmp_path, [parity], chosen)
    flagged = rollout_scores(trainer, chosen) > cutoff
    assert 0 < flagged.sum() < GROUP
    wanted = torch.where(flagged, 0, parity_advantages(watching))
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)


@PER_TOKEN
def test_zero_advantage_per_token_silences_flagged_tokens(saes: Path, tmp_path: Path) -> None:
    """Against scores of plain forwards, and TRL's advantages by hand."""
    cutoff = 0.4
    chosen = policy(saes, "zero_advantage", cutoff=cutoff, credit="token")
    recorder = Recorder()
    trainer, watching = run_policy(tmp_path, [parity, recorder], chosen, reward_weights=[1.0, 0.0])
    output, call, model = watching.outputs[0], recorder.calls[0], tiny_model()
    plain = group_advantages(torch.tensor(parity(call["completion_ids"])))
    silenced = 0
    for row, (prompt, ids) in enumerate(zip(call["prompts"], call["completion_ids"], strict=True)):
        scores = token_scores(fresh_values(model, tiny_tokenizer()(prompt).input_ids, ids))
        wanted = torch.where(scores > cutoff, 0, plain[row])
        assert torch.allclose(output["advantages"][row, : len(ids)], wanted, atol=1e-4)
        silenced += int((scores > cutoff).sum())
    assert 0 < silenced < sum(map(len, call["completion_ids"]))
    assert plain.abs().min() > 1e-3
    logged = next(e for e in trainer.state.log_history if "sae/rollouts/reweighted" in e)
    changed = (output["advantages"] != plain[:, None]) & output["completion_mask"].bool()
    assert logged["sae/rollouts/reweighted"] == pytest.approx(float(changed.any(-1).float().mean()))


@NAN_AWARE
def test_screen_leaves_the_group_and_its_baseline(saes: Path, tmp_path: Path) -> None:
    probe = policy(saes, "screen", cutoff=1e9)
    cutoff = float(rollout_scores(run_policy(tmp_path, [parity], probe)[0], probe).median())
    chosen = policy(saes, "screen", cutoff=cutoff)
    trainer, watching = run_policy(tmp_path, [parity], chosen)
    flagged = rollout_scores(trainer, chosen) > cutoff
    output = watching.outputs[0]
    ids = [r[m.bool()].tolist() for r, m in zip(output["completion_ids"], output["completion_mask"], strict=True)]
    rewards = torch.tensor(parity(ids))
    kept = rewards[~flagged]
    wanted = torch.where(flagged, 0, (rewards - kept.mean()) / (kept.std() + 1e-4))
    assert torch.allclose(output["advantages"], wanted, atol=1e-4)
    assert any(e.get("sae/rollouts/screened") == float(flagged.float().mean()) for e in trainer.state.log_history)


def test_penalise_is_a_reward_term(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "penalise", strength=3.0)
    trainer, watching = run_policy(tmp_path, [Recorder()], chosen, reward_weights=[1.0])
    wanted = group_advantages(-3.0 * rollout_scores(trainer, chosen))
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)
    assert trainer.reward_func_names == ["recorder", "rollout_policy"]


def test_amplify_negative_does_nothing_without_variance_and_penalise_does(saes: Path, tmp_path: Path) -> None:
    _, amplify = run_policy(tmp_path, [Recorder()], policy(saes, "amplify_negative"))
    _, penalise = run_policy(tmp_path, [Recorder()], policy(saes, "penalise"))
    assert not amplify.outputs[0]["advantages"].any()
    assert penalise.outputs[0]["advantages"].abs().min() > 0


@pytest.mark.parametrize("credit", ["rollout", pytest.param("token", marks=PER_TOKEN)])
def test_logged_advantages_are_those_trained_on(credit: str, saes: Path, tmp_path: Path) -> None:
    trainer, watching = run_policy(tmp_path, [parity], policy(saes, "amplify_negative", credit=credit))
    output = watching.outputs[0]
    trained = output["advantages"]
    if credit == "token":
        trained = (trained * output["completion_mask"]).sum(-1) / output["completion_mask"].sum(-1)
    assert list(trainer._logs["advantages"])[-GROUP:] == pytest.approx(trained.tolist())


def test_policy_takes_the_features_of_the_only_feature_reward(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    trainer, _ = run_policy(tmp_path, [parity, reward], RolloutPolicy("amplify_negative"))
    assert set(trainer.rollout_scoring.readers) == {"feature_reward"}


# --- every setting of the trainer ------------------------------------------------------------------------------------

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("kind", ["amplify_negative", "steered_negative"])
def test_every_loss_type_trains(kind: str, loss_type: str, saes: Path, tmp_path: Path) -> None:
    settings = {"credit": "token"} if kind == "amplify_negative" and Version(trl.__version__) >= Version("1.0") else {}
    try:
        trainer, watching = run_policy(
            tmp_path,
            [parity, Recorder()],
            policy(saes, kind, **settings),
            loss_type=loss_type,
            learning_rate=1e-3,
            max_grad_norm=1.0,
        )
    except ValueError as err:
        if "loss" not in str(err).lower():
            raise
        pytest.skip(f"this TRL has no loss_type {loss_type}")
    entry = next(e for e in trainer.state.log_history if "grad_norm" in e)
    assert math.isfinite(entry["grad_norm"])
    assert entry["grad_norm"] > 0
    assert watching.outputs[0]["advantages"].abs().sum() > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"num_iterations": 2},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2},
    ],
)
def test_settings_of_generation_and_scale_train(changes: dict[str, Any], saes: Path, tmp_path: Path) -> None:
    trainer, watching = run_policy(tmp_path, [parity], policy(saes, "amplify_negative"), learning_rate=1e-3, **changes)
    assert watching.outputs[0]["advantages"].numel() == GROUP * changes.get(
        "steps_per_generation", changes.get("gradient_accumulation_steps", 1)
    )
    assert any("sae/rollouts/reweighted" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", ["amplify_negative", "steered_negative", "penalise"])
def test_policies_work_with_lora_and_the_frozen_reader(kind: str, saes: Path, tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    chosen = policy(saes, kind, reader="frozen", strength=3.0)
    trainer, watching = run_policy(
        tmp_path, [parity], chosen, peft_config=adapter, learning_rate=1e-2, max_grad_norm=1.0
    )
    assert watching.outputs[0]["advantages"].abs().sum() > 0
    entry = next(e for e in trainer.state.log_history if "grad_norm" in e)
    assert entry["grad_norm"] > 0
    # One forward with adapters off where a score is needed; steering needs none.
    assert trainer.rollout_scoring.num_forwards == (kind != "steered_negative")
    assert not any(getattr(m, "disable_adapters", False) is True for m in trainer.model.modules())


def test_rloo_carries_rollout_policies(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "zero_advantage", cutoff=-1.0)
    trainer = grpo_trainer(
        tmp_path, [parity], kind=SAERLOOTrainer, config=trl.RLOOConfig, rollout_policy=chosen, max_steps=1
    )
    watching = Watching(trainer)
    train(trainer)
    assert not watching.outputs[0]["advantages"].any()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "punish"}, r"`kind` is 'punish'; choose one of penalise, amplify_negative"),
        ({"kind": "screen", "credit": "token"}, r"`credit='token'` has no meaning for `screen`"),
        ({"kind": "screen", "ratio": "exact"}, r"`ratio='exact'` is for `steered_negative`"),
        ({"kind": "screen", "strength": -1.0}, r"`strength` is -1.0; it is a finite number from 0"),
        ({"kind": "amplify_negative", "max_factor": 0.5}, r"`max_factor` is 0.5 \(1 or more\)"),
        ({"kind": "amplify_negative", "max_factor": math.nan}, r"`max_factor` is nan \(1 or more\)"),
        ({"kind": "steered_negative", "max_ratio": math.nan}, r"`max_ratio` nan \(above 0\)"),
        ({"kind": "screen", "cutoff": math.nan}, r"`cutoff` is nan"),
        ({"kind": "amplify_negative", "features": ["L1F3"]}, r"`features` and `saes` .* come together"),
    ],
)
def test_policy_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutPolicy(**settings)


def test_policy_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no features, and there are 0 `FeatureReward`s"):
        grpo_trainer(tmp_path, [parity], kind=SAEGRPOTrainer, rollout_policy=RolloutPolicy("screen"))


def test_penalise_beside_a_feature_reward_is_refused(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    with pytest.raises(ConfigError, match=r"a `FeatureReward` in `reward_funcs` penalises already"):
        grpo_trainer(tmp_path, [reward], kind=SAEGRPOTrainer, rollout_policy=RolloutPolicy("penalise"))


def test_settings_of_a_policy_that_borrows_its_scores_are_refused(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    chosen = RolloutPolicy("amplify_negative", aggregation="max")
    with pytest.raises(ConfigError, match=r"its own `aggregation` would change nothing"):
        grpo_trainer(tmp_path, [reward], kind=SAEGRPOTrainer, rollout_policy=chosen)


def test_penalise_where_trl_divides_it_out_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer, chosen = grpo_trainer(tmp_path, [parity]), policy(saes, "penalise")
    chosen.reward([parity])
    trainer.multi_objective_aggregation = "normalize_then_sum"
    with pytest.raises(AttachError, match=r"the strength of `penalise` would change nothing"):
        chosen.bind(trainer, None)


def test_token_credit_is_refused_in_rloo(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "amplify_negative", credit="token")
    with pytest.raises(AttachError, match="RLOO has one advantage per rollout"):
        grpo_trainer(tmp_path, [parity], kind=SAERLOOTrainer, config=trl.RLOOConfig, rollout_policy=chosen)


@pytest.mark.parametrize(
    ("version", "kind", "settings", "message"),
    [
        ("0.29.1", "amplify_negative", {"credit": "token"}, r"TRL 0.29.1 takes one advantage per rollout only"),
        ("0.29.1", "steered_negative", {"ratio": "truncated"}, r"per-token needs TRL 1.0 or newer"),
        ("1.6.0", "screen", {}, r"TRL 1.6.0 counts a rollout without rewards as reward 0 .* or `zero_advantage`"),
        ("1.11.0", "amplify_negative", {"credit": "token"}, r"TRL 1.11.0 gathers the weights of the `vespo` loss"),
    ],
)
def test_what_an_older_trl_cannot_do_is_refused(
    version: str,
    kind: str,
    settings: dict[str, Any],
    message: str,
    saes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, chosen = grpo_trainer(tmp_path, [parity]), policy(saes, kind, **settings)
    chosen.reward([parity])
    monkeypatch.setattr(trl, "__version__", version)
    trainer.loss_type = "vespo"
    trainer.accelerator = SimpleNamespace(num_processes=2)
    with pytest.raises(AttachError, match=message):
        chosen.bind(trainer, None)


def test_per_token_vespo_in_one_process_is_fine(saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, chosen = grpo_trainer(tmp_path, [parity]), policy(saes, "amplify_negative", credit="token")
    score = chosen.reward([parity])
    monkeypatch.setattr(trl, "__version__", "1.11.0")
    trainer.loss_type = "vespo"
    chosen.bind(trainer, scoring := RolloutScoring.of(trainer))
    assert scoring.readers == {"rollout_policy": score}


def test_binding_comes_after_the_choice_of_scores(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"`RolloutPolicy.reward` comes before `bind`"):
        policy(saes, "screen").bind(grpo_trainer(tmp_path, [parity]), None)
