"""The trainers with rollout policies: a mixin, and arguments that stay the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import GRPOConfig, GRPOTrainer

from qscope_trl import SAEGRPOMixin, SAEGRPOTrainer
from qscope_trl.errors import ConfigError
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.harness import arguments, train
from tests.training.rollout_harness import GROUP, Recorder, Watching, grpo_trainer, parity, policy, prompts, run_policy


def test_mixin_serves_a_trainer_of_ones_own(saes: Path, tmp_path: Path) -> None:
    class Mine(SAEGRPOMixin, GRPOTrainer):  # type: ignore[misc]
        pass

    chosen = policy(saes, "amplify_negative")
    trainer = grpo_trainer(tmp_path, [parity], kind=Mine, rollout_policy=chosen)
    watching = Watching(trainer)
    train(trainer)
    assert len(watching.outputs) == 2


def test_arguments_of_the_user_stay_as_they_are(saes: Path, tmp_path: Path) -> None:
    weights = [1.0]
    trainer, _ = run_policy(tmp_path, [Recorder()], policy(saes, "penalise"), reward_weights=weights)
    assert weights == [1.0]
    assert trainer.args.reward_weights == [1.0, 1.0]


def test_reward_functions_may_be_passed_by_place(saes: Path, tmp_path: Path) -> None:
    args = arguments(
        GRPOConfig, output_dir=str(tmp_path), per_device_train_batch_size=GROUP, num_generations=GROUP, max_steps=1
    )
    trainer = SAEGRPOTrainer(
        tiny_model(),
        [Recorder()],
        args=args,
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        rollout_policy=policy(saes, "penalise"),
    )
    assert trainer.reward_func_names == ["recorder", "rollout_policy"]


def test_more_by_place_is_refused_beside_a_policy(saes: Path) -> None:
    with pytest.raises(ConfigError, match=r"With `rollout_policy`, pass everything after `model` by name"):
        SAEGRPOTrainer(tiny_model(), [parity], None, rollout_policy=policy(saes, "penalise"))
