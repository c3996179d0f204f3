from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from qscope_trl.cli import main
from qscope_trl.config.plan import PlanConfig
from qscope_trl.errors import ConfigError, FeatureSetError
from qscope_trl.planning.engines import Engine
from qscope_trl.planning.memory import Precision, states, whole_logits_loss
from qscope_trl.planning.model import build_model, count
from qscope_trl.planning.optimizers import Parameter, scratch_bytes, state_bytes
from qscope_trl.planning.run import run
from qscope_trl.planning.suggestions import suggest
from tests.planning import backbone_plans
from tests.planning.runs import backbone, planned, write
from tests.test_config import OURS, THEIRS, names
from tests.tiny import tiny_model, write_saes

GIB = 2**30
# Totals in billions, see `backbones/README.md`: published for Qwen3 and, without the vision tower, for Qwen3.5-9B;
# for the other Qwen3.5 what agrees with their rounded names.
PUBLISHED = {
    "qwen3-1.7b": 1.72, "qwen3-8b": 8.19, "qwen3-30b-a3b": 30.5, "qwen3.5-2b": 2.21, "qwen3.5-9b": 8.95 + 0.456,
    "qwen3.5-27b": 27.4, "qwen3.5-35b-a3b": 35.1,
}  # fmt: skip


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


@pytest.mark.parametrize(
    ("changes", "in_steps", "in_generation"),
    [
        ({"vllm_mode": "colocate"}, 0.5, 0.5),
        ({"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}, 0.0, 0.5),
        ({"vllm_mode": "server"}, 0.0, 0.0),
    ],
    ids=["resident", "sleeping", "elsewhere"],
)
def test_vllm_keeps_its_share_through_the_step_unless_it_sleeps(
    changes: dict[str, Any], in_steps: float, in_generation: float, tmp_path: Path, small: Path
) -> None:
    grpo = {"max_length": None, "sae_features": None, "penalty_weight": None, "num_generations": 2}
    grpo |= {"reward_functions": ["m.f"], "max_completion_length": 128, "per_device_train_batch_size": 2}
    options = {"gpu_memory": 40.0}
    found = planned(
        tmp_path, small, use_vllm=True, vllm_gpu_memory_utilization=0.5, options=options, **changes, **grpo
    )
    share = {moment.name: moment.parts["generation"] / (40 * GIB) for moment in found.moments}
    assert share.pop("generation") == in_generation
    assert set(share.values()) == {in_steps}
    assert {"optimizer step", "backward of layer 0", "forward over rollouts"} <= set(share)
    if in_steps:
        # What is there all the time is lost to no other block, so the margin is that of a run without it.
        without = planned(tmp_path, small, options=options, **{**grpo, "use_vllm": True, "vllm_mode": "server"})
        assert found.margin == without.margin
        assert found.total == without.total + 20 * GIB


def test_a_resident_vllm_is_suggested_to_sleep(tmp_path: Path, small: Path) -> None:
    grpo = {"max_length": None, "sae_features": None, "penalty_weight": None, "num_generations": 2}
    grpo |= {"reward_functions": ["m.f"], "max_completion_length": 128, "per_device_train_batch_size": 2}
    path = write(tmp_path, small, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.8, **grpo)
    options = PlanConfig(config=path, gpu_memory=16)
    found = {item.flags: item.total for item in suggest(run(options), options, most=9)}
    sleeping = ["--vllm_enable_sleep_mode", "true"]
    assert found[" ".join(sleeping)] == run(options, sleeping).total
    again = suggest(run(options, sleeping), options, sleeping, most=9)
    assert " ".join(sleeping) not in {item.flags for item in again}


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
    for target in (tmp_path / "run.yaml" / "plan.json", tmp_path / "plans"):
        # The plan is shown all the same.
        assert main(["plan", "--config", path, "--json", str(target)]) == 2
        shown = capsys.readouterr()
        assert "of 80: fits" in shown.out
        assert f"error: The plan cannot be written to '{target}': " in shown.err
    assert [file.name for file in (tmp_path / "plans").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpo"}, "`method` is 'dpo'; choose one of sft, grpo"),
        ({"num_processes": 0}, "`num_processes` is 0; it is 1 or more"),
        ({"num_features": 0}, "`num_features` is 0"),
        ({"prompt_length": 0}, "`prompt_length` is 0"),
        ({"gpu_memory": 0.0}, "`gpu_memory` is 0.0; it is a number of GiB above 0"),
        ({"gpu_memory": float("inf")}, "`gpu_memory` is inf; it is a number of GiB above 0"),
        ({"gpu_memory": float("nan")}, "`gpu_memory` is nan; it is a number of GiB above 0"),
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


@pytest.mark.parametrize("config", backbone_plans.CONFIGS, ids=lambda path: path.stem)
def test_warmup_is_in_whole_steps(config: Path) -> None:
    # transformers 4 takes no share of the steps here.
    assert type(yaml.safe_load(config.read_text())["warmup_steps"]) is int


def test_every_released_backbone_has_a_configuration() -> None:
    assert [path.stem for path in backbone_plans.CONFIGS] == sorted(PUBLISHED)
