"""What one process lacks or meets is answered by all of them, at once; files are downloaded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_forked
from tests.tiny import write_saes


def outcome(case: str, folder: Path) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("one_differs.py")
    done = run_forked(script, case, str(write_saes(folder / "saes")), str(folder), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
def test_a_file_that_one_process_lacks_ends_all_of_them_at_once(tmp_path: Path) -> None:
    first, second = outcome("missing", tmp_path)
    assert second["error"].startswith("No SAE for layer 2 in '")
    assert first["error"].startswith(
        "Process 1 of 2 cannot open what the run needs, so no process goes on: CheckpointError: No SAE"
    )
    assert "Every node needs the same files" in first["error"]
    assert max(first["seconds"], second["seconds"]) < 30, "one waited for the other"


@pytest.mark.distributed
def test_one_process_of_a_node_downloads_and_the_others_wait(tmp_path: Path) -> None:
    first, second = outcome("hub", tmp_path)
    assert sorted(name for name, _ in first["downloads"]) == ["layer1.sae.pt", "layer2.sae.pt"]
    assert second["downloads"] == []
    assert first["trained"] == second["trained"] == 1


@pytest.mark.distributed
def test_nan_on_one_process_stops_all_before_the_step(tmp_path: Path) -> None:
    first, second = outcome("nan", tmp_path)
    assert second["error"].startswith(
        "Optimizer step 1 on process 1: the activations of rows [0, 1] of micro-batch 1 are"
    )
    assert first["error"].startswith(
        "Optimizer step 1: activations on process 1 are NaN or infinite; its message names"
    )
    assert max(first["seconds"], second["seconds"]) < 30, "one waited for the other"


@pytest.mark.distributed
def test_a_dashboard_that_fails_on_the_main_process_ends_the_ones_that_wait(tmp_path: Path) -> None:
    first, second = outcome("dashboard", tmp_path)
    assert first["error"] == "no such kernel"
    assert second["error"] == (
        "The main process failed while this one waited for it, so none goes on: RuntimeError: no such kernel"
    )
    assert max(first["seconds"], second["seconds"]) < 30, "one waited for the other"
