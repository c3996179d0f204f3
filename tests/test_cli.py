from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

import qscope_trl
from qscope_trl import FeatureSet, cli
from qscope_trl.cli import main
from qscope_trl.errors import CheckpointError, ConfigError, DataError, QScopeWarning
from qscope_trl.features import Feature
from qscope_trl.training import launch, sft
from tests.forked import Done, run_forked
from tests.tiny import prompt_completion_rows, sentence, tiny_model, tiny_tokenizer, write_saes

ROOT = Path(qscope_trl.__file__).parents[1]
DEMO = ROOT / "qscope_trl" / "demo" / "assets"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, SAEs, features and data, and a configuration that uses them."""
    folder = tmp_path_factory.mktemp("assets")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "SAE-Res-Tiny-W1K-L0_8", [1, 2], d_sae=1024)
    features = [Feature(layer=2, index=5, group_thresholds={"en": 0.5}), Feature(layer=1, index=900)]
    FeatureSet(features=tuple(features), target_group="zh").save(folder / "features.yaml")
    rows = [{**row, "lang": ("en", "zh")[n % 2]} for n, row in enumerate(prompt_completion_rows(16))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "eval.jsonl").write_text(lines)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    generator = torch.Generator().manual_seed(0)
    for name in ("zh", "en"):
        texts = [json.dumps({"text": sentence(generator, 6)}) + "\n" for _ in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(texts))
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl.gz"),
        "sae_path": str(folder / "SAE-Res-Tiny-W1K-L0_8"),
        "sae_features": str(folder / "features.yaml"),
        "penalty_weight": 0.1,
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def build(assets: Path, *argv: str) -> Any:
    return sft.build_trainer(sft.parse(["--config", str(assets / "run.yaml"), *argv]))


def test_help_and_version_answer_without_torch() -> None:
    code = (
        "import sys; from qscope_trl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)"
    )
    for argv in (["--help"], ["--version"], ["find", "--help"]):
        start = time.perf_counter()
        shown = subprocess.run(
            [sys.executable, "-c", code, *argv], check=True, capture_output=True, text=True, cwd=ROOT
        )
        # Measured 0.1 to 0.2 s; loading torch alone takes longer than this limit.
        assert time.perf_counter() - start < 2
        assert "qscope" in shown.stdout


# `sft` and `grpo`, whose flags are mostly TRL's: test_parsing.py.
HELPED = [
    *(set(cli._ABOUT) - {"sft", "grpo"}),
    *(f"rules {name}" for name in ("check", "explain", "learn", "evaluate")),
]


@pytest.mark.parametrize("words", sorted([*HELPED, "demo grpo"]))
def test_every_command_has_a_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main([*words.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert f"qscope {words}" in shown.out
    assert shown.err == ""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "find the features of a behaviour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fnd"], "error: Unknown command `fnd`. Did you mean `find`?\n"),
        (["--hepl"], "error: Unknown flag `--hepl`. Did you mean `--help`?\n"),
        (["find", "--modle", "m"], "error: Unknown flag `--modle`. Did you mean `--model`?\n"),
        (["find", "--model", "m"], "error: The following arguments are required: "),
        (["find", "--top", "x"], "error: Argument --top: invalid int value: 'x'. `--help` lists"),
        (
            ["sft", "--penalty_wieght", "1"],
            "error: Unknown flag `--penalty_wieght`. Did you mean `--penalty_weight`?\n",
        ),
        (
            ["sft", "--bf16", "false"],
            "error: `model_name_or_path` is missing. Set it in the YAML file or by `--model_name_or_path`.\n",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert shown.count("\n") == 1


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSCOPE_TRL_DEBUG", "1")
    with pytest.raises(ConfigError, match="Unknown command"):
        main(["fnd"])


def test_find_writes_the_set_and_shows_a_table(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = assets / "found" / "zh.yaml"
    where = ["--model", str(assets / "model"), "--saes", str(assets / "SAE-Res-Tiny-W1K-L0_8"), "--layers", "1,2"]
    data = ["--positive", str(assets / "zh.jsonl"), "--negative", str(assets / "en.jsonl")]
    assert main(["find", *where, *data, "--top", "3", "--output", str(output), "--device", "cpu"]) == 0
    found = FeatureSet.load(output)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:-1]] == [str(name) for name in found.ids]
    assert shown[-1] == f"{len(found)} features of `zh` written to {output}"
    assert found.origin["files"] == {"positive": data[1], "negative": data[3]}
    assert found.model == str(assets / "model")
    assert found.layers == (1, 2)


def test_find_without_the_model_is_an_error(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", str(assets / "none"), "--saes", str(assets / "SAE-Res-Tiny-W1K-L0_8"), "--layers", "1"]
    data = ["--positive", str(assets / "zh.jsonl"), "--negative", str(assets / "en.jsonl"), "--output", "x.yaml"]
    assert main(["find", *where, *data]) == 2
    assert "error: The model" in capsys.readouterr().err


def test_sft_trains_with_the_penalty_and_saves(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--data_eval_path", str(assets / "eval.jsonl"), "--eval_strategy", "steps", "--eval_steps", "2"]
    assert main(["sft", "--config", str(assets / "run.yaml"), *evaluation]) == 0
    shown = capsys.readouterr().out
    assert "sae/L2F5/firing_rate" in shown
    assert "eval_sae/penalty" in shown
    assert shown.splitlines()[-2:] == [
        f"Model saved to {assets / 'out'}",
        f"One page of the run: qscope report {assets / 'out'}",
    ]
    assert (assets / "out" / "model.safetensors").is_file()
    assert (assets / "out" / "used_features.json").is_file()
    card = (assets / "out" / "README.md").read_text(encoding="utf-8")
    assert "### Penalised features" in card
    assert "| L2F5 |" in card


def test_sft_reads_parquet_peft_monitors_and_groups(assets: Path) -> None:
    trainer = build(
        assets, "--dataset_name", str(assets / "train.parquet"), "--use_peft", "--lora_r", "2",
        "--lora_target_modules", "q_proj", "v_proj", "--monitor_features", "L1F7", "--penalty_group_column", "lang",
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["sae_group"]) <= {"en", "zh"}
    trainer.train()
    assert any("lora" in name for name, _ in trainer.model.named_parameters())
    assert any("sae/monitor/L1F7/firing_rate" in entry for entry in trainer.state.log_history)


def test_group_of_the_target_is_exempt_through_the_command(assets: Path) -> None:
    logs = []
    for rows in ("zh", "en"):
        data = assets / f"only_{rows}.jsonl"
        lines = [json.dumps({**row, "lang": rows}) for row in prompt_completion_rows(8)]
        data.write_text("\n".join(lines))
        trainer = build(assets, "--dataset_name", str(data), "--penalty_group_column", "lang", "--max_steps", "1")
        trainer.train()
        logs.append(sum(entry.get("sae/penalty", 0) for entry in trainer.state.log_history))
    assert logs[0] == 0
    assert logs[1] > 0


def test_data_is_read_from_folders_slices_and_streams(assets: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes((assets / "train.jsonl.gz").read_bytes())
    assert len(launch.load_split(str(tmp_path), None, "train", False)) == 16
    assert len(launch.load_split(str(tmp_path), None, "test[:3]", False)) == 3
    assert next(iter(launch.load_split(str(assets / "eval.jsonl"), None, "train", True)))["lang"] == "en"


def test_sft_resumes_from_its_last_checkpoint(assets: Path, tmp_path: Path) -> None:
    common = ["--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
    common = ["sft", "--config", str(assets / "run.yaml"), *common]
    assert main([*common, "--max_steps", "1"]) == 0
    assert main([*common, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--data_eval_path", "x.json"], ConfigError, "`data_eval_path` is set, but `eval_strategy` is 'no'"),
        (["--penalty_group_column", "lang", "--packing"], ConfigError, "needs one sample per row, but `packing`"),
        (["--penalty_group_column", "language"], DataError, "no column `language` for `penalty_group_column`"),
        (["--penalty_group_column", "prompt"], ConfigError, "none of these is a group of the features: `en`, `zh`"),
        (["--dataset_name", "none.jsonl"], DataError, "No data at 'none.jsonl'. Paths are relative to"),
        (["--dataset_name", "./none"], DataError, "No data at './none'"),
        (["--dataset_train_split", "other"], DataError, "Split `other` of '.*' cannot be loaded"),
        (["--dataset_name", "{assets}/model/model.safetensors"], DataError, "is of no known kind"),
        (["--dataset_name", "{assets}/empty.jsonl"], DataError, "is empty"),
        (["--dataset_name", "{assets}/odd.jsonl"], DataError, "columns `content`, and none that can be trained on"),
        (["--model_name_or_path", "{assets}/none"], ConfigError, "No trainer for '.*none' with these settings"),
    ],
)
def test_runs_that_cannot_work_are_refused(
    assets: Path, argv: list[str], error: type[Exception], message: str
) -> None:
    (assets / "empty.jsonl").write_text("")
    (assets / "odd.jsonl").write_text('{"content": "w2"}\n')
    with pytest.raises(error, match=message):
        build(assets, *[word.format(assets=assets) for word in argv])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("sft*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_name_only_what_there_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = sft.parse(["--config", str(path)])
    assert settings.penalty.penalty_weight > 0
    # The commented block for a large model is a configuration too.
    block = [line[2:] for line in path.read_text().split("# ---")[-1].splitlines()[1:]]
    large = yaml.safe_load("\n".join(block))
    assert large["model_name_or_path"].startswith("Qwen/")
    known = {name for part in vars(settings).values() for name in vars(part)}
    assert set(large) <= known


@pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="the demo's assets are not in this checkout")
def test_the_shipped_configuration_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = ["--output_dir", str(tmp_path), "--max_steps", "1", "--eval_steps", "1", "--logging_steps", "1"]
    trainer = sft.build_trainer(
        sft.parse(["--config", "configs/sft_penalty.yaml", *small, "--dataloader_pin_memory", "false"])
    )
    trainer.train()
    assert any(entry.get("sae/penalty", 0) > 0 for entry in trainer.state.log_history)


def test_processes_without_a_gpu_are_joined_over_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    launch.use_cpu_if_alone()
    assert os.environ.pop("ACCELERATE_USE_CPU") == "true"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    launch.use_cpu_if_alone()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    launch.use_cpu_if_alone()
    assert "ACCELERATE_USE_CPU" not in os.environ


def accelerate_launch(*arguments: str, engine: str = "ddp") -> tuple[str, str]:
    """What a command under `accelerate launch` with a shipped configuration, two processes, prints."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "configs" / "accelerate" / f"{engine}.yaml"), "--main_process_port", "0",
        "-m", "qscope_trl", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.distributed
