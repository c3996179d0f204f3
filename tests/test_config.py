from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
import trl

from qscope_trl.config.find import FindConfig
from qscope_trl.config.rollouts import RewardConfig, RolloutConfig
from qscope_trl.config.training import PREFIXES, DataConfig, MonitorConfig, PenaltyConfig, SAEConfig
from qscope_trl.errors import ConfigError

OURS = (SAEConfig, PenaltyConfig, MonitorConfig, RewardConfig, RolloutConfig, DataConfig)
THEIRS = [
    getattr(module, name)
    for module in (trl, transformers)
    for name in (
        "ScriptArguments", "DatasetMixtureConfig", "ModelConfig", "SFTConfig", "DPOConfig", "GRPOConfig", "KTOConfig",
        "RewardConfig", "RLOOConfig", "DistillationConfig", "TrainingArguments", "Seq2SeqTrainingArguments",
    )
    if hasattr(module, name)
]  # fmt: skip


def names(kind: type) -> set[str]:
    return {item.name for item in dataclasses.fields(kind)}


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda kind: kind.__name__)
def test_our_names_are_disjoint_from_those_of(theirs: type) -> None:
    for ours in OURS:
        assert names(ours).isdisjoint(names(theirs)), ours.__name__


def test_at_least_the_trainers_we_support_were_compared() -> None:
    assert {"SFTConfig", "DPOConfig", "GRPOConfig", "KTOConfig", "RewardConfig", "TrainingArguments"} <= {
        kind.__name__ for kind in THEIRS
    }


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_shared_names_carry_a_prefix_and_help(kind: type) -> None:
    for item in dataclasses.fields(kind):
        assert item.name.startswith(PREFIXES)
        assert item.metadata["help"]


def test_names_of_our_classes_are_disjoint() -> None:
    every = [name for kind in OURS for name in names(kind)]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("kind", [*OURS, FindConfig], ids=lambda kind: kind.__name__)
def test_settings_are_frozen_and_keyword_only(kind: type) -> None:
    parameters: Any = kind.__dataclass_params__
    assert parameters.frozen
    assert all(item.kw_only for item in dataclasses.fields(kind))


def test_penalty_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="`penalty_kind` is 'hinge'; choose one of preact_hinge, topk_act"):
        PenaltyConfig(penalty_kind="hinge")
    with pytest.raises(ConfigError, match="`penalty_weight` is -1"):
        PenaltyConfig(penalty_weight=-1)
    with pytest.raises(ConfigError, match="`penalty_schedule_steps` is 0"):
        PenaltyConfig(penalty_schedule_steps=0)
    with pytest.raises(ConfigError, match="`sae_k` is 0"):
        SAEConfig(sae_k=0)


def find(**settings: Any) -> FindConfig:
    given = {"model": "m", "saes": "s", "layers": "0", "output": "o", "positive": "p", "negative": "n", **settings}
    return FindConfig(**given)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [("3", (3,)), ("26, 27", (26, 27)), ("4-6,2", (2, 4, 5, 6)), ("all", (0, 1, 9)), ("5,5", (5,))],
)
def test_layers_are_read(layers: str, wanted: tuple[int, ...]) -> None:
    assert find(layers=layers).layer_list((0, 1, 9)) == wanted


@pytest.mark.parametrize("layers", ["", "a", "3-", "1;2", "6-4", "-1"])
def test_layers_of_another_form_are_refused(layers: str) -> None:
    with pytest.raises(ConfigError, match="`layers` is"):
        find(layers=layers).layer_list((0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative": None}, "exactly one way"),
        ({"positive": None, "negative": None}, "exactly one way"),
        ({"group": ["a=b"]}, "exactly one way"),
        ({"positive": None, "negative": None, "data": "d", "target": "t"}, "come together"),
        ({"positive": None, "negative": None, "group": ["a=b", "c=d"]}, "`--target` is missing"),
        ({"rank_by": "x"}, "`rank_by` is 'x'; choose one of mean_difference"),
        ({"positions": "x"}, "`positions` is 'x'"),
        ({"select": "x"}, "`select` is 'x'"),
        ({"dtype": "x"}, "`dtype` is 'x'"),
        ({"top": 0}, "`top` is 0; it is 1 or more"),
        ({"max_length": 1}, "`max_length` is 1; it is 2 or more"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"holdout": 1.0}, "`holdout` is 1.0"),
    ],
)
def test_find_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(**settings)
