"""The samples of every set and their active features, from texts by a model or from feature stores.

A sample without a kept token has no active set and is left out. Left out: several processes; index the sets by `qscope
index`, which has them, and map the stores.

Shape legend: `N` samples, `F` features of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from qscope_trl.activations.active import document_batches, token_features
from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.encode import num_kept, residual_batches, tokenize
from qscope_trl.activations.identity import model_identity
from qscope_trl.activations.layout import MANIFEST
from qscope_trl.activations.opening import load_encoders, open_all
from qscope_trl.activations.sources import ChatRenderer, open_source, text_columns, text_of
from qscope_trl.activations.store import FeatureStore
from qscope_trl.analysis.evalmap.footprints import Footprints, side_by_side
from qscope_trl.analysis.evalmap.tasks import Harness
from qscope_trl.analysis.evalmap.texts import SampleSet, read_texts
from qscope_trl.config.evalmap import EvalmapConfig, SetSpec
from qscope_trl.errors import ConfigError, DataError

_BLOCK = 2048


class Encoded(NamedTuple):
    """Active features of some texts."""

    bitmap: Any
    """`csr_matrix (texts, F)`."""

    num_tokens: NDArray[np.int64]
    """Tokens read of each text, as many as `max_length` keeps; 0: it has no active set."""

    num_full: int
    """Texts of `max_length` tokens or more, of which the rest was not read."""


class Encoder:
    """Texts in, active sets out, by a model that is opened once.

    Args:
        config: Model, SAEs, layers and pooling.

    Raises:
        ConfigError: If no model is named, or it cannot be loaded.
    """

    def __init__(self, config: EvalmapConfig) -> None:
        for name in ("model", "saes", "layers"):
            if not getattr(config, name):
                raise ConfigError(f"`{name}` is needed to read texts; feature stores alone need none.")
        self.config = config
        opened = open_all(config)
        self.model, self.tokenizer, self.layers = opened.model, opened.tokenizer, opened.layers
        self.saes = opened.saes
        self.encoders = load_encoders(opened.model, opened.saes, opened.layers)
        self.columns = {layer: sae.d_sae for layer, sae in self.encoders.items()}
        self.starts = dict(zip(self.columns, np.cumsum([0, *self.columns.values()])[:-1].tolist(), strict=True))
        self.chat: ChatRenderer = chat_renderer(opened.tokenizer, name=config.model)

    def reading(self) -> Reading:
        """What decides a text's features."""
        model = model_identity(self.model, name=self.config.model, revision=self.config.model_revision)
        prints = {layer: self.saes.fingerprint(layer) for layer in self.layers}
        return Reading(self.columns, prints, model["weights_checksum"], True)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids that are read of each text."""
        positions: Any = "last" if self.config.pool == "last" else "all"
        return tokenize(self.tokenizer, texts, max_length=self.config.max_length, positions=positions)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Active sets of some texts, in their order."""
        import scipy.sparse as sp

        ids = self.ids(texts)
        num_tokens = np.array([num_kept(len(row)) for row in ids], dtype=np.int64)
        rows, columns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        if num_tokens.any():
            for layer, text, feature in self._entries(ids):
                rows.append(text.cpu().numpy())
                columns.append(feature.cpu().numpy() + self.starts[layer])
        row, column = np.concatenate(rows), np.concatenate(columns)
        shape = (len(texts), sum(self.columns.values()))
        found = sp.csr_matrix((np.ones(row.size, dtype=np.int8), (row, column)), shape=shape)
        found.sort_indices()
        return Encoded(found, num_tokens, sum(len(row) >= self.config.max_length for row in ids))

    def _entries(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Layer, text and feature of every active one."""
        size = self.config.batch_size
        if self.config.pool == "max":
            for documents in document_batches(self.model, self.encoders, ids, batch_size=size, show_progress=False):
                for layer, found in documents.layers.items():
                    yield layer, found.document, found.feature
            return
        for batch in residual_batches(
            self.model, ids, self.layers, batch_size=size, positions="last", show_progress=False
        ):
            for layer, sae in self.encoders.items():
                active = token_features(sae, batch.residuals[layer].to(sae.W_enc.device))
                yield layer, batch.text_index[active.token.cpu()], active.feature


class Read(NamedTuple):
    """Everything that was read."""

    sets: tuple[SampleSet, ...]
    """The sets, in order."""

    footprints: Footprints
    """Their active sets; `row_ids` holds the numbers of the samples within their set."""

    num_full: dict[str, int]
    """By set, texts of which not every token was read."""

    reading: Reading
    """With what, and how."""

    encoder: Encoder | None
    """What read the texts, if there are any."""


def is_store(place: str) -> bool:
    """Whether a name is the folder of a feature store."""
    return (Path(place).expanduser() / MANIFEST).is_file()


class Gathered(NamedTuple):
    """The sets before anything is encoded: what does not fit them can be said at once."""

    sets: tuple[SampleSet, ...]
    """The sets, in order."""

    stores: dict[str, FeatureStore]
    """By set, the store that it is from."""

    reading: Reading
    """With what the texts are read, and how."""

    encoder: Encoder | None
    """What reads the texts, if there are any."""


def gather_sets(config: EvalmapConfig) -> Gathered:
    """Read the texts of every set, open every store, and look at the first row of every training set.

    Raises:
        ConfigError: If settings do not fit what is read.
        DataError: If data cannot be read, or stores do not belong together.
    """
    specs = config.specs()
    is_stored = {spec.name: is_store(spec.place) for spec in specs}
    for spec in specs:
        if is_stored[spec.name] and (spec.filters or spec.by):
            raise ConfigError(
                f"`{spec.name}` is a feature store, which has no columns of the data: `filter` and `by` need the "
                f"dataset."
            )
    harnesses = [Harness(config.task_path)] if config.task_names else []
    needs_model = not all(is_stored.values()) or harnesses or any(not is_store(p) for _, p in config.train_sets)
    encoder = Encoder(config) if needs_model else None
    reading = _reading(config, encoder, specs)
    sets: list[SampleSet] = []
    stores: dict[str, FeatureStore] = {}
    for spec in specs:
        if is_stored[spec.name]:
            store = stores[spec.name] = open_store(spec.place, reading)
            stop = store.num_rows if config.max_samples is None else min(store.num_rows, config.max_samples)
            sets.append(SampleSet(spec.name, f"store {spec.place}", np.arange(stop), None))
        elif encoder is not None:
            sets += read_texts(spec, config.max_samples, encoder.chat)
    for harness in harnesses:
        for name in config.task_names:
            prompts = harness.texts(name, config.max_samples)
            source = f"lm-evaluation-harness: {', '.join(prompts.tasks)}"
            sets.append(SampleSet(name, source, np.arange(len(prompts.texts)), prompts.texts))
    for _, place in config.train_sets:
        if is_store(place):
            open_store(place, reading)
        elif encoder is not None:
            next(_train_texts(config, place, encoder.chat), None)
    return Gathered(tuple(sets), stores, reading, encoder)


def encode_sets(config: EvalmapConfig, gathered: Gathered, *, show_progress: bool = True) -> Read:
    """Active sets of everything that was gathered.

    Raises:
        DataError: If a set has no active feature.
    """
    bitmaps: dict[str, Any] = {}
    row_ids: dict[str, NDArray[np.int64]] = {}
    num_full: dict[str, int] = {}
    for found in gathered.sets:
        if found.texts is None:
            bitmap, num_tokens, full = _stored(
                config, gathered.stores[found.name], gathered.reading, found.num_samples
            )
        elif gathered.encoder is not None:
            bitmap, num_tokens, full = _encode(gathered.encoder, found.name, found.texts, show_progress)
        kept = np.flatnonzero(num_tokens)
        bitmaps[found.name], row_ids[found.name], num_full[found.name] = bitmap[kept], kept, full
    footprints = Footprints(bitmaps, gathered.reading.columns, row_ids)
    return Read(gathered.sets, footprints, num_full, gathered.reading, gathered.encoder)


def read_sets(config: EvalmapConfig, *, show_progress: bool = True) -> Read:
    """Read every set of the settings: `gather_sets` and `encode_sets`."""
    return encode_sets(config, gather_sets(config), show_progress=show_progress)


def _encode(
    encoder: Encoder, name: str, texts: Sequence[str], show_progress: bool
) -> tuple[Any, NDArray[np.int64], int]:
    import scipy.sparse as sp

    parts = []
    with tqdm(total=len(texts), desc=f"encoding {name}", unit="text", disable=not show_progress, leave=False) as bar:
        for start in range(0, len(texts), _BLOCK):
            parts.append(encoder(texts[start : start + _BLOCK]))
            bar.update(parts[-1].num_tokens.size)
    bitmap = sp.vstack([part.bitmap for part in parts], format="csr")
    return bitmap, np.concatenate([part.num_tokens for part in parts]), sum(part.num_full for part in parts)


class Reading(NamedTuple):
    """What must be the same for active sets to be comparable."""

    columns: dict[int, int]
    """Features of each layer, in the order of the columns."""

    fingerprints: dict[int, str]
    """Fingerprint of each layer's SAE."""

    model: str
    """Checksum of the model's weights."""

    skip_first: bool
    """Whether position 0 is left out."""


def _reading(config: EvalmapConfig, encoder: Encoder | None, specs: Sequence[SetSpec]) -> Reading:
    if encoder is not None:
        return encoder.reading()
    store = FeatureStore.open(Path(specs[0].place).expanduser())
    return _store_reading(store, config.layer_list(store.layers) if config.layers else store.layers)


def _store_reading(store: FeatureStore, layers: Sequence[int]) -> Reading:
    manifest = store.manifest
    return Reading(
        {layer: store.d_sae(layer) for layer in layers},
        {layer: store.fingerprint(layer) for layer in layers},
        str(manifest["model"]["weights_checksum"]),
        bool(manifest["settings"]["skip_first"]),
    )


def open_store(place: str, wanted: Reading) -> FeatureStore:
    """A feature store whose active sets can be compared with the others'.

    Raises:
        ConfigError: If it lacks a layer.
        DataError: If it was made with another model or SAEs, or otherwise.
    """
    store = FeatureStore.open(Path(place).expanduser())
    mine = _store_reading(store, tuple(wanted.columns))
    for layer in wanted.columns:
        if mine.fingerprints[layer] != wanted.fingerprints[layer]:
            raise DataError(f"The store '{place}' was made with other SAEs than the others: layer {layer} differs.")
    if mine.model != wanted.model:
        raise DataError(f"The store '{place}' was made with another model than the others.")
    if mine.skip_first is not wanted.skip_first:
        raise DataError(f"The store '{place}' has `skip_first={mine.skip_first}`, unlike the others.")
    return store


def _stored(
    config: EvalmapConfig, store: FeatureStore, reading: Reading, stop: int
) -> tuple[Any, NDArray[np.int64], int]:
    num_tokens = store.token_counts(0, stop)
    full = int((num_tokens >= num_kept(store.manifest["settings"]["max_length"])).sum())
    return stored_bitmap(store, reading, config.pool, 0, stop), num_tokens, full


def stored_bitmap(store: FeatureStore, reading: Reading, pool: str, start: int, stop: int) -> Any:
    """Active sets of some rows of a store, `csr_matrix (rows, F)`."""
    return side_by_side([store.csr(layer, pool, start, stop) for layer in reading.columns])


class TrainBlock(NamedTuple):
    """Some texts of a training set."""

    first: int
    """Row of the first one."""

    bitmap: Any
    """Their active sets."""

    texts: Sequence[str] | None
    """The texts, if they are at hand."""


def train_blocks(
    config: EvalmapConfig, name: str, place: str, read: Read, *, show_progress: bool = True
) -> Iterator[TrainBlock]:
    """A training set, some texts at a time: memory does not grow with it."""
    with tqdm(desc=f"encoding {name}", unit="text", disable=not show_progress, leave=False) as bar:
        if is_store(place):
            store = open_store(place, read.reading)
            stop = min(store.num_rows, config.train_rows or store.num_rows)
            for first in range(0, stop, _BLOCK):
                last = min(first + _BLOCK, stop)
                yield TrainBlock(first, stored_bitmap(store, read.reading, config.pool, first, last), None)
                bar.update(last - first)
            return
        encoder = read.encoder
        if encoder is None:
            raise ConfigError(f"`{name}` is to be encoded: give `model`, `saes` and `layers`, or a store of it.")
        rows = _train_texts(config, place, encoder.chat)
        first = 0
        while texts := list(islice(rows, _BLOCK)):
            yield TrainBlock(first, encoder(texts).bitmap, texts)
            first += len(texts)
            bar.update(len(texts))


def _train_texts(config: EvalmapConfig, place: str, chat: ChatRenderer) -> Iterator[str]:
    source = open_source(place, split=config.train_split, config=config.train_config)
    rows = islice(source.rows(columns=text_columns(config.train_column)), config.train_rows)
    for index, row in rows:
        yield text_of(row, text_column=config.train_column, source_name=place, index=index, chat=chat)
