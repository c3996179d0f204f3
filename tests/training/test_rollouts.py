"""Rollout policies: each formula against a group computed by hand, and against what TRL trains on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig
from trl import GRPOTrainer

from qscope_trl import FeatureReward, FeatureSet, RolloutPolicy, SAEGRPOMixin, SAEGRPOTrainer, SAERLOOTrainer
from qscope_trl.errors import AttachError, ConfigError, FeatureSetError
from qscope_trl.features import Feature
from qscope_trl.hooks.edit import ResidualAdd
from qscope_trl.training.rollouts import amplified, screened, zeroed
from qscope_trl.training.steered import (
    completion_logps,
    muted_tokens,
    steered_rows,
    steering_vectors,
    truncated_ratio,
)
from tests.tiny import D_MODEL, K, random_sae, tiny_model, write_saes
from tests.training.harness import train
from tests.training.rollout_harness import FEATURES, GROUP, Recorder, features, grpo_trainer, parity

PER_TOKEN = pytest.mark.skipif(Version(trl.__version__) < Version("1.0"), reason="one advantage per rollout only")
NAN_AWARE = pytest.mark.skipif(Version(trl.__version__) < Version("1.7"), reason="counts a missing reward as 0")


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


def policy(saes: Path, kind: str, **settings: Any) -> RolloutPolicy:
    return RolloutPolicy(kind, features(), saes, sae_k=K, **{"reader": "policy", **settings})


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


class Watching:
    """Keeps what the trainer will train on, generation by generation."""

    def __init__(self, trainer: Any) -> None:
        self.outputs: list[dict[str, Any]] = []
        original = trainer._generate_and_score_completions

        def watch(inputs: Any) -> Any:
            output = original(inputs)
            self.outputs.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()})
            return output

        trainer._generate_and_score_completions = watch


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """TRL's default: minus the group's mean, over its standard deviation plus 1e-4."""
    grouped = rewards.view(-1, GROUP)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def run(tmp_path: Path, rewards: list[Any], chosen: RolloutPolicy, **changes: Any) -> tuple[Any, Watching]:
    torch.manual_seed(0)
    trainer = grpo_trainer(tmp_path, rewards, kind=SAEGRPOTrainer, rollout_policy=chosen, max_steps=1, **changes)
    watching = Watching(trainer)
    train(trainer)
    return trainer, watching


def rollout_scores(trainer: Any, chosen: RolloutPolicy) -> torch.Tensor:
    name = chosen._score.name
    return torch.tensor([float(row[name].score_C.mean()) for row in trainer.rollout_scoring.scores])


def token_scores(trainer: Any, chosen: RolloutPolicy, like: torch.Tensor) -> torch.Tensor:
    wanted = torch.zeros(like.shape)
    for number, row in enumerate(trainer.rollout_scoring.scores):
        score = row[chosen._score.name].score_C
        wanted[number, : len(score)] = score
    return wanted


def parity_advantages(watching: Watching) -> torch.Tensor:
    output = watching.outputs[0]
    ids = [
        row[keep.bool()].tolist()
        for row, keep in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    return group_advantages(torch.tensor(parity(ids)))


def test_amplify_negative_scales_what_is_trained_on(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "amplify_negative", strength=2.0)
    trainer, watching = run(tmp_path, [parity], chosen)
    plain, scores = parity_advantages(watching), rollout_scores(trainer, chosen)
    wanted = torch.where(plain < 0, plain * (1 + 2 * scores).clamp(max=5), plain)
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-2)


@PER_TOKEN
def test_token_credit_sits_on_the_tokens_that_fired(saes: Path, tmp_path: Path) -> None:
    strict = FeatureSet(features=[Feature(layer=2, index=7, threshold=0.5)])
    chosen = RolloutPolicy("amplify_negative", strict, saes, sae_k=K, reader="policy", credit="token")
    trainer, watching = run(tmp_path, [parity], chosen)
    plain = parity_advantages(watching)[:, None]
    scores = token_scores(trainer, chosen, watching.outputs[0]["completion_mask"])
    wanted = torch.where(plain < 0, plain * (1 + scores).clamp(max=5), plain)
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)
    real = watching.outputs[0]["completion_mask"].bool()
    assert (scores[real] == 0).any()
    assert (scores[real] > 0).any()


def test_zero_advantage_silences_flagged_rollouts(saes: Path, tmp_path: Path) -> None:
    probe = policy(saes, "zero_advantage", cutoff=1e9)
    cutoff = float(rollout_scores(run(tmp_path, [parity], probe)[0], probe).median())
    chosen = policy(saes, "zero_advantage", cutoff=cutoff)
    trainer, watching = run(tmp_path, [parity], chosen)
    flagged = rollout_scores(trainer, chosen) > cutoff
    assert 0 < flagged.sum() < GROUP
    wanted = torch.where(flagged, 0, parity_advantages(watching))
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)


@NAN_AWARE
def test_screen_leaves_the_group_and_its_baseline(saes: Path, tmp_path: Path) -> None:
    probe = policy(saes, "screen", cutoff=1e9)
    cutoff = float(rollout_scores(run(tmp_path, [parity], probe)[0], probe).median())
    chosen = policy(saes, "screen", cutoff=cutoff)
    trainer, watching = run(tmp_path, [parity], chosen)
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
    trainer, watching = run(tmp_path, [Recorder()], chosen, reward_weights=[1.0])
    wanted = group_advantages(-3.0 * rollout_scores(trainer, chosen))
    assert torch.allclose(watching.outputs[0]["advantages"], wanted, atol=1e-4)
    assert trainer.reward_func_names == ["recorder", "rollout_policy"]


def test_amplify_negative_does_nothing_without_variance_and_penalise_does(saes: Path, tmp_path: Path) -> None:
    _, amplify = run(tmp_path, [Recorder()], policy(saes, "amplify_negative"))
    _, penalise = run(tmp_path, [Recorder()], policy(saes, "penalise"))
    assert not amplify.outputs[0]["advantages"].any()
    assert penalise.outputs[0]["advantages"].abs().min() > 0


@pytest.mark.parametrize("credit", ["rollout", pytest.param("token", marks=PER_TOKEN)])
def test_logged_advantages_are_those_trained_on(credit: str, saes: Path, tmp_path: Path) -> None:
    trainer, watching = run(tmp_path, [parity], policy(saes, "amplify_negative", credit=credit))
    output = watching.outputs[0]
    trained = output["advantages"]
    if credit == "token":
        trained = (trained * output["completion_mask"]).sum(-1) / output["completion_mask"].sum(-1)
    assert list(trainer._logs["advantages"])[-GROUP:] == pytest.approx(trained.tolist())


def test_policy_takes_the_features_of_the_only_feature_reward(saes: Path, tmp_path: Path) -> None:
    reward = FeatureReward(features(), saes, sae_k=K, reader="policy")
    trainer, _ = run(tmp_path, [parity, reward], RolloutPolicy("amplify_negative"))
    assert set(trainer.rollout_scoring.readers) == {"feature_reward"}


def test_mixin_serves_a_trainer_of_ones_own(saes: Path, tmp_path: Path) -> None:
    class Mine(SAEGRPOMixin, GRPOTrainer):  # type: ignore[misc]
        pass

    chosen = policy(saes, "amplify_negative")
    trainer = grpo_trainer(tmp_path, [parity], kind=Mine, rollout_policy=chosen)
    watching = Watching(trainer)
    train(trainer)
    assert len(watching.outputs) == 2


# --- steered negatives -----------------------------------------------------------------------------------------------


def test_only_the_last_rollout_of_a_group_is_steered(saes: Path, tmp_path: Path) -> None:
    _, steered = run(tmp_path, [parity], policy(saes, "steered_negative", strength=50.0))
    _, plain = run(tmp_path, [parity], policy(saes, "steered_negative", strength=0.0))
    a, b = steered.outputs[0]["completion_ids"], plain.outputs[0]["completion_ids"]
    width = min(a.shape[1], b.shape[1])
    # Multinomial sampling draws row by row from one stream, so the other rows see the same numbers.
    assert torch.equal(a[: GROUP - 1, :width], b[: GROUP - 1, :width])
    assert not torch.equal(a[GROUP - 1, :width], b[GROUP - 1, :width])


def test_unsteered_rows_are_bit_identical() -> None:
    model = tiny_model().eval()
    ids = torch.randint(2, 90, (3, 7))
    rows = torch.tensor([False, True, False])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with ResidualAdd(model, {1: torch.full((D_MODEL,), 5.0)}, rows) as edit:
            steered = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert edit.num_edits == 1
    assert torch.equal(steered[~rows], plain[~rows])
    assert torch.equal(steered[rows][:, :-1], plain[rows][:, :-1])
    assert not torch.allclose(steered[rows][:, -1], plain[rows][:, -1], atol=1e-2)
    assert torch.equal(again, plain)


def test_training_forwards_are_never_edited() -> None:
    model, ids = tiny_model(), torch.tensor([[3, 4, 5]])
    plain = model(input_ids=ids).logits
    with ResidualAdd(model, {1: torch.full((D_MODEL,), 5.0)}, torch.tensor([True])) as edit:
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert edit.num_edits == 0


def test_steering_one_pass_equals_steering_token_by_token() -> None:
    """The log-probabilities of a steered rollout come from one pass; generation made it token by token."""
    model = tiny_model().eval()
    prompt, vectors = torch.tensor([[3, 4, 5]]), {1: torch.full((D_MODEL,), 0.7), 2: torch.full((D_MODEL,), -0.4)}
    rows = torch.tensor([True])
    with torch.no_grad():
        with ResidualAdd(model, vectors, rows):
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        steps = torch.stack(out.logits, dim=1)
        with ResidualAdd(model, vectors, rows, first_position=prompt.shape[1] - 1):
            whole = model(input_ids=out.sequences).logits[:, prompt.shape[1] - 1 : -1]
    assert torch.allclose(steps, whole[:, : steps.shape[1]], atol=1e-4)


def test_steering_without_a_cache_is_the_same_steering() -> None:
    model = tiny_model().eval()
    prompt, vectors = torch.tensor([[3, 4, 5]]), {1: torch.full((D_MODEL,), 0.7), 2: torch.full((D_MODEL,), -0.4)}
    logits = []
    for use_cache in (True, False):
        with torch.no_grad(), ResidualAdd(model, vectors, torch.tensor([True])):
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
                output_logits=True, return_dict_in_generate=True, use_cache=use_cache,
            )  # fmt: skip
        logits.append(torch.stack(out.logits, dim=1))
    assert torch.allclose(*logits, atol=1e-4)


def test_old_log_probabilities_are_the_unsteered_policys(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "steered_negative", strength=3.0)
    trainer, watching = run(tmp_path, [parity], chosen, num_iterations=2)
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

    trainer, watching = run(tmp_path, [last_is_worst], chosen)
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
    trainer, watching = run(tmp_path, [parity], chosen)
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
    _, watching = run(tmp_path, [parity], policy(saes, "steered_negative", max_steered_tokens=2))
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


# --- every setting of the trainer ------------------------------------------------------------------------------------

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("kind", ["amplify_negative", "steered_negative"])
def test_every_loss_type_trains(kind: str, loss_type: str, saes: Path, tmp_path: Path) -> None:
    settings = {"credit": "token"} if kind == "amplify_negative" and Version(trl.__version__) >= Version("1.0") else {}
    try:
        trainer, watching = run(
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
    trainer, watching = run(tmp_path, [parity], policy(saes, "amplify_negative"), learning_rate=1e-3, **changes)
    assert watching.outputs[0]["advantages"].numel() == GROUP * changes.get(
        "steps_per_generation", changes.get("gradient_accumulation_steps", 1)
    )
    assert any("sae/rollouts/reweighted" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", ["amplify_negative", "steered_negative", "penalise"])
def test_policies_work_with_lora_and_the_frozen_reader(kind: str, saes: Path, tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    chosen = policy(saes, kind, reader="frozen", strength=3.0)
    trainer, watching = run(tmp_path, [parity], chosen, peft_config=adapter, learning_rate=1e-2, max_grad_norm=1.0)
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


def test_arguments_of_the_user_stay_as_they_are(saes: Path, tmp_path: Path) -> None:
    weights = [1.0]
    trainer, _ = run(tmp_path, [Recorder()], policy(saes, "penalise"), reward_weights=weights)
    assert weights == [1.0]
    assert trainer.args.reward_weights == [1.0, 1.0]


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


def test_token_credit_is_refused_in_rloo(saes: Path, tmp_path: Path) -> None:
    chosen = policy(saes, "amplify_negative", credit="token")
    with pytest.raises(AttachError, match="RLOO has one advantage per rollout"):
        grpo_trainer(tmp_path, [parity], kind=SAERLOOTrainer, config=trl.RLOOConfig, rollout_policy=chosen)
