"""Steered negatives: the right rollouts and no others, and what that does to probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from qscope_trl import FeatureReward, RolloutPolicy, SAEGRPOTrainer, SAERLOOTrainer
from qscope_trl.errors import AttachError, FeatureSetError, PenaltySelfCheckError, QScopeWarning
from qscope_trl.training.steered import (
    completion_logps,
    muted_tokens,
    refuse_foreign_generation,
    steered_rows,
    steering_vectors,
    truncated_ratio,
)
from tests.tiny import D_MODEL, K, random_sae
from tests.training.rollout_harness import (
    FEATURES,
    GROUP,
    PER_TOKEN,
    features,
    grpo_trainer,
    parity,
    parity_advantages,
    policy,
    run_policy,
)

# --- formulas, by hand -----------------------------------------------------------------------------------------------


def test_truncated_ratio_by_hand() -> None:
    found = truncated_ratio(
        torch.tensor([math.log(0.2), math.log(0.9)]), torch.tensor([math.log(0.4), math.log(0.3)]), 1.0
    )
    assert found.tolist() == pytest.approx([0.5, 1.0])


def test_muted_tokens_by_hand() -> None:
    ratio, advantages = torch.tensor([[0.5, 0.9, 0.5, 0.5]]), torch.tensor([[-1.0, -1.0, 1.0, -1.0]])
    found = muted_tokens(advantages, ratio, torch.tensor([[1, 1, 1, 0]]), epsilon=0.2)
    assert found.tolist() == [[True, False, False, False]]


def test_last_rollout_of_each_group_is_steered_also_across_processes() -> None:
    assert steered_rows(0, 8, 4).tolist() == [False, False, False, True] * 2
    assert [steered_rows(p, 2, 4).tolist() for p in range(4)] == [[False, False], [False, True]] * 2


def test_steering_vector_is_the_weighted_sum_of_decoder_directions(saes: Path) -> None:
    found = steering_vectors(FeatureReward(features(), saes, sae_k=K), 3.0)
    for layer in (1, 2):
        W_dec = random_sae(100 + layer)["W_dec"]
        wanted = 3.0 * sum(w * W_dec[:, index] for a, index, w, _ in FEATURES if a == layer)
        assert torch.allclose(found[layer], wanted, atol=1e-6)


# --- in the trainer --------------------------------------------------------------------------------------------------


def test_only_the_last_rollout_of_a_group_is_steered(saes: Path, tmp_path: Path) -> None:
    _, steered = run_policy(tmp_path, [parity], policy(saes, "steered_negative", strength=50.0))
    _, plain = run_policy(tmp_path, [parity], policy(saes, "steered_negative", strength=0.0))
    a, b = steered.outputs[0]["completion_ids"], plain.outputs[0]["completion_ids"]
    width = min(a.shape[1], b.shape[1])
    # Multinomial sampling draws row by row from one stream, so the other rows see the same numbers.
    assert torch.equal(a[: GROUP - 1, :width], b[: GROUP - 1, :width])
    assert not torch.equal(a[GROUP - 1, :width], b[GROUP - 1, :width])


def test_old_log_probabilities_are_the_unsteered_policys(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "steered_negative", strength=3.0)
    trainer, watching = run_policy(tmp_path, [parity], chosen, num_iterations=2)
    output = watching.outputs[0]
    rows = torch.ones(GROUP, dtype=torch.bool)
    with torch.no_grad():
        wanted = completion_logps(trainer, output, {}, rows)
    mask = output["completion_mask"].bool()
    assert torch.allclose(output["old_per_token_logps"][mask], wanted[mask], atol=1e-5)


def test_exact_ratio_uses_the_steered_policy_and_counts_muted_tokens(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "steered_negative", strength=3.0, ratio="exact")

    def last_is_worst(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(n % GROUP != GROUP - 1) for n in range(len(completion_ids))]

    trainer, watching = run_policy(tmp_path, [last_is_worst], chosen)
    output, rows = watching.outputs[0], torch.arange(GROUP) == GROUP - 1
    with torch.no_grad():
        steered = completion_logps(trainer, output, chosen._vectors, rows)
        unsteered = completion_logps(trainer, output, {}, rows)
    mask = output["completion_mask"].bool()
    old = output["old_per_token_logps"]
    assert torch.allclose(old[rows][mask[rows]], steered[rows][mask[rows]], atol=1e-5)
    assert torch.allclose(old[~rows][mask[~rows]], unsteered[~rows][mask[~rows]], atol=1e-5)
    wanted = ((unsteered - steered).exp() < 1 - trainer.epsilon_low)[rows][mask[rows]].float().mean()
    logged = [e["sae/rollouts/muted_tokens"] for e in trainer.state.log_history if "sae/rollouts/muted_tokens" in e]
    assert logged == [pytest.approx(float(wanted), abs=1e-3)]
    assert wanted > 0


@PER_TOKEN
def test_truncated_ratio_weakens_only_steered_tokens(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "steered_negative", strength=3.0, ratio="truncated")
    trainer, watching = run_policy(tmp_path, [parity], chosen)
    output, rows = watching.outputs[0], torch.arange(GROUP) == GROUP - 1
    with torch.no_grad():
        ratio = (
            completion_logps(trainer, output, {}, rows) - completion_logps(trainer, output, chosen._vectors, rows)
        ).exp()
    plain = parity_advantages(watching)[:, None]
    wanted = torch.where(rows[:, None], plain * ratio.clamp(max=1), plain)
    mask = output["completion_mask"].bool()
    assert torch.allclose(output["advantages"][mask], wanted.expand_as(mask)[mask], atol=1e-4)


def test_cap_shortens_what_enters_the_loss(saes: Path, tmp_path: Path) -> None:
    _, watching = run_policy(tmp_path, [parity], policy(saes, "steered_negative", max_steered_tokens=2))
    output = watching.outputs[0]
    mask = output["completion_mask"]
    assert mask[GROUP - 1].sum() == 2
    assert mask[: GROUP - 1].sum(-1).max() > 2
    assert int(output["num_items_in_batch"]) == int(mask.sum())


def test_evaluation_is_not_steered(saes: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(
        tmp_path, [parity], kind=SAEGRPOTrainer, rollout_policy=policy(saes, "steered_negative", strength=50.0)
    )
    completions = []
    for strength in (50.0, 0.0):
        trainer.rollout_scoring.policy._vectors = {1: torch.full((D_MODEL,), strength)}
        torch.manual_seed(0)
        trainer.model.eval()
        completions.append(trainer._generate_and_score_completions([{"prompt": "w3 w4"}] * GROUP)["completion_ids"])
    assert torch.equal(*completions)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_vllm": True}, "vLLM generates outside the hooked model"),
        ({"tools": [len]}, "the tool loop generates in rows of its own"),
        ({"rollout_func": len}, "`rollout_func` generates by itself"),
        ({"use_transformers_continuous_batching": True}, "continuous batching mixes the rows"),
    ],
)
def test_steering_is_refused_where_the_model_does_not_generate_row_by_row(
    changes: dict[str, Any], message: str, saes: Path, tmp_path: Path
) -> None:
    trainer = grpo_trainer(tmp_path, [parity])
    chosen = policy(saes, "steered_negative")
    chosen.reward([parity])
    for name, value in changes.items():
        setattr(trainer, name, value)
    with pytest.raises(AttachError, match=message):
        chosen.bind(trainer, None)


def test_steering_features_of_another_model_are_refused_when_the_trainer_is_built(saes: Path, tmp_path: Path) -> None:
    chosen = RolloutPolicy("steered_negative", ["L1F9999"], saes, sae_k=K)
    with pytest.raises(FeatureSetError, match=r"L1F9999 is out of range"):
        grpo_trainer(tmp_path, [parity], kind=SAEGRPOTrainer, rollout_policy=chosen)


def test_beam_search_is_refused_for_steering(saes: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, [parity], generation_kwargs={"num_beams": 2})
    chosen = policy(saes, "steered_negative")
    chosen.reward([parity])
    with pytest.raises(AttachError, match="beam search mixes the rows"):
        chosen.bind(trainer, None)


def test_steered_negatives_are_refused_in_rloo(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="RLOO keeps one log-probability per rollout"):
        grpo_trainer(
            tmp_path,
            [parity],
            kind=SAERLOOTrainer,
            config=trl.RLOOConfig,
            rollout_policy=policy(saes, "steered_negative"),
        )


def test_a_group_of_one_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer, chosen = grpo_trainer(tmp_path, [parity]), policy(saes, "steered_negative")
    chosen.reward([parity])
    trainer.num_generations = 1
    with pytest.raises(AttachError, match="a group needs a normal rollout beside the steered one"):
        chosen.bind(trainer, None)


def test_masking_truncated_completions_warns(saes: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, [parity], mask_truncated_completions=True)
    with pytest.warns(QScopeWarning, match=r"`mask_truncated_completions` takes steered rollouts .* out of the loss"):
        refuse_foreign_generation(trainer, is_rloo=False)


def test_generation_that_never_ran_the_model_is_caught(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "steered_negative")
    trainer = grpo_trainer(tmp_path, [parity], kind=SAEGRPOTrainer, rollout_policy=chosen)

    with (
        pytest.raises(PenaltySelfCheckError, match=r"to be steered, but generation never ran the hooked model"),
        chosen.generating(trainer, GROUP),
    ):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
