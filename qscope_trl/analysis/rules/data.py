"""Labelled texts: read from any dataset, and dealt out into test, development and training parts.

Left out: more than two classes. A rule says yes or no; several classes take several rules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_trl.activations.chat import model_chat_renderer
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import open_source, text_of
from qscope_trl.config.rules import LabelledConfig
from qscope_trl.errors import DataError

TEST = -1
"""Slice of the texts that are only tested on."""


@dataclass(frozen=True)
class Labelled:
    """Texts with labels, in the order of their data set.

    Args:
        name: Name of the data set, for messages and evidence.
        texts: The texts.
        labels: Whether each is positive, `(texts,)`.
        groups: What each must not be parted from; by default its own content.
        fingerprint: Of the data set.
    """

    name: str
    texts: list[str]
    labels: NDArray[np.bool_]
    groups: list[str]
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def describe(self) -> dict[str, Any]:
        """What evidence says of the data."""
        found = {"name": self.name, "documents": len(self), "positive": int(self.labels.sum())}
        return {**found, "fingerprint": self.fingerprint} if self.fingerprint else found


def read_labelled(
    config: LabelledConfig,
    *,
    data: str | None = None,
    split: str | None = None,
    max_rows: int | None = None,
    group_column: str | None = None,
) -> Labelled:
    """Read a labelled data set as a command's settings say.

    Args:
        config: The settings.
        data: Another data set with the columns of `config.data`, such as the test set.
        split: Its split.
        max_rows: Most rows that are read of it: the first.
        group_column: Column of what must stay together.

    Raises:
        DataError: If a column is missing, a text or label is not usable, or a class is missing.
    """
    if config.positive is not None and config.negative is not None:
        parts = [
            _read(open_source(name), config, None, group_column, config.max_rows, is_positive)
            for name, is_positive in ((config.positive, True), (config.negative, False))
        ]
        return _both_classes(_joined(parts))
    name = config.data if data is None else data
    source = open_source(
        str(name),
        split=config.data_split if data is None else split,
        config=config.data_config if data in (None, config.data) else None,
        revision=config.data_revision if data in (None, config.data) else None,
    )
    limit = config.max_rows if data is None else max_rows
    return _both_classes(_read(source, config, config.label_column, group_column, limit, None))


def _read(
    source: RowSource,
    config: LabelledConfig,
    label_column: str | None,
    group_column: str | None,
    max_rows: int | None,
    label: bool | None,
) -> Labelled:
    texts, labels, groups = [], [], []
    chat = model_chat_renderer(config.model, revision=config.model_revision)
    for index, row in source.rows():
        if max_rows is not None and index >= max_rows:
            break
        texts.append(text_of(row, text_column=config.text_column, source_name=source.name, index=index, chat=chat))
        labels.append(_label(row, label_column, config, source.name, index) if label is None else label)
        groups.append(
            texts[-1] if group_column is None else str(_column(row, group_column, "group_column", source.name, index))
        )
    return Labelled(source.name, texts, np.array(labels, dtype=bool), groups, source.fingerprint())


def _label(row: dict[str, Any], column: str | None, config: LabelledConfig, name: str, index: int) -> bool:
    value = _column(row, str(column), "label_column", name, index)
    # A column of numbers with gaps holds NaN in the gaps.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"Row {index} of '{name}' has no label: column `{column}` is null there. Leave such rows out.")
    if isinstance(value, bool):
        return str(value).lower() == config.positive_label.lower()
    if isinstance(value, float) and math.isinf(value):
        raise DataError(f"Row {index} of '{name}' has the label {value} in column `{column}`, which names no class.")
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return str(value) == config.positive_label


def _column(row: dict[str, Any], column: str, setting: str, name: str, index: int) -> Any:
    if column not in row:
        raise DataError(
            f"Row {index} of '{name}' has no column `{column}`; it has {', '.join(f'`{key}`' for key in row)}. Name "
            f"the right one by `{setting}`."
        )
    return row[column]


def with_test(data: Labelled, test: Labelled) -> Labelled:
    """Both sets one after another."""
    return _joined([data, test])


def _joined(parts: Sequence[Labelled]) -> Labelled:
    return Labelled(
        " + ".join(part.name for part in parts),
        [text for part in parts for text in part.texts],
        np.concatenate([part.labels for part in parts]),
        [group for part in parts for group in part.groups],
        "+".join(part.fingerprint for part in parts),
    )


def _both_classes(found: Labelled) -> Labelled:
    positive = int(found.labels.sum())
    if not 0 < positive < len(found):
        which = "positive" if positive else "negative"
        raise DataError(
            f"All {len(found)} texts of '{found.name}' are {which}, so there is nothing to tell apart. Check "
            f"`label_column` and `positive_label`."
        )
    return found


def _joined_groups(data: Labelled) -> list[str]:
    """Group of each text, those with a text in common being one: the first of their names."""
    parent = {group: group for group in data.groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    first: dict[str, str] = {}
    for text, group in zip(data.texts, data.groups, strict=True):
        one, other = sorted((root(first.setdefault(text, group)), root(group)))
        parent[other] = one
    return [root(group) for group in data.groups]


def deal(data: Labelled, *, folds: int, test_share: float, seed: int) -> NDArray[np.int64]:
    """Deal the texts out into slices of like size and like shares of both classes.

    Groups are taken in the order of a hash of their name and the seed, and each goes to the slice that lacks most of
    its class. So neither the order of the data nor that of a class in it matters, and a group is never parted. Groups
    that have a text in common count as one.

    Args:
        data: The texts.
        folds: Slices beside the test.
        test_share: Share of the texts that goes into the test; 0 for none.
        seed: Seed of the order.

    Returns:
        Slice of each text, `(texts,)`: `TEST`, or 0 to `folds - 1`.

    Raises:
        DataError: If a slice would lack a class.
    """
    members: dict[str, list[int]] = {}
    for place, group in enumerate(_joined_groups(data)):
        members.setdefault(group, []).append(place)
    order = sorted(members, key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).hexdigest())
    names = [TEST, *range(folds)]
    shares = np.array([test_share, *[(1 - test_share) / folds] * folds])
    wanted = np.stack([shares * (~data.labels).sum(), shares * data.labels.sum()])
    found = np.zeros(len(data), dtype=np.int64)
    for group in order:
        places = members[group]
        positive = int(data.labels[places].sum())
        kind = int(2 * positive >= len(places))
        # As a share of what the slice is to get, so that small ones are not left to the end.
        lack = np.where(shares > 0, wanted[kind] / np.maximum(shares, 1e-12), -np.inf)
        chosen = int(np.argmax(lack))
        found[places] = names[chosen]
        wanted[0, chosen] -= len(places) - positive
        wanted[1, chosen] -= positive
    for name in names if test_share > 0 else names[1:]:
        inside = data.labels[found == name]
        if not inside.any() or inside.all():
            part = "the test" if name == TEST else "one of the folds"
            raise DataError(
                f"'{data.name}' has {int(data.labels.sum())} positive and {int((~data.labels).sum())} negative texts "
                f"in {len(members)} groups: too few to deal out, since {part} gets none of one class. Give more "
                f"texts, or fewer `folds`."
            )
    return found
