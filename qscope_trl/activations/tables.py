"""Texts of some rows to an Arrow table of a feature store, in the rows' order whatever order they are encoded in.

Left out: reading the rows (`sources.py`) and putting tables on disk (`writing.py`).

Shape legend: `N` tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qscope_trl.activations.active import document_batches, token_features
from qscope_trl.activations.encode import num_kept, residual_batches
from qscope_trl.activations.layout import layer_column, shard_schema, value_columns
from qscope_trl.sae.topk_sae import TopKSAE

_ARROW_OFFSET = np.int32


class _Part(NamedTuple):
    """Entries of a batch, item by item; an item is a document or a token."""

    lengths: NDArray[np.int64]
    """Entries of each item."""

    columns: tuple[NDArray[Any], ...]
    """Feature, then values."""


class TableMaker:
    """Makes tables with one model and its SAEs.

    Args:
        model: A transformers model, wrapped or not, on its device.
        saes: One SAE a layer, on its layer's device.
        per: `document` or `token`.
        aggregations: What documents are summed up to.
        batch_size: Texts in one forward.
        skip_first: Leave out position 0 of each text.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[int, TopKSAE],
        *,
        per: str,
        aggregations: Sequence[str],
        batch_size: int,
        skip_first: bool,
    ) -> None:
        self._model = model
        self._saes = dict(saes)
        self._batch_size = batch_size
        self.per = per
        self.skip_first = skip_first
        self._values = value_columns(per, aggregations)
        self._schema = shard_schema(per, list(self._saes), aggregations)

    def num_kept(self, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """Kept tokens of each text."""
        return [num_kept(len(ids), skip_first=self.skip_first) for ids in token_ids]

    def table(self, first_row: int, token_ids: Sequence[Sequence[int]]) -> Any:
        """The table of consecutive dataset rows.

        Args:
            first_row: Number of the first of them.
            token_ids: Token ids of each row's text; one without a kept token has no feature.

        Raises:
            DataError: If a residual is not finite.
        """
        import pyarrow as pa

        kept = np.array(self.num_kept(token_ids))
        rows = np.arange(first_row, first_row + len(token_ids))
        if self.per == "document":
            columns = [rows, kept.astype(np.uint32)]
            items, parts = self._documents(token_ids) if kept.any() else ([], {})
            num_items = len(token_ids)
        else:
            start = 1 if self.skip_first else 0
            columns = [
                np.repeat(rows, kept),
                _joined([np.arange(start, start + n, dtype=np.uint32) for n in kept], np.uint32),
                _joined([np.array(ids[start:], dtype=np.uint32) for ids in token_ids], np.uint32),
            ]
            items, parts = self._tokens(token_ids, kept) if kept.any() else ([], {})
            num_items = int(kept.sum())
        arrays = [pa.array(column) for column in columns]
        place = _joined(items, np.int64)
        for layer in self._saes:
            arrays += self._lists(layer, place, parts.get(layer, []), num_items)
        return pa.table(arrays, schema=self._schema)

    def _documents(self, token_ids: Sequence[Sequence[int]]) -> tuple[list[NDArray[Any]], dict[int, list[_Part]]]:
        items: list[NDArray[Any]] = []
        parts: dict[int, list[_Part]] = {layer: [] for layer in self._saes}
        batches = document_batches(
            self._model,
            self._saes,
            token_ids,
            batch_size=self._batch_size,
            skip_first=self.skip_first,
            show_progress=False,
        )
        for batch in batches:
            documents = batch.documents.numpy()
            items.append(documents)
            for layer, found in batch.layers.items():
                lengths = np.bincount(found.document.numpy(), minlength=len(token_ids))[documents]
                values = [getattr(found, name).numpy() for name in self._values]
                parts[layer].append(_Part(lengths, (found.feature.numpy().astype(np.uint32), *values)))
        return items, parts

    def _tokens(
        self, token_ids: Sequence[Sequence[int]], kept: NDArray[Any]
    ) -> tuple[list[NDArray[Any]], dict[int, list[_Part]]]:
        first = np.cumsum(kept) - kept
        items: list[NDArray[Any]] = []
        parts: dict[int, list[_Part]] = {layer: [] for layer in self._saes}
        batches = residual_batches(
            self._model,
            token_ids,
            tuple(self._saes),
            batch_size=self._batch_size,
            skip_first=self.skip_first,
            show_progress=False,
        )
        for batch in batches:
            text_N = batch.text_index.cpu().numpy()
            # The tokens of a text are together and in order.
            begins = np.append(True, text_N[1:] != text_N[:-1]).nonzero()[0]
            inside_N = np.arange(text_N.size) - np.repeat(begins, np.diff(np.append(begins, text_N.size)))
            items.append(first[text_N] + inside_N)
            for layer, sae in self._saes.items():
                found = token_features(sae, batch.residuals[layer].to(sae.W_enc.device))
                lengths = torch.bincount(found.token, minlength=text_N.size)
                parts[layer].append(_Part(_numpy(lengths), (_indices(found.feature), _numpy(found.value.float()))))
        return items, parts

    def _lists(self, layer: int, place: NDArray[Any], parts: Sequence[_Part], num_items: int) -> list[Any]:
        """List columns of a layer, item by item in the order of their places."""
        import pyarrow as pa

        lengths = _joined([part.lengths for part in parts], np.int64)
        order = np.argsort(place, kind="stable")
        starts = (np.cumsum(lengths) - lengths)[order]
        by_item = np.zeros(num_items, dtype=np.int64)
        by_item[place] = lengths
        offsets = np.concatenate([[0], by_item.cumsum()])
        # Entry by entry: where it is now, from where it will be.
        shift = starts - (lengths[order].cumsum() - lengths[order])
        source = np.arange(offsets[-1]) + np.repeat(shift, lengths[order])
        arrays = []
        for number, name in enumerate(("features", *self._values)):
            kind = self._schema.field(layer_column(layer, name)).type
            values = _joined([part.columns[number] for part in parts], kind.value_type.to_pandas_dtype())
            arrays.append(
                pa.ListArray.from_arrays(pa.array(offsets.astype(_ARROW_OFFSET)), pa.array(values[source]), type=kind)
            )
        return arrays


def _numpy(column: Tensor) -> NDArray[Any]:
    return column.cpu().numpy()


def _indices(column: Tensor) -> NDArray[Any]:
    # torch has few operations on unsigned integers; indices of features fit into int32.
    return _numpy(column.int()).astype(np.uint32)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
