"""FeatureSets on the Hub: what is pushed comes back equal, and the card says what a reader must know."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import yaml

from qscope_trl.errors import FeatureSetError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.features.hub import FEATURES_FILE, LICENCE, is_hub_id

CHOSEN = FeatureSet(
    features=(
        Feature(layer=5, index=23, weight=2.0, threshold=-0.25, label="Chinese | text", evidence={"auroc": 0.93}),
        Feature(layer=6, index=1),
    ),
    model="Qwen/Qwen3-8B-Base",
    sae="Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50",
    sae_revision="abc",
    origin={"command": "qscope find", "data": "a_b"},
)


class Hub:
    """A Hub of one repository, with the signatures of the real one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
        self.api.create_commit.side_effect = self._commit
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: self.api)
        download = mock.create_autospec(huggingface_hub.hf_hub_download, side_effect=self._download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    def _commit(self, repo_id: str, operations: Any, **_: Any) -> Any:
        for operation in operations:
            path = self.folder / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(operation.path_or_fileobj)
        return SimpleNamespace(commit_url=f"hub://{repo_id}/commit/1")

    def _download(self, repo_id: str, filename: str, **_: Any) -> str:
        return str(self.folder / repo_id / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_a_pushed_set_comes_back_equal(hub: Hub) -> None:
    assert CHOSEN.push_to_hub("me/zh", private=True, license="cc0-1.0") == "hub://me/zh/commit/1"
    assert FeatureSet.from_hub("me/zh") == CHOSEN
    assert FeatureSet.load("me/zh") == CHOSEN
    hub.api.create_repo.assert_called_once_with("me/zh", private=True, exist_ok=True)


def test_the_card_has_evidence_origin_use_and_the_note_on_licences(hub: Hub) -> None:
    CHOSEN.push_to_hub("me/zh", license="cc0-1.0")
    text = (hub.folder / "me/zh/README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "Qwen/Qwen3-8B-Base"
    assert metadata["license"] == "cc0-1.0"
    assert "qscope_trl" in metadata["tags"]
    assert "| L5F23 | Chinese \\| text | 2 | -0.25 | 0.93 |" in text
    assert "| L6F1 | - | 1 | 0 | - |" in text
    assert "revision `abc`" in text
    assert "- data: a\\_b" in text
    assert 'FeatureSet.from_hub("me/zh")' in text
    assert LICENCE in text


def test_a_long_set_is_cut_in_the_card_alone(hub: Hub) -> None:
    FeatureSet.from_names([f"L1F{n}" for n in range(60)]).push_to_hub("me/many")
    text = (hub.folder / "me/many/README.md").read_text(encoding="utf-8")
    assert "and 10 more, in `features.yaml`" in text
    assert "origin not stated" in text
    assert len(FeatureSet.from_hub("me/many")) == 60


def test_a_hub_that_refuses_is_said_with_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.api.create_repo.side_effect = OSError("403: no write access\nmore")
    with pytest.raises(FeatureSetError, match=r"cannot be pushed to 'me/zh': 403: no write access\. .*hf auth login"):
        CHOSEN.push_to_hub("me/zh")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", mock.Mock(side_effect=ValueError("offline")))
    with pytest.raises(FeatureSetError, match=rf"No `{FEATURES_FILE}` of 'me/zh' on the Hub.*: offline\."):
        FeatureSet.load("me/zh")


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("me/zh", True),
        ("me/zh.v2", True),
        ("zh", False),
        ("a/b/c", False),
        ("features/zh.yaml", False),
        ("./zh", False),
    ],
)
def test_what_counts_as_a_repository(text: str, is_id: bool) -> None:
    assert is_hub_id(text) is is_id


def test_a_local_path_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    CHOSEN.save(tmp_path / "sets" / "zh.yaml")
    (tmp_path / "sets" / "zh.yaml").rename(tmp_path / "sets" / "zh")
    assert not is_hub_id("sets/zh")
    assert FeatureSet.load("sets/zh") == CHOSEN


def test_no_path_of_this_machine_is_pushed(hub: Hub) -> None:
    origin = {"files": {"positive": "/home/me/zh.jsonl", "others": ["C:\\me\\en.jsonl", "~/de.jsonl"]}, "note": "a/b"}
    mine = FeatureSet(features=(Feature(layer=1, index=2, label="/think"),), sae="/home/me/saes", origin=origin)
    mine.push_to_hub("me/mine")
    for name in ("README.md", FEATURES_FILE):
        text = (hub.folder / "me/mine" / name).read_text(encoding="utf-8")
        assert "/home" not in text
        assert "~" not in text
    found = FeatureSet.from_hub("me/mine")
    assert found.sae == "saes"
    assert found.features == mine.features
    assert found.origin == {"files": {"positive": "zh.jsonl", "others": ["en.jsonl", "de.jsonl"]}, "note": "a/b"}
