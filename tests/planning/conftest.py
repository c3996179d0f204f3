"""The model that the tests plan for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.planning.runs import backbone


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Qwen3-1.7B with two layers more than the features' last one."""
    folder = backbone("qwen3-1.7b", tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 23}))
    return folder
