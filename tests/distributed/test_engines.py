"""The equality table over two processes: gradients under an engine against autograd in this one, without a trainer.

Both processes train on batches of different lengths; the reference takes the batches of both as one step. So averaging
over processes, accumulation and the number of trained tokens of all processes are in the comparison. Each engine is
started once, with the configuration file that is shipped for it, and goes through all methods.
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
from filelock import FileLock

from tests.distributed.setting import LAYERS, WEIGHT, lora, reference_penalty
from tests.tiny import largest_relative_difference, tiny_model, write_saes
from tests.training.reference import cross_entropy_sum, gradients, penalised_positions, penalty_sum, run

ROOT = Path(__file__).parents[2]
# fp32 sums in another order. Seen: up to 7e-7.
TOLERANCE = 1e-6
METHODS: dict[str, dict[str, Any]] = {
    # The last step of the epoch has fewer batches than the first.
    "full": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "lora": {"lora": True, "gradient_checkpointing": True},
    "topk_act": {"penalty_kind": "topk_act"},
    "grpo": {"grpo": True},
    "grpo-lora": {"grpo": True, "lora": True},
}
ENGINES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPModule"} | dict.fromkeys(
    ("zero1", "zero2", "zero3"), "DeepSpeedEngine"
)


def launch(engine: str, folder: Path) -> None:
    saes = write_saes(folder / "saes")
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{engine.replace('zero1', 'zero2')}.yaml")]
    command += ["--zero_stage", "1"] if engine == "zero1" else []
    script = Path(__file__).with_name("train_engine.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*command, str(script), engine, str(saes), str(folder), json.dumps(METHODS)],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The engine and the folder of its results; started by whichever test process comes first."""
    name = request.param
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / f"engine-{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            launch(name, folder)
    return name, folder


def sft_sums(model: Any, batches: list[dict[str, Any]], penalty: Any) -> Any:
    """Task and penalty of one optimizer step, over the trained tokens of both processes."""
    total: Any = 0.0
    for batch in batches:
        output, residuals = run(model, batch, LAYERS)
        positions = penalised_positions(batch, batch["labels"] != -100)
        total = total + cross_entropy_sum(output.logits, batch["labels"])
        total = total + WEIGHT * penalty_sum(penalty.per_token(residuals), positions)
    return total / sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


def rollouts_of(batches: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions, without padding."""
    return [
        (b["prompt_ids"][r][b["prompt_mask"][r].bool()].tolist(),
         b["completion_ids"][r][b["completion_mask"][r].bool()].tolist())
        for b in batches for r in range(b["prompt_ids"].shape[0])
    ]  # fmt: skip


def grpo_sums(model: Any, batches: list[dict[str, Any]], penalty: Any) -> Any:
    """The penalty over the completion tokens of both processes; rewards of 0 leave the task without a gradient."""
    total: Any = 0.0
    for prompt, completion in rollouts_of(batches):
        _, residuals = run(model, {"input_ids": torch.tensor([prompt + completion])}, LAYERS)
        span = slice(max(1, len(prompt) - 1), len(prompt) + len(completion) - 1)
        total = total + penalty.per_token(residuals)[0][span].sum()
    tokens = sum(len(completion) for _, completion in rollouts_of(batches))
    assert all(int(b["num_items_in_batch"]) == tokens for b in batches)
    return WEIGHT * total / tokens


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_gradients_over_two_processes_equal_those_of_one(engine: tuple[str, Path], method: str) -> None:
    name, folder = engine[0], engine[1] / method
    settings, is_zero = METHODS[method], engine[0].startswith("zero")
    facts = json.loads((folder / "facts.json").read_text())
    assert ENGINES[name] in facts["bases"]
    seen = torch.load(folder / "gradients.pt")
    per_process = [torch.load(folder / f"batches{rank}.pt") for rank in range(2)]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    is_grpo = settings.get("grpo", False)
    model = lora(tiny_model()) if settings.get("lora") else tiny_model()
    penalty = reference_penalty(settings.get("penalty_kind", "preact_hinge"))
    whole_epoch = math.ceil(len(per_process[0]) / accumulation)
    assert len(seen) == (1 if is_grpo or (is_zero and accumulation == 1) else whole_epoch)
    lengths, worst = set(), 0.0
    for number, step in enumerate(seen):
        micro = [b for batches in per_process for b in batches[number * accumulation : (number + 1) * accumulation]]
        lengths.update(int((b["completion_mask"] if is_grpo else b["labels"][:, 1:] != -100).sum()) for b in micro)
        wanted = gradients(model, (grpo_sums if is_grpo else sft_sums)(model, micro, penalty))
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
        worst = max(worst, largest_relative_difference(step, wanted))
        assert worst < tolerance
        if is_zero:
            # The next step begins where this one has moved the weights to.
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if key in step:
                        p -= step[key]
    # Shown by `pytest -rP`: the numbers of docs/scaling.md.
    sys.stdout.write(f"equality {name} {method} {worst:.1e}\n")
    assert len(lengths) > 1, "every batch has as many tokens, so nothing is averaged unevenly"


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["grpo", "grpo-lora"])
def test_rollouts_are_read_as_by_a_fresh_forward(engine: tuple[str, Path], method: str) -> None:
    """LoRA: by the frozen model, without the adapters."""
    folder = engine[1] / method
    sources = reference_penalty()
    model = tiny_model()
    for rank in range(2):
        scores = torch.load(folder / f"scores{rank}.pt")
        rollouts = rollouts_of(torch.load(folder / f"batches{rank}.pt"))
        assert len(scores) == len(rollouts) > 0
        left = [torch.tensor(values) for values in scores]
        for prompt, completion in rollouts:
            with torch.no_grad():
                _, residuals = run(model, {"input_ids": torch.tensor([prompt + completion])}, LAYERS)
            columns = [
                residuals[layer][0, len(prompt) :] @ sources.saes[layer]["W_enc"][index]
                + sources.saes[layer]["b_enc"][index]
                for layer, index, _, _ in sources.features
            ]
            wanted = torch.stack(columns, dim=-1)
            # The trainer shuffles the rollouts after they were read.
            same = [n for n, v in enumerate(left) if v.shape == wanted.shape and torch.allclose(v, wanted, atol=1e-5)]
            assert same, "no rollout was read so"
            del left[same[0]]


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_those_of_all_processes_and_logged_once(engine: tuple[str, Path], method: str) -> None:
    facts = json.loads((engine[1] / method / "facts.json").read_text())
    first = facts["log"][0]
    per_process = [torch.load(engine[1] / method / f"batches{rank}.pt") for rank in range(2)]
    settings = METHODS[method]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    micro = [b for batches in per_process for b in batches[:accumulation]]
    model = lora(tiny_model()) if settings.get("lora") else tiny_model()
    penalty = reference_penalty(settings.get("penalty_kind", "preact_hinge"))
    values: list[torch.Tensor] = []
    with torch.no_grad():
        if settings.get("grpo"):
            for prompt, completion in rollouts_of(micro):
                _, residuals = run(model, {"input_ids": torch.tensor([prompt + completion])}, LAYERS)
                span = slice(max(1, len(prompt) - 1), len(prompt) + len(completion) - 1)
                values += [penalty.per_token(residuals)[0][span]]
        else:
            for batch in micro:
                _, residuals = run(model, batch, LAYERS)
                per_token = penalty.per_token(residuals)
                positions = penalised_positions(batch, batch["labels"] != -100)
                values += [torch.stack([per_token[row, position] for row, position in positions])]
    assert first["sae/penalty"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)
    assert len(facts["log"]) == len(torch.load(engine[1] / method / "gradients.pt"))
