"""The `monitor_` settings of the commands: which callbacks they become, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.config.training import MonitorConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.watching import MOST_TEXTS, read_prompts, read_texts, watchers
from tests.tiny import K, write_saes


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes")), k=K)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"w{n} w3", "prompt": f"w{n}", "empty": ""} for n in range(2, 300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def names(monitor: MonitorConfig, suite: SAESuite) -> list[str]:
    return [type(one).__name__ for one in watchers(monitor, suite, [1, 2])]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, []),
        ({"monitor_texts": "rows"}, ["DriftMonitor", "FeatureDashboard"]),
        ({"monitor_texts": "rows", "monitor_drift": "off"}, ["FeatureDashboard"]),
        ({"monitor_prompts": "rows"}, ["FeatureDashboard"]),
        ({"monitor_behaviour": "chinese"}, ["FeatureDashboard"]),
    ],
    ids=["nothing", "texts", "no-drift", "prompts", "behaviour"],
)
def test_settings_become_callbacks(settings: dict[str, Any], wanted: list[str], suite: SAESuite, rows: str) -> None:
    given = {key: rows if value == "rows" else value for key, value in settings.items()}
    assert names(MonitorConfig(**given), suite) == ["RunRecorder", *wanted]


def test_settings_reach_the_callbacks(suite: SAESuite, rows: str) -> None:
    monitor = MonitorConfig(
        monitor_texts=rows, monitor_prompts=rows, monitor_behaviour="repetition", monitor_every=7, monitor_drift="stop"
    )
    _, drift, dashboard = watchers(monitor, suite, [1, 2])
    assert (drift.every, drift.on_drift, drift._settings.texts[:2]) == (7, "stop", ["w2 w3", "w3 w3"])
    assert (dashboard.every, dashboard.detector.name, dashboard.prompts[:2]) == (7, "repetition", ["w2", "w3"])
    assert len(drift._settings.texts) == len(dashboard.texts) == MOST_TEXTS


def test_what_cannot_be_read_is_named_with_its_setting(rows: str) -> None:
    with pytest.raises(DataError, match=r"no column `body`.*Here that is `monitor_text_column`"):
        read_texts(rows, "body", "monitor_text_column")
    with pytest.raises(DataError, match="holds no text in column `empty`"):
        read_texts(rows, "empty", "monitor_text_column")
    with pytest.raises(DataError, match=r"no column `body`; it has `text`, .*`monitor_prompt_column`"):
        read_prompts(rows, "body")
    with pytest.raises(DataError, match="holds no prompt in column `empty`"):
        read_prompts(rows, "empty")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="`monitor_every` is 0"):
        MonitorConfig(monitor_every=0)
    with pytest.raises(ConfigError, match="without `monitor_texts` no drift is measured"):
        MonitorConfig(monitor_drift="stop")
    with pytest.raises(ConfigError, match="`monitor_drift`"):
        MonitorConfig(monitor_drift="maybe")
