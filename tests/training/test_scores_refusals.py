"""What rollout scoring refuses, and how it finds rollouts among padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from qscope_trl import FeatureReward
from qscope_trl.errors import AttachError, ConfigError, FeatureSetError
from qscope_trl.training.generations import Rollouts, find_rollouts, read_generation
from tests.tiny import K, write_saes
from tests.training.harness import train
from tests.training.rollout_harness import grpo_trainer
from tests.training.test_scores import reward, saved


def test_frozen_reader_without_a_frozen_model_says_what_to_set(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"full fine-tuning with `beta=0` keeps none. Set `beta` above 0"):
        train(grpo_trainer(tmp_path, [reward(saes)]))


def test_frozen_reader_of_a_reference_that_moves_is_refused(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"`sync_ref_model` moves the reference model"):
        train(grpo_trainer(tmp_path, [reward(saes)], model=saved(tmp_path), beta=0.1, sync_ref_model=True))


def test_a_schedule_that_trl_divides_out_is_refused(saes: Path, tmp_path: Path) -> None:
    chosen = reward(saes, reader="policy", schedule="warmup")
    trainer = grpo_trainer(tmp_path, [chosen])
    trainer.multi_objective_aggregation = "normalize_then_sum"
    with pytest.raises(AttachError, match=r"the schedule of `feature_reward` would change nothing"):
        train(trainer)


def test_two_readers_of_one_name_are_refused(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Two feature readers are called `feature_reward`"):
        grpo_trainer(tmp_path, [reward(saes), reward(saes)])


def test_features_of_another_model_are_refused(saes: Path, tmp_path: Path) -> None:
    chosen = FeatureReward(["L9F1"], write_saes(tmp_path / "more", [9]), sae_k=K, reader="policy")
    with pytest.raises(FeatureSetError, match=r"L9F1 is out of range: the model has 4 decoder layers"):
        train(grpo_trainer(tmp_path, [chosen]))


class Reshaped(GRPOTrainer):  # type: ignore[misc]
    def _calculate_rewards(self, batch: Any) -> Any:
        raise NotImplementedError


def test_changed_private_methods_are_refused_when_the_trainer_is_built(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AttachError, match=r"`Reshaped._calculate_rewards` .* found the parameters \(batch\).*TRL 0.24"
    ):
        grpo_trainer(tmp_path, [reward(saes)], kind=Reshaped)


def test_unexpected_result_of_generation_is_refused() -> None:
    with pytest.raises(AttachError, match=r"did not return one list of prompt ids and one of completion ids"):
        read_generation((torch.zeros(2, 3), [[1], [2]]), 2)


def test_images_are_refused(saes: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, [reward(saes, reader="policy")])
    with pytest.raises(AttachError, match=r"Rollouts with images cannot be scored"):
        trainer._generate_and_score_completions([{"prompt": "w2", "image": None}])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[0, 5, 6, 7, 1, 0], [3, 5, 8, 0, 0, 0]], [3, 2]),
        ([[0, 0, 0, 5, 6, 7, 1], [0, 0, 0, 3, 5, 8, 0]], [5, 5]),
        ([[5, 6, 7, 1, 0, 0], [3, 5, 9, 0, 0, 0]], None),
        ([[5, 6, 7, 1]] * 3, None),
    ],
)
def test_rollouts_are_found_whatever_the_padding(rows: list[list[int]], wanted: list[int] | None) -> None:
    rollouts = Rollouts([[5, 6], [3, 5]], [[7, 1], [8]], None)
    assert find_rollouts(rows, rollouts, 0) == wanted


def test_an_end_token_that_is_also_padding_does_not_shift_the_completion() -> None:
    rollouts = Rollouts([[1, 5]], [[6, 1]], None)
    assert find_rollouts([[1, 1, 1, 5, 6, 1, 1, 1]], rollouts, 0) == [4]


@pytest.mark.parametrize(("setting", "value"), [("kind", "hinge"), ("reader", "reference")])
def test_unknown_choices_are_refused(setting: str, value: str, saes: Path) -> None:
    with pytest.raises(ConfigError, match=rf"`{setting}` is '{value}'; choose one of"):
        reward(saes, **{setting: value})


def test_scores_need_a_trainer_that_reads_them(saes: Path) -> None:
    with pytest.raises(AttachError, match=r"called without activations"):
        reward(saes)()
