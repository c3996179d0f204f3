"""Feature rewards: hand-computed aggregates, the shape TRL expects, and use without any class of ours."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from qscope_trl import FeatureReward, SAEGRPOTrainer
from qscope_trl.errors import AttachError, ConfigError
from qscope_trl.features import FeatureId
from qscope_trl.training.generations import RolloutActivations
from qscope_trl.training.rewards import aggregate, fired_tokens
from tests.tiny import K, tiny_model, tiny_tokenizer
from tests.training.harness import train
from tests.training.rollout_harness import FEATURES, Recorder, features, fresh_values, grpo_trainer, parity

IDS = (FeatureId(1, 3), FeatureId(2, 40), FeatureId(2, 7))


def activations(score: list[float], generated: list[int] | None = None) -> RolloutActivations:
    """One feature that fires where the score is positive; two that never do."""
    values = torch.tensor([[float(s), -1.0, -1.0] for s in score])
    kept = torch.tensor(generated or [1] * len(score)).bool()
    return RolloutActivations(IDS, values, values > 0, torch.tensor(score, dtype=torch.float32), kept)


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [("mean", 1.5), ("max", 4.0), ("last_k", 3.0), ("rate", 0.5), ("first_hit", 0.5)],
)
def test_aggregates_by_hand(aggregation: str, wanted: float) -> None:
    assert aggregate(activations([0, 0, 4, 2]), aggregation, last_k=2) == pytest.approx(wanted)


@pytest.mark.parametrize("aggregation", ["mean", "max", "last_k", "rate", "first_hit"])
def test_tool_results_do_not_count(aggregation: str) -> None:
    with_tool = activations([0, 9, 4, 2], generated=[1, 0, 1, 1])
    assert aggregate(with_tool, aggregation, 2) == aggregate(activations([0, 4, 2]), aggregation, 2)


def test_first_hit_is_one_at_once_and_zero_without() -> None:
    assert aggregate(activations([1, 0, 0, 0]), "first_hit") == 1
    assert aggregate(activations([0, 0, 0, 0]), "first_hit") == 0


def test_nothing_generated_is_none() -> None:
    assert aggregate(activations([3.0], generated=[0]), "mean") is None


def rows(reward: FeatureReward, scores: list[Any]) -> list[Any]:
    return [None if s is None else {reward.name: activations(s)} for s in scores]


def test_reward_is_sign_times_scale_times_clipped_score(saes: Path) -> None:
    reward = FeatureReward(features(), saes, scale=0.5, clip=2.0, aggregation="mean")
    found = reward(sae_activations=rows(reward, [[1.0, 2.0], [8.0], None]))
    assert found == [-0.75, -1.0, None]
    assert FeatureReward(features(), saes, sign=1).__call__(sae_activations=rows(reward, [[3.0]])) == [3.0]


def test_schedule_follows_the_trainer_state(saes: Path) -> None:
    reward = FeatureReward(features(), saes, schedule="warmup", schedule_steps=4)
    state = SimpleNamespace(global_step=0, max_steps=100)
    assert reward(sae_activations=rows(reward, [[2.0]]), trainer_state=state) == [-0.5]
    state.global_step = 3
    assert reward(sae_activations=rows(reward, [[2.0]]), trainer_state=state) == [-2.0]


def test_table_says_which_feature_fired_where() -> None:
    assert fired_tokens(activations([0, 3, 1, 0, 2])) == "L1F3@1-2,4"
    assert fired_tokens(activations([0, 3, 1, 0, 2], generated=[1, 0, 1, 1, 1])) == "L1F3@2,4"
    assert fired_tokens(activations([1, 0] * 20)).endswith(",...")
    assert fired_tokens(None) == ""


def test_stronger_features_come_first() -> None:
    values = torch.tensor([[1.0, -1.0, 5.0], [1.0, -1.0, -1.0]])
    found = RolloutActivations(IDS, values, values > 0, torch.ones(2), torch.ones(2).bool())
    assert fired_tokens(found) == "L2F7@0 L1F3@0-1"


def test_metrics_and_columns_reach_trl(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy", name="loops")
    trainer = grpo_trainer(tmp_path, [parity, reward])
    columns: dict[str, list[Any]] = {}
    flush = trainer._log_completion_extra if hasattr(trainer, "_log_completion_extra") else None
    if flush is None:
        pytest.skip("TRL before 1.0 has neither `log_extra` nor `log_metric`")
    trainer._log_completion_extra = lambda name, values: (columns.setdefault(name, values), flush(name, values))
    train(trainer)
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {
        "rewards/loops/mean",
        "sae/loops/score",
        "sae/loops/L1F3/mean_pre_act",
        "sae/loops/L2F40/firing_rate",
    } <= logged
    assert set(columns) == {"loops_score", "loops_fired"}
    entry = next(e for e in trainer.state.log_history if "sae/loops/score" in e)
    assert entry["rewards/loops/mean"] == pytest.approx(-entry["sae/loops/score"], rel=1e-5)
    assert entry["sae/loops/score"] == pytest.approx(
        sum(columns["loops_score"]) / len(columns["loops_score"]), rel=1e-5
    )


def test_metrics_and_table_name_the_features_that_were_read(saes: Path, tmp_path: Path) -> None:
    """Also where the set is not in the order of the layers, against plain forwards."""
    recorder, metrics, columns = Recorder(), {}, {}
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    model = tiny_model()
    trainer = grpo_trainer(tmp_path, [recorder, reward], max_steps=1)
    train(trainer)
    call = recorder.calls[0]
    reward(
        sae_activations=call["sae_activations"],
        log_metric=lambda name, value: metrics.update({name: value}),
        log_extra=lambda name, values: columns.update({name: values}),
    )
    tokenizer = tiny_tokenizer()
    values = [
        fresh_values(model, tokenizer(prompt).input_ids, ids)
        for prompt, ids in zip(call["prompts"], call["completion_ids"], strict=True)
    ]
    for column, (layer, index, _, threshold) in enumerate(FEATURES):
        name = f"L{layer}F{index}"
        mine = torch.cat(values)[:, column]
        assert metrics[f"sae/feature_reward/{name}/mean_pre_act"] == pytest.approx(float(mine.mean()), abs=1e-5)
        assert metrics[f"sae/feature_reward/{name}/firing_rate"] == pytest.approx(
            float((mine > threshold).float().mean())
        )
        for row, shown in zip(values, columns["feature_reward_fired"], strict=True):
            assert (f"{name}@" in shown) == bool((row[:, column] > threshold).any())


# --- a reward inside another function --------------------------------------------------------------------------------


def doubled(reward: FeatureReward, **only: Any) -> Any:
    def inside(**kwargs: Any) -> list[float | None]:
        given = {key: kwargs[key] for key in only} if only else kwargs
        return [None if value is None else 2 * value for value in reward(**given)]

    return inside


def test_reward_inside_a_function_is_refused(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    with pytest.raises(AttachError, match=r"reads no features for `feature_reward` \(it reads none\).*itself"):
        train(grpo_trainer(tmp_path, [parity, doubled(reward)], kind=SAEGRPOTrainer))
    with pytest.raises(AttachError, match=r"called without activations: .* itself, not a function around it"):
        train(grpo_trainer(tmp_path, [parity, doubled(reward)]))


@pytest.mark.parametrize("only", [{}, {"sae_activations": 0}], ids=["all keywords", "activations alone"])
def test_reward_inside_a_function_beside_another_reader_is_refused(
    only: dict[str, Any], saes: Path, tmp_path: Path
) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    other = FeatureReward(["L2F9"], saes, sae_k=K, reader="policy", name="other")
    with pytest.raises(AttachError, match=r"no features for `feature_reward` \(it reads other\)"):
        train(grpo_trainer(tmp_path, [other, doubled(reward, **only)], kind=SAEGRPOTrainer))


def test_features_of_a_namesake_are_not_taken(saes: Path, tmp_path: Path) -> None:
    reward, other = (FeatureReward([name], saes, sae_k=K, reader="policy") for name in ("L1F3", "L2F9"))
    with pytest.raises(AttachError, match=r"no features for `feature_reward` \(it reads feature_reward\)"):
        train(grpo_trainer(tmp_path, [other, doubled(reward)]))


def test_a_reward_may_be_used_by_itself_and_inside_a_function(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    trainer = grpo_trainer(tmp_path, [reward, doubled(reward)])
    train(trainer)
    entry = next(e for e in trainer.state.log_history if "reward" in e)
    assert entry["rewards/inside/mean"] == pytest.approx(2 * entry["rewards/feature_reward/mean"], rel=1e-5)


@pytest.mark.parametrize("kind", ["preact_hinge", "topk_act"])
def test_both_scores_train_in_trls_own_trainer(kind: str, saes: Path, tmp_path: Path) -> None:
    reward, recorder = FeatureReward(features(), saes, sae_k=K, reader="policy", kind=kind), Recorder()
    trainer = grpo_trainer(tmp_path, [recorder, reward])
    assert type(trainer) is GRPOTrainer
    train(trainer)
    assert recorder.calls[0]["sae_activations"][0]["feature_reward"].score_C.shape[0] > 0


def test_pickled_reward_is_the_same(saes: Path, tmp_path: Path) -> None:
    reward = pickle.loads(pickle.dumps(FeatureReward(features(), str(saes), sae_k=K, reader="policy", scale=2.0)))
    assert reward.__name__ == "feature_reward"
    assert reward.scale == 2.0
    assert reward.features.ids == features().ids
    train(grpo_trainer(tmp_path, [reward]))


def test_dotted_path_works_as_trls_command_line_uses_it(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop_rewards.py").write_text(
        f"from qscope_trl import FeatureReward\n"
        f"loops = FeatureReward(['L1F3'], {str(saes)!r}, sae_k={K}, reader='policy', name='loops')\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module, name = ["loop_rewards", "loops"]
    try:
        # `trl grpo --reward_funcs loop_rewards.loops` imports and passes it on in this way.
        reward = getattr(importlib.import_module(module), name)
        trainer = grpo_trainer(tmp_path, [reward])
        train(trainer)
    finally:
        sys.modules.pop("loop_rewards", None)
    assert any("rewards/loops/mean" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "median"}, r"`aggregation` is 'median'; choose one of mean, max"),
        ({"schedule": "cosine"}, r"`schedule` is 'cosine'; choose one of constant"),
        ({"sign": 0}, r"`sign` is 0; it is -1 to punish"),
        ({"scale": -1.0}, r"`scale` is -1.0; it is a finite number from 0"),
        ({"clip": 0.0}, r"`clip` 0.0 .* above 0"),
        ({"last_k": 0}, r"`last_k` is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, saes: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureReward(features(), saes, **settings)
