"""Reading a feature store: documents by features as scipy CSR, columns as Arrow, chosen features as an array.

Only the shards, row groups and columns that a question needs are read. Left out: writing (`writing.py`), and the
texts, which stay in the dataset: row `i` of a store is row `i` of the dataset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.active import AGGREGATIONS
from qscope_trl.activations.layout import (
    ShardFacts,
    layer_column,
    read_facts,
    read_manifest,
    shard_name,
    shard_schema,
)
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureId, FeatureSet


class FeatureStore:
    """A feature store on disk, opened for reading. Open one with `FeatureStore.open`.

    Guaranteed: every row from 0 to `num_rows` is there once, in the dataset's order; pages are checked against their
    checksums when read. Not guaranteed: that the dataset is still the one that was indexed; compare its fingerprint
    with `manifest["dataset"]`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shards: Sequence[ShardFacts]) -> None:
        self.path = path
        self.manifest = manifest
        settings = manifest["settings"]
        self.per: str = settings["per"]
        self.layers: tuple[int, ...] = tuple(sorted(int(layer) for layer in manifest["saes"]["layers"]))
        self.aggregations: tuple[str, ...] = AGGREGATIONS if self.per == "token" else tuple(settings["aggregations"])
        self.is_complete: bool = manifest["complete"]
        self.num_rows: int = shards[-1].first_row + shards[-1].rows if shards else 0
        self.num_tokens: int = sum(shard.num_tokens for shard in shards)
        self._shard_size: int = settings["shard_size"]
        self._group_size: int = settings["group_size"]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_partial: bool = False) -> FeatureStore:
        """Open a store; of its shards only footers are read.

        Args:
            path: Folder that `qscope index` wrote.
            allow_partial: Also open a store that is not finished: its rows up to the first one that is missing.

        Raises:
            DataError: If there is no store, it is not finished, or a shard is missing or damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        layers = sorted(int(layer) for layer in manifest["saes"]["layers"])
        there: list[ShardFacts] = []
        while (file := folder / shard_name(len(there))).is_file():
            there.append(read_facts(file, layers))
        if manifest["complete"]:
            if len(there) < len(manifest["shards"]):
                raise DataError(
                    f"'{folder}' lacks `{shard_name(len(there))}`, which its manifest lists. Run `qscope index` again "
                    f"with the same settings: it writes what is missing."
                )
        elif not allow_partial:
            raise DataError(
                f"The feature store '{folder}' is not finished: {_count_shards(folder)} shards are there. Run `qscope "
                f"index` again with the same settings to go on where it ended, or pass `allow_partial=True` for the "
                f"rows up to the first missing one."
            )
        return cls(folder, manifest, there)

    def __repr__(self) -> str:
        return (
            f"FeatureStore('{self.path}', {self.num_rows} rows per {self.per}, layers {list(self.layers)}"
            f"{'' if self.is_complete else ', not finished'})"
        )

    def __len__(self) -> int:
        return self.num_rows

    def d_sae(self, layer: int) -> int:
        """Number of features of a layer's SAE.

        Raises:
            ConfigError: If the store lacks the layer.
        """
        self._require(layer)
        return int(self.manifest["saes"]["layers"][str(layer)]["d_sae"])

    def fingerprint(self, layer: int) -> str:
        """Fingerprint of a layer's SAE, as `SAESuite.fingerprint` gives it.

        Raises:
            ConfigError: If the store lacks the layer.
        """
        self._require(layer)
        return str(self.manifest["saes"]["layers"][str(layer)]["fingerprint"])

    def check_fits(self, chosen: FeatureSet) -> None:
        """Refuse features of a layer that the store lacks, or of other SAEs.

        Raises:
            ConfigError: If the store lacks a layer of the set.
            FeatureSetError: If the set was made for other SAEs.
        """
        for layer in chosen.layers:
            part = chosen.with_features(chosen.for_layer(layer))
            part.check_fits(
                d_sae=self.d_sae(layer),
                sae=self.manifest["saes"]["source"],
                fingerprints={layer: self.fingerprint(layer)},
            )

    def token_counts(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Kept tokens of each dataset row, int64 `(rows,)`; 0 for a row whose text has none."""
        start, stop = self._range(start, stop)
        found = np.zeros(stop - start, dtype=np.int64)
        for _, _, table in self._pieces(start, stop, ["row"] if self.per == "token" else ["row", "num_tokens"]):
            rows = table["row"].to_numpy() - start
            if self.per == "token":
                found += np.bincount(rows, minlength=found.size)
            else:
                found[rows] = table["num_tokens"].to_numpy()
        return found

    def csr(self, layer: int, aggregation: str = "max", start: int = 0, stop: int | None = None) -> Any:
        """Documents by features of one layer, `scipy.sparse.csr_matrix (rows, d_sae)` in fp32.

        Row `i` is dataset row `start + i`. A store per token is summed up by document on the way.

        Args:
            layer: Layer.
            aggregation: `max`, `mean`, `last` or `rate`, as far as stored.
            start: First dataset row.
            stop: Where to end; by default at the last row. `iter_csr` goes over all rows piece by piece.

        Raises:
            ConfigError: If the store lacks the layer or aggregation, rows are out of range, or scipy is missing.
            DataError: If a shard is damaged.
        """
        scipy_sparse = _scipy_sparse()
        start, stop = self._range(start, stop)
        counts, features, values = [], [], []
        for size, columns in self._documents(layer, aggregation, start, stop):
            document, feature, value = columns
            counts.append(np.bincount(document, minlength=size))
            features.append(feature.astype(np.int32))
            values.append(value)
        indptr = np.concatenate([[0], *(count for count in counts)]).cumsum()
        matrix = scipy_sparse.csr_matrix(
            (_joined(values, np.float32), _joined(features, np.int32), indptr), shape=(stop - start, self.d_sae(layer))
        )
        matrix.has_sorted_indices = True
        return matrix

    def iter_csr(self, layer: int, aggregation: str = "max", rows_per_batch: int = 4096) -> Iterator[Any]:
        """All rows in order, `rows_per_batch` at a time, each as `csr` gives them; the last may be shorter.

        Raises:
            ConfigError: As `csr`.
        """
        for start, stop in self._batches(rows_per_batch):
            yield self.csr(layer, aggregation, start, stop)

    def token_csr(self, layer: int, start: int = 0, stop: int | None = None) -> Any:
        """Tokens by features of one layer, `csr_matrix (tokens, d_sae)` in fp32, of a store per token.

        Its rows are those of `arrow(start, stop)`, which says which dataset row, position and token each one is.

        Raises:
            ConfigError: If the store is per document, lacks the layer, or scipy is missing.
        """
        if self.per != "token":
            raise ConfigError(f"'{self.path}' holds documents, not tokens. Index with `--per token` for tokens.")
        scipy_sparse = _scipy_sparse()
        start, stop = self._range(start, stop)
        counts, features, values = [], [], []
        for _, _, table in self._pieces(start, stop, self._columns(layer, "acts")):
            token, feature, value = _entries(table, layer, "acts")
            counts.append(np.bincount(token, minlength=table.num_rows))
            features.append(feature.astype(np.int32))
            values.append(value)
        indptr = np.concatenate([[0], *counts]).cumsum()
        shape = (indptr.size - 1, self.d_sae(layer))
        return scipy_sparse.csr_matrix((_joined(values, np.float32), _joined(features, np.int32), indptr), shape=shape)

    def arrow(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> Any:
        """Rows as a `pyarrow.Table`: one per document, or one per kept token of the dataset rows asked for.

        Columns are `row` (the dataset's) and `num_tokens`, or `row`, `position` and `token_id`; then for each layer
        `L12_features` and `L12_max`, ..., or `L12_features` and `L12_acts`: lists of equal length.

        Args:
            start: First dataset row.
            stop: Where to end; by default at the last row.
            columns: Columns to read; by default all.

        Raises:
            ConfigError: If rows or columns are not there.
        """
        import pyarrow as pa

        start, stop = self._range(start, stop)
        schema = self._schema(columns)
        wanted = schema.names
        read = list(dict.fromkeys(["row", *wanted]))
        tables = [table.select(wanted) for _, _, table in self._pieces(start, stop, read)]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def iter_arrow(self, rows_per_batch: int = 4096, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """All rows in order, those of `rows_per_batch` dataset rows at a time, each as `arrow` gives them.

        Raises:
            ConfigError: As `arrow`.
        """
        for start, stop in self._batches(rows_per_batch):
            yield self.arrow(start, stop, columns)

    def values(self, features: Sequence[FeatureId], aggregation: str = "max") -> NDArray[Any]:
        """Values of chosen features in every row, fp32 `(num_rows, len(features))`; 0 where one does not fire.

        Raises:
            ConfigError: If the store lacks a layer or the aggregation, or a feature is out of range.
        """
        found = np.zeros((self.num_rows, len(features)), dtype=np.float32)
        columns: dict[int, dict[int, list[int]]] = {}
        for place, chosen in enumerate(features):
            if chosen.index >= self.d_sae(chosen.layer):
                raise ConfigError(
                    f"Feature {chosen} is out of range: the SAE has `d_sae={self.d_sae(chosen.layer)}` features."
                )
            columns.setdefault(chosen.layer, {}).setdefault(chosen.index, []).append(place)
        for layer, places in columns.items():
            place_of = np.full(self.d_sae(layer), -1)
            place_of[list(places)] = [of_feature[0] for of_feature in places.values()]
            first = 0
            for size, (document, feature, value) in self._documents(layer, aggregation, 0, self.num_rows):
                at = place_of[feature]
                kept = at >= 0
                found[document[kept] + first, at[kept]] = value[kept]
                first += size
            for of_feature in places.values():
                found[:, of_feature[1:]] = found[:, of_feature[:1]]
        return found

    def _documents(
        self, layer: int, aggregation: str, start: int, stop: int
    ) -> Iterator[tuple[int, tuple[NDArray[Any], ...]]]:
        """Per row group: number of dataset rows, and (row among them, feature, value) of each entry, in order."""
        what = aggregation if self.per == "document" else "acts"
        if aggregation not in self.aggregations:
            raise ConfigError(f"`aggregation` is {aggregation!r}; '{self.path}' holds {', '.join(self.aggregations)}.")
        for first, last, table in self._pieces(start, stop, self._columns(layer, what)):
            document, feature, value = _entries(table, layer, what)
            if self.per == "token":
                token_row = table["row"].to_numpy() - first
                document, feature, value = _sum_up(token_row, document, feature, value, aggregation)
            fires = value != 0
            if not fires.all():
                document, feature, value = document[fires], feature[fires], value[fires]
            yield last - first, (document, feature, value)

    def _columns(self, layer: int, what: str) -> list[str]:
        self._require(layer)
        return ["row", layer_column(layer, "features"), layer_column(layer, what)]

    def _pieces(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[tuple[int, int, Any]]:
        """Range of dataset rows and its columns, row group by row group; `row` is among the columns."""
        import pyarrow.parquet as pq

        while start < stop:
            shard, inside = divmod(start, self._shard_size)
            path = self.path / shard_name(shard)
            end = min(start - inside + self._shard_size, stop)
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    while start < end:
                        group = inside // self._group_size
                        last = min(start - inside + (group + 1) * self._group_size, end)
                        table = file.read_row_group(group, columns=list(columns), use_threads=False)
                        low, high = np.searchsorted(table["row"].to_numpy(), [start, last])
                        yield start, last, table.slice(low, high - low)
                        start, inside = last, inside + last - start
            # What pyarrow raises derives from one of these.
            except (OSError, ValueError) as err:
                raise DataError(
                    f"The shard '{path}' is damaged ({err}). Delete it and run `qscope index` again with the same "
                    f"settings: it is written anew."
                ) from err

    def _schema(self, columns: Sequence[str] | None) -> Any:
        schema = shard_schema(self.per, self.layers, self.aggregations)
        if columns is None:
            return schema
        import pyarrow as pa

        unknown = [name for name in columns if name not in schema.names]
        if unknown:
            raise ConfigError(f"'{self.path}' has no column `{unknown[0]}`; it has {', '.join(schema.names)}.")
        return pa.schema([schema.field(name) for name in columns])

    def _batches(self, rows_per_batch: int) -> Iterator[tuple[int, int]]:
        if rows_per_batch < 1:
            raise ConfigError(f"`rows_per_batch` is {rows_per_batch}; it is 1 or more.")
        for start in range(0, self.num_rows, rows_per_batch):
            yield start, min(start + rows_per_batch, self.num_rows)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ConfigError(
                f"Rows {start} to {stop} are not within 0 to {self.num_rows}, which '{self.path}' holds."
            )
        return start, stop

    def _require(self, layer: int) -> None:
        if layer not in self.layers:
            raise ConfigError(
                f"'{self.path}' holds no layer {layer}; it holds {', '.join(map(str, self.layers))}. Index with that "
                f"layer among `--layers`."
            )


def _entries(table: Any, layer: int, what: str) -> tuple[NDArray[Any], ...]:
    """(row in the table, feature, value) of each entry."""
    features, values = (table[layer_column(layer, name)].combine_chunks() for name in ("features", what))
    lengths = np.diff(features.offsets.to_numpy())
    row = np.repeat(np.arange(table.num_rows), lengths)
    return row, features.flatten().to_numpy(), values.flatten().to_numpy()


def _sum_up(
    token_row: NDArray[Any],
    token: NDArray[Any],
    feature: NDArray[Any],
    value: NDArray[Any],
    aggregation: str,
) -> tuple[NDArray[Any], ...]:
    """Entries by document of entries by token, as `active.document_features` sums them up."""
    document = token_row[token]
    if aggregation == "last":
        is_last = np.append(token_row[1:] != token_row[:-1], True)[: token_row.size]
        at_end = is_last[token]
        return document[at_end], feature[at_end], value[at_end]
    order = np.lexsort((feature, document))
    document, feature, value = document[order], feature[order], value[order]
    new = np.append(True, (document[1:] != document[:-1]) | (feature[1:] != feature[:-1]))[: document.size]
    begins = new.nonzero()[0]
    document, feature = document[begins], feature[begins]
    if not begins.size:
        return document, feature, value
    if aggregation == "max":
        return document, feature, np.maximum.reduceat(value, begins)
    tokens = np.bincount(token_row)[document]
    sums = (
        np.add.reduceat(value.astype(np.float64), begins)
        if aggregation == "mean"
        else np.diff(np.append(begins, value.size))
    )
    return document, feature, (sums / tokens).astype(np.float32)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _count_shards(folder: Path) -> int:
    return sum(1 for _ in folder.glob("shard-*.parquet"))


def _scipy_sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError as err:
        raise ConfigError(
            "CSR matrices need scipy, which is not installed: `pip install 'qscope-trl[data]'`. `arrow` and `values` "
            "need nothing more."
        ) from err
    return sparse
