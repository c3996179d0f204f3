"""Two processes: groups of rollouts that span both are one group, checkpoints hold the sums of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version

from tests.forked import run_forked
from tests.tiny import write_saes
from tests.training.rollout_harness import parity


def launch(tmp_path: Path, kind: str, cutoff: float = 0.0, script: str = "two_processes.py") -> list[dict[str, Any]]:
    """What both processes saw; they draw the same rollouts in every launch."""
    tmp_path.mkdir(exist_ok=True)
    saes = write_saes(tmp_path / "saes")
    path = Path(__file__).with_name(script)
    done = run_forked(path, str(saes), str(tmp_path), kind, processes=2, environment={"CUTOFF": str(cutoff)})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["amplify_negative", pytest.param("screen", marks=pytest.mark.slow), "steered_negative", "penalise"]
)
def test_a_group_over_two_processes_is_one_group(kind: str, tmp_path: Path) -> None:
    if kind == "screen" and Version(trl.__version__) < Version("1.7"):
        pytest.skip("counts a missing reward as 0")
    cutoff = 0.0
    if kind == "screen":
        first = launch(tmp_path / "first", "amplify_negative")
        cutoff = sorted(s for rank in first for s in rank["scores"])[5]
    ranks = launch(tmp_path, kind, cutoff)
    ids = [row for rank in ranks for row in rank["ids"]]
    trained = torch.tensor([a for rank in ranks for a in rank["advantages"]])
    scores = torch.tensor([s for rank in ranks for s in rank["scores"]])
    rewards = torch.tensor(parity(ids))
    assert len(ids) == 8
    assert ranks[0]["ids"] != ranks[1]["ids"]
    for rank in ranks:
        assert rank["items"] == sum(map(len, ids))
        assert rank["logged"][-8:] == pytest.approx(trained.tolist(), abs=1e-5)
    if kind == "steered_negative":
        # One steered rollout, the last of all; its cap is seen by both processes.
        assert len(ids[-1]) == 3
        assert max(map(len, ids[:-1])) > 3
        assert ranks[0]["log"]["sae/rollouts/steered_advantage"] == pytest.approx(float(trained[-1]), abs=1e-4)
        return
    if kind == "penalise":
        # LoRA, read with the adapters off; the log's mean is that of both processes.
        if Version(trl.__version__) >= Version("1.0"):  # older ones have no `log_metric`
            assert ranks[0]["log"]["sae/rollout_policy/score"] == pytest.approx(float(scores.mean()), abs=1e-4)
            assert ranks[0]["log"] == ranks[1]["log"]
        both = rewards - scores
        wanted = (both - both.mean()) / (both.std() + 1e-4)
    elif kind == "screen":
        kept = scores <= cutoff
        assert kept.sum() == 6
        mean, std = rewards[kept].mean(), rewards[kept].std()
        wanted = torch.where(kept, (rewards - mean) / (std + 1e-4), 0)
    else:
        plain = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        wanted = torch.where(plain < 0, plain * (1 + scores).clamp(max=5), plain)
    assert torch.allclose(trained, wanted, atol=1e-3)


@pytest.mark.distributed
def test_a_run_resumed_inside_a_log_window_logs_as_the_whole_one(tmp_path: Path) -> None:
    """The checkpoint holds the sums of both processes, and they are counted once."""
    ranks = launch(tmp_path, "resume", script="two_processes_penalty.py")
    assert ranks[0]["saved"] == pytest.approx(ranks[0]["expected"])
    for rank in ranks:
        assert rank["whole"].keys() == rank["resumed"].keys() > {"sae/penalty", "sae/monitor/L3F9/firing_rate"}
        assert rank["resumed"] == pytest.approx(rank["whole"])
