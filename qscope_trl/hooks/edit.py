"""Editing residuals: vectors added to the output of chosen decoder layers, for chosen rows, while text is generated.

Only forwards without gradient are edited, so a training forward can never be. Left out: ablating and clamping
features, gates and calibrated strengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.errors import ModelStructureError
from qscope_trl.hooks.layers import find_decoder, find_layers


class ResidualAdd:
    """Adds a vector per layer to the residuals of chosen rows; a context manager.

    While generating (`first_position=None`), every decode step is edited, and of the prompt's own forward the last
    position, which decides the first new token. With `first_position=p` a full-length forward is edited from position
    p on: the same positions, seen in one pass. Rows that are not chosen stay bit-identical.

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
        self.model = model
        self.vectors = dict(vectors)
        self.rows_B = rows_B.bool()
        self.first_position = first_position
        self.num_edits = 0
        self._prompt_width: int | None = None
        self._stack = ExitStack()
        self._inside = False

    def __enter__(self) -> ResidualAdd:
        decoder, layers = find_decoder(self.model), find_layers(self.model)
        for layer in self.vectors:
            if not 0 <= layer < len(layers):
                raise ModelStructureError(
                    f"No decoder layer {layer} in `{type(self.model).__name__}`: it has layers 0-{len(layers) - 1}."
                )
        with ExitStack() as stack:
            stack.enter_context(decoder.register_forward_pre_hook(self._enter_decoder))
            for layer in self.vectors:
                stack.enter_context(layers[layer].register_forward_hook(self._layer_hook(layer)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _enter_decoder(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self._inside = not torch.is_grad_enabled()
        self.num_edits += self._inside

    def _first_edited(self, width: int) -> int:
        """Where the edit begins: the prompt's last position, and every position after it, cached or computed again."""
        if self._prompt_width is None:
            self._prompt_width = width
            return width - 1
        if self.num_edits == 1:
            return width - 1
        return self._prompt_width - 1 if width > self._prompt_width else 0

    def _layer_hook(self, layer: int) -> Any:
        def edit(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if not self._inside:
                return None
            residual = output[0] if isinstance(output, tuple) else output
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
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit
