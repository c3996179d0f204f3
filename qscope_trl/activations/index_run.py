"""`qscope index`: the features of a dataset to a store on disk, by one process or several, begun or gone on with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from qscope_trl._version import __version__
from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.encode import tokenize
from qscope_trl.activations.identity import model_identity, sae_identity, tokenizer_checksum
from qscope_trl.activations.layout import ShardFacts, shard_schema
from qscope_trl.activations.opening import Opened, load_encoders, open_all
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import ChatRenderer, open_source, text_columns, text_of
from qscope_trl.activations.tables import TableMaker
from qscope_trl.activations.writing import begin, finish, only_writer, write_shard
from qscope_trl.config.index import IndexConfig
from qscope_trl.errors import DataError

# Dataset rows whose tables are in memory at a time, sorted by length among themselves; at most a shard.
_GROUP = {"document": 256, "token": 64}
# Texts whose uncut token ids are in memory at a time.
_TOKENIZE = 64
# A process waits this long for the others, which may have slower devices.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """What came of `qscope index`."""

    output: Path
    shards: tuple[ShardFacts, ...]
    new_rows: int
    new_tokens: int
    seconds: float
    num_processes: int
    is_main_process: bool

    @property
    def num_rows(self) -> int:
        """Rows of the store."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Kept tokens of them."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_entries(self) -> int:
        """Entries of all layers."""
        return sum(sum(shard.num_entries.values()) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of the shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_empty(self) -> int:
        """Rows without a kept token."""
        return sum(shard.num_empty for shard in self.shards)


class _Plan(NamedTuple):
    """What all processes must agree on."""

    done: frozenset[int]
    """Shards that are there already."""

    num_rows: int | None
    """Rows to store; `None` for a stream."""


def run(config: IndexConfig, *, show_progress: bool = True) -> Indexed:
    """`qscope index`: write the features of `config.data` to `config.output`, or go on with what is there.

    Started by `accelerate launch`, processes share the shards among themselves. However many there are, and however
    often the run was killed, every row of the dataset is in the store once. The values do not depend on the number of
    processes; on `batch_size`, device and versions they depend by rounding.

    Args:
        config: The settings.
        show_progress: Whether to show a progress bar on stderr.

    Raises:
        ConfigError: If a setting does not fit, the output holds something else, or another run is writing to it.
        DataError: If the data cannot be read, a row has no text, or a residual is not finite; the shards that are
            finished stay.
    """
    columns = text_columns(config.text_column)
    begun = time.monotonic()
    state = _processes(config)
    if config.device is None and state.num_processes > 1:
        config = replace(config, device=str(state.device))
    # On each node one process goes first, so that one downloads and the others find the files.
    with state.local_main_process_first():
        source = open_source(
            config.data,
            split=config.data_split,
            config=config.data_config,
            revision=config.data_revision,
            streaming=config.streaming,
        )
        opened = open_all(config)
    job = _Job(config, source, opened, columns)
    job.check_first_row()
    folder = Path(config.output)
    if not state.is_main_process:
        job.write(folder, _from_main(state, None), state, show_progress=False)
        state.wait_for_everyone()
        result: Indexed = _from_main(state, None)
        return replace(result, is_main_process=False)
    with only_writer(folder):
        manifest = job.manifest()
        plan = _Plan(frozenset(begin(folder, manifest)), _num_rows(config, source))
        seen = job.write(folder, _from_main(state, plan), state, show_progress=show_progress)
        state.wait_for_everyone()
        facts = finish(folder, manifest, seen if plan.num_rows is None else plan.num_rows)
    new = [shard for shard in facts if shard.first_row // config.shard_size not in plan.done]
    indexed = Indexed(
        output=folder,
        shards=tuple(facts),
        new_rows=sum(shard.rows for shard in new),
        new_tokens=sum(shard.num_tokens for shard in new),
        seconds=time.monotonic() - begun,
        num_processes=state.num_processes,
        is_main_process=True,
    )
    _from_main(state, indexed)
    return indexed


def format_result(result: Indexed) -> str:
    """What `qscope index` prints at its end."""
    lines = [
        f"{result.num_rows} rows, {result.num_tokens} tokens, {result.num_entries} entries in {len(result.shards)} "
        f"shards, {result.num_bytes / 1e6:.1f} MB: {result.output}"
    ]
    if result.num_empty:
        lines.append(f"{result.num_empty} rows have no token to read, so no feature fires in them.")
    there = result.num_rows - result.new_rows
    if there:
        lines.append(f"{there} of the rows were there already, {result.new_rows} are new.")
    if result.new_rows:
        processes = f" by {result.num_processes} processes" if result.num_processes > 1 else ""
        rate = result.new_tokens / result.seconds
        lines.append(f"{result.new_tokens} tokens in {result.seconds:.1f} s{processes}: {rate:.0f} a second.")
    return "\n".join(lines) + "\n"


class _Job:
    """What every process does alike: rows to texts, token ids, tables, shards."""

    def __init__(self, config: IndexConfig, source: RowSource, opened: Opened, columns: Sequence[str]) -> None:
        self.config = config
        self.source = source
        self.opened = opened
        self.columns = columns
        self.encoders = load_encoders(opened.model, opened.saes, opened.layers)
        self.group_size = min(_GROUP[config.per], config.shard_size)
        self.chat: ChatRenderer = chat_renderer(opened.tokenizer, name=config.model)
        self.maker = TableMaker(
            opened.model,
            self.encoders,
            per=config.per,
            aggregations=config.aggregation_list,
            batch_size=config.batch_size,
            skip_first=config.skip_first,
        )

    def check_first_row(self) -> None:
        """Read the first row's text, so that a wrong column is told before anything is written.

        Raises:
            DataError: If there is no row, or it has no text.
        """
        first = next(self.source.rows(columns=self.columns), None)
        if first is None:
            raise DataError(f"'{self.source.name}' has no rows, so there is nothing to index.")
        self._text(*first)

    def manifest(self) -> dict[str, Any]:
        """What the store is made of."""
        config, source = self.config, self.source
        return {
            "model": model_identity(self.opened.model, name=config.model, revision=config.model_revision),
            "tokenizer": {"checksum": tokenizer_checksum(self.opened.tokenizer)},
            "saes": sae_identity(self.opened.saes, self.encoders),
            "dataset": {
                "name": source.name,
                "config": config.data_config,
                "split": source.split,
                "revision": source.revision,
                "fingerprint": source.fingerprint(),
            },
            "settings": {
                "per": config.per,
                "aggregations": list(config.aggregation_list),
                "text_column": config.text_column,
                "max_length": config.max_length,
                "max_rows": config.max_rows,
                "skip_first": config.skip_first,
                "shard_size": config.shard_size,
                "group_size": self.group_size,
            },
            "versions": {
                "qscope_trl": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def write(self, folder: Path, plan: _Plan, state: PartialState, *, show_progress: bool) -> int:
        """Write this process's share of the missing shards.

        Returns:
            Number of rows of the dataset, as far as they were read.
        """
        size, rank, world = self.config.shard_size, state.process_index, state.num_processes
        if plan.num_rows is None:
            return self._write_stream(folder, plan, rank, world, show_progress)
        missing = [index for index in range(-(-plan.num_rows // size)) if index not in plan.done]
        mine = missing[rank::world]
        total = sum(min(size, plan.num_rows - index * size) for index in mine)
        with tqdm(total=total, desc="indexing", unit="row", disable=not show_progress) as bar:
            for index, rows in self._shards(mine, plan.num_rows):
                wanted = min(size, plan.num_rows - index * size)
                if len(rows) < wanted:
                    raise DataError(
                        f"'{self.source.name}' ended at row {index * size + len(rows)}, but {plan.num_rows} rows were "
                        f"counted before. It must not change while it is indexed."
                    )
                self._write_shard(folder, index, rows, bar)
        return plan.num_rows

    def _write_stream(self, folder: Path, plan: _Plan, rank: int, world: int, show_progress: bool) -> int:
        """Of a stream nobody knows the end: each process reads all of it and encodes every `world`-th shard."""
        seen = 0
        size, last = self.config.shard_size, self.config.max_rows
        rows = islice(self.source.rows(columns=self.columns), last)
        with tqdm(total=self.source.expected_rows, desc="indexing", unit="row", disable=not show_progress) as bar:
            while block := [row for _, row in islice(rows, size)]:
                index = seen // size
                seen += len(block)
                if index in plan.done or index % world != rank:
                    bar.update(len(block))
                else:
                    self._write_shard(folder, index, block, bar)
        return seen

    def _shards(self, wanted: Sequence[int], num_rows: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The rows of some shards, ascending. Sources without random access are read through once."""
        size = self.config.shard_size
        if not wanted:
            return
        if self.source.is_random_access:
            for index in wanted:
                rows = self.source.rows(index * size, columns=self.columns)
                yield index, [row for _, row in islice(rows, min(size, num_rows - index * size))]
            return
        chosen, rows = set(wanted), self.source.rows(wanted[0] * size, columns=self.columns)
        for index in range(wanted[0], wanted[-1] + 1):
            block = [row for _, row in islice(rows, min(size, num_rows - index * size))]
            if index in chosen:
                yield index, block

    def _text(self, index: int, row: dict[str, Any]) -> str:
        return text_of(
            row, text_column=self.config.text_column, source_name=self.source.name, index=index, chat=self.chat
        )

    def _write_shard(self, folder: Path, index: int, rows: Sequence[dict[str, Any]], bar: Any) -> None:
        first = index * self.config.shard_size
        texts = [self._text(first + place, row) for place, row in enumerate(rows)]
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TOKENIZE):
            block = texts[start : start + _TOKENIZE]
            ids += tokenize(self.opened.tokenizer, block, max_length=self.config.max_length)
        kept = self.maker.num_kept(ids)
        schema = shard_schema(
            self.config.per,
            self.opened.layers,
            self.config.aggregation_list,
            {"first_row": first, "rows": len(ids), "num_tokens": sum(kept), "num_empty": kept.count(0)},
        )

        def tables() -> Iterator[Any]:
            for start in range(0, len(ids), self.group_size):
                group = ids[start : start + self.group_size]
                yield self.maker.table(first + start, group)
                bar.update(len(group))

        write_shard(folder, index, schema, tables())


def _processes(config: IndexConfig) -> PartialState:
    """The processes that `accelerate launch` or torchrun started; one without them."""
    return PartialState(cpu=config.device == "cpu", timeout=_PATIENCE)


def _from_main(state: PartialState, value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0] if state.num_processes > 1 else value


def _num_rows(config: IndexConfig, source: RowSource) -> int | None:
    counted = source.num_rows
    return counted if counted is None or config.max_rows is None else min(counted, config.max_rows)
