"""Which features a model was trained on, and how: it travels with the model, so that none is a monitor later."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qscope_trl.errors import QScopeWarning
from qscope_trl.features import FeatureId
from qscope_trl.files import write_whole

USED_FILE = "used_features.json"
"""File in each checkpoint and in `output_dir`: features that were trained on, and how."""

_NOTE = (
    "These features were trained on. On this model, and on what is trained from it, they no longer tell whether the "
    "behaviour is gone: choose others as monitors."
)


class UsedFeatures:
    """Features that were trained on, by name, each with its uses.

    Args:
        model: A transformers model; what its folder says was used before is taken over. A Hub id has no folder.
    """

    def __init__(self, model: Any) -> None:
        self.uses = _read(getattr(model.config, "_name_or_path", ""))

    def add(self, ids: Iterable[FeatureId], how: str) -> None:
        """Mark features as trained on.

        Args:
            ids: The features.
            how: By what: `penalty`, `reward NAME`, `policy NAME`.
        """
        for name in map(str, ids):
            ways = self.uses.setdefault(name, [])
            if how not in ways:
                ways.append(how)

    def warn_of(self, monitors: Iterable[FeatureId]) -> None:
        """Warn of monitors that this run trains on, or that the model it started from was trained on."""
        burnt = [str(one) for one in monitors if str(one) in self.uses]
        if burnt:
            listed = ", ".join(f"{name} ({', '.join(self.uses[name])})" for name in burnt[:5])
            warnings.warn(
                f"{len(burnt)} of the monitors are trained on, in this run or before it: {listed}. They do not tell "
                f"whether the behaviour is gone; choose others.",
                QScopeWarning,
                stacklevel=4,
            )

    def write(self, folder: Path) -> None:
        """Write the file into a folder, unless there is nothing to say; a disk that refuses is warned of."""
        if not self.uses:
            return
        features = dict(sorted(self.uses.items(), key=lambda item: FeatureId.parse(item[0])))
        try:
            write_whole(folder / USED_FILE, json.dumps({"note": _NOTE, "features": features}, indent=1) + "\n")
        except OSError as err:
            warnings.warn(
                f"'{folder / USED_FILE}' cannot be written ({err}); training goes on. What is trained from this "
                f"model will not know which features were trained on.",
                QScopeWarning,
                stacklevel=3,
            )


def _read(folder: str) -> dict[str, list[str]]:
    path = Path(folder) / USED_FILE if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["features"]
        return {str(FeatureId.parse(name)): [str(way) for way in ways] for name, ways in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        warnings.warn(
            f"'{path}' cannot be read ({err}), so monitors that were trained on before are not told apart.",
            QScopeWarning,
            stacklevel=4,
        )
        return {}
