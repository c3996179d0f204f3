"""What is bundled with the package: a small bilingual model, its SAEs and texts. `demo` names them on command lines.

Where they come from: `demo/assets/SOURCES.md` and `scripts/demo_assets/`.
"""

from __future__ import annotations

from pathlib import Path

from qscope_trl.errors import DataError

NAME = "demo"
"""Names the bundled model or SAEs where a Hub id or folder is asked for; `demo:NAME` names one of its data sets."""

FOLDER = Path(__file__).parent / "demo" / "assets"
"""Folder with everything bundled."""

MODEL = FOLDER / "model"
"""A bilingual Qwen3 of 1.7M parameters with its tokenizer."""


def saes() -> Path:
    """Folder of the SAEs, one file a layer in the Qwen-Scope format."""
    return next(FOLDER.glob("SAE-Res-*"))


def model_path(name: str) -> str:
    """Where a model is: the bundled one's folder for `demo`, else the name itself."""
    return str(MODEL) if name == NAME else name


def sae_path(name: str) -> str:
    """Where SAEs are: the bundled ones' folder for `demo`, else the name itself."""
    return str(saes()) if name == NAME else name


def data_path(name: str) -> str:
    """Where data is: the bundled file for `demo:NAME`, else the name itself.

    Raises:
        DataError: If no bundled data set has that name.
    """
    if not name.startswith(f"{NAME}:"):
        return name
    wanted = name.removeprefix(f"{NAME}:")
    path = FOLDER / "data" / f"{wanted}.jsonl.gz"
    if not path.is_file():
        there = sorted(file.name.split(".")[0] for file in (FOLDER / "data").glob("*.jsonl.gz"))
        raise DataError(f"No data set `{wanted}` is bundled; there are {', '.join(there)}.")
    return str(path)
