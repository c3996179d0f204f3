"""What several files of this folder curate."""

from __future__ import annotations

import pytest

from tests.analysis.curation_setting import Setting, make_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("curation"))
