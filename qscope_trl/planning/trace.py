"""What one decoder layer needs in a training step, by running its own code on tensors without data.

No table of architectures and no formula per attention: the layer that transformers builds is run forwards and
backwards under `FakeTensorMode`, and the storages alive are summed. That covers adapters, gradient checkpointing,
mixture-of-experts and linear attention alike. Left out: kernels that only exist on a GPU. Attention is PyTorch's
memory-efficient one, which keeps queries, keys, values, output and one number per row, as FlashAttention does; linear
attention is the plain torch implementation that runs where flash-linear-attention is not installed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from qscope_trl.hooks.layers import d_model, find_decoder, find_layers


class LayerTrace(NamedTuple):
    """Bytes of one decoder layer, above what was there before it ran."""

    held_in_forward: int
    """Kept after its forward until the end of the whole forward, its output included."""

    held: int
    """Kept after the forward for its backward, its output included; with checkpointing little else."""

    forward_peak: int
    """Most during its forward."""

    backward_peak: int
    """Most during its backward, what it held and its parameters' new gradients included."""

    inference_peak: int
    """Most during a forward without gradient."""

    output: int
    """Its output."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # PyTorch runs grouped products of experts in fp32, but its rule for shapes knows bf16 alone.
            narrow = tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, args)
            out = func(*narrow, **(kwargs or {})).to(args[0].dtype)
        else:
            out = func(*args, **(kwargs or {}))
        given = {_storage(tensor)._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._add(storage)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = (weakref.ref(storage, gone), size)
        self.now += size


def without_data(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the meta tensors of a model by fake CPU tensors, in place; call it under a `FakeTensorMode`.

    Args:
        model: On the meta device.
        dtype: Cast parameters to it, as engines do that compute in another dtype than they store.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    fake = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def trace_layers(
    model: nn.Module, batch: int, length: int, autocast: torch.dtype | None, *, accumulates: bool, padded: bool
) -> tuple[list[LayerTrace], LayerTrace | None, torch.dtype]:
    """Trace one layer of each kind, and the norm behind the last.

    Args:
        model: Its tensors are fake (`without_data`) under a mode that is still active; adapters on, checkpointing
            switched as in training.
        batch: Rows of a micro-batch.
        length: Tokens of a row.
        autocast: Dtype of mixed precision, or None.
        accumulates: Whether gradients of an earlier micro-batch are there already.
        padded: Whether rows differ in length, so that attention takes a mask.

    Returns:
        A trace for each layer, in order, one for the final norm if the decoder has one, and the dtype of residuals.
    """
    layers, decoder = find_layers(model), find_decoder(model)
    calls = _calls_of(model, batch, length, autocast)
    dtype = calls[0][0][0].dtype
    traces: dict[Any, LayerTrace] = {}
    result = []
    # Below the first trainable parameter nothing is kept, unless inputs are made to require a gradient, as they are
    # for adapters under checkpointing.
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    reached = embeddings.weight.requires_grad or any(
        getattr(layer, "gradient_checkpointing", False) for layer in layers
    )
    for layer, (args, kwargs) in zip(layers, calls, strict=True):
        kind = (_kind(layer), reached)
        if kind not in traces:
            # Without data nothing tells that a mask is all ones, and one is made; in a run attention then needs none.
            if "attention_mask" in kwargs:
                kwargs = {**kwargs, "attention_mask": _mask(layer, batch, length) if padded else None}
            traces[kind] = _trace(layer, args, kwargs, autocast, accumulates, reached)
        result.append(traces[kind])
        reached = reached or any(p.requires_grad for p in layer.parameters())
    norm = getattr(decoder, "norm", None)
    if not isinstance(norm, nn.Module):
        return result, None, dtype
    return result, _trace(norm, (calls[-1][0][0],), {}, autocast, accumulates, reached), dtype


def trace_function(
    function: Callable[[Tensor], Tensor], shape: Sequence[int], dtype: torch.dtype
) -> tuple[int, int, int]:
    """Bytes that a function holds for its backward, and most in its forward and backward; above its input."""
    x = torch.empty(*shape, dtype=dtype, requires_grad=True)
    with LiveBytes() as live:
        out = function(x)
        held, forward = live.now, live.peak
        live.peak = live.now
        torch.autograd.backward(out, torch.empty_like(out))
    return held, forward, live.peak


def _trace(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    autocast: torch.dtype | None,
    accumulates: bool,
    reached: bool,
) -> LayerTrace:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if accumulates:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    hidden = args[0].detach().requires_grad_(reached)
    with LiveBytes() as live:
        with _mixed(autocast):
            out = _first(layer(hidden, *args[1:], **kwargs))
            held_in_forward, forward_peak = live.now, live.peak
        held = live.now
        live.peak = live.now
        output = _storage(out).nbytes()
        if out.requires_grad:
            torch.autograd.backward(out, torch.empty_like(out))
        else:
            held_in_forward, held, live.peak = held_in_forward - output, held - output, 0
        backward_peak = live.peak
        del out
    for parameter in parameters:
        parameter.grad = None
    with LiveBytes() as live, _mixed(autocast), torch.no_grad():
        layer(hidden.detach(), *args[1:], **kwargs)
    return LayerTrace(held_in_forward, held, forward_peak, backward_peak, live.peak, output)


def _calls_of(
    model: nn.Module, batch: int, length: int, autocast: torch.dtype | None
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every decoder layer in a forward of the backbone; the layers themselves are passed over."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layers = find_layers(model)

    def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(((hidden_states, *args), kwargs))
        return hidden_states

    with _replaced_forwards(layers, passed), _mixed(autocast), torch.no_grad():
        ids = torch.zeros(batch, length, dtype=torch.int64)
        find_decoder(model)(input_ids=ids, use_cache=False)
    embedded = torch.empty(batch, length, d_model(model), dtype=calls[0][0][0].dtype)
    return [
        ((embedded, *args[1:]), tree_map_only(Tensor, lambda tensor: tensor.detach(), kwargs))
        for args, kwargs in calls
    ]


@contextmanager
def _replaced_forwards(layers: Sequence[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    # On the class's `__call__` checkpointing would run first, and it wants a gradient.
    checkpointing = [getattr(layer, "gradient_checkpointing", None) for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = function
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for layer, before in zip(layers, checkpointing, strict=True):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.gradient_checkpointing = before


def _mask(layer: nn.Module, batch: int, length: int) -> Tensor:
    """The mask of padded rows: over pairs of positions for attention, over positions for linear attention."""
    shape = (batch, length) if hasattr(layer, "linear_attn") else (batch, 1, length, length)
    return torch.empty(shape, dtype=torch.bool)


def _kind(layer: nn.Module) -> Any:
    return tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())


def _mixed(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
