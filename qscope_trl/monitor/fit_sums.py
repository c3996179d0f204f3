"""How well an SAE describes residuals: sums over a stream of tokens, and comparisons of active sets.

Sums are fp64 and of fixed size, so neither the amount of text nor its order matters.

Shape legend: `N` tokens of a batch, `D` d_model, `F` d_sae, `K` slots for active features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from qscope_trl.ops.reference import TopKActs, token_chunks
from qscope_trl.sae.topk_sae import TopKSAE

MAX_NORM_RATIO = 10.0
"""Default multiple of the median norm of a layer's residuals above which a token is left out.

References:
    `ActivationBuffer` of github.com/saprmarks/dictionary_learning, which filters the training data of SAEs in this way
    and calls 10 a good default, for the sake of Qwen models.
"""


def codes(sae: TopKSAE, x_ND: Tensor) -> TopKActs:
    """Active features of each token, whatever the activation function; unused slots have activation 0."""
    if sae.activation == "topk":
        return sae.encode(x_ND)
    parts = []
    for rows in token_chunks(x_ND.shape[0], sae.d_sae):
        parts.append(sparse(sae.feature_acts(x_ND[rows])))
    return join(parts)


def sparse(acts_NF: Tensor) -> TopKActs:
    """Dense activations as slots: as many as the fullest token needs, one at least."""
    width = max(1, int((acts_NF > 0).sum(1).max()))
    return TopKActs(*acts_NF.topk(width, dim=1))


def join(parts: list[TopKActs]) -> TopKActs:
    """Codes of consecutive tokens as one, widened to the fullest."""
    width = max(part.top_acts.shape[1] for part in parts)
    return TopKActs(*(torch.cat([pad(part[i], (0, width - part[i].shape[1])) for part in parts]) for i in range(2)))


class FitSums:
    """Running sums of one SAE over tokens.

    Args:
        sae: The SAE, with its decoder.
    """

    def __init__(self, sae: TopKSAE) -> None:
        device = sae.W_enc.device
        self.sae, self.k = sae, sae.k
        self.num_tokens = 0
        self._x_D = torch.zeros(sae.d_model, dtype=torch.float64, device=device)
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        # |x|^2, |x - x_hat|^2, cosine, active features, tokens with fewer than k of them, |x|, |x_hat|
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)

    def update(self, x_ND: Tensor, acts: TopKActs, x_hat_ND: Tensor) -> None:
        """Add tokens with their active features and reconstructions."""
        x_ND, x_hat_ND = x_ND.double(), x_hat_ND.double()
        active = acts.top_acts > 0
        count_N = active.sum(1)
        self._x_D += x_ND.sum(0)
        self.fired_F += torch.bincount(acts.top_indices[active], minlength=self.fired_F.numel())
        norm_N, norm_hat_N = x_ND.norm(dim=1), x_hat_ND.norm(dim=1)
        self._sums += torch.stack(
            [
                norm_N.square().sum(),
                (x_ND - x_hat_ND).square().sum(),
                cosine_similarity(x_ND, x_hat_ND, dim=1).sum(),
                count_N.sum().double(),
                (count_N < (self.k or 0)).sum().double(),
                norm_N.sum(),
                norm_hat_N.sum(),
            ]
        )
        self.num_tokens += x_ND.shape[0]

    def merged(self, others: FitSums) -> FitSums:
        """Sums over the tokens of both."""
        both = FitSums(self.sae)
        both.num_tokens = self.num_tokens + others.num_tokens
        both._x_D = self._x_D + others._x_D
        both.fired_F = self.fired_F + others.fired_F
        both._sums = self._sums + others._sums
        return both

    @property
    def mean_D(self) -> Tensor:
        """Mean residual, fp64 `(D,)`."""
        return self._x_D / max(1, self.num_tokens)

    def fvu(self, about_D: Tensor | None = None) -> float:
        """Fraction of variance unexplained; NaN without any variance.

        Args:
            about_D: Point the variance is taken about; by default these tokens' own mean.
        """
        mean_D = self.mean_D
        about = self._sums[0] - self.num_tokens * mean_D.square().sum()
        if about_D is not None:
            about = about + self.num_tokens * (mean_D - about_D).square().sum()
        # What rounding leaves of the difference of two equal numbers is no variance.
        return float(self._sums[1] / about) if about > 1e-12 * self._sums[0] else float("nan")

    @property
    def cosine(self) -> float:
        """Mean over tokens of the cosine between residual and reconstruction."""
        return self._mean(2)

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return self._mean(3)

    @property
    def short_share(self) -> float:
        """Share of tokens with fewer than k active features; 0 without a k."""
        return self._mean(4)

    @property
    def norm_ratio(self) -> float:
        """Mean norm of the reconstructions over that of the residuals."""
        return float(self._sums[6] / self._sums[5]) if self._sums[5] > 0 else float("nan")

    @property
    def silent_share(self) -> float:
        """Share of features that are active at no token seen."""
        return float((self.fired_F == 0).double().mean())

    def _mean(self, index: int) -> float:
        return float(self._sums[index]) / self.num_tokens if self.num_tokens else float("nan")


def jaccard(first: TopKActs, second: TopKActs) -> Tensor:
    """Of each token, features active in both over features active in either; 1 where none is. Shape `(N,)`, fp64."""
    parts = [torch.zeros(0, dtype=torch.float64, device=first.top_acts.device)]
    for rows in _pair_chunks(first, second):
        same, sizes = _shared(first, second, rows)
        both = same.sum((1, 2)).double()
        either = sizes - both
        parts.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))
    return torch.cat(parts)


def value_error(first: TopKActs, second: TopKActs) -> float:
    """Mean of |a' - a| / a over features active in both, `first` being exact; NaN if there are none."""
    total, count = 0.0, 0
    for rows in _pair_chunks(first, second):
        same, _ = _shared(first, second, rows)
        exact, other = first.top_acts[rows, :, None], second.top_acts[rows, None, :]
        total += float(torch.where(same, (other - exact).abs() / exact, 0).double().sum())
        count += int(same.sum())
    return total / count if count else float("nan")


def _pair_chunks(first: TopKActs, second: TopKActs) -> list[slice]:
    return token_chunks(first.top_acts.shape[0], first.top_acts.shape[1] * second.top_acts.shape[1])


def _shared(first: TopKActs, second: TopKActs, rows: slice) -> tuple[Tensor, Tensor]:
    """Which slots hold the same active feature `(n, K, K')`, and both sets' sizes together `(n,)`."""
    on, other_on = first.top_acts[rows] > 0, second.top_acts[rows] > 0
    same = first.top_indices[rows, :, None] == second.top_indices[rows, None, :]
    return same & on[:, :, None] & other_on[:, None, :], (on.sum(1) + other_on.sum(1)).double()
