"""The figures features are chosen by: streaming sums over all features, and per-text figures of a few of them.

No tensor of all tokens by all features ever exists: sums take `d_sae` numbers per layer and group, per-text figures
`texts x candidates`. Sums are fp64, so that the order of the texts does not matter.

Shape legend: `N` tokens of a batch, `D` d_model, `F` d_sae, `S` candidate features, `X` texts of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import ResidualBatch
from qscope_trl.ops.reference import pre_activations
from qscope_trl.sae.topk_sae import TopKSAE


class GroupSums:
    """Running sums of one layer over the texts of one group, for every feature.

    Args:
        sae: The layer's SAE.
    """

    def __init__(self, sae: TopKSAE) -> None:
        device = sae.W_enc.device
        self.sae = sae
        self.num_tokens = 0
        self.num_texts = 0
        self._x_D = torch.zeros(sae.d_model, dtype=torch.float64, device=device)
        self._act_F = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        self._tokens_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self._texts_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)

    def update(self, x_ND: Tensor, text_index_N: Tensor) -> None:
        """Add the tokens of a batch; all kept tokens of a text must come in one batch."""
        F = self.sae.d_sae
        text_index_N = text_index_N.to(x_ND.device)
        pairs = []
        for active in active_features(self.sae, x_ND):
            self._act_F.index_add_(0, active.feature, active.value)
            self._tokens_F += torch.bincount(active.feature, minlength=F)
            pairs.append(torch.unique(text_index_N[active.token] * F + active.feature))
        self._texts_F += torch.bincount(torch.unique(torch.cat(pairs)) % F, minlength=F)
        self._x_D += x_ND.double().sum(0)
        self.num_tokens += x_ND.shape[0]
        self.num_texts += int(torch.unique(text_index_N).numel())

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
    * `monolinguality`: mean activation on the target minus the macro-mean over the other groups.

    References:
        `delta`: Qwen-Scope, arXiv:2605.11887, section 5. `monolinguality`: SASFT, arXiv:2507.14894, nu.
    """
    mine, others = sums[target], [s for name, s in sums.items() if name != target]
    positive, negative = pool([mine]), pool(others)
    return {
        "mean_difference": positive.mean_act - negative.mean_act,
        "delta": positive.text_rate - negative.text_rate,
        "monolinguality": mine.mean_act - torch.stack([s.mean_act for s in others]).mean(0),
    }


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

    def update(self, x_ND: Tensor, text_index_N: Tensor) -> None:
        """Add the tokens of a batch; all kept tokens of a text must come in one batch."""
        S = self.indices.numel()
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


def collect(batches: Iterator[ResidualBatch], sinks: Mapping[int, GroupSums | TextFigures]) -> None:
    """Feed every batch to the sink of each layer."""
    for batch in batches:
        for layer, sink in sinks.items():
            x_ND = batch.residuals[layer]
            sink.update(x_ND.to(sink.sae.W_enc.device), batch.text_index)


def contrast(positive: TextFigures, negatives: list[TextFigures], texts: list[Tensor]) -> list[dict[str, float]]:
    """Evidence per candidate on chosen texts: positive group against all texts of the negative ones.

    Args:
        positive: Figures of the target group.
        negatives: Figures of the other groups.
        texts: Boolean masks `(X,)` of the texts that count: the target group's first, then the others'.

    Returns:
        One mapping per candidate with `mean_difference`, `delta`, `auroc` (largest activation per text) and
        `auroc_pre_act` (largest pre-activation per text).
    """
    pairs = list(zip([positive, *negatives], texts, strict=True))

    def rows(name: str) -> tuple[Tensor, Tensor]:
        parts = [getattr(figures, name)[mask.to(figures.tokens_X.device)] for figures, mask in pairs]
        return parts[0], torch.cat(parts[1:])

    tokens_pos, tokens_neg = rows("tokens_X")
    sum_pos, sum_neg = rows("act_sum_XS")
    max_pos, max_neg = rows("act_max_XS")
    pre_pos, pre_neg = rows("pre_act_max_XS")
    mean_difference = sum_pos.sum(0) / tokens_pos.sum() - sum_neg.sum(0) / tokens_neg.sum()
    delta = (max_pos > 0).double().mean(0) - (max_neg > 0).double().mean(0)
    return [
        {
            "mean_difference": float(mean_difference[s]),
            "delta": float(delta[s]),
            "auroc": auroc(max_pos[:, s], max_neg[:, s]),
            "auroc_pre_act": auroc(pre_pos[:, s], pre_neg[:, s]),
        }
        for s in range(positive.indices.numel())
    ]


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
