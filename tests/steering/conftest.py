"""The tiny model and SAEs that steering is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model, write_saes


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model().eval()
    model.generation_config.eos_token_id = None
    return model