def test_accelerate_launch_trains_one_model_with_two_processes(assets: Path, tmp_path: Path) -> None:
    out, _ = accelerate_launch(
        "sft", "--config", str(assets / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--max_steps", "-1",
        "--num_train_epochs", "1",
    )  # fmt: skip
    # 16 samples in batches of 2 are 4 steps for two joined processes, 8 for two that train apart.
    assert out.count("'loss':") == 4
    assert out.count("Model saved to") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch_runs_the_shipped_grpo_configuration_with_two_processes(tmp_path: Path) -> None:
    out, _ = accelerate_launch(
        "grpo", "--config", "configs/grpo_feature_reward.yaml", "--output_dir", str(tmp_path / "out"), "--max_steps",
        "1", "--per_device_train_batch_size", "4", "--max_completion_length", "8",
    )  # fmt: skip
    assert out.count("'reward':") == 1
    assert "sae/rollouts/reweighted" in out
    assert out.count("Model saved to") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "name"), [pytest.param("fsdp2", "FSDP", marks=pytest.mark.slow), ("zero3", "DeepSpeed")]
)
def test_an_engine_that_the_cpu_does_not_have_is_said_to_be_ddp(
    engine: str, name: str, assets: Path, tmp_path: Path
) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    out, err = accelerate_launch(
        "sft", "--config", "configs/sft_penalty.yaml", "--output_dir", str(tmp_path / "out"), "--max_steps", "1",
        "--per_device_train_batch_size", "2", "--eval_strategy", "no", "--data_eval_path", "",
        engine=engine,
    )  # fmt: skip
    assert err.count(f"The configuration asks for {name}, which accelerate does not have on a CPU") == 1
    assert out.count("Model saved to") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def limited(assets: Path, megabytes: float, *arguments: str) -> Done:
    """`qscope sft` in a process whose files may not grow beyond a size: writing fails as on a full disk."""
    # Python ignores the signal, so the write fails.
    code = (
        "import resource, sys\n"
        "from qscope_trl.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    return run_forked(code, str(int(megabytes * 2**20)), "sft", "--config", str(assets / "run.yaml"), *arguments)


def test_a_full_disk_ends_the_run_with_advice_and_costs_no_whole_checkpoint(assets: Path, tmp_path: Path) -> None:
    common = [
        "--output_dir",
        str(tmp_path),
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--save_total_limit",
        "1",
    ]
    done = main(["sft", "--config", str(assets / "run.yaml"), *common])
    assert done == 0
    sizes = {path.name: path.stat().st_size / 2**20 for path in (tmp_path / "checkpoint-2").iterdir()}
    resume = [*common, "--max_steps", "4", "--resume_from_checkpoint", "true"]
    # The optimizer's file is the largest, then the weights'.
    for megabytes in (sizes["model.safetensors"] + 0.01, sizes["model.safetensors"] / 2):
        full = limited(assets, megabytes, *resume)
        assert full.returncode == 2, full.stderr[-2000:]
        message = full.stderr.strip().splitlines()[-1]
        assert message.startswith(f"error: Nothing more can be written to '{tmp_path}': ")
        assert "with `--resume_from_checkpoint true`" in message
        assert launch_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.warns(QScopeWarning, match=r"checkpoint-4' is passed over"):
        assert main(["sft", "--config", str(assets / "run.yaml"), *resume]) == 0
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert not (tmp_path / "checkpoint-2").exists()


def launch_checkpoint(folder: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qscope_trl.last_complete_checkpoint(folder)


def test_resuming_without_a_whole_checkpoint_is_refused(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint that was written to its end"):
        sft.run(sft.parse([
            "--config", str(assets / "run.yaml"), "--output_dir", str(tmp_path), "--resume_from_checkpoint", "true",
        ]))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"There is no checkpoint '.*none' to resume from"):
        sft.run(sft.parse(["--config", str(assets / "run.yaml"), "--resume_from_checkpoint", str(tmp_path / "none")]))


def test_the_full_disk_is_named_where_it_is_another(assets: Path, tmp_path: Path) -> None:
    """A data loader's shared memory is none of the run's output."""
    trainer = build(assets, "--output_dir", str(tmp_path))

    def train(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/shm/loader")

    trainer.train = train
    with pytest.raises(CheckpointError, match=r"Nothing more can be written to '/dev/shm/loader': .*No space left"):
        launch.train_and_save(trainer, trainer.args, "data")
