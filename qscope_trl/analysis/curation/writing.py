"""The output folder: the rows that stay as a `datasets` dataset and as Parquet, and one line for each that left.

Everything is written to a folder beside it, which takes its name at the end: the output is whole or not there. Rows
are read again from the data, a few at a time, and must be what they were when they were judged.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qscope_trl.activations.feature_table import FeatureTable
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.analysis.curation.choosing import content_key
from qscope_trl.analysis.curation.rows import RowFacts
from qscope_trl.analysis.curation.steps import Decision
from qscope_trl.bundled import data_path
from qscope_trl.config.curate import CurateConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.files import try_lock

_BATCH = 4096


def refuse_output(config: CurateConfig) -> None:
    """Refuse an output folder that holds something, or that lies in what is read.

    Raises:
        ConfigError: If it does.
    """
    if config.output is None or config.dry_run:
        return
    output = Path(config.output).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"The output '{output}' is there already, and nothing is written over. Name another folder.")
    inputs = [data_path(config.data), config.store, *config.exclude_near, config.nearest]
    for name in inputs:
        path = Path(str(name)).expanduser()
        if name and path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"The output '{output}' lies in '{name}', which is read and stays as it is.")


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes `output` at the end; after an error nothing of it is left.

    Raises:
        ConfigError: If something has come to be at `output` meanwhile.
        DataError: If nothing can be written there.
    """
    output = output.expanduser()
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        temporary.mkdir()
        with _locked(temporary):
            yield temporary
        if output.exists():
            if output.is_file() or any(output.iterdir()):
                raise ConfigError(f"Something has been written to '{output}' meanwhile. Name another folder.")
            output.rmdir()
        os.replace(temporary, output)
    except OSError as err:
        raise DataError(f"The output '{output}' cannot be written: {err}") from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder, which ends with the process however it ends; whether it is held."""
    if os.name != "posix":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield try_lock(handle) is True
    finally:
        os.close(handle)


def _remove_leftovers(output: Path) -> None:
    """Delete what a killed run has left beside the output; a run that goes on holds a lock on it."""
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.*"):
        if leftover.is_dir() and leftover.suffix[1:].isdecimal():
            with _locked(leftover) as is_free:
                if is_free:
                    shutil.rmtree(leftover, ignore_errors=True)


def write_rows(folder: Path, source: RowSource, facts: RowFacts, decision: Decision, seed: int) -> None:
    """Write the rows that stay: `dataset/` for `datasets.load_from_disk`, and `data.parquet`.

    Columns are as they were; after them come `qscope_row`, the number of the row in the data, and what was added.

    Raises:
        DataError: If the data is not what it was, or a value does not fit its column's type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features

    schema = facts.schema
    for name, values in decision.columns.items():
        schema = schema.append(pa.field(name, pa.from_numpy_dtype(values.dtype)))
    try:
        schema = schema.with_metadata(Features.from_arrow_schema(schema).arrow_schema.metadata)
        stream = folder / "rows.arrow"
        with (
            pa.ipc.new_stream(str(stream), schema) as rows_file,
            pq.ParquetWriter(folder / "data.parquet", schema) as parquet,
        ):
            for places, rows in _rows_left(source, facts, decision, seed):
                table = pa.Table.from_pylist(rows, schema=facts.schema)
                for name, values in decision.columns.items():
                    table = table.append_column(name, pa.array(values[places]))
                table = table.cast(schema)
                rows_file.write_table(table)
                parquet.write_table(table)
    except (pa.ArrowException, OverflowError, UnicodeError) as err:
        raise DataError(f"The rows of '{source.name}' cannot be written as Arrow and Parquet: {err}") from err
    dataset = Dataset.from_file(str(stream))
    dataset.save_to_disk(str(folder / "dataset"))
    del dataset
    stream.unlink()


def _rows_left(
    source: RowSource, facts: RowFacts, decision: Decision, seed: int
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    changed = f"'{source.name}' is not what it was when its rows were judged"
    places: list[int] = []
    rows: list[dict[str, Any]] = []
    count = 0
    for place, row in source.rows():
        count += 1
        if place >= facts.num_rows or content_key(row, seed) != int(facts.keys[place]):
            raise DataError(f"{changed}: row {place} is another. Run again while nothing writes to it.")
        if decision.left[place]:
            places.append(place)
            rows.append(row)
        if len(rows) == _BATCH:
            yield places, rows
            places, rows = [], []
    if count != facts.num_rows:
        raise DataError(f"{changed}: it has {count} rows instead of {facts.num_rows}. Run again.")
    if rows:
        yield places, rows


def write_removed(folder: Path, decision: Decision, table: FeatureTable | None) -> None:
    """Write `removed.parquet`: for each row that left its number, the step, the setting and the reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("step", pa.string()),
            ("setting", pa.string()),
            ("reason", pa.string()),
            ("other_row", pa.int64()),
            ("other_source", pa.string()),
            ("similarity", pa.float64()),
        ]
    )
    with pq.ParquetWriter(folder / "removed.parquet", schema) as file:
        for removal in decision.removals:
            count = removal.rows.size
            if not count:
                continue
            columns = [
                pa.array(removal.rows),
                pa.array([removal.step] * count),
                pa.array([removal.setting] * count),
                pa.array(list(removal.reasons(table)), pa.string()),
                pa.nulls(count, pa.int64()) if removal.other is None else pa.array(removal.other),
                pa.array([removal.other_source] * count, pa.string()),
                pa.nulls(count, pa.float64()) if removal.similarity is None else pa.array(removal.similarity),
            ]
            file.write_table(pa.Table.from_arrays(columns, schema=schema))
