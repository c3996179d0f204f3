from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from qscope_trl.cli import main
from qscope_trl.config_plan import PlanConfig
from qscope_trl.errors import ConfigError, FeatureSetError
from qscope_trl.planning.engines import Engine, read_engine
from qscope_trl.planning.memory import Precision, states, whole_logits_loss
from qscope_trl.planning.model import build_model, count
from qscope_trl.planning.optimizers import Parameter, scratch_bytes, state_bytes
from qscope_trl.planning.run import Plan, run
from qscope_trl.planning.suggestions import suggest
from tests.planning import backbone_plans
from tests.test_config import OURS, THEIRS, names
from tests.tiny import tiny_model, write_saes

GIB = 2**30
# Totals in billions, see `backbones/README.md`: published for Qwen3 and, without the vision tower, for Qwen3.5-9B;
# for the other Qwen3.5 what agrees with their rounded names.
PUBLISHED = {
    "qwen3-1.7b": 1.72, "qwen3-8b": 8.19, "qwen3-30b-a3b": 30.5, "qwen3.5-2b": 2.21, "qwen3.5-9b": 8.95 + 0.456,
    "qwen3.5-27b": 27.4, "qwen3.5-35b-a3b": 35.1,
}  # fmt: skip


def backbone(name: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(backbone_plans.FACTS / f"{name}.json", folder / "config.json")
    return folder


def write(folder: Path, model: Path, **changes: Any) -> str:
    settings = {
        "model_name_or_path": str(model),
        "dtype": "bfloat16",
        "dataset_name": "owner/data",
        "sae_path": "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
        "sae_features": ["L20F1", "L20F2", "L21F3"],
        "penalty_weight": 0.1,
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Qwen3-1.7B with two layers more than the features' last one."""
    folder = backbone("qwen3-1.7b", tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 23}))
    return folder


def planned(folder: Path, model: Path, *overrides: str, options: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return run(PlanConfig(config=write(folder, model, **changes), **(options or {})), overrides)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_backbones_have_the_published_size(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.qwen3_5", reason="no Qwen3.5 in this transformers")
    import trl

    settings = trl.ModelConfig(model_name_or_path=str(backbone(name, tmp_path / name)), dtype="bfloat16")
    facts = count(build_model(settings, None, Engine("single", 1)), settings)
    assert facts.num_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)
    assert facts.tied is (name in ("qwen3-1.7b", "qwen3.5-2b"))
    # TRL loads the class that the configuration names first: Qwen3.5 comes with its vision tower.
    assert (facts.aside.elements > 0) is name.startswith("qwen3.5")


def test_meta_counts_are_those_of_the_real_model_and_its_adapters(tmp_path: Path) -> None:
    import trl
    from peft import get_peft_model

    model = tiny_model("qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    settings = trl.ModelConfig(
        model_name_or_path=str(tmp_path), use_peft=True, use_dora=True, lora_target_modules=["q_proj", "v_proj"]
    )
    adapters = trl.get_peft_config(settings)
    facts = count(build_model(settings, None, Engine("single", 1), adapters), settings)
    adapters.base_model_name_or_path = None
    real = get_peft_model(model, adapters)
    trainable, everything = real.get_nb_trainable_parameters()
    assert (facts.num_trainable, facts.num_parameters) == (trainable, everything)


def test_quantised_weights_take_half_a_byte_and_their_scales(tmp_path: Path, small: Path) -> None:
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    plain = planned(tmp_path, small, **lora)
    packed = planned(tmp_path, small, load_in_4bit=True, **lora)
    linear = 23 * 2048 * (16 * 128 * 2 + 8 * 128 * 2 + 3 * 6144)
    saved = plain.peak.parts["weights"] - packed.peak.parts["weights"]
    # 2 bytes become 0.5 and an fp32 scale for 64; TRL also casts the adapters from fp32 to bf16.
    adapters = 2 * plain.facts.num_trainable
    assert saved == pytest.approx(linear * (2 - 0.5625) + adapters, rel=1e-3)


# --- engines ---------------------------------------------------------------------------------------------------------


def test_engines_are_read_from_accelerates_yaml(tmp_path: Path) -> None:
    folder = backbone_plans.ROOT / "configs" / "accelerate"
    assert read_engine(str(folder / "ddp.yaml"), None) == Engine("ddp", 2)
    assert read_engine(str(folder / "ddp.yaml"), 1) == Engine("single", 1)
    assert read_engine(None, None) == Engine("single", 1)
    assert read_engine(None, 4) == Engine("ddp", 4)
    file = tmp_path / "a.yaml"
    settings = "{fsdp_version: 2, fsdp_offload_params: true}"
    file.write_text(f"distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {settings}")
    assert read_engine(str(file), 8)[:2] == ("fsdp2", 8)
    assert read_engine(str(file), 8).offloads_weights
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}")
    assert read_engine(str(file), 2) == Engine("zero3", 2, offloads_optimizer=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No accelerate configuration at '.*'. Examples are in `configs/accelerate/`"),
        ("a: [", "is not YAML"),
        ("- 1", "holds a list, not a mapping as `accelerate config` writes it"),
        ("distributed_type: MEGATRON_LM", "`distributed_type` in '.*' is 'MEGATRON_LM', which is not planned"),
        ("distributed_type: FSDP", "`fsdp_version` in '.*' is 1, and only FSDP2 is planned"),
        ("distributed_type: DEEPSPEED", "`zero_stage` in '.*' is None; 1, 2 and 3 are planned"),
    ],
)
def test_engines_that_are_not_planned_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_engine(str(file), None)


