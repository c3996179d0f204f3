"""Where steering acts: which columns of a forward are prompt or generation, and which of them were asked for.

A text's positions are counted from its first token; padding does not count. The prompt's last position belongs to the
generation, since it decides the first new token. Left out: what is done there.

Shape legend: `B` rows of the forward (with beam search all beams), `T` columns of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qscope_trl.errors import ConfigError, SteeringError
from qscope_trl.hooks.edit import Forward

PHASES = ("prompt", "generation")
Positions = slice | Sequence[int] | None


class Span:
    """Follows one generation after the other, forward by forward.

    Args:
        phases: Which of `prompt` and `generation` to act in.
        positions: Positions to act at: a slice (`slice(1, None)`: all but the first token), or whole numbers. Negative
            ones are counted from the prompt's end. None: all.

    Raises:
        ConfigError: If a phase is unknown, none is left, or positions are of another kind.
    """

    def __init__(self, phases: Sequence[str], positions: Positions = None) -> None:
        chosen = (phases,) if isinstance(phases, str) else tuple(phases)
        unknown = [phase for phase in chosen if phase not in PHASES]
        if unknown or not chosen:
            raise ConfigError(f"`phases` is {phases!r}; name {' or '.join(map(repr, PHASES))}, or both.")
        self.phases = frozenset(chosen)
        self.positions = _positions(positions)
        self.forget()

    def forget(self) -> None:
        """Begin as if no text had been seen."""
        self.prompt_width: int | None = None
        self._last_width = 0
        self._seen = 0
        self._prompt: Tensor | None = None
        self._first_B: Tensor | None = None
        self._end_B: Tensor | None = None
        self.is_new = False
        """Whether the last forward entered began a text."""

    def enter(self, forward: Forward) -> None:
        """Read where a forward stands; call it when the decoder is entered.

        Raises:
            SteeringError: If it cannot be told whether the forward's columns are prompt or generation.
        """
        self.is_new = forward.past == 0 and not self._goes_on(forward)
        if self.is_new:
            self.prompt_width = forward.width
            self._prompt = forward.tokens
            self._read_padding(forward)
        elif forward.past > 0 and not self.is_everywhere and (forward.width > 1 or forward.past != self._seen):
            raise SteeringError(
                f"Of a forward of {forward.width} tokens after {forward.past} cached ones it cannot be told what is "
                f"prompt and what generation, so `phases` and `positions` cannot be followed. Steer both phases at "
                f"all positions, or generate without assisted decoding, chunked prefill and a cache of your own."
            )
        self._last_width = forward.width
        self._seen = forward.past + forward.width

    @property
    def is_everywhere(self) -> bool:
        """Whether no column is ever left out."""
        return len(self.phases) == len(PHASES) and self.positions is None

    def columns(self, forward: Forward) -> Tensor | None:
        """Where to act, boolean `(B, T)`; None: everywhere. Padding may be among it, which nothing reads."""
        if self.is_everywhere:
            return None
        device = forward.tokens.device
        is_decode = forward.past > 0 and forward.width == 1
        if is_decode and self.positions is None:
            wanted = "generation" in self.phases
            return None if wanted else torch.zeros(forward.rows, 1, dtype=torch.bool, device=device)
        index_BT, length_B1 = self._index(forward)
        is_prompt = index_BT < length_B1 - 1
        if is_decode:
            is_prompt = torch.zeros_like(is_prompt)
        found = torch.zeros_like(is_prompt)
        if "prompt" in self.phases:
            found = found | is_prompt
        if "generation" in self.phases:
            found = found | ~is_prompt
        return found if self.positions is None else found & _chosen(index_BT, length_B1, self.positions)

    def text_index(self, forward: Forward) -> Tensor:
        """Position of each column in its text, from 0; negative in the padding before it. Shape `(B, T)`."""
        return self._index(forward)[0]

    def in_prompt(self, forward: Forward) -> Tensor:
        """Which columns hold a token of the prompt, its last one included, boolean `(B, T)`."""
        index_BT, length_B1 = self._index(forward)
        found = (index_BT >= 0) & (index_BT < length_B1)
        return torch.zeros_like(found) if forward.past > 0 else found

    def num_tokens(self, forward: Forward, mask_BT: Tensor | None) -> Tensor | int:
        """How many tokens, padding apart, are in the mask (None: everywhere); not waited for."""
        if mask_BT is None and (forward.past > 0 or self._first_B is None):
            return forward.rows * forward.width
        index_BT, length_B1 = self._index(forward)
        is_generated = torch.arange(forward.past, forward.past + forward.width, device=index_BT.device) >= (
            self.prompt_width or 0
        )
        real = (index_BT >= 0) & ((index_BT < length_B1) | is_generated)
        return (real if mask_BT is None else real & mask_BT.to(real.device)).sum()

    def _index(self, forward: Forward) -> tuple[Tensor, Tensor]:
        device = forward.tokens.device
        column_T = torch.arange(forward.past, forward.past + forward.width, device=device)
        if self._first_B is None or self._end_B is None:
            width = self.prompt_width or forward.width
            return column_T.expand(forward.rows, -1), torch.full((forward.rows, 1), width, device=device)
        first_B1, end_B1 = self._first_B[:, None].to(device), self._end_B[:, None].to(device)
        return column_T[None] - first_B1, end_B1 - first_B1

    def _goes_on(self, forward: Forward) -> bool:
        """Whether a forward without a cache computes the last text again, with one more token."""
        return (
            forward.cache is None
            and self._prompt is not None
            and self.prompt_width is not None
            and forward.width == self._last_width + 1
            and forward.tokens.shape[0] == self._prompt.shape[0]
            and forward.tokens.dim() == self._prompt.dim()
            and torch.equal(forward.tokens[:, : self.prompt_width], self._prompt)
        )

    def _read_padding(self, forward: Forward) -> None:
        mask = forward.attention_mask
        self._first_B = self._end_B = None
        if mask is None:
            return
        mask = mask.to(torch.uint8)
        if mask.shape[0] != forward.rows:
            mask = mask.expand(forward.rows, -1)
        self._first_B = mask.argmax(1)
        self._end_B = mask.shape[1] - mask.flip(1).argmax(1)


def _positions(positions: Positions) -> Positions:
    if positions is None:
        return None
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        if any(part is not None and not isinstance(part, int) for part in parts) or (positions.step or 1) < 1:
            raise ConfigError(f"`positions` is {positions}; a slice has whole numbers, and a step from 1.")
        return positions
    if not all(isinstance(p, int) and not isinstance(p, bool) for p in positions):
        raise ConfigError(f"`positions` is {positions!r}; it is a slice such as `slice(1, None)`, or whole numbers.")
    if not positions:
        raise ConfigError("`positions` is empty, so nothing would be steered. Leave it out for all positions.")
    return tuple(positions)


def _chosen(index_BT: Tensor, length_B1: Tensor, positions: slice | Sequence[int]) -> Tensor:
    def place(position: int) -> Tensor:
        return length_B1 + position if position < 0 else torch.full_like(length_B1, position)

    if not isinstance(positions, slice):
        found = torch.zeros_like(index_BT, dtype=torch.bool)
        for position in positions:
            found = found | (index_BT == place(position))
        return found
    start_B1 = place(positions.start or 0).clamp(min=0)
    found = index_BT >= start_B1
    if positions.stop is not None:
        found = found & (index_BT < place(positions.stop))
    if positions.step is not None:
        found = found & ((index_BT - start_B1) % positions.step == 0)
    return found
