"""Bytes an optimizer keeps for each trainable parameter, by the name in `optim`.

States take the dtype of their parameter, as in PyTorch: bf16 weights trained without an engine that keeps fp32 copies
have bf16 states. Left out: low-rank optimizers (GaLore, APOLLO) and LOMO, whose states depend on more than counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qscope_trl.errors import ConfigError

_STATES_OF = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "adamw_anyprecision": 2, "stable_adamw": 2, "grokadamw": 3,
    "sgd": 0, "adagrad": 1, "rmsprop": 1, "adafactor": 0, "ademamix": 3,
    "schedule_free_adamw": 2, "schedule_free_radam": 2, "schedule_free_sgd": 1,
}  # fmt: skip
# bitsandbytes: bytes for each element by name, always; paged states can move to the host, but need not.
_FIXED_BYTES = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1,
    "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop_bnb_8bit": 1, "ademamix_8bit": 3, "paged_ademamix_8bit": 3,
    "paged_adamw_32bit": 8, "lion_32bit": 4, "paged_lion_32bit": 4, "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4,
    "paged_ademamix_32bit": 12,
}  # fmt: skip
# One fp32 scale for 256 elements of each quantised state; smaller tensors stay fp32.
_BLOCK, _SMALLEST = 256, 4096
_FOREACH = ("adamw_torch", "adagrad", "rmsprop")


class Parameter(NamedTuple):
    """A trainable parameter, as the optimizer sees it."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def state_bytes(optim: str, parameters: Sequence[Parameter]) -> int:
    """Bytes of all optimizer states of whole parameters.

    Raises:
        ConfigError: If the optimizer is not known here.
    """
    if optim in _FIXED_BYTES:
        return sum(_fixed(optim, parameter) for parameter in parameters)
    if optim not in _STATES_OF:
        raise ConfigError(
            f"`optim` is '{optim}', whose states are not known here. Known: "
            f"{', '.join(sorted((*_STATES_OF, *_FIXED_BYTES)))}."
        )
    if optim == "adafactor":
        return sum(4 * _factored(parameter.shape) for parameter in parameters)
    return sum(_STATES_OF[optim] * parameter.numel * parameter.itemsize for parameter in parameters)


def scratch_bytes(optim: str, parameters: Sequence[Parameter]) -> int:
    """Bytes that a step makes and frees: the roots of all second moments at once without a fused kernel.

    On a GPU, where PyTorch updates all tensors together; optimizers that go tensor by tensor need no more than some
    copies of the largest one.
    """
    if not parameters or "fused" in optim or optim in _FIXED_BYTES or optim == "sgd":
        return 0
    if optim in _FOREACH:
        return sum(parameter.numel * parameter.itemsize for parameter in parameters)
    return 3 * 4 * max(parameter.numel for parameter in parameters)


def _fixed(optim: str, parameter: Parameter) -> int:
    width = _FIXED_BYTES[optim]
    if "8bit" not in optim and "4bit" not in optim:
        return width * parameter.numel
    states = {"adamw": 2, "ademamix": 3}.get(optim.removeprefix("paged_").split("_")[0], 1)
    if parameter.numel < _SMALLEST:
        return 4 * states * parameter.numel
    return width * parameter.numel + 4 * states * -(-parameter.numel // _BLOCK)


def _factored(shape: tuple[int, ...]) -> int:
    """Elements that Adafactor keeps: a row and a column sum of each matrix."""
    if len(shape) < 2:
        return shape[0] if shape else 1
    rest = 1
    for size in shape[:-2]:
        rest *= size
    return rest * (shape[-1] + shape[-2])
