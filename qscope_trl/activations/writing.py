"""Writing a feature store: shards that are whole or not there, and a manifest that says what they were made of.

A run that was killed is gone on with: what is there stays, what is missing is written. Left out: changing a store, or
adding to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qscope_trl.activations.layout import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    ShardFacts,
    leaf,
    read_facts,
    read_manifest,
    shard_name,
)
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.files import sync_folder, try_lock, write_whole

# What must be the same when a store is gone on with, but for the names of things whose content is compared.
_COMPARED = ("model", "saes", "tokenizer", "dataset", "settings")
_NAMES = ("model.name", "model.revision", "saes.source", "saes.revision", "dataset.name", "dataset.revision")
_SHARDS = "shard-*.parquet"
_TEMPORARY = ".shard-"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which ends with the process however it ends; it is made if it is not there.

    On file systems without locks, and on Windows, nothing is held.

    Raises:
        ConfigError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(handle) is False:
            raise ConfigError(f"Another run is writing to '{folder}'. Wait for it, or give another `--output`.")
        yield
    finally:
        os.close(handle)


def begin(folder: Path, manifest: Mapping[str, Any]) -> dict[int, ShardFacts]:
    """Start a store, or find what there is of it. What a killed run left half-written is deleted.

    A store that has no shard yet is begun anew, whatever it was to be made of.

    Args:
        folder: The store's folder; the caller is its `only_writer`.
        manifest: What the store is to be made of.

    Returns:
        Facts of the shards that are there, by number.

    Raises:
        ConfigError: If the folder holds something else, or a store made of something else.
        DataError: If a shard is damaged.
    """
    new = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "complete": False}
    if (folder / MANIFEST).is_file():
        old = read_manifest(folder)
        if any(folder.glob(_SHARDS)):
            refuse_differences(folder, old, manifest)
        else:
            # Nothing is lost: a run that failed before its first shard must not stand in the way of a corrected one.
            _write_manifest(folder, new)
    else:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise ConfigError(f"'{folder}' holds `{others[0]}` and is no feature store. Give another `--output`.")
        _write_manifest(folder, new)
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink()
    return _shards(folder, manifest)


def refuse_differences(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `ConfigError` with what differs between a store and what is to be written."""
    before, now = (
        {key: value for part in _COMPARED for key, value in _flat(part, manifest.get(part)).items()}
        for manifest in (old, new)
    )
    differ = [key for key in sorted({*before, *now} - {*_NAMES}) if before.get(key) != now.get(key)]
    if differ:
        shown = "; ".join(f"`{key}` was {before.get(key)!r} and is now {now.get(key)!r}" for key in differ[:4])
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ConfigError(
            f"The feature store '{folder}' was begun with something else: {shown}{more}. Run with the same data and "
            f"settings to go on with it, or give another `--output`."
        )


def write_shard(folder: Path, index: int, schema: Any, tables: Iterable[Any]) -> None:
    """Write a shard under another name, bring it to the disk, rename it.

    Args:
        folder: The store's folder.
        index: Number of the shard.
        schema: Its schema, with its facts.
        tables: Its row groups.

    Raises:
        OSError: If it cannot be written; nothing of it is left then.
    """
    path = folder / shard_name(index)
    temporary = folder / f"{_TEMPORARY}{index:06d}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            with _parquet_writer(file, schema) as writer:
                for table in tables:
                    # An empty table makes an empty row group, so that readers can count them.
                    writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table) or 1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def finish(folder: Path, manifest: Mapping[str, Any], num_rows: int) -> list[ShardFacts]:
    """Check that every row is there and mark the store as finished.

    Args:
        folder: The store's folder.
        manifest: What it was made of.
        num_rows: Rows there must be.

    Returns:
        Facts of all shards.

    Raises:
        DataError: If a row is missing, or there are more.
    """
    shards = _shards(folder, manifest)
    facts = [shards[index] for index in sorted(shards)]
    row = 0
    for shard in facts:
        if shard.first_row != row:
            break
        row += shard.rows
    if not facts or row != num_rows or sum(shard.rows for shard in facts) != num_rows:
        raise DataError(
            f"'{folder}' holds rows 0 to {row} without a gap, but there are {num_rows}. Did the data change "
            f"meanwhile, or did another program touch the folder? Run `qscope index` again with the same settings."
        )
    layers = list(facts[0].num_entries)
    old = read_manifest(folder)
    _write_manifest(
        folder,
        {
            **old,
            "complete": True,
            "num_rows": num_rows,
            "num_tokens": sum(shard.num_tokens for shard in facts),
            "num_empty": sum(shard.num_empty for shard in facts),
            "num_entries": {str(layer): sum(shard.num_entries[layer] for shard in facts) for layer in layers},
            "shards": [
                {
                    "file": shard.file,
                    "first_row": shard.first_row,
                    "rows": shard.rows,
                    "num_tokens": shard.num_tokens,
                    "bytes": shard.num_bytes,
                }
                for shard in facts
            ],
        },
    )
    return facts


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    path = folder / MANIFEST
    write_whole(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(folder)


def _shards(folder: Path, manifest: Mapping[str, Any]) -> dict[int, ShardFacts]:
    layers = sorted(int(layer) for layer in manifest["saes"]["layers"])
    size = manifest["settings"]["shard_size"]
    found = {}
    for path in sorted(folder.glob(_SHARDS)):
        facts = read_facts(path, layers)
        index = facts.first_row // size
        if path.name != shard_name(index):
            raise DataError(f"'{path}' holds rows from {facts.first_row}, which belong to `{shard_name(index)}`.")
        found[index] = facts
    return found


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """`{"a.b": 1}` of `{"a": {"b": 1}}`; lists stay."""
    if isinstance(value, Mapping):
        return {name: v for key, inner in value.items() for name, v in _flat(f"{prefix}.{key}", inner).items()}
    return {prefix: list(value) if isinstance(value, tuple) else value}


def _parquet_writer(file: Any, schema: Any) -> Any:
    import pyarrow.parquet as pq

    lists = [name for name in schema.names if name.startswith("L")]
    # Few different values: most activations are not at the last token, and a rate is a count over a length.
    few = [leaf(name) for name in lists if name.endswith(("_last", "_rate"))]
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=few,
        write_statistics=["row", *(leaf(name) for name in lists if name.endswith("_features"))],
        write_page_checksum=True,
    )
