"""Groups of texts for discovery: read from any dataset, tokenised, and parted into chosen-on and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_trl.activations.encode import Positions, num_kept, tokenize
from qscope_trl.activations.files import whole
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import ChatRenderer, open_source, text_columns, text_of
from qscope_trl.bundled import data_path
from qscope_trl.config.find import FindConfig
from qscope_trl.errors import ConfigError, DataError


@dataclass(frozen=True)
class TextGroup:
    """Token ids of the texts of a group, and which of them are held out.

    Args:
        token_ids: Ids of each text, as `activations.encode.tokenize` gives them.
        heldout: Whether each text is held out.
    """

    token_ids: list[list[int]]
    heldout: list[bool]

    def kept(self) -> list[list[int]]:
        """Token ids of the texts that are not held out."""
        return [ids for ids, out in zip(self.token_ids, self.heldout, strict=True) if not out]


def prepare_group(
    name: str,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    positions: Positions = "all",
    max_length: int = 512,
    max_tokens: int | None = None,
    holdout: float = 0.2,
    seed: int = 0,
) -> TextGroup:
    """Tokenise a group and decide which texts are held out.

    Texts are ordered by a hash of their content and the seed, so the order in the file changes nothing, and equal
    texts are on the same side.

    Args:
        name: Name of the group, for messages.
        texts: Its texts.
        tokenizer: A transformers tokenizer.
        positions: `all` tokens or the `last` of each text.
        max_length: Tokens kept of each text.
        max_tokens: Stop taking texts at this many tokens.
        holdout: Share of the different texts to hold out; above 0 at least one is, and at least one is not.
        seed: Seed of the order.

    Raises:
        DataError: If no token is left, or there is one different text and it would have to be held out.
    """
    texts = [whole(text) for text in texts]
    ids = tokenize(tokenizer, texts, max_length=max_length, positions=positions)
    keys = [hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest() for text in texts]
    order = [i for i in sorted(range(len(texts)), key=lambda i: keys[i]) if num_kept(len(ids[i]), positions=positions)]
    if not order:
        raise DataError(
            f"No token of group `{name}` is left after masking: none of its {len(texts)} texts has a token after "
            f"position 0, which is left out. Give longer texts."
        )
    if max_tokens is not None:
        taken, total = [], 0
        for i in order:
            if total >= max_tokens:
                break
            taken.append(i)
            total += num_kept(len(ids[i]), positions=positions)
        order = taken
    different = sorted({keys[i] for i in order})
    if holdout > 0 and len(different) < 2:
        raise DataError(
            f"Group `{name}` has one different text, so none can be held out. Give more texts, or set `holdout` to "
            f"0 and go without held-out evidence."
        )
    num_out = min(max(1, round(holdout * len(different))), len(different) - 1) if holdout > 0 else 0
    out = set(different[:num_out])
    return TextGroup([ids[i] for i in order], [keys[i] in out for i in order])


def read_groups(config: FindConfig, chat: ChatRenderer | None = None) -> tuple[dict[str, list[str]], str]:
    """The texts per group, and the target group's name.

    With `positive` and `negative`, groups are named after their datasets (`zh.jsonl.gz` is `zh`). `demo:NAME` stands
    for a bundled file.

    Args:
        config: The settings.
        chat: Renders conversations.

    Raises:
        ConfigError: If groups are named twice, fewer than two, or lack the target.
        DataError: If a dataset is missing, empty, or lacks a column.
    """
    groups: dict[str, list[str]] = {}
    if config.data:
        groups = _split_by_column(_open(config.data, config), config.text_column, str(config.group_column), chat)
    else:
        for name, place in _named_datasets(config).items():
            groups[name] = read_texts(place, config, chat)
    target = config.target or _group_name(str(config.positive))
    if target not in groups or len(groups) < 2:
        raise ConfigError(
            f"The target group `{target}` and at least one other are needed; the data has "
            f"{', '.join(f'`{name}`' for name in groups)}."
        )
    return groups, target


def read_texts(name: str, config: FindConfig, chat: ChatRenderer | None = None) -> list[str]:
    """The texts of one dataset, in order; blank ones are left out.

    Args:
        name: What `open_source` takes.
        config: The column, and the split, configuration and revision.
        chat: Renders conversations.

    Raises:
        ConfigError: If a split or the like does not fit.
        DataError: If it is missing, unreadable, without texts, or lacks the column.
    """
    source, column = _open(name, config), config.text_column
    return _not_blank(
        source,
        [
            text_of(row, text_column=column, source_name=source.name, index=index, chat=chat)
            for index, row in source.rows(columns=text_columns(column))
        ],
    )


def _open(name: str, config: FindConfig) -> RowSource:
    return open_source(name, split=config.data_split, config=config.data_config, revision=config.data_revision)


def _split_by_column(
    source: RowSource, column: str, group_column: str, chat: ChatRenderer | None
) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for index, row in source.rows(columns=(*text_columns(column), group_column)):
        text = text_of(row, text_column=column, source_name=source.name, index=index, chat=chat)
        groups.setdefault(_group_of(source, index, row, group_column), []).append(text)
    return {name: _not_blank(source, texts) for name, texts in groups.items()}


def _named_datasets(config: FindConfig) -> dict[str, str]:
    if config.positive and config.negative:
        pairs = [(_group_name(name), name) for name in (config.positive, config.negative)]
    else:
        pairs = []
        for entry in config.group:
            name, mark, place = entry.partition("=")
            if not (name and mark and place):
                raise ConfigError(f"`--group` is {entry!r}; write it as NAME=FILE, for example zh=data/zh.jsonl.")
            pairs.append((name, place))
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ConfigError(
            f"Two files would both be the group `{pairs[-1][0]}`. Name them with `--group NAME=FILE` and `--target`."
        )
    return named


def _group_name(name: str) -> str:
    return Path(data_path(name)).name.split(".", 1)[0]


def _group_of(source: RowSource, index: int, row: dict[str, Any], column: str) -> str:
    """A row's group: a text, or a whole number or boolean, which are named `1` and `true`."""
    if column not in row:
        raise DataError(
            f"Row {index} of '{source.name}' has no column `{column}`; it has "
            f"{', '.join(f'`{key}`' for key in row)}. Name the right one by `group_column`."
        )
    value = row[column]
    # A column of whole numbers with a gap is one of floats in many files.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str):
        raise DataError(
            f"Row {index} of '{source.name}' holds {value!r} in column `{column}`, which names no group: that is a "
            f"text, a whole number or a boolean."
        )
    return value


def _not_blank(source: RowSource, texts: Sequence[str]) -> list[str]:
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise DataError(f"'{source.name}' holds no text: every row is blank or there is none.")
    return kept
