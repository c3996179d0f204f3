"""The folder that a map is written to: a page, tables as CSV, everything as JSON, figures."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qscope_trl._version import __version__
from qscope_trl.analysis.evalmap.figures import draw
from qscope_trl.analysis.evalmap.near import NearSets, ngram_shares
from qscope_trl.analysis.evalmap.page import build_page
from qscope_trl.config.evalmap import EvalmapConfig
from qscope_trl.files import write_whole
from qscope_trl.monitor import html

if TYPE_CHECKING:
    from qscope_trl.analysis.evalmap.run import Mapped


class ListedPair(NamedTuple):
    """A near pair as it is shown."""

    set: str
    sample: int
    row: int
    other_set: str
    other_sample: int
    similarity: float
    same_text: bool
    ngrams_in_other: float | None
    """Share of the first text's token n-grams that the other has."""

    ngrams_of_other: float | None
    """Share of the other's that the first has."""

    text: str | None
    other_text: str | None


def write_report(folder: Path, config: EvalmapConfig, result: Mapped) -> None:
    """Write every file of the report to an empty folder."""
    near = listed_pairs(config, result, result.near, None)
    train = listed_pairs(config, result, result.train, result.train_texts)
    figures = draw(result.map, result.scores)
    for drawn in figures:
        write_whole(folder / f"{drawn.name}.svg", drawn.svg)
        (folder / f"{drawn.name}.png").write_bytes(drawn.png)
    _write_csv(folder / "sets.csv", _SET_COLUMNS, [_set_row(result, place) for place in range(len(result.map.sets))])
    _write_csv(folder / "pairs.csv", _PAIR_COLUMNS, _pair_rows(result))
    _write_csv(folder / "marginal.csv", ("set", "added", "total"), result.map.marginal)
    if config.near:
        _write_csv(folder / "near.csv", ListedPair._fields, [*near, *train])
    for name, file in subset_files(result.map.names).items():
        _write_csv(folder / file, _SUBSET_COLUMNS, _subset_rows(result, name))
    data = _json(config, result, train=result.train)
    write_whole(folder / "report.json", json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    title = f"Map of {len(result.map.names)} evaluation sets"
    html.write_page(folder / "report.html", title, build_page(config, result, figures, near, train))


def subset_files(names: Sequence[str]) -> dict[str, str]:
    """File of each set's subset; a name that is no file name is changed to one."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.+-]", "_", name)
        while f"subset_{plain}.csv" in found.values():
            plain += "_"
        found[name] = f"subset_{plain}.csv"
    return found


def listed_pairs(
    config: EvalmapConfig,
    result: Mapped,
    near: Sequence[NearSets],
    training: Mapping[str, Mapping[int, str]] | None,
) -> list[ListedPair]:
    """The near pairs with what is known of them, each once.

    Args:
        config: The settings.
        result: The map.
        near: The pairs.
        training: Texts by training set and row, if the others are training texts.
    """
    sets = {found.name: found for found in result.read.sets}
    row_ids = result.read.footprints.row_ids
    encoder = result.read.encoder
    ids: dict[str, list[int]] = {}

    def tokens(text: str) -> list[int]:
        if text not in ids and encoder is not None:
            ids[text] = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[text]

    found: list[ListedPair] = []
    seen: set[tuple[str, int, str, int]] = set()
    for entry in near:
        mine = sets[entry.name]
        for pair in entry.listed:
            sample = int(row_ids[entry.name][pair.sample])
            text = None if mine.texts is None else mine.texts[sample]
            if training is not None:
                other_sample, other_text = pair.other, training[entry.other].get(pair.other)
            else:
                theirs = sets[entry.other]
                other_sample = int(row_ids[entry.other][pair.other])
                other_text = None if theirs.texts is None else theirs.texts[other_sample]
                if (entry.other, other_sample, entry.name, sample) in seen:
                    continue
                seen.add((entry.name, sample, entry.other, other_sample))
            shares: tuple[float | None, float | None] = (None, None)
            if text is not None and other_text is not None and encoder is not None:
                shares = ngram_shares(tokens(text), tokens(other_text), config.ngram)
            found.append(
                ListedPair(
                    entry.name,
                    sample,
                    int(mine.rows[sample]),
                    entry.other,
                    other_sample,
                    pair.similarity,
                    pair.same_text,
                    *shares,
                    text,
                    other_text,
                )
            )
    return found


_SET_COLUMNS = (
    "set", "source", "samples", "samples_without_tokens", "samples_at_max_length", "features", "R", "mean_coverage",
    "half_overlap", "own_share", "unlike_others", "nearest", "nearest_overlap", "cluster",
)  # fmt: skip
_PAIR_COLUMNS = (
    "first", "second", "shared", "overlap_of_first", "overlap_of_second", "overlap_min", "overlap_min_equal_size",
    "near_of_first", "looked_up_of_first", "same_text_of_first", "near_of_second", "looked_up_of_second",
    "same_text_of_second",
)  # fmt: skip
_SUBSET_COLUMNS = ("place", "sample", "row", "features", "coverage", "text")


def _set_row(result: Mapped, place: int) -> list[Any]:
    entry, read = result.map.sets[place], result.read
    source = next(found for found in read.sets if found.name == entry.name)
    return [
        entry.name, source.source, entry.num_samples, source.num_samples - entry.num_samples,
        read.num_full[entry.name], entry.num_features, entry.redundancy, entry.mean_coverage, entry.half_overlap,
        entry.own, entry.is_unlike, entry.nearest, entry.nearest_overlap, entry.cluster,
    ]  # fmt: skip


def _pair_rows(result: Mapped) -> Iterable[list[Any]]:
    found, names = result.map.overlaps, result.map.names
    near = {(entry.name, entry.other): entry for entry in result.near}
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            counts: list[Any] = []
            for key in ((first, names[j]), (names[j], first)):
                entry = near.get(key)
                counts += [None] * 3 if entry is None else [entry.near, entry.looked_up, entry.same_text]
            yield [
                first, names[j], int(found.shared[i, j]), found.of_row[i, j], found.of_row[j, i],
                found.of_smaller[i, j], result.map.equal_overlaps[i, j], *counts,
            ]  # fmt: skip


def _subset_rows(result: Mapped, name: str) -> Iterable[list[Any]]:
    entry = next(found for found in result.map.sets if found.name == name)
    source = next(found for found in result.read.sets if found.name == name)
    samples = result.read.footprints.row_ids[name][entry.chosen.samples].tolist()
    for place, (sample, covered) in enumerate(zip(samples, entry.chosen.covered.tolist(), strict=True), 1):
        text = None if source.texts is None else source.texts[sample]
        yield [place, sample, int(source.rows[sample]), covered, covered / entry.num_features, text]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    # What no encoding can hold, as a lone surrogate in a text, is shown as a mark.
    write_whole(path, text.getvalue().encode("utf-8", "replace").decode("utf-8"))


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    return "" if value is None else value


def _json(config: EvalmapConfig, result: Mapped, train: Sequence[NearSets]) -> dict[str, Any]:
    values = asdict(config)
    settings = {item.name: values[item.name] for item in fields(config) if values[item.name] not in (item.default, [])}
    found, reading = result.map, result.read.reading
    sets = []
    for place, entry in enumerate(found.sets):
        sets.append(
            {
                **dict(zip(_SET_COLUMNS, _set_row(result, place), strict=True)),
                "curve": {"samples": entry.curve_sizes, "coverage": entry.curve},
                "subsets": [subset._asdict() for subset in entry.subsets],
            }
        )
    report: dict[str, Any] = plain(
        {
            "qscope_trl": __version__,
            "settings": settings,
            "features": {"layers": reading.columns, "sae_fingerprints": reading.fingerprints, "model": reading.model},
            "sets": sets,
            "overlap": found.overlaps.of_row,
            "overlap_min": found.overlaps.of_smaller,
            "shared": found.overlaps.shared,
            "equal_size": found.equal_size,
            "overlap_min_equal_size": found.equal_overlaps,
            "marginal": [step._asdict() for step in found.marginal],
            "linkage": None if found.clusters is None else found.clusters.linkage,
            "near": [_counts(entry) for entry in result.near],
            "train": [_counts(entry) for entry in train],
            "scores": None if result.scores is None else asdict(result.scores),
        }
    )
    return report


def _counts(entry: NearSets) -> dict[str, Any]:
    return {key: value for key, value in entry._asdict().items() if key != "listed"}


def plain(value: Any) -> Any:
    """A value for JSON: arrays as lists, named tuples as mappings, NaN as null."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