@pytest.mark.parametrize(
    ("engine", "weights", "optimizer", "gradients"),
    [
        # Bytes per parameter of a bf16 model of 8 GPUs, all of it trained by AdamW in mixed precision.
        (Engine("single", 1), 2, 4, 2),
        (Engine("ddp", 8), 2, 4, 2),
        (Engine("fsdp2", 8), 4 / 8, 8 / 8, 4 / 8),
        (Engine("zero1", 8), 2, 12 / 8, 2),
        (Engine("zero2", 8), 2, 12 / 8, 2 / 8),
        (Engine("zero3", 8), 2 / 8, 12 / 8, 2 / 8),
        (Engine("zero3", 8, offloads_optimizer=True, offloads_weights=True), 0, 0, 2 / 8),
    ],
    ids=lambda value: value.name if isinstance(value, Engine) else "",
)
def test_engines_keep_what_they_document(
    engine: Engine, weights: float, optimizer: float, gradients: float, small: Path
) -> None:
    import trl

    settings = trl.ModelConfig(model_name_or_path=str(small), dtype="bfloat16")
    facts = count(build_model(settings, None, engine), settings)
    kept = states(facts, engine, Precision(2, True), "adamw_torch_fused")
    number = facts.num_parameters
    assert kept.weights == pytest.approx(weights * number)
    assert kept.optimizer == pytest.approx(optimizer * number)
    assert kept.gradient_factor * 2 == pytest.approx(gradients)
    assert (kept.buckets == 2 * number) is (engine.name == "ddp")


def test_optimizer_states_follow_their_definition() -> None:
    matrix, vector = Parameter((100, 256), 2), Parameter((256,), 2)
    assert state_bytes("adamw_torch", [matrix, vector]) == 2 * 2 * (25600 + 256)
    assert state_bytes("sgd", [matrix]) == 0
    assert state_bytes("adafactor", [matrix, vector]) == 4 * (100 + 256 + 256)
    assert state_bytes("adafactor", [Parameter((3, 4, 5), 4)]) == 4 * 3 * (4 + 5)
    # Two states of a byte with an fp32 scale for 256 each; small tensors stay fp32.
    assert state_bytes("adamw_8bit", [matrix, vector]) == 2 * 25600 + 2 * 4 * 100 + 2 * 4 * 256
    assert scratch_bytes("adamw_torch_fused", [matrix]) == 0
    assert scratch_bytes("adamw_torch", [matrix, vector]) == 2 * (25600 + 256)
    assert scratch_bytes("adafactor", [matrix, vector]) == 3 * 4 * 25600
    assert scratch_bytes("adamw_torch", []) == 0
    with pytest.raises(ConfigError, match="`optim` is 'galore_adamw', whose states are not known here"):
        state_bytes("galore_adamw", [matrix])


def test_whole_logits_are_counted_in_fp32_too() -> None:
    loss = whole_logits_loss(10, 100, 2)
    assert loss.forward == 10 * 100 * (2 + 4 + 4)


# --- the command -----------------------------------------------------------------------------------------------------


