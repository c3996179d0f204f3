"""What features are chosen by: streaming sums over all features, and per-text figures of a few of them.

No tensor of all tokens by all features ever exists: sums take `d_sae` numbers per layer and group, per-text figures
`texts x candidates`. Sums are fp64, so that the order of the texts does not matter.

Shape legend: `N` tokens of a batch, `D` d_model, `F` d_sae, `S` candidate features, `X` texts of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import ResidualBatch
from qscope_trl.analysis.outliers import NormLimits
from qscope_trl.ops.reference import pre_activations
from qscope_trl.sae.topk_sae import TopKSAE

Keep = Literal["sum", "max"]


class Sink(Protocol):
    """Takes the kept tokens of one layer, batch by batch; all of a text come in one batch."""

    def update(self, x_ND: Tensor, text_index_N: Tensor) -> None:
        """Add the tokens of a batch."""


class Entries(NamedTuple):
    """What a group's texts come to, an entry per text and feature that fires in it; on the CPU, in no order."""

    text: Tensor
    """Which text of the group, int32."""

    feature: Tensor
    """Which feature, int32."""

    value: Tensor
    """Sum or maximum of its activations over the text's tokens, fp32, positive."""


class GroupSums:
    """Running sums of one layer over the texts of one group, for every feature.

    Args:
        sae: The layer's SAE.
        keep: Also keep what every text comes to, the sum or the maximum of each feature's activations: 12 bytes per
            text and feature that fires in it.
    """

    def __init__(self, sae: TopKSAE, keep: Keep | None = None) -> None:
        device = sae.W_enc.device
        self.sae = sae
        self.num_tokens = 0
        self.num_texts = 0
        self._keep = keep
        self._kept: list[Entries] = []
        self._text_tokens: list[tuple[Tensor, Tensor]] = []
        self._x_D = torch.zeros(sae.d_model, dtype=torch.float64, device=device)
        self._act_F = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        self._tokens_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self._texts_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)

    def update(self, x_ND: Tensor, text_index_N: Tensor) -> None:
        """Add the tokens of a batch; all kept tokens of a text must come in one batch."""
        F = self.sae.d_sae
        x_ND = x_ND.to(self._x_D.device)
        text_index_N = text_index_N.to(x_ND.device)
        keys, values = [], []
        for active in active_features(self.sae, x_ND):
            self._act_F.index_add_(0, active.feature, active.value)
            self._tokens_F += torch.bincount(active.feature, minlength=F)
            key, value = self._by_text(text_index_N[active.token] * F + active.feature, active.value)
            keys.append(key)
            values.append(value)
        key, value = (keys[0], values[0]) if len(keys) == 1 else self._by_text(torch.cat(keys), torch.cat(values))
        self._texts_F += torch.bincount(key % F, minlength=F)
        if self._keep is not None:
            self._kept.append(Entries((key // F).int().cpu(), (key % F).int().cpu(), value.float().cpu()))
        texts, counts = torch.unique(text_index_N, return_counts=True)
        self._text_tokens.append((texts.cpu(), counts.cpu()))
        self._x_D += x_ND.double().sum(0)
        self.num_tokens += x_ND.shape[0]
        self.num_texts += texts.numel()

    def _by_text(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One entry per text and feature; without `keep` the values are not summed up."""
        if self._keep is None:
            return torch.unique(key), value
        unique, place = torch.unique(key, return_inverse=True)
        result = torch.zeros(unique.numel(), dtype=value.dtype, device=value.device)
        if self._keep == "sum":
            return unique, result.index_add_(0, place, value)
        return unique, result.scatter_reduce_(0, place, value, "amax")

    def entries(self) -> Entries:
        """What every text comes to; empty unless `keep` was given."""
        if not self._kept:
            none = torch.zeros(0, dtype=torch.int32)
            return Entries(none, none, none.float())
        return Entries(*(torch.cat(column) for column in zip(*self._kept, strict=True)))

    def text_tokens(self, num_texts: int) -> Tensor:
        """Number of kept tokens of each text of the group, int64, 0 for a text without any. Shape `(X,)`."""
        tokens_X = torch.zeros(num_texts, dtype=torch.int64)
        for texts, counts in self._text_tokens:
            tokens_X[texts] += counts
        return tokens_X

    @property
    def act_sum(self) -> Tensor:
        """Sum of activations over tokens, `(F,)`."""
        return self._act_F

    @property
    def mean_act(self) -> Tensor:
        """Mean activation over tokens, silent ones included, `(F,)`."""
        return self._act_F / self.num_tokens

    @property
    def text_count(self) -> Tensor:
        """Number of texts in which a feature fires at least once, `(F,)`."""
        return self._texts_F

    @property
    def token_count(self) -> Tensor:
        """Number of tokens at which a feature fires, `(F,)`."""
        return self._tokens_F

    def mean_pre_act(self, indices: Tensor) -> Tensor:
        """Mean pre-activation over tokens of chosen features, `(S,)`: exact, as the encoder is linear before TopK."""
        W_SD, b_S = self.sae.W_enc[indices].double(), self.sae.b_enc[indices].double()
        return W_SD @ (self._x_D / self.num_tokens) + b_S


class Pooled(NamedTuple):
    """One group of texts, or several taken together token by token. Each `(F,)`."""

    mean_act: Tensor
    """Mean activation over tokens."""

    token_rate: Tensor
    """Share of tokens at which a feature fires."""

    text_rate: Tensor
    """Share of texts in which it fires."""


def pool(sums: list[GroupSums]) -> Pooled:
    """Take groups together, every token counting alike."""
    tokens, texts = sum(s.num_tokens for s in sums), sum(s.num_texts for s in sums)
    return Pooled(
        torch.stack([s.act_sum for s in sums]).sum(0) / tokens,
        torch.stack([s.token_count for s in sums]).sum(0).double() / tokens,
        torch.stack([s.text_count for s in sums]).sum(0).double() / texts,
    )


def scores(sums: Mapping[str, GroupSums], target: str) -> dict[str, Tensor]:
    """What ranks the features of a layer: target group against the others, each score `(F,)`.

    * `mean_difference`: mean activation on the target's tokens minus that on all other tokens.
    * `delta`: share of the target's texts in which the feature fires, minus that of the other texts.
    * `log_odds`: natural logarithm of the odds of firing in a target text over the odds of firing in another text.
    * `monolinguality`: mean activation on the target minus the macro-mean over the other groups.

    References:
        `delta`: Qwen-Scope, arXiv:2605.11887, section 5. `monolinguality`: SASFT, arXiv:2507.14894, nu.
    """
    mine, others = sums[target], [s for name, s in sums.items() if name != target]
    positive, negative = pool([mine]), pool(others)
    others_fire = torch.stack([s.text_count for s in others]).sum(0)
    return {
        "mean_difference": positive.mean_act - negative.mean_act,
        "delta": positive.text_rate - negative.text_rate,
        "log_odds": log_odds(mine.text_count, mine.num_texts, others_fire, sum(s.num_texts for s in others)),
        "monolinguality": mine.mean_act - torch.stack([s.mean_act for s in others]).mean(0),
    }


def log_odds(fires: Tensor, texts: int | Tensor, fires_others: Tensor, texts_others: int | Tensor) -> Tensor:
    """Log odds ratio of firing, half a text added to each of the four counts so that it is finite.

    0 for a feature that fires in no text: with groups of unequal size the halves alone would make a difference.

    Args:
        fires: Texts of the target in which a feature fires.
        texts: Texts of the target.
        fires_others: Texts of the other groups in which it fires.
        texts_others: Texts of the other groups.

    References:
        The half: Haldane (1956) and Anscombe (1956), which takes the leading term off the bias.
    """
    odds = (fires.double() + 0.5) / (texts - fires.double() + 0.5)
    odds_others = (fires_others.double() + 0.5) / (texts_others - fires_others.double() + 0.5)
    return (odds / odds_others).log().masked_fill(fires + fires_others == 0, 0.0)


class TextFigures:
    """Per-text figures of candidate features of one layer over one group.

    Args:
        sae: The layer's SAE.
        indices: The candidates `(S,)`.
        num_texts: Texts of the group, encoded or not.
    """

    def __init__(self, sae: TopKSAE, indices: Tensor, num_texts: int) -> None:
        device = sae.W_enc.device
        self.sae, self.indices = sae, indices
        self.column_F = torch.full((sae.d_sae,), -1, dtype=torch.int64, device=device)
        self.column_F[indices] = torch.arange(indices.numel(), device=device)
        shape = (num_texts, indices.numel())
        self.tokens_X = torch.zeros(num_texts, dtype=torch.int64, device=device)
        self.act_sum_XS = torch.zeros(shape, dtype=torch.float64, device=device)
        self.act_max_XS = torch.zeros(shape, dtype=torch.float64, device=device)
        self.pre_act_max_XS = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.fired_XS = torch.zeros(shape, dtype=torch.int32, device=device)

    def update(self, x_ND: Tensor, text_index_N: Tensor) -> None:
        """Add the tokens of a batch; all kept tokens of a text must come in one batch."""
        S = self.indices.numel()
        x_ND = x_ND.to(self.sae.W_enc.device)
        text_index_N = text_index_N.to(x_ND.device)
        self.tokens_X += torch.bincount(text_index_N, minlength=self.tokens_X.numel())
        f_NS = pre_activations(x_ND, self.sae.W_enc[self.indices], self.sae.b_enc[self.indices]).double()
        self.pre_act_max_XS.scatter_reduce_(0, text_index_N[:, None].expand(-1, S), f_NS, "amax")
        for active in active_features(self.sae, x_ND):
            column = self.column_F[active.feature]
            chosen = column >= 0
            place = text_index_N[active.token[chosen]] * S + column[chosen]
            value = active.value[chosen]
            self.act_sum_XS.view(-1).index_add_(0, place, value)
            self.act_max_XS.view(-1).scatter_reduce_(0, place, value, "amax")
            self.fired_XS.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.int32))


def collect(
    batches: Iterator[ResidualBatch], *sinks: Mapping[int, Sink], limits: NormLimits | None = None
) -> dict[int, int]:
    """Feed every batch to the sinks of each layer.

    Args:
        batches: What `residual_batches` yields.
        *sinks: One sink a layer; several mappings to fill several at once.
        limits: Which tokens to leave out, layer by layer.

    Returns:
        Tokens left out in each layer.
    """
    layers = sorted({layer for mapping in sinks for layer in mapping})
    masked = dict.fromkeys(layers, 0)
    for batch in batches:
        for layer in layers:
            x_ND, text_index_N = batch.residuals[layer], batch.text_index
            if limits is not None:
                within_N = limits.within(layer, x_ND)
                if not bool(within_N.all()):
                    masked[layer] += int((~within_N).sum())
                    x_ND, text_index_N = x_ND[within_N], text_index_N[within_N.to(text_index_N.device)]
            if x_ND.shape[0]:
                for mapping in sinks:
                    if layer in mapping:
                        mapping[layer].update(x_ND, text_index_N)
    return masked


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive value exceeds a negative one, ties counted half; exact.

    Args:
        positive: Values of the positive texts, at least one.
        negative: Values of the negative texts, at least one.
    """
    ordered = negative.contiguous().sort().values
    below = torch.searchsorted(ordered, positive.contiguous(), side="left")
    up_to = torch.searchsorted(ordered, positive.contiguous(), side="right")
    return float((below + up_to).sum()) / (2 * positive.numel() * negative.numel())
