"""One layer's SAE as a file on disk: its facts, and its weights read in the convention of Qwen-Scope.

Foreign conventions end here: whatever the format, `encoder_rows`, `decoder_columns` and `load` give weights for
`f = x @ W_enc.T + b_enc` and `x_hat = a @ W_dec.T + b_dec`, without centring or rescaling at run time.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.errors import CheckpointError, ConfigError, FeatureSetError
from qscope_trl.features import FeatureId
from qscope_trl.sae.tensors import StoredMatrix
from qscope_trl.sae.topk_sae import Activation, TopKSAE

# Rows that are checked or measured at a time, so that no temporary is as large as the matrix.
_BLOCK_ROWS = 4096


class EncoderRows(NamedTuple):
    """Selected rows of an encoder, ready for `ops.reference.pre_activations`."""

    W: Tensor
    """Rows of `W_enc`. Shape `(S, d_model)`."""

    b: Tensor
    """Entries of `b_enc`, with any input centring folded in. Shape `(S,)`."""

    jump: Tensor | None
    """JumpReLU thresholds, `None` for other activations. Shape `(S,)`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened file of one SAE. The big matrices stay on disk.

    Args:
        layer: Decoder layer whose output it reads, from 0.
        path: The file, for messages.
        W_enc: Encoder on disk.
        W_dec: Decoder on disk.
        b_enc: Encoder bias as stored `(d_sae,)`.
        b_dec: Decoder bias as stored `(d_model,)`.
        jump: JumpReLU thresholds `(d_sae,)`.
        activation: `topk`, `relu` or `jumprelu`.
        k: Active features per token, if the checkpoint or its name says.
        is_centred: Whether `b_dec` is subtracted from the input before encoding.
        is_rescaled: Whether pre-activations are multiplied by the norm of the feature's decoder vector before TopK
            and activations divided by it before decoding.
    """

    layer: int
    path: Path
    W_enc: StoredMatrix
    W_dec: StoredMatrix
    b_enc: Tensor
    b_dec: Tensor
    activation: Activation
    jump: Tensor | None = None
    k: int | None = None
    is_centred: bool = False
    is_rescaled: bool = False

    def __post_init__(self) -> None:
        expected = {"d_sae": self.b_enc.numel(), "d_model": self.b_dec.numel()}
        wanted = (expected["d_sae"], expected["d_model"])
        for matrix in (self.W_enc, self.W_dec):
            if matrix.shape == wanted:
                continue
            if matrix.shape == wanted[::-1]:
                raise CheckpointError(
                    f"`{matrix.name}` in '{self.path}' is transposed: it holds {matrix.shape[1]} features of width "
                    f"{matrix.shape[0]} the other way round, by `d_sae={wanted[0]}` and `d_model={wanted[1]}` of the "
                    f"biases. Store it as docs/sae-formats.md says for this format."
                )
            raise CheckpointError(
                f"`{matrix.name}` in '{self.path}' holds {matrix.shape[0]} features of width {matrix.shape[1]}, but "
                f"the biases say `d_sae={wanted[0]}` and `d_model={wanted[1]}`. The tensors are not of one SAE."
            )
        if self.jump is not None and self.jump.shape != self.b_enc.shape:
            raise CheckpointError(
                f"`threshold` in '{self.path}' has the shape {tuple(self.jump.shape)}, expected ({wanted[0]},)."
            )
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise CheckpointError(
                f"`k={self.k}` for '{self.path}' is outside 1 to `d_sae={self.d_sae}`, the number of its features."
            )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    def with_k(self, k: int) -> Checkpoint:
        """The same with another number of active features.

        Raises:
            CheckpointError: If `k` is outside 1 to `d_sae`.
            ConfigError: If the activation is not `topk`.
        """
        if self.activation != "topk":
            raise ConfigError(
                f"`k={k}` was given, but the SAE '{self.path}' has the activation `{self.activation}`, whose "
                "number of active features varies. Leave `k` out."
            )
        return replace(self, k=k)

    def fingerprint(self) -> str:
        """First 16 hex digits of SHA-256 over `b_enc` as little-endian fp32: cheap, and the same in every format."""
        values = self.b_enc.to(torch.float32).contiguous().numpy()
        return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16]

    def encoder_rows(
        self, indices: Sequence[int], device: torch.device | str | None, dtype: torch.dtype
    ) -> EncoderRows:
        """Rows of chosen features; see `SAESuite.encoder_rows`."""
        index = self._indices(indices)
        W, b = self.W_enc.features(index).double(), self.b_enc[index].double()
        if self.is_centred:
            b = b - W @ self.b_dec.double()
        if self.is_rescaled:
            norm = self.W_dec.features(index).double().norm(dim=1)
            W, b = W * norm[:, None], b * norm
        jump = None if self.jump is None else self.jump[index].to(device, dtype)
        rows = EncoderRows(W.to(device, dtype), b.to(device, dtype), jump)
        for name, tensor in {"W_enc": rows.W, "b_enc": rows.b, "threshold": rows.jump}.items():
            if tensor is not None:
                self._check_finite(name, tensor, index)
        return rows

    def decoder_columns(self, indices: Sequence[int], device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        """Decoder directions of chosen features; see `SAESuite.decoder_columns`."""
        index = self._indices(indices)
        vectors = self.W_dec.features(index).double()
        if self.is_rescaled:
            vectors = vectors / _divisor(vectors.norm(dim=1))[:, None]
        vectors = vectors.to(device, dtype)
        self._check_finite("W_dec", vectors, index)
        return vectors.T.contiguous()

    def load(
        self, device: torch.device | str | None, dtype: torch.dtype, *, decoder: bool, mmap: bool = False
    ) -> TopKSAE:
        """The whole SAE in memory; see `SAESuite.load`."""
        # Folding multiplies by what is stored: rounding to a narrower dtype comes after it, as for single rows.
        exact = torch.promote_types(dtype, torch.float32) if self.is_centred or self.is_rescaled else dtype
        W_enc = self._mapped_encoder(exact) if mmap and torch.device(device or "cpu").type == "cpu" else None
        if W_enc is None:
            W_enc = torch.empty(self.d_sae, self.d_model, dtype=exact, device=device)
            self.W_enc.copy_to(W_enc)
        b_enc, b_dec = self.b_enc.to(device, exact), self.b_dec.to(device, exact)
        if self.is_centred:
            b_enc = b_enc - torch.nn.functional.linear(b_dec, W_enc)
        vectors = None
        if decoder or self.is_rescaled:
            vectors = torch.empty(self.d_sae, self.d_model, dtype=exact, device=device)
            self.W_dec.copy_to(vectors)
            if self.is_rescaled:
                norm = torch.cat([block.norm(dim=1) for _, block in _blocks(vectors)])
                W_enc.mul_(norm[:, None])
                b_enc = b_enc * norm
                vectors.div_(_divisor(norm)[:, None])
        W_enc = W_enc.to(dtype)
        # Shape and name as in the checkpoint, memory feature by feature: decoding sparse activations reads whole
        # vectors.
        W_dec = vectors.to(dtype).T if vectors is not None and decoder else None
        everything = range(self.d_sae)
        for name, tensor in {"W_enc": W_enc, "W_dec": None if W_dec is None else W_dec.T}.items():
            if tensor is not None:
                self._check_finite(name, tensor, everything)
        for name, tensor in {"b_enc": b_enc, "threshold": self.jump}.items():
            if tensor is not None:
                self._check_finite(name, tensor, everything)
        if not bool(self.b_dec.isfinite().all()):
            raise CheckpointError(f"`b_dec` in '{self.path}' holds NaN or inf. Fetch the file again.")
        return TopKSAE(
            W_enc=W_enc,
            b_enc=b_enc.to(dtype),
            k=self.k,
            activation=self.activation,
            W_dec=W_dec,
            b_dec=None if W_dec is None else b_dec.to(dtype),
            jump=None if self.jump is None else self.jump.to(device, dtype),
        )

    def _mapped_encoder(self, dtype: torch.dtype) -> Tensor | None:
        """The encoder in its file, if it is stored as it is used."""
        if self.is_rescaled or not self.W_enc.has_feature_rows:
            return None
        mapped = self.W_enc.mapped()
        return mapped if mapped.dtype == dtype else None

    def _indices(self, indices: Sequence[int]) -> list[int]:
        index = [operator.index(i) for i in indices]
        for i in index:
            if not 0 <= i < self.d_sae:
                name = FeatureId(self.layer, i) if i >= 0 else i
                raise FeatureSetError(
                    f"Feature {name} is out of range: the SAE '{self.path}' has `d_sae={self.d_sae}` features, so "
                    f"indices go from 0 to {self.d_sae - 1}. Was the set made for another SAE?"
                )
        return index

    def _check_finite(self, name: str, tensor: Tensor, index: Sequence[int]) -> None:
        for start, block in _blocks(tensor):
            # One pass without a temporary; NaN passes through to both ends.
            if bool(torch.stack(block.aminmax()).isfinite().all()):
                continue
            bad = ~block.isfinite().reshape(block.shape[0], -1).all(1)
            feature = FeatureId(self.layer, index[start + int(bad.nonzero()[0, 0])])
            raise CheckpointError(
                f"`{name}` of feature {feature} in '{self.path}' holds NaN or inf as {tensor.dtype}. One such value "
                "would spread to the loss; fetch the file again, or leave this feature out."
            )


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each block."""
    for start in range(0, tensor.shape[0], _BLOCK_ROWS):
        yield start, tensor[start : start + _BLOCK_ROWS]


def _divisor(norm: Tensor) -> Tensor:
    """A feature without a decoder vector never fires here, so it may be divided by anything but zero."""
    return norm.clamp(min=1e-8)
