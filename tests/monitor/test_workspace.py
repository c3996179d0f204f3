"""`qscope dashboard`: the panels are those of the run's own features, and without an account a file is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.config.dashboard import DashboardConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.monitor import workspace
from qscope_trl.monitor.run_record import RunRecord

pytest.importorskip("wandb_workspaces")

LOGGED = {
    "loss": 1.0,
    "sae/penalty": 1.0,
    "sae/penalty_weight": 0.1,
    "sae/L4/penalty": 0.5,
    "sae/L4F17/mean_pre_act": 0.1,
    "sae/L4F17/firing_rate": 0.1,
    "sae/monitor/L3F7/mean_pre_act": 0.2,
    "sae/monitor/L3F7/firing_rate": 0.2,
    "sae/drift/L4/fvu": 0.1,
    "sae/drift/L5/fvu": 0.1,
    "sae/drift/kl": 0.0,
    "sae/text/rate": 0.5,
    "sae/rule/loops": 0.5,
    "reward": 0.5,
    "rewards/parity/mean": 0.5,
    "sae/feature_reward/score": 0.5,
    "eval_loss": 1.0,
    "eval_sae/L4F17/firing_rate": 0.1,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    record = RunRecord(tmp_path / "run")
    record.begin(0)
    for step in (1, 2):
        record.add("log", step, LOGGED)
    for feature, kind in (("L4F17", "penalised"), ("L3F7", "monitor")):
        record.add(
            "histograms", 0, {"feature": feature, "kind": kind, "edges": [0, 1], "counts": [1], "num_tokens": 1}
        )
    return tmp_path / "run"


def spec(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Panels by section, as the file has them."""
    data = json.loads(path.read_text(encoding="utf-8"))
    bank = data["spec"]["section"]["panelBankConfig"]["sections"]
    assert all(section["isOpen"] for section in bank)
    assert data["spec"]["section"]["settings"]["xAxis"] == "train/global_step"
    return {section["name"]: section["panels"] for section in bank}


def metrics(panels: list[dict[str, Any]]) -> set[str]:
    return {name for panel in panels for name in panel["config"].get("metrics", [])}


