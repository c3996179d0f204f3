"""What a run leaves for its report: small files in `OUTPUT_DIR/sae_record`, written while it trains.

Training writes them, `qscope audit` adds one, `qscope report` and the model card read them. One file a subject:

| file | rows or keys |
|---|---|
| `run.json` | what is trained on and how: `model`, `trainer`, `sae` (`name`, `source`: where they were opened, `revision`), `penalty`, `features`, `monitors`, `rewards`, `policy`, `control` (`kind`, and `of`: the chosen features that are only measured), `uses`, `drift` (`limits`, `on_drift`, `every`, `layers`, `num_texts`, `num_tokens`, `reference_mib`, `begin_seconds`), `arguments`, `versions`, `hardware`, `started`, `num_processes` |
| `log.jsonl` | every log event of the trainer, as it came |
| `drift.jsonl` | `layers` (per layer `fvu`, `fvu_ratio`, `l0`, `dead_rate`, `jaccard`, `activation_cosine`, `residual_cosine`), `kl` (null where not measured), `crossed` (limits such as `L5/min_jaccard`, `max_kl`), `action` (`warn` or `stop` if any is crossed, else null), `seconds`, `cost_share` (null without one) |
| `drift_reference.safetensors` | what the frozen model showed on the probe; see `monitor/drift.py` |
| `histograms.jsonl` | per feature: `feature`, `kind` (`penalised` or `monitor`), `edges`, `counts` of tokens at which it is active, `num_tokens` of all |
| `texts.jsonl` | fixed texts: `index`, `tokens`, `values` (feature to a value per token, null where not read) |
| `samples.jsonl` | generations from fixed prompts: `index`, `prompt`, `text`, `tokens`, `values`, `is_shown` (the text detector's verdict, or null), `detector` |
| `rollouts.jsonl` | GRPO: `prompt`, `tokens`, `values`, `score`, `advantage_before` the policy, `advantage`, `policy` (what it did, or empty), `rewards` (by name) |
| `alarms.jsonl` | `kind`, `message`, `shares` (present over first value, by name in the log) |
| `overhead.jsonl` | `steps`, `step_seconds` (their sum), `parts` (name to seconds) since the row before |
| `end.json` | `step`, `seconds`, `finished`, `metrics` |
| `audit.json` | what `qscope audit` found: `verdict`, `reason`, `notes`, `behaviour`, `activity`, `detectors`, `features`, `collateral`, `fits`, `samples`, `settings`, counts; see `analysis/audit/result.py` |

Every row has a `step`. JSON is as Python writes it, with `NaN` and `Infinity`. Left out: the weights, and anything that
needs more than one process: one writes.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qscope_trl.errors import DataError, QScopeWarning
from qscope_trl.files import write_whole

RECORD_FOLDER = "sae_record"
"""Folder in a run's `output_dir`."""

PREVIOUS_FOLDER = "sae_record_previous"
"""What an earlier run in the same `output_dir` left."""

FORMAT_VERSION = 1


