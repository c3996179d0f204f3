"""Editing residuals: the output of chosen decoder layers is replaced by what a function makes of it.

`ResidualEdits` is the mechanism; `ResidualAdd` adds vectors to chosen rows while rollouts are generated. Left out:
what to add, where and how much; that is `qscope_trl.steering`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.errors import ModelStructureError
from qscope_trl.hooks.layers import find_decoder, find_layers


class Forward:
    """What one forward of the decoder was called with; cache and mask are looked at only when they are asked for.

    Args:
        tokens: Token ids `(rows, width)`, or embeddings `(rows, width, d_model)`.
        cache: The caller's cache object, or None.
        mask: The caller's attention mask, of whatever kind.
    """

    def __init__(self, tokens: Tensor, cache: Any, mask: Any) -> None:
        self.tokens = tokens
        self.cache = cache
        self._mask = mask
        self.rows: int = tokens.shape[0]
        """Rows of the batch; with beam search, of all beams."""
        self.width: int = tokens.shape[1]
        """Positions of each row that this forward computes."""
        self.has_grad = torch.is_grad_enabled()
        """Whether gradients were enabled when the decoder was entered."""

    @functools.cached_property
    def past(self) -> int:
        """Positions before them, which the cache holds. Ask before the first layer has filled it further."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @functools.cached_property
    def attention_mask(self) -> Tensor | None:
        """Which of the `past + width` positions hold a token, boolean; None if all do."""
        return _real_tokens(self._mask, self.past + self.width)


Edit = Callable[[Tensor, Forward], Tensor | None]
"""From the residual `(rows, width, d_model)` after a layer to the one to put in its place; None leaves it."""


class ResidualEdits:
    """Replaces residuals after chosen layers; a context manager.

    Args:
        model: A transformers model, wrapped or not.
        edits: What is made of the residual, by layer from 0.
        on_forward: Called when the decoder is entered, before any layer.

    Raises:
        ModelStructureError: If a layer does not exist; then nothing is hooked.
    """

    def __init__(
        self, model: nn.Module, edits: Mapping[int, Edit], on_forward: Callable[[Forward], None] | None = None
    ) -> None:
        self.model = model
        self.edits = dict(edits)
        self.on_forward = on_forward
        self.num_forwards = 0
        self._forward: Forward | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ResidualEdits:
        decoder, layers = find_decoder(self.model), find_layers(self.model)
        for layer in self.edits:
            if not 0 <= layer < len(layers):
                raise ModelStructureError(
                    f"No decoder layer {layer} in `{type(self.model).__name__}`: it has layers 0-{len(layers) - 1}."
                )
        with ExitStack() as stack:
            stack.enter_context(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
            for layer, edit in self.edits.items():
                stack.enter_context(layers[layer].register_forward_hook(self._layer_hook(edit)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _enter_decoder(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forward = _read_call(args, kwargs)
        self.num_forwards += 1
        if self.on_forward is not None:
            self.on_forward(self._forward)

    def _layer_hook(self, edit: Edit) -> Any:
        def replace(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if self._forward is None:
                return None
            residual = output[0] if isinstance(output, tuple) else output
            edited = edit(residual, self._forward)
            if edited is None:
                return None
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return replace


class ResidualAdd:
    """Adds a vector per layer to the residuals of chosen rows; a context manager.

    While generating (`first_position=None`), every decode step is edited, and of the prompt's own forward the last
    position, which decides the first new token. With `first_position=p` a full-length forward is edited from position
    p on: the same positions, seen in one pass. Rows that are not chosen stay bit-identical. Only forwards without
    gradient are edited, so a training forward can never be.

    Args:
        model: A transformers model, wrapped or not.
        vectors: Vector `(d_model,)` to add, by layer from 0.
        rows_B: Which rows of the batch are edited, boolean `(B,)`.
        first_position: See above.

    Raises:
        ModelStructureError: If a layer does not exist, or a forward has another number of rows than `rows_B`.
    """

    def __init__(
        self, model: nn.Module, vectors: Mapping[int, Tensor], rows_B: Tensor, first_position: int | None = None
    ) -> None:
        self.vectors = dict(vectors)
        self.rows_B = rows_B.bool()
        self.first_position = first_position
        self.num_edits = 0
        self._prompt_width: int | None = None
        self._edits = ResidualEdits(model, {layer: self._edit(layer) for layer in self.vectors}, self._on_forward)

    def __enter__(self) -> ResidualAdd:
        self._edits.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._edits.__exit__(kind, error, trace)

    def _on_forward(self, forward: Forward) -> None:
        self.num_edits += not forward.has_grad

    def _first_edited(self, width: int) -> int:
        """Where the edit begins: the prompt's last position, and every position after it, cached or computed again."""
        if self._prompt_width is None:
            self._prompt_width = width
            return width - 1
        if self.num_edits == 1:
            return width - 1
        return self._prompt_width - 1 if width > self._prompt_width else 0

    def _edit(self, layer: int) -> Edit:
        def add(residual: Tensor, forward: Forward) -> Tensor | None:
            if forward.has_grad:
                return None
            if residual.shape[0] != self.rows_B.numel():
                raise ModelStructureError(
                    f"{self.rows_B.numel()} rows were to be steered or left alone, but the model ran "
                    f"{residual.shape[0]}. Beam search and continuous batching change the rows; sample instead."
                )
            vector = self.vectors[layer]
            if vector.device != residual.device or vector.dtype != residual.dtype:
                vector = self.vectors[layer] = vector.to(residual.device, residual.dtype)
            rows = self.rows_B = self.rows_B.to(residual.device)
            start = self._first_edited(residual.shape[1]) if self.first_position is None else self.first_position
            edited = residual.clone()
            edited[rows, start:] += vector
            return edited

        return add


def _read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
    tokens = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    return Forward(tokens, kwargs.get("past_key_values"), kwargs.get("attention_mask"))


def _real_tokens(mask: Any, length: int) -> Tensor | None:
    """Which positions hold a token: a 2D mask says it; of a 4D one (bool, or 0 and minus infinity) the last query."""
    if isinstance(mask, dict):
        mask = next((value for value in mask.values() if isinstance(value, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:
        last = mask[:, 0, -1, :length]
        return last if last.dtype == torch.bool else last == 0
    return mask[:, :length].bool() if mask.dim() == 2 and mask.shape[1] >= length else None
