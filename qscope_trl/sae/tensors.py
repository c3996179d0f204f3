"""Tensors in files, read piece by piece so that the resident memory stays small.

A memory map alone is not enough: whoever reads a column of a row-major matrix touches a page in every row (and the
system maps 64 KiB to 2 MiB around it), and so ends with the whole matrix resident. `StoredMatrix` therefore maps the
file anew for every 16 MiB it crosses. Left out on purpose: caching, the operating system does that.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qscope_trl.errors import CheckpointError

# A mapping is dropped after this much of the file was crossed. Two are alive for a moment; opening may cost 50 MB.
_SPAN_BYTES = 16 * 1024 * 1024
# The same for single rows: where the page cache holds large folios, touching a row maps 2 MiB.
_SPAN_ROWS = 4

_REFETCH = "Fetch it again, or copy it again."


class TensorFile(NamedTuple):
    """An open file of named tensors. Holds a memory map, so keep it for as long as it is needed and no longer."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor."""

    read: Callable[[str], Any]
    """Name to something that slices like a tensor and reads what is sliced."""

    metadata: Mapping[str, str]
    """Text stored beside the tensors (safetensors alone)."""

    def vector(self, name: str) -> Tensor:
        """A small tensor, whole, in memory of its own."""
        tensor: Tensor = self.read(name)[:]
        return tensor.clone()


def open_tensors(path: Path) -> TensorFile:
    """Open a `.safetensors` file or what `torch.save` wrote, reading nothing but the index.

    Raises:
        CheckpointError: If the file is absent, cut short, of another format, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as err:
        raise CheckpointError(f"Cannot read '{path}': {err.strerror}.") from err
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{path}' is a Git LFS pointer, not the weights. Run `git lfs pull` there, or download it from the Hub."
        )
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path, start)


def _open_safetensors(path: Path) -> TensorFile:
    try:
        file = safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"'{path}' ({path.stat().st_size} bytes) is cut short or not a safetensors file: {err}. {_REFETCH}"
        ) from err
    with file as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        metadata = opened.metadata() or {}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    return TensorFile(shapes, slices.__getitem__, metadata)


def _open_torch(path: Path, start: bytes) -> TensorFile:
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"'{path}' is not a file that `torch.save` of torch 1.6 or later wrote, so it cannot be read in slices. "
            "If it is an older one, write it anew: `torch.save(torch.load(path, weights_only=True), path)`."
        )
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as err:
        raise CheckpointError(
            f"'{path}' holds Python objects other than tensors and was refused, because loading it could run code. "
            "An SAE file is a dict of tensors; take it from a source you trust."
        ) from err
    except (RuntimeError, OSError, EOFError, ValueError) as err:
        raise CheckpointError(
            f"'{path}' ({path.stat().st_size} bytes) is cut short or damaged: {str(err).splitlines()[0]} {_REFETCH}"
        ) from err
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, expected a dict of tensors.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return TensorFile({name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__, {})


class StoredMatrix:
    """A matrix in a file, read feature by feature whichever way round it is stored.

    Args:
        path: The file.
        name: Name of the tensor in it.
        shape: Its shape as stored.
        has_feature_rows: True if a row belongs to a feature, False if a column does.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], *, has_feature_rows: bool) -> None:
        self.path = path
        self.name = name
        self.has_feature_rows = has_feature_rows
        self._shape = shape

    @property
    def shape(self) -> tuple[int, int]:
        """Number of features and width, `(d_sae, d_model)`, whichever way round it is stored."""
        rows, columns = self._shape
        return (rows, columns) if self.has_feature_rows else (columns, rows)

    def features(self, indices: Sequence[int]) -> Tensor:
        """Vectors of chosen features, `(S, d_model)`, in the stored dtype and in memory of their own."""
        if not indices:
            return torch.zeros(0, self.shape[1])
        if self.has_feature_rows:
            return torch.cat(
                [self._rows(indices[start : start + _SPAN_ROWS]) for start in range(0, len(indices), _SPAN_ROWS)]
            )
        columns = torch.tensor(indices, dtype=torch.int64)
        return torch.cat([block[:, columns] for _, block in self._spans()]).T.contiguous()

    def copy_to(self, out: Tensor) -> None:
        """Fill `out (d_sae, d_model)`, of any dtype and device, with the whole matrix."""
        for rows, block in self._spans():
            if self.has_feature_rows:
                out[rows] = block.to(out.device, out.dtype)
            else:
                out[:, rows] = block.to(out.device, out.dtype).T

    def mapped(self) -> Tensor:
        """The whole matrix as stored, mapped into memory: nothing is read yet, and processes share the pages.

        Not guaranteed: anything, once the file is cut short or written over in place.
        """
        whole: Tensor = open_tensors(self.path).read(self.name)[:]
        return whole

    def _rows(self, indices: Sequence[int]) -> Tensor:
        stored = open_tensors(self.path).read(self.name)
        return torch.cat([stored[index : index + 1] for index in indices])

    def _spans(self) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = self._shape
        step = max(1, _SPAN_BYTES // max(1, 4 * columns))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, open_tensors(self.path).read(self.name)[part]