class RunRecord:
    """The record of one run.

    Training never fails for it: if the disk refuses, one warning says so and nothing more is recorded.

    Args:
        output_dir: The run's folder.
        writes: Whether this process writes; False on all but the main one, where every call does nothing.
    """

    def __init__(self, output_dir: str | os.PathLike[str], *, writes: bool = True) -> None:
        self.folder = Path(output_dir) / RECORD_FOLDER
        self.writes = writes

    def begin(self, step: int) -> None:
        """Start, or go on from `step`: rows of later steps, which a killed run left, are dropped.

        At step 0 an earlier run's record is moved to `sae_record_previous`, in place of what was there; if it ended
        before its first step, as the first tries of `auto_find_batch_size` do, it is deleted instead.
        """
        if not self.writes:
            return
        try:
            if step == 0 and self.folder.is_dir():
                previous = self.folder.with_name(PREVIOUS_FOLDER)
                if self._has_steps():
                    shutil.rmtree(previous, ignore_errors=True)
                    os.replace(self.folder, previous)
                else:
                    shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.jsonl"):
                _cut(path, step)
        except OSError as err:
            self._give_up(err)

    def put(self, name: str, data: Mapping[str, Any]) -> None:
        """Write `NAME.json` whole, instead of what was there."""
        if self.writes:
            try:
                text = _json({"format_version": FORMAT_VERSION, **data}, indent=1)
                write_whole(self.folder / f"{name}.json", text + "\n")
            except OSError as err:
                self._give_up(err)

    def add(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Append one row to `NAME.jsonl`."""
        if self.writes:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                    file.write(_json({"step": step, **row}) + "\n")
            except OSError as err:
                self._give_up(err)

    def put_file(self, name: str, write: Callable[[Path], None]) -> None:
        """Write the file `NAME` whole, by a function that is given where to write it."""
        if self.writes:
            temporary = self.folder / f".{name}.{os.getpid()}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write(temporary)
                os.replace(temporary, self.folder / name)
            except OSError as err:
                temporary.unlink(missing_ok=True)
                self._give_up(err)

    def get(self, name: str) -> dict[str, Any] | None:
        """`NAME.json`, or None if there is none.

        Raises:
            DataError: If it is damaged, or of a later version of this package.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.pop("format_version", FORMAT_VERSION)
        except (ValueError, AttributeError) as err:
            raise DataError(f"'{path}' is damaged: {err}. Delete it to go on without it.") from err
        if version != FORMAT_VERSION:
            raise DataError(f"'{path}' has `format_version` {version}, this version reads {FORMAT_VERSION}.")
        return dict(data)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of `NAME.jsonl`, in the order they came; empty if there is none. A last line cut short is left out.

        Raises:
            DataError: If another line is damaged.
        """
        return list(self.each(name))

    def each(self, name: str) -> Iterator[dict[str, Any]]:
        """The same one by one, for files that are larger than what is wanted of them.

        Raises:
            DataError: If a line is damaged, when it is reached.
        """
        path = self.folder / f"{name}.jsonl"
        if not path.is_file():
            return
        # Bytes, as a killed run may have cut the last character too.
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line == b"\n":
                    continue
                row = _row(line)
                if row is not None:
                    yield row
                elif line.endswith(b"\n"):
                    raise DataError(f"Line {number} of '{path}' is damaged. Delete that line to go on.")

    def first(self, name: str) -> Iterator[dict[str, Any]]:
        """Rows of the first step that `NAME.jsonl` has, without reading the others.

        Raises:
            DataError: If a line is damaged, when it is reached.
        """
        step = None
        for row in self.each(name):
            step = row["step"] if step is None else step
            if row["step"] != step:
                return
            yield row

    def _has_steps(self) -> bool:
        """Whether training went on for a step, or ended."""
        if (self.folder / "end.json").is_file() or (self.folder / "audit.json").is_file():
            return True
        for path in self.folder.glob("*.jsonl"):
            with open(path, "rb") as file:
                if any(row is None or row["step"] > 0 for row in map(_row, file)):
                    return True
        return False

    def _give_up(self, err: OSError) -> None:
        self.writes = False
        warnings.warn(
            f"The run's record in '{self.folder}' cannot be written ({err.strerror or err}); training goes on without "
            f"it. `qscope report` will show what was written until now.",
            QScopeWarning,
            stacklevel=3,
        )


def _cut(path: Path, step: int) -> None:
    """Leave out rows after a step, and lines that are damaged, with a warning: resuming must not fail for them."""
    temporary, damaged = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with open(path, "rb") as old, open(temporary, "wb") as new:
            for line in old:
                row = _row(line)
                if row is None:
                    damaged += line != b"\n" and line.endswith(b"\n")
                elif row["step"] <= step:
                    new.write(line if line.endswith(b"\n") else line + b"\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if damaged:
        warnings.warn(
            f"'{path}' has {damaged} damaged lines, which are left out; the run's record goes on without them.",
            QScopeWarning,
            stacklevel=4,
        )


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row, None if it is none."""
    try:
        row: dict[str, Any] = json.loads(line)
        row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError):
        return None
    return row


def _json(data: Mapping[str, Any], indent: int | None = None) -> str:
    """As readable JSON; where half a character stands in a text, which no file can hold, all escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent)
    return text
