"""What a run's record says beside the features: the trainer's arguments without secrets, versions, hardware."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from qscope_trl.monitor.secrets import without_secrets

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them; a tensor or NumPy number becomes a number, what is neither is left out."""
    found = {}
    for key, value in values.items():
        size = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", None)
        item = value.item() if size == 1 and hasattr(value, "item") else value
        if item is None or isinstance(item, bool | int | float | str):
            found[str(key)] = item
    return found


def arguments(given: TrainingArguments) -> dict[str, Any]:
    """A trainer's arguments as `to_sanitized_dict` has them, without secrets, also in mappings, which become texts."""
    nested = {key: value for key, value in given.to_dict().items() if isinstance(value, Mapping | list | tuple)}
    texts = {key: str(value) for key, value in without_secrets(nested).items()}
    return plain(without_secrets({**given.to_sanitized_dict(), **texts}))


def versions() -> dict[str, str]:
    """Versions of what trains, as far as it is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> str:
    """What this process trains on, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"
