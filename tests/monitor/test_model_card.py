"""The card's section, from records made by hand: no path of this machine, no mapping as text, no failing run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qscope_trl.errors import QScopeWarning
from qscope_trl.monitor.model_card import BEGIN, section, update, update_if_possible
from qscope_trl.monitor.run_record import RunRecord
from tests.monitor.records import features


def recorded(folder: Path, **run: Any) -> RunRecord:
    record = RunRecord(folder)
    record.put("run", {"features": features(2).to_dict(), **run})
    return record


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/saes/qwen/", "qwen"),
        ("..\\mine\\saes", "saes"),
        ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"),
    ],
)
def test_of_saes_in_a_folder_the_card_names_the_last_part(tmp_path: Path, name: str, shown: str) -> None:
    text = section(recorded(tmp_path, sae={"name": name, "source": name}))
    assert f"the sparse autoencoders `{shown}`." in text
    assert "/home" not in text


def test_a_control_run_is_said_in_words(tmp_path: Path) -> None:
    text = section(recorded(tmp_path, control={"kind": "random", "of": features(1).to_dict()}))
    assert "**Control run**: the penalty was put on random features instead of the named ones." in text


def test_a_reward_of_scale_0_is_no_reward_and_names_are_not_escaped_in_code(tmp_path: Path) -> None:
    reward = {"reader": "frozen", "features": features(2).to_dict()}
    rewards = [{**reward, "name": "my_reward", "scale": 0.5}, {**reward, "name": "rollout_policy", "scale": 0.0}]
    text = section(recorded(tmp_path, rewards=rewards))
    assert "- Reward `my_reward`: 2 features, scale 0.5" in text
    assert "- Read without a reward: `rollout_policy`: 2 features" in text


def test_the_course_has_the_first_and_the_last_rate(tmp_path: Path) -> None:
    record = recorded(tmp_path)
    for step, rate in ((1, 0.5), (2, 0.9), (3, 0.25)):
        record.add("log", step, {"sae/L5F10/firing_rate": rate})
    record.add("log", 3, {"train_runtime": 1.0})
    assert "| L5F10 | penalised | 0.500 | 0.250 |" in section(record)


@pytest.mark.parametrize("damage", ["card", "record"])
def test_a_card_that_cannot_be_written_is_said_and_stops_nothing(tmp_path: Path, damage: str) -> None:
    record = recorded(tmp_path)
    head = "tags: [a" if damage == "card" else "tags: [a]"
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Mine\n")
    if damage == "record":
        (record.folder / "log.jsonl").write_text("{}\n")
    before = (tmp_path / "README.md").read_text()
    with pytest.warns(QScopeWarning, match="gets no new section on features .*; all else goes on"):
        update_if_possible(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_a_later_section_replaces_the_earlier_one_alone(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n# Mine\n")
    for _ in range(2):
        assert update(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count(BEGIN) == 1
    assert "# Mine" in text
