"""The bundled model, SAEs and texts. Where they come from: `assets/SOURCES.md` and `scripts/demo_assets/`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "assets"
"""Folder with everything bundled."""

MODEL = FOLDER / "model"
"""A bilingual Qwen3 of 1.7M parameters with its tokenizer."""


def saes() -> Path:
    """Folder of the SAEs, one file a layer in the Qwen-Scope format."""
    return next(FOLDER.glob("SAE-Res-*"))


def rows(name: str) -> list[dict[str, Any]]:
    """One of the bundled data sets, such as `sft_train`."""
    with gzip.open(FOLDER / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
