"""What a run left, read for its report: the record, or what an older run without one has in `trainer_state.json`.

Left out: checkpoints' weights, and logs of Weights & Biases or TensorBoard.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from qscope_trl.errors import DataError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.monitor.charts import Line
from qscope_trl.monitor.run_record import RECORD_FOLDER, RunRecord

_STATE, _PENALTY_STATE, _USED = "trainer_state.json", "sae_penalty_state.json", "used_features.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TAIL = 10


@dataclass
class Course:
    """The values of one logged name."""

    name: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """The first finite value."""
        return next((value for value in self.values if math.isfinite(value)), math.nan)

    @property
    def last(self) -> float:
        """The mean of the last tenth of the finite values, at least one and at most ten."""
        finite = [value for value in self.values if math.isfinite(value)]
        tail = finite[-min(_TAIL, max(1, len(finite) // 10)) :]
        return sum(tail) / len(tail) if tail else math.nan

    def line(self, name: str | None = None) -> Line:
        """As a curve, under another name if one is given."""
        return Line(self.name if name is None else name, self.steps, self.values)


@dataclass
class RunData:
    """One run as its report shows it; what is not there is empty."""

    folder: Path
    is_recorded: bool
    """Whether there is a record; otherwise it is read from `trainer_state.json`."""

    run: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    courses: dict[str, Course] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows of every file but the log."""

    features: tuple[Feature, ...] = ()
    monitors: tuple[Feature, ...] = ()

    @property
    def last_step(self) -> int:
        """The last step that anything was written at."""
        logged = [course.steps[-1] for course in self.courses.values() if course.steps]
        rows = [int(rows[-1]["step"]) for rows in self.rows.values() if rows]
        return max([*logged, *rows, int((self.end or {}).get("step", 0))], default=0)

    def course(self, name: str) -> Course | None:
        """The values logged under a name, or None."""
        return self.courses.get(name)

    def matching(self, pattern: str) -> Iterator[tuple[re.Match[str], Course]]:
        """Names that a pattern matches wholly, in the order they were first logged."""
        for name, course in self.courses.items():
            found = re.fullmatch(pattern, name)
            if found:
                yield found, course


ROW_FILES = ("drift", "histograms", "texts", "samples", "rollouts", "alarms", "overhead")


def read_run(run_dir: str | Path) -> RunData:
    """Read what a run left.

    Args:
        run_dir: The run's `output_dir`, a record's folder itself, or a checkpoint.

    Raises:
        DataError: If there is no such folder, no trace of a run in it, or a file is damaged.
        FeatureSetError: If its features are malformed.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"`run_dir` is '{run_dir}', which is no folder. Name the `output_dir` of a run.")
    place = folder if any((folder / name).is_file() for name in ("run.json", "log.jsonl")) else folder / RECORD_FOLDER
    if place.is_dir():
        found = _read_record(folder, place)
        if found.run or found.courses or any(found.rows.values()):
            return found
    state = _newest_state(folder)
    if state is None:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RECORD_FOLDER}"))
        hint = f"Runs lie in it: {', '.join(inside[:5])}; name one." if inside else "Name the `output_dir` of a run."
        raise DataError(f"'{folder}' holds neither `{RECORD_FOLDER}` nor a checkpoint, so no run was here. {hint}")
    return _read_state(folder, state)


def _read_record(folder: Path, place: Path) -> RunData:
    record = RunRecord(place.parent, writes=False)
    record.folder = place
    found = RunData(folder, True, run=record.get("run") or {}, end=record.get("end"), audit=record.get("audit"))
    for row in record.each("log"):
        _add(found.courses, row)
    found.rows = {name: record.rows(name) for name in ROW_FILES}
    found.features, found.monitors = (_features(found.run.get(name)) for name in ("features", "monitors"))
    return found


def _newest_state(folder: Path) -> Path | None:
    """The `trainer_state.json` of the last step: the folder's own or that of a checkpoint."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    places = [folder, *(path for _, path in sorted(numbered, reverse=True))]
    return next((place / _STATE for place in places if (place / _STATE).is_file()), None)


def _read_state(folder: Path, path: Path) -> RunData:
    state = _json(path)
    found = RunData(folder, False)
    for row in state.get("log_history") or []:
        if isinstance(row, Mapping):
            _add(found.courses, row)
    penalty = _json(path.parent / _PENALTY_STATE)
    used = _json(path.parent / _USED) or _json(folder / _USED)
    found.run = {"penalty": penalty.get("config"), "uses": used.get("features")}
    names = [str(name) for name in penalty.get("features") or []]
    found.features = FeatureSet.from_names(names).features if names else ()
    seen = {match[1]: None for match, _ in found.matching(r"sae/monitor/(L\d+F\d+)/.*")}
    found.monitors = FeatureSet.from_names(list(seen)).features if seen else ()
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as err:
        raise DataError(f"'{path}' is damaged: {err}. Delete it to go on without it.") from err


def _features(data: Any) -> tuple[Feature, ...]:
    return FeatureSet.from_dict(data).features if data else ()


def _add(courses: dict[str, Course], row: Mapping[str, Any]) -> None:
    step = row.get("step")
    if not isinstance(step, int):
        return
    for name, value in row.items():
        if name in ("step", "epoch") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        course = courses.get(name)
        if course is None:
            course = courses[name] = Course(name)
        course.steps.append(step)
        course.values.append(float(value))


def short_name(name: str) -> str:
    """A Hub id as it is; of a folder's whole path the last two parts, as the configuration has all of it."""
    path = PurePath(name)
    return f".../{'/'.join(path.parts[-2:])}" if path.is_absolute() and len(path.parts) > 3 else name


def by_index(rows: Sequence[Mapping[str, Any]], key: str = "index") -> list[list[Mapping[str, Any]]]:
    """Rows of each index in the order of their steps, the indices ascending."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get(key), []).append(row)
    return [sorted(found[place], key=lambda row: row["step"]) for place in sorted(found, key=_order)]


def _order(place: Any) -> tuple[bool, float, str]:
    is_number = isinstance(place, int | float)
    return (not is_number, place if is_number else 0, str(place))
