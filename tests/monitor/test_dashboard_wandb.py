"""What is shown in wandb by name, and a wandb that refuses: training hears of it once and goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qscope_trl.errors import ConfigError, QScopeWarning
from qscope_trl.monitor import dashboard_wandb
from qscope_trl.monitor.dashboard_things import penalty_things, rollout_things, sample_things, summed, text_things
from qscope_trl.monitor.dashboard_wandb import Histogram, Scatter, Table, WandbSink, grouped
from qscope_trl.monitor.html import Html

wandb = pytest.importorskip("wandb")


class Run:
    """Keeps what a run is told, or refuses it."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal, self.logged, self.alerts, self.axes = refusal, [], [], []

    def define_metric(self, name: str, **settings: Any) -> None:
        self.axes.append((name, settings.get("step_metric")))

    def log(self, row: dict[str, Any]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.logged.append(row)

    def alert(self, **given: Any) -> None:
        self.alerts.append(given)


def test_names_are_grouped_by_their_first_part() -> None:
    logs = {
        "loss": 1.0,
        "sae/penalty": 2,
        "sae/penalty_weight": 0.1,
        "sae/L3/penalty": 0.5,
        "sae/L3F7/mean_act": 0.25,
        "sae/monitor/L3F8/firing_rate": 0.125,
        "sae/monitor/penalty": 0.1,
        "sae/drift/L3/fvu": 0.2,
        "sae/drift/kl": 0.01,
        "sae/text/rate": 0.3,
        "sae/rule/loops": 0.4,
        "sae/alarm": 1.0,
        "reward": 0.5,
        "sae/feature_reward/score": 0.6,
        "eval_loss": 3.0,
        "learning_rate": 1e-4,
        "note": "text",
    }
    assert grouped(logs) == {
        "sae_penalty/loss": 1.0,
        "sae_penalty/penalty": 2.0,
        "sae_penalty/penalty_weight": 0.1,
        "sae_penalty/L3_penalty": 0.5,
        "sae_features/L3F7_mean_act": 0.25,
        "sae_monitors/L3F8_firing_rate": 0.125,
        "sae_monitors/penalty": 0.1,
        "sae_drift/L3_fvu": 0.2,
        "sae_drift/kl": 0.01,
        "sae_text/rate": 0.3,
        "sae_text/rule_loops": 0.4,
        "sae_monitors/alarm": 1.0,
        "sae_rollouts/reward": 0.5,
        "sae_rollouts/feature_reward_score": 0.6,
    }


def test_things_become_wandbs_own_on_the_step_axis() -> None:
    run = Run()
    sink = WandbSink(run)
    assert run.axes == [("train/global_step", None), ("sae_*", "train/global_step")]
    cell = Html("<b>x</b>")
    table = Table(["a", "b"], [[1.0, cell], [2.0, cell]])
    sink.show(3, {"h": Histogram([0.0, 1.0, 2.0], [4, 5]), "t": table, "p": Html("<p>&lt;</p>"), "n": 1})
    (row,) = run.logged
    assert row["train/global_step"] == 3
    assert (row["h"].histogram, row["h"].bins) == ([4, 5], [0.0, 1.0, 2.0])
    assert row["t"].columns == ["a", "b"]
    assert [line[0] for line in row["t"].data] == [1.0, 2.0]
    assert isinstance(row["t"].data[0][1], wandb.Html)
    assert "Content-Security-Policy" in row["t"].data[0][1].html
    assert row["p"].html == "<p>&lt;</p>"
    assert row["n"] == 1.0
    sink.show(4, {})
    assert len(run.logged) == 1
    sink.alert("title", "message")
    assert run.alerts == [{"title": "title", "text": "message", "level": wandb.AlertLevel.WARN}]


def test_a_run_that_refuses_is_left_with_one_warning() -> None:
    sink = WandbSink(Run(wandb.errors.CommError("the connection is gone.\nmore")))
    with pytest.warns(QScopeWarning, match=r"wandb takes no more \(the connection is gone\), so the dashboard ends"):
        sink.show(1, {"n": 1.0})
    sink.show(2, {"n": 1.0})
    sink.alert("title", "message")
    assert sink.run.alerts == []


def test_without_a_run_there_is_no_sink_and_wandb_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "run", None)
    assert WandbSink.of_running() is None
    assert dashboard_wandb.alert("title", "message") is False
    monkeypatch.delitem(sys.modules, "wandb")
    assert WandbSink.of_running() is None
    assert "wandb" not in sys.modules


