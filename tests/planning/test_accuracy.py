"""The plan against the live bytes of real training steps on a CPU: models of some million parameters, every operation
watched by code that shares nothing with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from qscope_trl.config.plan import PlanConfig
from qscope_trl.planning import memory, saes
from qscope_trl.planning.engines import Engine
from qscope_trl.planning.run import Plan, plan
from qscope_trl.training import grpo_run, sft
from tests.planning.live_bytes import LiveTensors
from tests.tiny import tiny_tokenizer, write_saes

chunked_logprob = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL builds whole logits")
pytest.importorskip("transformers.models.qwen3_5", reason="no Qwen3.5 in this transformers")

WIDTH, LENGTH, TILE = 128, 256, 1024
SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": WIDTH, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "pad_token_id": 0, "eos_token_id": 1,
    "max_position_embeddings": 1024,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {"tie_word_embeddings": False}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}),
    "hybrid": (
        "qwen3_5_text",
        {
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
        },
    ),
}  # fmt: skip
LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj", "o_proj"]}
BF16 = {"bf16": True, "dtype": "bfloat16"}
# What is not planned: ids and masks, positions, statistics of features, counters; here some hundred KB of 20 to 90 MB.
TOLERANCE = 0.03


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(autouse=True)
def tiles_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's Triton kernels work in the tile's memory: their torch stand-ins must not allocate. Small tiles, so that
    the loss does not hide everything else."""

    def forward(tile: Any, stride: Any, targets: Any, most: Any, total: Any, *args: Any, **kwargs: Any) -> None:
        most.zero_()
        total.fill_(1.0)

    def backward(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        tile.zero_()

    def add(total: torch.Tensor, *args: Any) -> None:
        total.zero_()

    monkeypatch.setattr(chunked_logprob, "_forward_tile", forward)
    monkeypatch.setattr(chunked_logprob, "_backward_tile", backward)
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", add)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", TILE)
    monkeypatch.setattr(memory, "TILE_VOCAB", TILE)
    # What the counting kernel allocates within its operation is not seen, and on a CPU it is another size.
    monkeypatch.setattr(saes, "_SLAB_ELEMENTS", 0)


def write_run(folder: Path, kind: str, **changes: Any) -> list[str]:
    model_type, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **sizes}))
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [type(model).__name__]}))
    write_saes(folder / "SAE-Res-Tiny-W1K-L0_8", [3, 5], d_model=WIDTH, d_sae=1024)
    rows = [{"text": " ".join(["w5"] * (LENGTH + 5))}] * 16
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "rows.jsonl"),
        "sae_path": str(folder / "SAE-Res-Tiny-W1K-L0_8"),
        "sae_features": ["L3F1", "L3F2", "L5F7"],
        "penalty_weight": 0.1,
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "max_length": LENGTH,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "run.yaml")]


