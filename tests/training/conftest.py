"""SAEs that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_saes


@pytest.fixture(scope="session")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SAEs for every layer of the tiny model; nothing writes there."""
    return write_saes(tmp_path_factory.mktemp("saes"))
