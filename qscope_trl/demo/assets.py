"""The bundled model, SAEs and texts, from Python."""

from __future__ import annotations

import gzip
import json
from typing import Any

from qscope_trl.bundled import FOLDER, MODEL, data_path, saes

__all__ = ["FOLDER", "MODEL", "rows", "saes"]


def rows(name: str) -> list[dict[str, Any]]:
    """One of the bundled data sets, such as `sft_train`.

    Raises:
        DataError: If there is none of that name.
    """
    with gzip.open(data_path(f"demo:{name}"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