def test_overrides_change_the_plan_and_unknown_ones_are_named(tmp_path: Path, small: Path) -> None:
    short = planned(tmp_path, small)
    long = planned(tmp_path, small, "--max_length", "2048", "--per_device_train_batch_size", "2")
    assert long.peak.parts["weights"] == short.peak.parts["weights"]
    assert (long.settings["batch"], long.settings["length"]) == (2, 2048)
    assert long.held > 4 * short.held
    with pytest.raises(ConfigError, match=r"Unknown flag `--max_lenght`\. Did you mean `--max_length`"):
        planned(tmp_path, small, "--max_lenght", "3")
    with pytest.raises(ConfigError, match=r"Unknown flag `--gpu_memroy`\. Did you mean `--gpu_memory`"):
        planned(tmp_path, small, "--gpu_memroy", "3")


def test_the_method_is_told_by_keys_or_said(tmp_path: Path, small: Path) -> None:
    assert planned(tmp_path, small).method == "sft"
    grpo = {"max_length": None, "sae_features": None, "penalty_weight": None, "num_generations": 2, "beta": 0.1}
    grpo |= {"reward_features": ["L20F1"], "reward_kind": "topk_act", "per_device_train_batch_size": 2}
    found = planned(tmp_path, small, **grpo)
    assert found.method == "grpo"
    assert {"generation", "forward over rollouts"} <= {moment.name for moment in found.moments}
    with pytest.raises(ConfigError, match="keys of both: `max_length` is of SFT, `num_generations` of GRPO"):
        planned(tmp_path, small, num_generations=2)
    with pytest.raises(ConfigError, match="none of its keys is of one of them alone"):
        planned(tmp_path, small, max_length=None)
    assert planned(tmp_path, small, options={"method": "sft"}, max_length=None).method == "sft"


def test_grpo_keeps_a_reference_model_only_for_full_training_with_beta(tmp_path: Path, small: Path) -> None:
    common = {"max_length": None, "sae_features": None, "penalty_weight": None, "num_generations": 2}
    common |= {"reward_functions": ["m.f"], "max_completion_length": 128, "per_device_train_batch_size": 2}
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    without = planned(tmp_path, small, beta=0.0, **common)
    full = planned(tmp_path, small, beta=0.1, **common)
    adapted = planned(tmp_path, small, beta=0.1, **lora, **common)
    weights = full.peak.parts["weights"]
    assert [plan.peak.parts["reference model"] for plan in (without, full, adapted)] == [0, weights, 0]
    generation = next(moment for moment in full.moments if moment.name == "generation")
    # Keys and values of 23 layers, 8 heads of 128, for the rows of a generation batch and all their tokens.
    rows, tokens = 2 * full.settings["gradient_accumulation_steps"], full.settings["length"]
    assert generation.parts["generation"] > rows * tokens * 23 * 2 * 8 * 128 * 2


def test_features_come_from_names_a_file_or_flags(tmp_path: Path, small: Path) -> None:
    named = planned(tmp_path, small)
    assert named.saes is not None
    assert (named.saes.layers, named.saes.num_features) == ((20, 21), 3)
    # Four fp32 tensors a layer; chosen rows and biases read.
    assert named.saes.bytes_on_disk == 2 * 4 * (2 * 32768 * 2048 + 32768 + 2048)
    assert named.saes.bytes_read == 3 * 4 * 2049
    missing = {"sae_features": "features/none.yaml"}
    ahead = planned(tmp_path, small, options={"layers": "19-21", "num_features": 5}, **missing)
    assert ahead.saes is not None
    assert (ahead.saes.layers, ahead.saes.num_features) == ((19, 20, 21), 15)
    with pytest.raises(ConfigError, match=r"'features/none.yaml' is not there yet.*plan ahead with `--layers"):
        planned(tmp_path, small, **missing)
    with pytest.raises(FeatureSetError, match="chosen at layer 40, but the model has layers 0 to 22"):
        planned(tmp_path, small, sae_features=["L40F1"])


