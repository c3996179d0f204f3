"""A frozen sparse autoencoder in memory: encode, decode, reconstruct.

Weights are buffers, not parameters: nothing here is ever trained. The work is done by `qscope_trl.ops`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from qscope_trl.errors import CheckpointError, ConfigError
from qscope_trl.ops.reference import TopKActs, pre_activations, token_chunks
from qscope_trl.ops.sparse import sparse_decode
from qscope_trl.ops.topk_encode import topk_encode

Activation = Literal["topk", "relu", "jumprelu"]


class TopKSAE(nn.Module):
    """One layer's SAE: `f = x @ W_enc.T + b_enc`, an activation function, `x_hat = a @ W_dec.T + b_dec`.

    Guaranteed: no input centring and no normalisation happens at run time, because `SAESuite` folds a format's own
    centring into `b_enc`. Not guaranteed: that the reconstruction means anything at position 0 of a sequence, which
    Qwen-Scope's training data left out.

    Args:
        W_enc: Encoder, as in the checkpoint.
        b_enc: Encoder bias, with any input centring folded in.
        k: Active features per token, 1 to `d_sae`, typically 50 or 100. Needed by `topk` alone.
        activation: `topk` (then ReLU), `relu`, or `jumprelu`.
        W_dec: Decoder, as in the checkpoint; `None` for an encoder without decoder.
        b_dec: Decoder bias; given exactly if `W_dec` is.
        jump: Thresholds; given exactly if the activation is `jumprelu`.

    Raises:
        CheckpointError: If shapes disagree or `k` is outside `1..d_sae`.
        ConfigError: If the activation is unknown, or lacks what it needs.

    Shape:
        `W_enc (d_sae, d_model)`, `b_enc (d_sae,)`, `W_dec (d_model, d_sae)`, `b_dec (d_model,)`, `jump (d_sae,)`.

    References:
        Qwen-Scope, arXiv:2605.11887, section 2.

    Deviation: the model card's snippet has no ReLU after TopK; the paper, Qwen's demo and SAELens have it, and so has
    this module. A token with fewer than `k` positive pre-activations therefore has fewer than `k` active features.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor | None
    b_dec: Tensor | None
    jump: Tensor | None

    def __init__(
        self,
        *,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int | None = None,
        activation: Activation = "topk",
        W_dec: Tensor | None = None,
        b_dec: Tensor | None = None,
        jump: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(W_enc, b_enc, k, activation, W_dec, b_dec, jump)
        self.k = k
        self.activation: Activation = activation
        for name, value in {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "jump": jump}.items():
            self.register_buffer(name, None if value is None else value.detach())

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    def copy_to(self, device: torch.device | str, dtype: torch.dtype) -> TopKSAE:
        """The same SAE with its matrices on another device and in another dtype; this one stays as it is.

        Biases and thresholds keep their dtype: rounding them would save nothing.
        """
        return TopKSAE(
            W_enc=self.W_enc.to(device, dtype),
            b_enc=self.b_enc.to(device),
            k=self.k,
            activation=self.activation,
            W_dec=None if self.W_dec is None else self.W_dec.to(device, dtype),
            b_dec=None if self.b_dec is None else self.b_dec.to(device),
            jump=None if self.jump is None else self.jump.to(device),
        )

    def extra_repr(self) -> str:
        """Facts for `repr`."""
        return f"d_model={self.d_model}, d_sae={self.d_sae}, k={self.k}, activation={self.activation!r}"

    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations of all features, before TopK and before ReLU; differentiable in `x`.

        Args:
            x: Residuals `(..., d_model)`, any float dtype.

        Returns:
            `(..., d_sae)`, at least fp32. A thousand tokens of a 64K-wide SAE take 260 MB.

        Raises:
            CheckpointError: If the last dimension of `x` is not `d_model`.
        """
        return pre_activations(self._flat(x), self.W_enc, self.b_enc).reshape(*x.shape[:-1], self.d_sae)

    def encode(self, x: Tensor) -> TopKActs:
        """The `k` largest pre-activations per token, then ReLU; differentiable in `x`. See `ops.topk_encode`.

        Args:
            x: Residuals `(..., d_model)`.

        Returns:
            `top_acts` and `top_indices`, both `(..., k)`, ordered by value descending, then index ascending.

        Raises:
            ConfigError: If the activation is not `topk`: such an SAE has no fixed number of active features.
            CheckpointError: If the last dimension of `x` is not `d_model`.
        """
        if self.k is None or self.activation != "topk":
            raise ConfigError(
                f"An SAE with activation `{self.activation}` has no `k` active features per token. "
                "Use `feature_acts`, which is dense."
            )
        self._flat(x)
        return topk_encode(x, self.W_enc, self.b_enc, self.k)

    @torch.no_grad()
    def feature_acts(self, x: Tensor) -> Tensor:
        """Dense activations, zero where a feature is not active.

        Args:
            x: Residuals `(..., d_model)`.

        Returns:
            `(..., d_sae)`, at least fp32.

        Raises:
            CheckpointError: If the last dimension of `x` is not `d_model`.
        """
        if self.activation == "topk":
            acts, indices = self.encode(x)
            return acts.new_zeros(*x.shape[:-1], self.d_sae).scatter_(-1, indices, acts)
        f = self.pre_acts(x)
        return f.relu() if self.jump is None else f.relu() * (f > self.jump)

    def decode(self, acts: TopKActs | Tensor) -> Tensor:
        """Reconstruct residuals: `x_hat = a @ W_dec.T + b_dec`; differentiable in the activations.

        Args:
            acts: What `encode` gave, or dense activations `(..., d_sae)`.

        Returns:
            `(..., d_model)`, at least fp32.

        Raises:
            ConfigError: If the SAE was loaded without its decoder.
        """
        W_dec, b_dec = self._decoder()
        if isinstance(acts, Tensor):
            flat = pre_activations(acts.reshape(-1, self.d_sae), W_dec, b_dec)
            return flat.reshape(*acts.shape[:-1], self.d_model)
        k = acts.top_acts.shape[-1]
        flat = sparse_decode(acts.top_acts.reshape(-1, k), acts.top_indices.reshape(-1, k), W_dec, b_dec)
        return flat.view(*acts.top_acts.shape[:-1], self.d_model)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `(..., d_model)` of residuals `x (..., d_model)`, at least fp32, in token chunks."""
        self._decoder()
        if self.activation == "topk":
            return self.decode(self.encode(x))
        flat = self._flat(x)
        chunks = token_chunks(flat.shape[0], self.d_sae) or [slice(0, 0)]
        return torch.cat([self.decode(self.feature_acts(flat[rows])) for rows in chunks]).reshape(x.shape)

    @torch.no_grad()
    def fvu(self, x: Tensor) -> float:
        """Fraction of variance unexplained: `sum |x - x_hat|^2 / sum |x - mean(x)|^2` over all tokens of `x`.

        0 is a perfect reconstruction, 1 no better than the mean. The caller leaves out padding and position 0.

        Args:
            x: Residuals `(..., d_model)`, two tokens at least.
        """
        flat = self._flat(x).to(torch.promote_types(x.dtype, torch.float32))
        residual = (flat - self(flat)).double().square().sum()
        return float(residual / (flat - flat.mean(0)).double().square().sum())

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise CheckpointError(
                f"These residuals are {x.shape[-1]} wide, but the SAE reads `d_model={self.d_model}`. "
                "It was made for another model."
            )
        return x.reshape(-1, self.d_model)

    def _decoder(self) -> tuple[Tensor, Tensor]:
        if self.W_dec is None or self.b_dec is None:
            raise ConfigError("This SAE was loaded without its decoder. Load it with `decoder=True` to reconstruct.")
        return self.W_dec, self.b_dec


def _check(
    W_enc: Tensor,
    b_enc: Tensor,
    k: int | None,
    activation: str,
    W_dec: Tensor | None,
    b_dec: Tensor | None,
    jump: Tensor | None,
) -> None:
    if activation not in get_args(Activation):
        raise ConfigError(f"`activation={activation!r}` is unknown. Known: {', '.join(get_args(Activation))}.")
    if (activation == "topk") is not (k is not None):
        raise ConfigError(f"`k` belongs to activation `topk` alone, got `k={k}` with `{activation}`.")
    if (activation == "jumprelu") is not (jump is not None):
        raise ConfigError(f"Thresholds `jump` belong to activation `jumprelu` alone; this is `{activation}`.")
    if (W_dec is None) is not (b_dec is None):
        raise ConfigError("`W_dec` and `b_dec` come together; got one of them.")
    if W_enc.dim() != 2:
        raise CheckpointError(f"`W_enc` has the shape {tuple(W_enc.shape)}, expected `(d_sae, d_model)`.")
    d_sae, d_model = W_enc.shape
    for name, tensor, expected in [
        ("b_enc", b_enc, (d_sae,)),
        ("W_dec", W_dec, (d_model, d_sae)),
        ("b_dec", b_dec, (d_model,)),
        ("jump", jump, (d_sae,)),
    ]:
        if tensor is not None and tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"`{name}` has the shape {tuple(tensor.shape)}, but `W_enc` is ({d_sae}, {d_model}), "
                f"so {expected} is expected."
            )
    if k is not None and not 1 <= k <= d_sae:
        raise CheckpointError(f"`k={k}` is outside 1 to `d_sae={d_sae}`, the number of features there are.")
