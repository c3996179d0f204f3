"""Bytes of all live tensors of a run, by watching every operation. Shares no code with the package.

A storage counts from the operation that made it until the last reference to it is gone, which is also when a GPU's
allocator would get it back. Kernels' own temporaries are not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveTensors(TorchDispatchMode):
    """Live bytes, their largest sum, and the sum at marked moments; `existing` tensors count from the start."""

    def __init__(self, existing: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.most = 0
        self.marks: dict[str, list[int]] = {}
        for tensor in existing:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a sharded tensor the part that is here
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __enter__(self) -> LiveTensors:
        # FSDP2 gives gathered weights back by resizing their storage, which is no operation on tensors.
        self.resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            result = self.resize(storage, size)
            key = id(storage)
            if key in self.sizes:
                self.live += storage.nbytes() - self.sizes[key]
                self.sizes[key] = storage.nbytes()
            self.most = max(self.most, self.live)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, []).append(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        self.most = max(self.most, self.live)
        return result