def measure(folder: Path, kind: str, **changes: Any) -> tuple[Plan, LiveTensors, Any]:
    """The plan, the watched bytes of two optimizer steps, and the trainer."""
    argv = write_run(folder, kind, **changes)
    planned = plan(sft.parse(argv), "sft", PlanConfig(config=argv[1]), Engine("single", 1))
    trainer = sft.build_trainer(sft.parse(argv))
    live = LiveTensors([*trainer.model.parameters(), *trainer.model.buffers()])
    compute_loss, clip = trainer.compute_loss, trainer.accelerator.clip_grad_norm_

    def marked_loss(*args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        live.mark("forward")
        return result

    def marked_clip(*args: Any, **kwargs: Any) -> Any:
        live.mark("step")
        return clip(*args, **kwargs)

    trainer.compute_loss = marked_loss
    trainer.accelerator.clip_grad_norm_ = marked_clip
    with live:
        trainer.train()
    return planned, live, trainer


CASES = [
    ("dense", {}),
    ("dense", {"gradient_checkpointing": True}),
    ("dense", {**LORA, **BF16, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ("dense", {**LORA, **BF16}),
    ("dense", {"bf16": True, "gradient_accumulation_steps": 2}),
    ("dense", {"bf16": True, "gradient_checkpointing": True}),
    ("tied", {**BF16, "gradient_checkpointing": True}),
    ("dense", {**BF16, "penalty_kind": "topk_act", "gradient_checkpointing": True}),
    ("experts", {"bf16": True}),
    ("experts", {**BF16, "gradient_checkpointing": True}),
    ("experts", {**LORA, **BF16, "gradient_checkpointing": True}),
    ("hybrid", {**BF16}),
    ("hybrid", {"bf16": True, "gradient_checkpointing": True}),
    ("hybrid", {**LORA, **BF16}),
    ("hybrid", {**LORA, **BF16, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_the_plan_is_what_a_training_step_takes(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    planned, live, trainer = measure(tmp_path, kind, **{"gradient_checkpointing": False, **changes})
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    parts = planned.peak.parts
    # Counts are exact.
    assert planned.facts.num_parameters == sum(p.numel() for p in parameters)
    assert planned.facts.num_trainable == sum(p.numel() for p in trained)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    assert parts["weights"] == weights
    moments = [value for states in trainer.optimizer.state.values() for n, value in states.items() if n != "step"]
    optimizer = sum(value.numel() * value.element_size() for value in moments)
    assert parts["optimizer"] == optimizer
    step = next(moment for moment in planned.moments if moment.name == "optimizer step")
    assert step.parts["gradients"] == sum(p.numel() * p.element_size() for p in trained)
    # What is alive before the optimizer's step, and at the end of the last forward (penalty and loss included).
    assert live.marks["step"][-1] == pytest.approx(step.total, rel=TOLERANCE)
    loss = next(moment for moment in planned.moments if moment.name == "backward of the loss")
    kept = planned.held
    assert live.marks["forward"][-1] == pytest.approx(
        weights + optimizer + loss.parts["gradients"] + kept, rel=TOLERANCE
    )
    # And the peak.
    assert live.most == pytest.approx(planned.peak.total, rel=TOLERANCE)


def test_two_padded_rows_take_a_mask_and_repeated_keys(tmp_path: Path) -> None:
    changes = {**BF16, "gradient_checkpointing": False, "per_device_train_batch_size": 2}
    argv = write_run(tmp_path, "dense", **changes)
    rows = [{"text": " ".join(["w5"] * count)} for count in (LENGTH + 5, LENGTH - 40)] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = plan(sft.parse(argv), "sft", PlanConfig(config=argv[1]), Engine("single", 1))
    trainer = sft.build_trainer(sft.parse([*argv, "--train_sampling_strategy", "sequential"]))
    with LiveTensors([*trainer.model.parameters(), *trainer.model.buffers()]) as live:
        trainer.train()
    assert live.most == pytest.approx(planned.peak.total, rel=TOLERANCE)


def test_checkpointing_and_adapters_matter_as_much_as_planned(tmp_path: Path) -> None:
    """Differences of totals, so that no common part can hide an error."""
    found = {}
    for name, checkpoints in (("plain", False), ("checkpointed", True)):
        planned, live, _ = measure(tmp_path / name, "dense", **BF16, gradient_checkpointing=checkpoints)
        found[name] = (planned.peak.total, live.most)
    saved, measured = (found["plain"][n] - found["checkpointed"][n] for n in (0, 1))
    assert measured > 0.2 * found["plain"][1]
    # Two peaks, each with what is not planned.
    assert saved == pytest.approx(measured, rel=2 * TOLERANCE)


GRPO: dict[str, Any] = {
    "sae_features": None, "penalty_weight": None, "max_length": None, "reward_features": ["L3F1", "L3F2", "L5F7"],
    "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 224,
    "generation_kwargs": {"min_new_tokens": 224, "max_new_tokens": 224}, "gradient_checkpointing": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("dense", {"beta": 0.1}, marks=pytest.mark.slow),
        pytest.param("hybrid", {"beta": 0.0, **LORA}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_plan_of_grpo_is_what_rollouts_and_steps_take(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    argv = write_run(tmp_path, kind, **BF16, **GRPO, **changes)
    path = tmp_path / "run.yaml"
    settings = {key: value for key, value in yaml.safe_load(path.read_text()).items() if value is not None}
    path.write_text(yaml.safe_dump(settings))
    (tmp_path / "rows.jsonl").write_text((json.dumps({"prompt": " ".join(["w5"] * 32)}) + "\n") * 16)
    planned = plan(grpo_run.parse(argv), "grpo", PlanConfig(config=argv[1], prompt_length=32), Engine("single", 1))
    trainer = grpo_run.build_trainer(grpo_run.parse(argv))
    reference = [] if trainer.ref_model is None else list(trainer.ref_model.parameters())
    live = LiveTensors([*trainer.model.parameters(), *trainer.model.buffers(), *reference])
    generate, rollouts = trainer._generate_and_score_completions, []

    def marked(*args: Any, **kwargs: Any) -> Any:
        before, live.most = live.most, live.live
        result = generate(*args, **kwargs)
        rollouts.append(live.most)
        live.most = max(before, live.most)
        return result

    trainer._generate_and_score_completions = marked
    with live:
        trainer.train()
    assert planned.peak.parts["reference model"] == sum(p.numel() * p.element_size() for p in reference)
    # Twice what is allowed above: rows are planned as padded, and these are not.
    assert live.most == pytest.approx(planned.peak.total, rel=2 * TOLERANCE)
    names = ("generation", "forward over rollouts", "log-probabilities of rollouts")
    largest = max(moment.total for moment in planned.moments if moment.name in names)
    assert max(rollouts) == pytest.approx(largest, rel=2 * TOLERANCE)
