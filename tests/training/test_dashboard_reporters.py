"""What reaches wandb, TensorBoard and trackio, read back from their files; a wandb that fails stops nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import sqlite3
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qscope_trl.errors import QScopeWarning
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.training.dashboard import FeatureDashboard
from tests.monitor import wandb_file
from tests.tiny import sentence
from tests.training.test_dashboard import PENALISED, PROMPTS, SETTINGS, make, penalty

wandb = pytest.importorskip("wandb")
# Not imported here: trackio keeps the folder that it sees when it first is.
for name in ("tensorboard", "trackio"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)

SCALARS = ["loss", "sae/penalty", "sae/L1F3/firing_rate", "sae/monitor/L1F90/firing_rate", "sae/text/rate"]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """wandb without an account, its files in a folder of the test's."""
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, tmp_path)
        yield tmp_path
        close()


def enter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TRACKIO_DIR", "HOME"):
        patch.setenv(name, str(folder))
    for name, value in (("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off"), ("WANDB_DISABLE_GIT", "true")):
        patch.setenv(name, value)
    # It keeps the settings of its first use.
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        patch.delenv(name, raising=False)


def close() -> None:
    """End the run and the service: only then is the file whole."""
    wandb.finish()
    wandb.teardown()


def quietly(trainer: Any) -> list[str]:
    """Train, and give back what our warnings said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(item.message) for item in caught if item.category is QScopeWarning]


class Reported(NamedTuple):
    folder: Path
    history: list[dict[str, Any]]
    wandb: wandb_file.WandbFile


@pytest.fixture(scope="module")
def reported(saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    """One run of four steps that reports to all three, offline."""
    folder = tmp_path_factory.mktemp("reported")
    generator = torch.Generator().manual_seed(1)
    texts = [sentence(generator, 3 + n) for n in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        trainer = make(
            folder / "run",
            [penalty(saes), FeatureDashboard(PROMPTS, texts, **SETTINGS)],
            report_to=["wandb", "tensorboard", "trackio"],
            learning_rate=0.05,
        )
        assert quietly(trainer) == []
        close()
        yield Reported(folder, trainer.state.log_history, wandb_file.read(folder))


def at(rows: list[dict[str, Any]], name: str) -> dict[int, Any]:
    """What a name shows, by `train/global_step`; once a step."""
    found = [(int(row["train/global_step"]), row[name]) for row in rows if name in row]
    assert len(dict(found)) == len(found)
    return dict(found)


def logged(reported: Reported, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in reported.history if name in entry}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_reach_wandb_on_the_step_axis(reported: Reported, name: str) -> None:
    wanted = logged(reported, name)
    assert len(wanted) >= 3
    assert at(reported.wandb.rows, f"train/{name}") == pytest.approx(wanted)
    assert reported.wandb.axes["*"] == "train/global_step"
    assert reported.wandb.axes["sae_*"] == "train/global_step"


def test_scalars_stand_in_groups_too(reported: Reported) -> None:
    for name, group in (
        ("loss", "sae_penalty/loss"),
        ("sae/penalty", "sae_penalty/penalty"),
        ("sae/L1F3/firing_rate", "sae_features/L1F3_firing_rate"),
        ("sae/monitor/L1F90/mean_pre_act", "sae_monitors/L1F90_mean_pre_act"),
        ("sae/text/rate", "sae_text/rate"),
    ):
        assert at(reported.wandb.rows, group) == pytest.approx(logged(reported, name))
    task = at(reported.wandb.rows, "sae_penalty/task_loss")
    for step, loss in logged(reported, "loss").items():
        assert task[step] == pytest.approx(loss - 0.1 * logged(reported, "sae/penalty")[step])


def test_histograms_are_those_of_the_record(reported: Reported) -> None:
    rows = [row for row in RunRecord(reported.folder / "run").rows("histograms") if any(row["counts"])]
    assert {row["step"] for row in rows} == {0, 2, 4}
    for row in rows:
        name = f"sae_histograms/{row['kind']}_{row['feature']}"
        for part, wanted in (("values", row["counts"]), ("bins", row["edges"])):
            assert at(reported.wandb.rows, f"{name}/{part}")[row["step"]] == pytest.approx(wanted)
        assert at(reported.wandb.rows, f"{name}/_type")[row["step"]] == "histogram"


def test_tables_hold_generations_and_texts(reported: Reported) -> None:
    record = RunRecord(reported.folder / "run")
    for step, path in at(reported.wandb.rows, "sae_samples/generations/path").items():
        found = wandb_file.table(reported.folder, path)
        assert found["columns"] == ["step", "prompt_index", "prompt", "text", "verdict", "tokens"]
        rows = [row for row in record.rows("samples") if row["step"] == step][: SETTINGS["top"]]
        assert [row[:4] for row in found["data"]] == [[step, r["index"], r["prompt"], r["text"]] for r in rows]
        assert [row[4].startswith("shows") for row in found["data"]] == [r["is_shown"] for r in rows]
    texts = at(reported.wandb.rows, "sae_texts/strongest/path")
    assert list(texts) == [0, 2, 4]
    first = wandb_file.table(reported.folder, texts[0])
    assert first["columns"] == ["step", "feature", "text", "largest", "tokens"]
    assert {row[1] for row in first["data"]} <= {*PENALISED, "L1F90"}


def test_pages_show_tokens_shaded_by_their_values(reported: Reported) -> None:
    for name in ("sae_texts/page", "sae_samples/page"):
        paths = at(reported.wandb.rows, f"{name}/path")
        assert list(paths) == [0, 2, 4]
        assert set(paths.values()) <= set(reported.wandb.files)
        pages = [next(reported.folder.rglob(f"files/{path}")).read_text() for path in paths.values()]
        assert any('class="high" style="--a:0.90"' in page for page in pages)
        assert all("Content-Security-Policy" in page and "<script" not in page for page in pages)
        assert all("https://" not in page for page in pages)
    assert "<th>step 0</th><th>step 4</th>" in pages[-1]


def test_penalty_against_task_loss_is_a_chart_with_a_point_per_log_event(reported: Reported) -> None:
    ((step, path),) = at(reported.wandb.rows, "sae_penalty/against_task_loss_table/path").items()
    found = wandb_file.table(reported.folder, path)
    assert step == 4
    assert found["columns"] == ["penalty", "task_loss", "step"]
    assert {row[2]: row[0] for row in found["data"]} == pytest.approx(logged(reported, "sae/penalty"))


def test_the_same_scalars_reach_tensorboard(reported: Reported) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = EventAccumulator(str(reported.folder / "events")).Reload()
        found = {name: {e.step: e.value for e in events.Scalars(f"train/{name}")} for name in SCALARS}
    for name in SCALARS:
        assert found[name] == pytest.approx(logged(reported, name), rel=1e-6)


def test_the_same_scalars_reach_trackio(reported: Reported) -> None:
    import trackio.utils

    (path,) = Path(trackio.utils.TRACKIO_DIR).glob("*.db")
    with sqlite3.connect(path) as database:
        # Of this run: where a worker has made the fixture before, trackio still writes to that one's folder.
        newest = "(select run_id from metrics order by id desc limit 1)"
        found = database.execute(f"select metrics from metrics where run_id = {newest} order by id")
        rows = [json.loads(metrics) for (metrics,) in found]
    for name in SCALARS:
        assert at(rows, f"train/{name}") == pytest.approx(logged(reported, name))


def run_wandb(saes: Path, folder: Path, **changes: Any) -> tuple[Any, list[str]]:
    dashboard = FeatureDashboard(PROMPTS, ["w3 w4 w5"], **SETTINGS)
    trainer = make(folder / "run", [penalty(saes), dashboard], max_steps=2, **{"report_to": "wandb", **changes})
    return trainer, quietly(trainer)


def test_without_an_account_the_run_is_kept_offline_with_one_message(saes: Path, at_home: Path) -> None:
    trainer, said = run_wandb(saes, at_home)
    assert len(said) == 1
    assert "wandb could not be started (No API key configured" in said[0]
    assert "`wandb sync '" in said[0]
    assert trainer.state.global_step == 2
    close()
    found = wandb_file.read(at_home)
    assert list(at(found.rows, "train/loss")) == [1, 2]
    assert list(at(found.rows, "sae_samples/page/path")) == [0, 2]
    assert found.config["max_steps"] == 2


def test_if_wandb_cannot_start_at_all_the_run_goes_on_with_one_message(
    saes: Path, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("Timed out while retrying: no route to host\nand more")

    monkeypatch.setattr(wandb, "init", refuse)
    trainer, said = run_wandb(saes, at_home)
    assert len(said) == 1
    assert "could not be started (Timed out while retrying: no route to host), nor without network" in said[0]
    assert trainer.state.global_step == 2
    assert len(RunRecord(at_home / "run").rows("samples")) == 10


def test_without_wandb_installed_the_record_is_all_there_is(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, said = run_wandb(saes, tmp_path, report_to="none")
    assert said == []
    assert len(RunRecord(tmp_path / "run").rows("samples")) == 10


def test_training_is_the_same_with_wandb_and_without(saes: Path, at_home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        shown, said = run_wandb(saes, at_home)
    assert said == []
    alone = make(at_home / "alone", [penalty(saes)], max_steps=2)
    quietly(alone)
    for mine, theirs in zip(shown.model.parameters(), alone.model.parameters(), strict=True):
        assert bool((mine == theirs).all())
    assert all(math.isfinite(e["loss"]) for e in alone.state.log_history if "loss" in e)
