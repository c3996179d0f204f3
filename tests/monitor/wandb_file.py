"""Reads the `.wandb` file of an offline run: LevelDB's log format around wandb's own protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK, _HEADER = 32768, 7


class WandbFile(NamedTuple):
    """What an offline run holds."""

    rows: list[dict[str, Any]]
    """Rows of its history; parts of nested values are joined by `/`."""

    axes: dict[str, str]
    """Step metric of names, or of patterns that end in `*`."""

    files: list[str]
    """Media, by path below the run's `files`."""

    config: dict[str, Any]
    """Its configuration."""


def records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        if kind == 0:
            place += left
            continue
        whole += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def read(folder: Path) -> WandbFile:
    """The one offline run under a folder."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    found = WandbFile([], {}, [], {})
    for raw in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            found.rows.append({key: json.loads(value) for key, value in items})
        elif kind == "metric" and record.metric.step_metric:
            found.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "files":
            found.files.extend(file.path for file in record.files.files)
        elif kind in ("run", "config"):
            changes = record.run.config.update if kind == "run" else record.config.update
            found.config.update({item.key: json.loads(item.value_json) for item in changes if item.key})
    return found


def table(folder: Path, path: str) -> dict[str, Any]:
    """A table's columns and rows, from its file."""
    (found,) = folder.rglob(f"files/{path}")
    return dict(json.loads(found.read_text(encoding="utf-8")))
