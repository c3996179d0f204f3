"""What a record says of a run's surroundings: numbers as numbers, arguments without secrets, installed versions."""

from __future__ import annotations

import json

import numpy as np
import torch
from trl import SFTConfig

from qscope_trl.training.run_facts import arguments, hardware, plain, versions
from tests.training.harness import arguments as training_arguments


def test_single_numbers_of_torch_and_numpy_become_numbers() -> None:
    given = {"a": torch.tensor(1.5), "b": np.float32(2.0), "c": np.int64(3), "d": torch.ones(3), "e": [1], "f": None}
    found = plain(given)
    assert found == {"a": 1.5, "b": 2.0, "c": 3, "f": None}
    assert json.loads(json.dumps(found)) == found


def test_arguments_hold_no_secret_also_inside_of_mappings() -> None:
    secret = "hf_" + "A1b2" * 8
    given = training_arguments(
        SFTConfig, hub_token=secret, model_init_kwargs={"token": "short", "revision": secret}, learning_rate=0.5
    )
    found = arguments(given)
    assert found["learning_rate"] == 0.5
    assert found["model_init_kwargs"] == "{'token': '(hidden)', 'revision': '(hidden)'}"
    assert secret not in json.dumps(found)


def test_versions_and_hardware_are_named() -> None:
    assert versions()["torch"] == torch.__version__
    assert hardware(torch.device("cpu")).startswith("cpu, ")
