"""The equality table over two processes: gradients under an engine against autograd in this one, without a trainer.

Both processes train on batches of different lengths; the reference takes the batches of both as one step. So averaging
over processes, accumulation and the number of trained tokens of all processes are in the comparison.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.setting import LAYERS, WEIGHT, lora, reference_penalty
from tests.tiny import largest_relative_difference, tiny_model, write_saes
from tests.training.reference import cross_entropy_sum, gradients, penalised_positions, penalty_sum, run

ROOT = Path(__file__).parents[2]
# fp32 sums in another order. Seen: up to 5e-7.
TOLERANCE = 1e-6
CASES = {
    "ddp": {"engine": "ddp"},
    "ddp-accumulation": {"engine": "ddp", "gradient_accumulation_steps": 2},
    "ddp-clipping": {"engine": "ddp", "max_grad_norm": 0.1},
    "ddp-lora": {"engine": "ddp", "lora": True},
    "fsdp2": {"engine": "fsdp2"},
    "fsdp2-accumulation": {"engine": "fsdp2", "gradient_accumulation_steps": 2},
    "fsdp2-lora": {"engine": "fsdp2", "lora": True},
    "zero1": {"engine": "zero1"},
    "zero2": {"engine": "zero2"},
    "zero2-accumulation": {"engine": "zero2", "gradient_accumulation_steps": 2},
    "zero2-clipping": {"engine": "zero2", "max_grad_norm": 0.1},
    "zero3": {"engine": "zero3"},
    "zero3-lora": {"engine": "zero3", "lora": True},
}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPModule"}


def launch(folder: Path, settings: dict[str, Any]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(Path(__file__).with_name("train_engine.py")), str(write_saes(folder / "saes")), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*command, json.dumps(settings)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_gradients_over_two_processes_equal_those_of_one(name: str, tmp_path: Path) -> None:
    settings = dict(CASES[name])
    is_zero = settings["engine"].startswith("zero")
    if is_zero and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    launch(tmp_path, settings)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert WRAPPERS.get(settings["engine"], "DeepSpeedEngine") in facts["bases"]
    seen = torch.load(tmp_path / "gradients.pt")
    per_process = [torch.load(tmp_path / f"batches{rank}.pt") for rank in range(2)]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    model = lora(tiny_model()) if settings.get("lora") else tiny_model()
    penalty = reference_penalty()
    # The last step of an epoch may have fewer batches than the others.
    assert len(seen) == (1 if is_zero else math.ceil(len(per_process[0]) / accumulation))
    lengths = set()
    for number, step in enumerate(seen):
        micro = [b for batches in per_process for b in batches[number * accumulation : (number + 1) * accumulation]]
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in micro]
        lengths.update(counts)
        total: Any = 0.0
        for batch in micro:
            output, residuals = run(model, batch, LAYERS)
            positions = penalised_positions(batch, batch["labels"] != -100)
            total = total + cross_entropy_sum(output.logits, batch["labels"])
            total = total + WEIGHT * penalty_sum(penalty.per_token(residuals), positions)
        wanted = gradients(model, total / sum(counts))
        limit = settings.get("max_grad_norm")
        if limit:
            norm = torch.stack([g.norm() for g in wanted.values()]).norm()
            assert norm > limit
            wanted = {key: g * limit / (norm + 1e-6) for key, g in wanted.items()}
        tolerance = TOLERANCE
        if is_zero:
            # Read off the weights, which round what is added to them.
            weights = max(float(p.detach().abs().max()) for p in model.parameters() if p.requires_grad)
            tolerance += 2.0**-23 * weights / max(float(g.abs().max()) for g in wanted.values())
        assert largest_relative_difference(step, wanted) < tolerance
    assert len(lengths) > 1, "every batch has as many tokens, so nothing is averaged unevenly"
