"""Rows of equal text, told by a hash: duplicates whatever was computed for them.

In bf16 the padding of a batch moves activations a little, so that equal texts may get unequal sets of features, and a
text without a kept token has none at all. Equal is what is equal character by character; case and white space count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import text_of
from qscope_trl.analysis.curation.leaders import Duplicates
from qscope_trl.analysis.curation.references import NearReference
from qscope_trl.analysis.curation.sets import IntArray

TextKeys = NDArray[np.uint64]
"""Hash of each row's text, 128 bits: two texts of the same one do not occur. Shape `(rows, 2)`."""


def text_key(row: Mapping[str, Any], *, text_column: str, source_name: str, index: int) -> bytes:
    """Hash of a row's text. A conversation counts by its messages, so no chat template is needed.

    Raises:
        DataError: If the row has no such text.
    """
    text = text_of(row, text_column=text_column, source_name=source_name, index=index, chat=_as_json)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _as_json(messages: list[Any]) -> str:
    return f"\0{json.dumps(messages, sort_keys=True, ensure_ascii=False, default=repr)}"


def text_keys(digests: list[bytes]) -> TextKeys:
    """Hashes of rows as one array."""
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)


def source_keys(source: RowSource, text_column: str) -> TextKeys:
    """Hashes of all rows of a dataset, in their order."""
    return text_keys(
        [text_key(row, text_column=text_column, source_name=source.name, index=index) for index, row in source.rows()]
    )


def first_equal(keys: TextKeys, among: TextKeys) -> IntArray:
    """For each text the place of the first one in `among` that is equal, -1 for none."""
    _, group = np.unique(np.concatenate([among, keys]), axis=0, return_inverse=True)
    group = group.ravel()
    first = np.full(group.size, -1, dtype=np.int64)
    # Of several assignments to one place the last one counts.
    first[group[: len(among)][::-1]] = np.arange(len(among))[::-1]
    found: IntArray = first[group[len(among) :]]
    return found


class Copies(NamedTuple):
    """Rows whose text an earlier one has."""

    originals: IntArray
    """Rows whose text no earlier one has, in the order given."""

    rows: IntArray
    """The others, in the order given."""

    original: IntArray
    """For each of those the original."""


def part_copies(keys: TextKeys, order: IntArray) -> Copies:
    """Part rows into originals and copies.

    Args:
        keys: Hashes of all rows.
        order: Those that take part, the ones to keep first.
    """
    first = first_equal(keys[order], keys[order])
    is_copy = first < np.arange(order.size)
    return Copies(order[~is_copy], order[is_copy], order[first[is_copy]])


def with_copies(near: Duplicates, copies: Copies, num_rows: int) -> Duplicates:
    """Duplicates among originals, and the copies: near their original, or near what that one is near.

    Args:
        near: Duplicates among the originals.
        copies: What they were parted into.
        num_rows: Rows of the data.
    """
    leader, similarity = np.arange(num_rows), np.ones(num_rows)
    leader[near.rows], similarity[near.rows] = near.leader, near.similarity
    return Duplicates(
        np.concatenate([near.rows, copies.rows]),
        np.concatenate([near.leader, leader[copies.original]]),
        np.concatenate([near.similarity, similarity[copies.original]]),
    )


def with_equal(near: NearReference, rows: IntArray, keys: TextKeys, references: TextKeys) -> NearReference:
    """Rows near a reference, and those that have the text of one: near the first such, with similarity 1.

    Args:
        near: What is near by features.
        rows: The rows that were compared, ascending.
        keys: Hashes of all rows.
        references: Hashes of the references.
    """
    first = first_equal(keys[rows], references)
    equal = rows[first >= 0]
    others = ~np.isin(near.rows, equal)
    found = np.concatenate([near.rows[others], equal])
    order = np.argsort(found)
    reference = np.concatenate([near.reference[others], first[first >= 0]])
    similarity = np.concatenate([near.similarity[others], np.ones(equal.size)])
    return NearReference(found[order], reference[order], similarity[order])
