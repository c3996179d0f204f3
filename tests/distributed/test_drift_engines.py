"""Drift over two processes: the figures of one process, on all of them alike, and training as it would be without."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.training.drift import DriftMonitor
from tests.distributed.drift_engine import probe_texts, run_once
from tests.forked import run_forked
from tests.tiny import tiny_model, write_saes
from tests.training.drift_harness import NO_LIMITS

SCRIPT = Path(__file__).with_name("drift_engine.py")
_FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip
_ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": _FSDP,
    "zero2": {**_ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**_ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sae_record" / "drift.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.slow if name.startswith("zero") else ()) for name in ENGINES]
)
def test_figures_over_two_processes_are_those_of_one(engine: str, tmp_path: Path) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    saes = write_saes(tmp_path / "saes")
    done = run_forked(SCRIPT, engine, str(saes), str(tmp_path), processes=2, environment=ENGINES[engine])
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert all(rank["spread"] == (engine in ("fsdp2", "zero3")) for rank in ranks)
    monitor = DriftMonitor(probe_texts(), every=1, limits=NO_LIMITS)
    run_once("one", tiny_model(), str(saes), tmp_path / "one", [monitor], batch=2)
    mine, theirs = rows(tmp_path / "with"), rows(tmp_path / "one")
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [0, 1, 2, 3]
    for row, wanted in zip(mine, theirs, strict=True):
        for layer, values in wanted["layers"].items():
            # A feature near the k-th place may be on the other side of it by rounding.
            assert row["layers"][layer] == pytest.approx(values, rel=1e-3, abs=1e-3)
        if engine == "zero3":
            assert row["kl"] is None
        else:
            assert row["kl"] == pytest.approx(wanted["kl"], rel=1e-3, abs=1e-7)
    assert mine[-1]["layers"]["3"]["jaccard"] < 0.95
    # Both processes log the same figures, and train as without.
    logged = [[e for e in rank["with"] if "sae/drift/L3/fvu" in e] for rank in ranks]
    assert logged[0] == logged[1]
    for rank in ranks:
        losses = [[e["loss"] for e in rank[name] if "loss" in e] for name in ("with", "without")]
        assert losses[0] == losses[1]
        assert len(set(losses[0])) == 3
