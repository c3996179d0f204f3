"""How a feature store lies on disk: names, columns, manifest. `store.py` reads it, `writing.py` writes it.

A store is a folder with `manifest.json` and Parquet shards. A shard holds a fixed range of the dataset's rows, in
order; it is written under another name and renamed, so a shard that is there is whole. Within a shard, a Parquet row
group holds the documents, or all tokens of the documents, of `settings.group_size` dataset rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qscope_trl.errors import DataError

FORMAT = "qscope feature store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PER = ("document", "token")
_FACTS = b"qscope"


class ShardFacts(NamedTuple):
    """What a shard's footer says."""

    file: str
    """Its name in the store."""

    first_row: int
    """First of its dataset rows."""

    rows: int
    """How many they are."""

    num_tokens: int
    """Kept tokens of them."""

    num_empty: int
    """Rows of them without a kept token."""

    num_entries: dict[int, int]
    """Entries per layer: one per token, or document, and feature that fires in it."""

    num_bytes: int
    """Size of the file."""


def shard_name(index: int) -> str:
    """File of shard `index`, from 0."""
    return f"shard-{index:06d}.parquet"


def value_columns(per: str, aggregations: Sequence[str]) -> tuple[str, ...]:
    """What is stored of each layer beside the features' indices."""
    return ("acts",) if per == "token" else tuple(aggregations)


def layer_column(layer: int, what: str) -> str:
    """`L12_features`, `L12_max`, ..."""
    return f"L{layer}_{what}"


def leaf(column: str) -> str:
    """Path of a list column's values in Parquet."""
    return f"{column}.list.element"


def shard_schema(
    per: str, layers: Sequence[int], aggregations: Sequence[str], facts: dict[str, int] | None = None
) -> Any:
    """Arrow schema of a shard; nothing in it is null.

    Args:
        per: `document` (a row per dataset row) or `token` (a row per kept token).
        layers: Layers.
        aggregations: What is stored per document and feature.
        facts: `first_row`, `rows`, `num_tokens` and `num_empty` of one shard.
    """
    import pyarrow as pa

    def column(name: str, kind: Any) -> Any:
        return pa.field(name, kind, nullable=False)

    def lists(kind: Any) -> Any:
        return pa.list_(pa.field("element", kind, nullable=False))

    columns = [column("row", pa.int64())]
    if per == "token":
        columns += [column("position", pa.uint32()), column("token_id", pa.uint32())]
    else:
        columns.append(column("num_tokens", pa.uint32()))
    for layer in layers:
        columns.append(column(layer_column(layer, "features"), lists(pa.uint32())))
        columns += [
            column(layer_column(layer, what), lists(pa.float32())) for what in value_columns(per, aggregations)
        ]
    return pa.schema(columns, metadata=None if facts is None else {_FACTS: json.dumps(facts)})


def read_facts(path: Path, layers: Sequence[int]) -> ShardFacts:
    """What a shard's footer says; nothing else of it is read.

    Raises:
        DataError: If it is no whole shard.
    """
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        facts = json.loads(metadata.metadata[_FACTS])
        entries = dict.fromkeys(layers, 0)
        paths = {leaf(layer_column(layer, "features")): layer for layer in layers}
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for place in range(row_group.num_columns):
                chunk = row_group.column(place)
                layer = paths.get(chunk.path_in_schema)
                # Of tokens there may be none, and then no statistics.
                if layer is not None and chunk.num_values:
                    # An empty list takes a place too, which counts as a null.
                    entries[layer] += chunk.num_values - chunk.statistics.null_count
        counts = {name: int(facts[name]) for name in ("first_row", "rows", "num_tokens", "num_empty")}
        return ShardFacts(file=path.name, **counts, num_entries=entries, num_bytes=path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(
            f"The shard '{path}' is damaged ({_first_line(err)}). Delete it and run `qscope index` again with the "
            f"same settings: it is written anew."
        ) from err


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        DataError: If there is none, or it is damaged or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"No feature store at '{folder}': it has no `{MANIFEST}`. `qscope index` makes one.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(f"'{path}' cannot be read as JSON: {err}") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"'{path}' is not the manifest of a feature store: it lacks `format: {FORMAT}`.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"'{path}' has `format_version` {manifest.get('format_version')!r}, but this version of qscope_trl reads "
            f"{FORMAT_VERSION}. Update the package."
        )
    return manifest


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")
