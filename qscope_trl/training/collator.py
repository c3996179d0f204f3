"""A collator that carries each sample's group (for example its language) to the penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qscope_trl.errors import DataError

GROUP_KEY = "sae_group"
"""Key under which a batch carries the group of each row; the penalty takes it out before the model sees the batch."""


class GroupCollator:
    """Wraps a trainer's collator and keeps one dataset column as the group of each row.

    The trainer must keep the column: set `remove_unused_columns=False`. Packed datasets have no column per sample
    left; there, pass `group_fn` to the callback instead.

    Args:
        collator: The collator that makes the batch, for example `trainer.data_collator`.
        column: Dataset column with the group's name.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], column: str = "group") -> None:
        self.collator = collator
        self.column = column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate `examples` and add the list of their groups.

        Raises:
            DataError: If an example lacks the column.
        """
        groups = []
        for example in examples:
            if self.column not in example:
                raise DataError(
                    f"A sample has no column `{self.column}`; it has {', '.join(f'`{key}`' for key in example)}. Set "
                    f"`remove_unused_columns=False` and turn packing off, or name groups by `group_fn`."
                )
            groups.append(example[self.column])
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in examples])
        return {**batch, GROUP_KEY: groups}