def test_the_file_holds_the_panels_of_the_runs_own_features(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "workspace.json"
    result = workspace.run(DashboardConfig(project="p", run_dir=str(run_dir), json=str(out)))
    found = spec(out)
    assert list(found) == [
        "Penalty and task loss",
        "Penalised features",
        "Held-out monitors",
        "Drift",
        "Text",
        "Rollouts",
        "Tables",
    ]
    assert metrics(found["Penalty and task loss"]) == {
        "train/sae/penalty",
        "sae_penalty/task_loss",
        "train/loss",
        "eval/loss",
        "train/sae/penalty_weight",
        "train/sae/L4/penalty",
    }
    assert metrics(found["Penalised features"]) == {
        "train/sae/L4F17/mean_pre_act",
        "train/sae/L4F17/firing_rate",
        "sae_histograms/penalised_L4F17",
    }
    assert metrics(found["Held-out monitors"]) == {
        "train/sae/monitor/L3F7/mean_pre_act",
        "train/sae/monitor/L3F7/firing_rate",
        "sae_histograms/monitor_L3F7",
    }
    assert [panel["config"]["metrics"] for panel in found["Drift"]] == [
        ["train/sae/drift/L4/fvu", "train/sae/drift/L5/fvu"],
        ["train/sae/drift/kl"],
    ]
    assert metrics(found["Text"]) == {"train/sae/text/rate", "train/sae/rule/loops"}
    assert metrics(found["Rollouts"]) == {
        "train/reward",
        "train/rewards/parity/mean",
        "train/sae/feature_reward/score",
    }
    media = [key for panel in found["Tables"] for key in panel["config"].get("mediaKeys", [])]
    assert media == ["sae_samples/page", "sae_texts/page", "sae_rollouts/page"]
    assert all(
        panel["config"]["xAxis"] == "train/global_step"
        for panels in found.values()
        for panel in panels
        if panel["viewType"] == "Run History Line Plot"
    )
    shown = workspace.format_result(result)
    assert "Held-out monitors: 4 panels" in shown
    assert shown.endswith(f"Workspace written to {out}\n")


def test_every_panel_that_names_a_metric_names_one_that_is_logged(run_dir: Path) -> None:
    names = workspace.logged_names(run_dir)
    known = {f"train/{name}" for name in names} | {f"eval/{name.removeprefix('eval_')}" for name in names}
    known |= {name for name in names if name.startswith("sae_histograms/")} | {"sae_penalty/task_loss"}
    for section in workspace.plan(names):
        for panel in section.panels:
            if panel.kind == "lines":
                assert set(panel.keys) <= known


def test_a_run_without_rollouts_has_no_panels_for_them() -> None:
    found = {section.name: section for section in workspace.plan(["loss", "sae/penalty"])}
    assert list(found) == ["Penalty and task loss", "Tables"]
    assert all("rollouts" not in key for panel in found["Tables"].panels for key in panel.keys)


def test_many_features_stay_readable() -> None:
    names = [f"sae/L1F{n}/{what}" for n in range(200) for what in ("mean_act", "firing_rate")]
    (section,) = (one for one in workspace.plan(names) if one.name == "Penalised features")
    assert len(section.panels) <= 2 + 12
    assert len(section.panels[0].keys) == 200


def test_without_a_run_the_panels_take_what_matches(tmp_path: Path) -> None:
    import re

    out = tmp_path / "any.json"
    workspace.run(DashboardConfig(project="p", json=str(out)))
    found = spec(out)
    patterns = [panel["config"].get("metricRegex") for panels in found.values() for panel in panels]
    patterns = [pattern for pattern in patterns if pattern]
    for name in LOGGED:
        if re.match(r"sae/(L4F|monitor|drift|feature_reward)", name):
            assert any(re.fullmatch(pattern, f"train/{name}") for pattern in patterns), name


def test_a_run_without_a_record_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "sae/L1F2/mean_act": 1.0}]}))
    assert "sae/L1F2/mean_act" in workspace.logged_names(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither a record nor a checkpoint"):
        workspace.logged_names(tmp_path / "empty")


def test_it_is_saved_in_the_account_or_says_what_is_missing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    config = DashboardConfig(entity="e", project="p", run_dir=str(run_dir))
    spaces = sys.modules[type(workspace.build([], config)).__module__]

    def refuse(self: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(spaces.Workspace, "save", refuse)
    with pytest.raises(ConfigError, match=r"cannot be saved in wandb: No API key configured\..*by `--json`"):
        workspace.run(config)
    saved: list[Any] = []
    monkeypatch.setattr(spaces.Workspace, "save", lambda self: saved.append((self.entity, self.project, self.name)))
    monkeypatch.setattr(spaces.Workspace, "url", "https://wandb.ai/e/p?nw=1")
    assert workspace.run(config).place == "https://wandb.ai/e/p?nw=1"
    assert saved == [("e", "p", "SAE features")]
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(
        ConfigError, match=r"needs the package wandb-workspaces, .*pip install \"qscope_trl\[wandb\]\""
    ):
        workspace.run(config)


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`project` is empty"):
        DashboardConfig(project=" ", json="x.json")
    with pytest.raises(ConfigError, match="`name` is empty"):
        DashboardConfig(project="p", name="", json="x.json")
    with pytest.raises(ConfigError, match="`entity` is missing"):
        DashboardConfig(project="p")
    with pytest.raises(ConfigError, match=r"`run_dir` is '.*', which is no folder"):
        DashboardConfig(project="p", json="x.json", run_dir=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"`json` is '.*', which is a folder"):
        DashboardConfig(project="p", json=str(tmp_path))
