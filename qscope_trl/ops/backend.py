"""Which implementation runs: one switch, `QSCOPE_TRL_KERNEL=auto|cuda|cpu|torch`.

`auto` takes the kernel for the tensor's device where it can be had and plain torch otherwise; results are the same. A
kernel that is asked for by name and cannot run raises.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qscope_trl.errors import ConfigError, KernelError
from qscope_trl.ops import build

SWITCH = "QSCOPE_TRL_KERNEL"
BACKENDS = ("auto", "cuda", "cpu", "torch")
MAX_K_CUDA = 1024
"""Largest k of the CUDA kernels: the running selection of a token has to fit into shared memory."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(tensors: tuple[Tensor, ...], k: int = 1) -> str:
    """The backend for an operation on these tensors.

    Args:
        tensors: All float operands, on one device.
        k: Active features per token, where that matters.

    Returns:
        `cuda`, `cpu` or `torch`.

    Raises:
        ConfigError: If the switch has an unknown value.
        KernelError: If the kernel that it names cannot run here, or not on these tensors.
    """
    wanted = os.environ.get(SWITCH, "auto")
    if wanted not in BACKENDS:
        raise ConfigError(f"`{SWITCH}` is {wanted!r}; choose one of {', '.join(BACKENDS)}.")
    if wanted == "torch":
        return "torch"
    device = tensors[0].device.type
    reason = _obstacle(device if wanted == "auto" else wanted, tensors, k)
    if wanted == "auto":
        return device if reason is None and build.is_available(device) else "torch"
    if reason is not None:
        raise KernelError(f"`{SWITCH}={wanted}` cannot be followed: {reason}. Set it to `auto` or `torch`.")
    build.load(wanted)
    return wanted


def _obstacle(kernel: str, tensors: tuple[Tensor, ...], k: int) -> str | None:
    device = tensors[0].device
    if device.type != kernel or kernel not in build.SOURCES:
        return f"the tensors are on `{device}`"
    wide = [str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype not in _DTYPES]
    if wide:
        return f"the kernels take fp32, bf16 and fp16, not {wide[0]}"
    if kernel == "cuda":
        if k > MAX_K_CUDA:
            return f"`k={k}` is above {MAX_K_CUDA}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 or newer"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where it is on a GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