def test_local_saes_are_opened_and_others_must_say_their_size(tmp_path: Path, small: Path) -> None:
    folder = write_saes(tmp_path / "SAE-Res-Tiny-W1K-L0_8", [20], d_model=2048, d_sae=1024)
    local = planned(tmp_path, small, sae_path=str(folder), sae_features=["L20F1"], penalty_kind="topk_act")
    assert local.saes is not None
    assert (local.saes.is_local, local.saes.d_sae, local.saes.whole_encoders) == (True, 1024, True)
    rows = planned(tmp_path, small, sae_path=str(folder), sae_features=["L20F1"])
    # The whole encoder in the residuals' dtype, its biases, and the slab.
    assert local.moments[2].parts["penalty"] - rows.moments[2].parts["penalty"] > 1024 * 2048 * 2
    narrow = write_saes(tmp_path / "narrow", [20])
    with pytest.raises(ConfigError, match="read residuals of width 32, but the model's have 2048"):
        planned(tmp_path, small, sae_path=str(narrow), sae_k=8, sae_features=["L20F1"])
    with pytest.raises(ConfigError, match="The size of the SAEs 'owner/saes' is not known"):
        planned(tmp_path, small, sae_path="owner/saes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "owner/not-there"}, "`config.json` of 'owner/not-there' cannot be read, and the plan"),
        ({"use_peft": True, "lora_target_modules": ["c_attn", "d"]}, "The adapters do not fit `qwen3`: Target"),
        ({"load_in_4bit": True}, "train only adapters. Set `use_peft: true` too"),
        ({"max_length": None, "penalty_group_column": "lang"}, "`max_length` is null, so samples are as long"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    overrides = ["--max_length", "null"] if "max_length" in changes else []
    path = write(tmp_path, small, **changes)
    if overrides:
        text = Path(path).read_text()
        Path(path).write_text(text + "max_length: null\n")
    with pytest.raises(ConfigError, match=message):
        run(PlanConfig(config=path))


def test_what_does_not_fit_is_planned_again_with_other_settings(tmp_path: Path, small: Path) -> None:
    options = PlanConfig(config=write(tmp_path, small, gradient_checkpointing=False, max_length=2048), gpu_memory=8)
    found = run(options)
    assert not found.fits
    better = suggest(found, options)
    assert 2 <= len(better) <= 3
    assert all(item.total < found.total for item in better)
    assert [item.total for item in better] == sorted(item.total for item in better)
    lora = next(item for item in better if item.flags.startswith("--use_peft"))
    assert lora.total == run(options, lora.flags.split()).total
    assert suggest(run(PlanConfig(config=options.config, gpu_memory=80)), options) == []


def test_the_command_shows_a_table_and_writes_json(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plans" / "plan.json"
    path = write(tmp_path, small)
    assert main(["plan", "--config", path, "--json", str(output), "--gpu_memory", "40", "--max_length", "1024"]) == 0
    shown = capsys.readouterr().out
    data = json.loads(output.read_text())
    assert "micro-batch 1 x 1024 tokens" in shown
    assert f"{data['total'] / GIB:.2f}   of 40: fits" in shown
    assert data["total"] == sum(data["parts"].values()) + data["margin"]
    assert data["total"] - data["margin"] == max(moment["total"] for moment in data["moments"])
    assert main(["plan", "--config", path, "--gpu_memory", "4"]) == 0
    shown = capsys.readouterr().out
    assert "of 4: does not fit" in shown
    assert "What would help most:\n  " in shown
    assert main(["plan", "--config", str(tmp_path / "none.yaml"), "--method", "sft"]) == 2
    assert "error: No configuration file at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpo"}, "`method` is 'dpo'; choose one of sft, grpo"),
        ({"num_processes": 0}, "`num_processes` is 0; it is 1 or more"),
        ({"num_features": 0}, "`num_features` is 0"),
        ({"prompt_length": 0}, "`prompt_length` is 0"),
        ({"gpu_memory": 0.0}, "`gpu_memory` is 0.0; it is a number of GiB above 0"),
        ({"layers": "3-1"}, "`layers` is '3-1'; write it as `26,27` or `20-27`"),
    ],
)
def test_plan_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanConfig(config="c.yaml", **settings)


def test_plans_flags_hide_none_of_the_training_commands() -> None:
    for kind in (*OURS, *THEIRS):
        assert {item.name for item in fields(PlanConfig)}.isdisjoint(names(kind)), kind.__name__


# --- the shipped configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", backbone_plans.CONFIGS, ids=lambda path: path.stem)
def test_headers_of_the_backbones_configurations_say_what_plan_says(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers.models.qwen3_5", reason="no Qwen3.5 in this transformers")
    monkeypatch.chdir(backbone_plans.ROOT)
    assert backbone_plans.written(config) == backbone_plans.planned(config)
    launch = next(line for line in config.read_text().splitlines() if "accelerate launch" in line).split()
    command = backbone_plans.command(config)
    # The run is launched as it was planned.
    assert launch[launch.index("--config_file") + 1] == command[command.index("--accelerate_config") + 1]
    assert launch[launch.index("--num_processes") + 1] == command[command.index("--num_processes") + 1]
    assert launch[-1] == command[command.index("--config") + 1] == f"configs/backbones/{config.name}"


def test_every_released_backbone_has_a_configuration() -> None:
    assert [path.stem for path in backbone_plans.CONFIGS] == sorted(PUBLISHED)
