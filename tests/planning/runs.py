"""Runs to plan: a backbone's facts in a folder, a training configuration for it, and its plan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from qscope_trl.config.plan import PlanConfig
from qscope_trl.planning.run import Plan, run
from tests.planning import backbone_plans


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


def planned(folder: Path, model: Path, *overrides: str, options: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return run(PlanConfig(config=write(folder, model, **changes), **(options or {})), overrides)
