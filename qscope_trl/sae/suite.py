"""The SAEs of one release, by layer, opened lazily: nothing is read before it is used, and then only what is used.

Left out on purpose: caching weights. A loaded SAE belongs to the caller, and the operating system caches files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_trl.errors import CheckpointError, ConfigError
from qscope_trl.sae.checkpoint import Checkpoint, EncoderRows
from qscope_trl.sae.loading import open_qwen_scope, open_saelens, open_sparsify
from qscope_trl.sae.sources import LayerFile, Source, open_source
from qscope_trl.sae.topk_sae import Activation, TopKSAE

__all__ = ["EncoderRows", "SAESpec", "SAESuite", "TopKSAE"]


@dataclass(frozen=True, kw_only=True)
class SAESpec:
    """Facts of one layer's SAE.

    Args:
        layer: Decoder layer whose output it reads, from 0.
        d_model: Width of the residual stream.
        d_sae: Number of features.
        k: Active features per token; `None` for other activations than `topk`, or where nothing says it.
        activation: `topk`, `relu` or `jumprelu`.
        source: Hub id or path, for messages.
    """

    layer: int
    d_model: int
    d_sae: int
    k: int | None
    activation: Activation
    source: str


class SAESuite:
    """The SAEs of a release, one per layer. Open one with `from_pretrained`.

    Guaranteed: opening reads no weights; `encoder_rows` keeps memory near the rows asked for, however large the
    file. Not guaranteed: that a file stays the same while the suite is in use; compare `fingerprint` where it matters.
    """

    def __init__(
        self, source: Source, layers: tuple[int, ...], k: int | None, dtype: torch.dtype | None = None
    ) -> None:
        self._source = source
        self._k = k
        self.dtype = dtype
        self.source: str = source.name
        self.revision: str | None = source.revision
        self.layers: tuple[int, ...] = layers

    def __repr__(self) -> str:
        revision = "" if self.revision is None else f", revision={self.revision!r}"
        return f"SAESuite({self.source!r}, layers {_ranges(self.layers)}{revision})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | SAESuite,
        *,
        layers: Sequence[int] | None = None,
        revision: str | None = None,
        k: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> SAESuite:
        """Open a Hub repository, folder or file, without reading weights.

        From the Hub only the list of files is fetched, and the `cfg.json` files where the format has them. A layer's
        weights (0.5 to 3.4 GB for Qwen-Scope) are downloaded when that layer is first used. Without a connection, what
        is in the local cache is used.

        Args:
            source: Hub id such as `Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50` (`owner/name/folder` for a folder in it), a
                folder, a single file, or an open suite, which is narrowed to `layers`.
            layers: Layers to use, from 0; by default all there are.
            revision: Branch, tag or commit on the Hub. Resolved to a commit, so all layers are of one.
            k: Active features per token. By default what the configuration or the name states; overrides it if given.
            dtype: Dtype of whole encoders that penalties and rewards open (`topk_act`). By default that of the
                residuals they read, which for bf16 halves memory and time and rounds the encoder; `torch.float32`
                keeps what the checkpoint says. Chosen rows are fp32 in any case.

        Raises:
            CheckpointError: If nothing that can be read is there, or a layer of `layers` is not.
            ConfigError: If `k` is not a whole number from 1, or `layers` is empty.

        References:
            Qwen-Scope, arXiv:2605.11887; files and licence at https://huggingface.co/Qwen.
        """
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ConfigError(f"`k` is the number of active features per token, a whole number from 1; got {k!r}.")
        if isinstance(source, SAESuite):
            opened, available, k = source._source, source.layers, source._k if k is None else k
            dtype = source.dtype if dtype is None else dtype
        else:
            opened = open_source(os.fspath(source), revision)
            available = tuple(opened.layers)
        if layers is None:
            return cls(opened, available, k, dtype)
        if not layers:
            raise ConfigError(
                f"`layers` is empty. Name layers of '{opened.name}' ({_ranges(available)}), or leave it out for all."
            )
        for layer in layers:
            _require_layer(layer, available, opened)
        return cls(opened, tuple(sorted(set(layers))), k, dtype)

    @property
    def d_model(self) -> int:
        """Width of the residual stream, of the first of `layers`. On the Hub, this downloads that layer."""
        return self._open(self.layers[0]).d_model

    @property
    def d_sae(self) -> int:
        """Number of features, of the first of `layers`. On the Hub, this downloads that layer."""
        return self._open(self.layers[0]).d_sae

    def spec(self, layer: int) -> SAESpec:
        """Facts of one layer's SAE.

        Raises:
            CheckpointError: If there is no SAE for `layer`, or its file is damaged.
        """
        checkpoint = self._open(layer)
        return SAESpec(
            layer=layer,
            d_model=checkpoint.d_model,
            d_sae=checkpoint.d_sae,
            k=checkpoint.k,
            activation=checkpoint.activation,
            source=self.source,
        )

    def encoder_rows(
        self,
        layer: int,
        indices: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> EncoderRows:
        """Rows of `W_enc` for chosen features, and what belongs to them. Does not need `k`.

        Args:
            layer: Layer, from 0.
            indices: Features, from 0; may repeat. S of them.
            device: Where to put the rows; by default the CPU.
            dtype: Their dtype. Centring and rescaling are folded in fp64 before rounding to it.

        Raises:
            CheckpointError: If there is no SAE for `layer`, its file is damaged, or a row holds NaN or inf.
            FeatureSetError: If an index is out of range.

        Shape:
            `W (S, d_model)`, `b (S,)`, `jump (S,)` or `None`.
        """
        with _as_stored():
            return self._open(layer).encoder_rows(indices, device, dtype)

    def decoder_columns(
        self,
        layer: int,
        indices: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Columns of `W_dec` for chosen features: their directions in the residual stream, not normalised.

        Qwen-Scope stores them across the whole matrix, so this crosses the file (page by page; seconds from a cold
        disk), but memory stays small.

        Args:
            layer: Layer, from 0.
            indices: Features, from 0; may repeat. S of them.
            device: Where to put the columns; by default the CPU.
            dtype: Their dtype.

        Raises:
            CheckpointError: If there is no SAE for `layer`, its file is damaged, or a column holds NaN or inf.
            FeatureSetError: If an index is out of range.

        Shape:
            `(d_model, S)`.
        """
        with _as_stored():
            return self._open(layer).decoder_columns(indices, device, dtype)

    def load(
        self,
        layer: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        decoder: bool = True,
        mmap: bool = False,
    ) -> TopKSAE:
        """The whole SAE of one layer in memory. It is the caller's: the suite keeps no reference.

        Args:
            layer: Layer, from 0.
            device: Where to put it; by default the CPU.
            dtype: Dtype of its weights.
            decoder: Whether to load the decoder too, half of the memory.
            mmap: On the CPU, leave the encoder in its file where it is stored as it is used (Qwen-Scope and sparsify
                files in their own dtype), so that the processes of a node share one copy. The file must then stay
                as it is.

        Raises:
            CheckpointError: If there is no SAE for `layer`, its file is damaged, a value is NaN or inf, or `k` is
                stated nowhere.
        """
        with _as_stored():
            return self._open(layer, needs_k=True).load(device, dtype, decoder=decoder, mmap=mmap)

    def fingerprint(self, layer: int) -> str:
        """First 16 hex digits of SHA-256 over `b_enc` as stored, as little-endian fp32.

        Reads `d_sae` numbers only. The same for a file and its conversion to safetensors.

        Raises:
            CheckpointError: If there is no SAE for `layer`, or its file is damaged.
        """
        return self._open(layer).fingerprint()

    def _open(self, layer: int, *, needs_k: bool = False) -> Checkpoint:
        _require_layer(layer, self.layers, self._source)
        file: LayerFile = self._source.layers[layer]
        path = self._source.fetch(file.weights)
        if file.config is None:
            checkpoint = open_qwen_scope(path, name=self._source.label)
        else:
            config = self._source.read_config(file.config)
            checkpoint = (open_saelens if file.format == "saelens" else open_sparsify)(path, config)
        if self._k is not None:
            checkpoint = checkpoint.with_k(self._k)
        if needs_k and checkpoint.activation == "topk" and checkpoint.k is None:
            raise CheckpointError(
                f"'{self.source}' does not say how many features are active per token. Pass `k=`, or keep the "
                "release's name on the folder, such as `SAE-Res-Qwen3-8B-Base-W64K-L0_50` for `k=50`."
            )
        return checkpoint


@contextmanager
def _as_stored() -> Iterator[None]:
    """Autocast, which a caller may be in, off: it would round what is read, or refuse to join fp64."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _require_layer(layer: int, available: Iterable[int], source: Source) -> None:
    if layer in available:
        return
    if layer in source.layers:
        raise CheckpointError(
            f"Layer {layer} of '{source.name}' was not asked for: this suite was opened with layers "
            f"{_ranges(available)}. Add it to `layers`."
        )
    is_qwen_scope = all(file.format == "qwen-scope" for file in source.layers.values())
    advice = f", or download `layer{layer}.sae.pt`" if is_qwen_scope else ""
    raise CheckpointError(
        f"No SAE for layer {layer} in '{source.name}': found layers {_ranges(source.layers)}. "
        f"Choose layers within that range{advice}."
    )


def _ranges(layers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