def test_an_alert_goes_to_the_run_that_is_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    monkeypatch.setattr(wandb, "run", run)
    assert dashboard_wandb.alert("title", "message") is True
    assert run.alerts[0]["title"] == "title"


def test_starting_falls_back_to_disk_and_then_to_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []

    def refuse(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("no route to host.")

    assert dashboard_wandb.start(lambda: started.append(1), project="p", name=None) == "begun"
    assert started == [1]

    def init(**given: Any) -> None:
        started.append(given)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "run", SimpleNamespace(dir=str(tmp_path / "run" / "files")))
    with pytest.warns(QScopeWarning, match=r"could not be started \(no route to host\), so the run is kept on disk"):
        assert dashboard_wandb.start(refuse, project="p", name="n") == "offline"
    assert started[-1] == {"project": "p", "name": "n", "mode": "offline"}
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(QScopeWarning, match="nor without network .* training goes on without it"):
        assert dashboard_wandb.start(refuse, project="p", name="n") == "not"


def test_what_needs_an_account_says_so() -> None:
    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured.")

    with pytest.raises(
        ConfigError, match=r"cannot be saved in wandb: No API key configured\. .*`wandb login`.*--json"
    ):
        dashboard_wandb.needing_account(refuse)


# --- what is made of a record's rows ---------------------------------------------------------------------------------


def sample(step: int, text: str, values: list[float], shown: bool | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "index": 0,
        "prompt": "<p>",
        "text": text,
        "tokens": ["a", "<b>"],
        "values": {"L1F1": values, "L1F2": [1.0, 1.0]},
        "is_shown": shown,
        "detector": None if shown is None else "chinese",
    }


def test_generations_stand_beside_the_first_ones_on_one_scale_and_are_escaped() -> None:
    first, now = sample(0, "x", [0.0, 4.0], True), sample(5, "<script>", [2.0, 0.0], False)
    things = sample_things(5, [now], [first], ["L1F1"])
    page = things["sae_samples/page"]
    assert isinstance(page, Html)
    assert "<th>step 0</th><th>step 5</th>" in page
    assert 'style="--a:0.90" title="4.000">&lt;b&gt;</span>' in page
    assert 'style="--a:0.50" title="2.000">a</span>' in page
    assert "shows chinese" in page
    assert "<script>" not in page
    table = things["sae_samples/generations"]
    assert isinstance(table, Table)
    assert table.rows[0][:5] == [5, 0, "<p>", "<script>", "no chinese"]
    assert sample_things(5, [], [], []) == {}
    assert "<th>prompt</th><th>step 0</th>" in sample_things(0, [first], [first], [])["sae_samples/page"]  # type: ignore[operator]
    assert text_things(0, []) == {}


def test_rollouts_show_every_reward_and_a_dash_where_there_is_none() -> None:
    row = {
        "prompt": "p",
        "tokens": ["a"],
        "values": {},
        "score": None,
        "advantage": -1.0,
        "advantage_before": -0.5,
        "policy": "amplified",
        "rewards": {"parity": 1.0},
    }
    things = rollout_things(7, [row, {**row, "rewards": {"other": 2.0}}], ["L1F1"])
    table = things["sae_rollouts/rollouts"]
    assert isinstance(table, Table)
    assert table.columns == [
        "step", "prompt", "score", "advantage_before", "advantage", "policy", "parity", "other", "tokens",
    ]  # fmt: skip
    assert [line[:8] for line in table.rows] == [
        [7, "p", None, -0.5, -1.0, "amplified", 1.0, None],
        [7, "p", None, -0.5, -1.0, "amplified", None, 2.0],
    ]
    assert rollout_things(7, [], []) == {}


def test_a_long_run_is_thinned_out_to_2000_points() -> None:
    assert penalty_things([(1, 0.5, 1.0)]) == {}
    (shown,) = penalty_things([(step, 1.0 / step, float(step)) for step in range(1, 5001)]).values()
    assert isinstance(shown, Scatter)
    assert 1600 < len(shown.table.rows) <= 2000
    assert shown.table.rows[0] == [1.0, 1.0, 1]


def test_sums_leave_out_what_was_not_read() -> None:
    values = {"a": [None, 1.0, None], "b": [None, 2.0, 3.0]}
    assert summed(values, ["a", "b", "c"], 3) == [None, 3.0, 3.0]
    assert summed({}, ["a"], 2) == [None, None]
