"""Capturing residuals: one hook mechanism for penalties, monitors and encoding.

A forward of the decoder opens a capture, each chosen layer adds its output, the end of the forward closes it. Outside
`listen()` the hooks do nothing, so generation, reference models and the recomputation of gradient checkpointing leave
no trace. The tensors are kept exactly as the layer returned them and are only read after the forward: under reentrant
checkpointing they join the autograd graph only then. No counters and no branches on tensors in here: torch.compile
traces these hooks into the model's graph. Editing residuals is `qscope_trl.hooks.edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.errors import ModelStructureError
from qscope_trl.hooks.layers import find_decoder, find_layers


@dataclass
class Capture:
    """What one forward of the decoder showed.

    Args:
        residuals: Output of each hooked layer `(B, T, d_model)`, by layer.
        has_grad: Whether gradients were enabled when the decoder was entered.
        input_ids: Token ids `(B, T)`, or None if the caller passed embeddings.
        attention_mask: The caller's 2D attention mask `(B, T)`, or None.
        position_ids: Position ids `(B, T)`, or None.
        labels: Labels given to the model's own forward `(B, T)`, or None.
    """

    residuals: dict[int, Tensor] = field(default_factory=dict)
    has_grad: bool = False
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None


class ResidualHook:
    """Hooks on chosen decoder layers, behind one handle.

    Usable as a context manager that attaches and detaches; `listen()` collects captures in between.

    Args:
        model: A transformers model, wrapped or not.
        layers: Decoder layers to read, from 0.

    Raises:
        ModelStructureError: If a layer does not exist.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        found = find_layers(model)
        for layer in layers:
            if not 0 <= layer < len(found):
                raise ModelStructureError(
                    f"No decoder layer {layer} in `{type(model).__name__}`: it has layers 0-{len(found) - 1}. Choose "
                    f"features of those layers."
                )
        self.model = model
        self.layers = tuple(sorted(set(layers)))
        self._captures: list[Capture] = []
        self._consume: Callable[[Capture], None] | None = None
        self._given: dict[str, Tensor | None] = {}
        self._listening = False
        self._inside = False
        self._stack = ExitStack()
        self._attached = False

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._attached

    def attach(self) -> ResidualHook:
        """Put the hooks on the model: all of them or, if one fails, none."""
        if self._attached:
            return self
        decoder, layers = find_decoder(self.model), find_layers(self.model)
        with ExitStack() as stack:
            stack.enter_context(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
            stack.enter_context(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
            for layer in self.layers:
                stack.enter_context(layers[layer].register_forward_hook(self._layer_hook(layer)))
            stack.enter_context(decoder.register_forward_hook(self._leave_decoder))
            self._stack = stack.pop_all()
        self._attached = True
        return self

    def detach(self) -> None:
        """Take every hook off the model; a second call does nothing."""
        self._stack.close()
        self._attached = False

    def __enter__(self) -> ResidualHook:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @contextmanager
    def listen(self, consume: Callable[[Capture], None] | None = None) -> Iterator[list[Capture]]:
        """Collect one `Capture` per decoder forward while the block runs.

        Args:
            consume: Called with each capture at the end of its forward; the capture is then dropped instead of kept,
                so that the residuals of one forward at most are alive. Only for forwards without gradient.

        Yields:
            The captures so far; empty with `consume`.
        """
        captures: list[Capture] = []
        self._captures, self._given, self._inside, self._listening = captures, {}, False, True
        self._consume = consume
        try:
            yield captures
        finally:
            self._listening, self._inside, self._consume = False, False, None
            self._captures, self._given = [], {}

    def _enter_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listening:
            # Multimodal classes embed the ids themselves and pass none on to the decoder.
            ids = args[0] if args else kwargs.get("input_ids")
            self._given = {"labels": kwargs.get("labels"), "input_ids": ids}

    def _enter_decoder(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._listening:
            return
        mask, ids = kwargs.get("attention_mask"), args[0] if args else kwargs.get("input_ids")
        self._captures.append(
            Capture(
                has_grad=torch.is_grad_enabled(),
                input_ids=self._given.get("input_ids") if ids is None else ids,
                attention_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
                position_ids=kwargs.get("position_ids"),
                labels=self._given.get("labels"),
            )
        )
        self._given = {}
        self._inside = True

    def _layer_hook(self, layer: int) -> Any:
        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if self._inside:
                self._captures[-1].residuals[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def _leave_decoder(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._consume is not None and self._inside:
            self._consume(self._captures.pop())
        self._inside = False
