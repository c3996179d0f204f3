"""Which rows of a group stay: a random choice that depends on what rows hold, not on where they stand.

Every row has a key, a hash of its content and the seed; the lowest keys stay. So the same rows in another order give
the same choice, and a smaller choice is part of a larger one. Equal rows have equal keys; the earlier one goes first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from qscope_trl.analysis.curation.sets import FloatArray, IntArray
from qscope_trl.config.curate import OTHERS
from qscope_trl.errors import ConfigError, DataError

Keys = NDArray[np.uint64]

_MAX_LISTED = 10
# What `repr` writes in full, beside what JSON has.
_WRITTEN_IN_FULL = (bytes, date, time, timedelta, Decimal, UUID, np.generic)


def content_key(row: Mapping[str, Any], seed: int) -> int:
    """Hash of a row's content and the seed, from 0 to 2**64; the order of its columns does not count."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_plain)
    # A lone surrogate, which JSON may hold, is no UTF-8.
    data = f"{seed}\0{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _plain(value: Any) -> str:
    if not isinstance(value, _WRITTEN_IN_FULL):
        raise DataError(
            f"The data holds a value of the type `{type(value).__name__}`, which cannot be compared and written here. "
            f"Take its column out first, by `remove_columns` of `datasets`."
        )
    return f"{type(value).__name__}:{value!r}"


def by_key(rows: IntArray, keys: Keys) -> IntArray:
    """Rows by their keys, ascending; those of equal keys as they stand."""
    ordered: IntArray = rows[np.lexsort((rows, keys[rows]))]
    return ordered


class Groups(NamedTuple):
    """Rows parted into groups."""

    names: list[str]
    """The groups."""

    of: IntArray
    """Group of each row of the dataset, -1 for rows of none."""

    def rows(self, group: int, among: IntArray) -> IntArray:
        """Those of some rows that belong to a group."""
        inside: IntArray = among[self.of[among] == group]
        return inside


class Cut(NamedTuple):
    """Rows of a group that are over its quota."""

    group: str
    rows: IntArray
    quota: int
    had: int


class Shortage(NamedTuple):
    """A group with fewer rows than its quota."""

    group: str
    quota: int
    had: int


def groups_by_values(columns: Sequence[Sequence[Any]], num_rows: int) -> Groups:
    """A group for each combination of values that occurs: `zh`, or `zh/true` of two columns.

    Args:
        columns: The values of every row, one sequence a column.
        num_rows: Number of rows.
    """
    place: dict[str, int] = {}
    of = np.fromiter(
        (
            place.setdefault("/".join(value_name(value) for value in values), len(place))
            for values in zip(*columns, strict=True)
        ),
        dtype=np.int64,
        count=num_rows,
    )
    return Groups(list(place), of)


def groups_by_tags(tags: Mapping[str, NDArray[np.bool_]]) -> Groups:
    """Rows belong to the first tag that they have, in the order given; rows without one to no group."""
    names = list(tags)
    held = np.stack([tags[name] for name in names])
    return Groups(names, np.where(held.any(0), held.argmax(0), -1).astype(np.int64))


def value_name(value: Any) -> str:
    """How a value is written as a group's name: as in JSON, a text without quotes."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(value)


def cut_to_quotas(
    groups: Groups, rows: IntArray, keys: Keys, quotas: Mapping[str, int]
) -> tuple[list[Cut], list[Shortage]]:
    """What is over the quotas.

    Args:
        groups: The groups.
        rows: Rows that are left.
        keys: Key of every row.
        quotas: Number of rows by group; `*` is that of each group without its own. Groups without any stay whole.

    Returns:
        The rows that are over, by group, and the groups that have fewer than their quota.

    Raises:
        ConfigError: If a quota names no group.
    """
    unknown = next((name for name in quotas if name not in (*groups.names, OTHERS)), None)
    if unknown is not None:
        there = ", ".join(f"`{name}`" for name in groups.names[:_MAX_LISTED])
        more = f" and {len(groups.names) - _MAX_LISTED} more" if len(groups.names) > _MAX_LISTED else ""
        raise ConfigError(f"`--quota {unknown}={quotas[unknown]}` names no group; there are {there}{more}.")
    cuts, short = [], []
    for group, name in enumerate(groups.names):
        quota = quotas.get(name, quotas.get(OTHERS))
        if quota is None:
            continue
        inside = groups.rows(group, rows)
        if inside.size < quota:
            short.append(Shortage(name, quota, int(inside.size)))
        elif inside.size > quota:
            cuts.append(Cut(name, np.sort(by_key(inside, keys)[quota:]), quota, int(inside.size)))
    return cuts, short


def cut_to_smallest(groups: Groups, rows: IntArray, keys: Keys) -> list[Cut]:
    """What must go for every group that has rows left to be of one size."""
    sizes = np.bincount(groups.of[rows], minlength=len(groups.names))
    smallest = int(sizes[sizes > 0].min()) if rows.size else 0
    return cut_to_quotas(
        groups, rows, keys, {name: smallest for name, n in zip(groups.names, sizes, strict=True) if n}
    )[0]


def refuse_shortages(short: Sequence[Shortage]) -> None:
    """Raise `DataError` if a group has fewer rows than its quota."""
    if not short:
        return
    listed = ", ".join(f"`{item.group}` has {item.had} of {item.quota}" for item in short[:_MAX_LISTED])
    raise DataError(
        f"There are fewer rows than the quotas ask for: {listed}. Lower them, or give `--allow-fewer` to take what is "
        f"there."
    )


def nearest_rows(similarity: FloatArray, rows: IntArray, keys: Keys, count: int) -> IntArray:
    """Those of some rows that are not among the `count` of highest similarity; ties go by key."""
    order = np.lexsort((rows, keys[rows], -similarity[rows]))
    return np.sort(rows[order[count:]])
