"""Some texts against others, for a few features: every score, and how far it would move with other texts.

Each figure is computed from how often each text counts, so that figures of all texts and of bootstrap samples are one
computation.

Shape legend: `X` texts, `S` candidate features, `R` resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.analysis.evidence import TextFigures, log_odds
from qscope_trl.analysis.significance import bootstrap_interval

FIGURES = ("mean_difference", "delta", "log_odds", "monolinguality", "auroc", "auroc_pre_act")
"""What `contrast` gives for each candidate."""


class TextRows(NamedTuple):
    """Figures of some texts of several groups, candidate by candidate; on the CPU."""

    group_X: Tensor
    """Number of the group of each text; 0 is the target."""

    tokens_X: Tensor
    """Kept tokens of each text, at least one."""

    act_sum_XS: Tensor
    """Sum of activations over them."""

    act_max_XS: Tensor
    """Largest activation."""

    pre_act_max_XS: Tensor
    """Largest pre-activation."""


def rows(figures: Sequence[TextFigures], texts: Sequence[Tensor]) -> TextRows:
    """The figures of chosen texts of groups, one after another; texts without a kept token are left out.

    Args:
        figures: Of each group, the target first.
        texts: Boolean masks `(X,)` of the texts that count.
    """
    parts: list[list[Tensor]] = []
    for number, (one, mask) in enumerate(zip(figures, texts, strict=True)):
        here = mask.to(one.tokens_X.device) & (one.tokens_X > 0)
        columns = [one.tokens_X[here], one.act_sum_XS[here], one.act_max_XS[here], one.pre_act_max_XS[here]]
        parts.append([torch.full((int(here.sum()),), number), *(column.cpu() for column in columns)])
    return TextRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def contrast(texts: TextRows) -> list[dict[str, float]]:
    """Evidence per candidate: the texts of the target group against those of all others.

    Args:
        texts: Texts of two groups or more, each with at least one.

    Returns:
        One mapping per candidate with `FIGURES`: the scores of `evidence.scores`, the AUROC of each text's largest
        activation, and that of its largest pre-activation.
    """
    once = torch.ones(1, texts.tokens_X.numel(), dtype=torch.float64)
    found = {name: statistic(texts)(once)[0].tolist() for name, statistic in _STATISTICS.items()}
    return [{name: found[name][s] for name in FIGURES} for s in range(texts.act_sum_XS.shape[1])]


def intervals(
    texts: TextRows, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> list[dict[str, float]]:
    """Bootstrap intervals of what `contrast` gives, as `..._low` and `..._high`; see `bootstrap_interval`."""
    statistics = [_STATISTICS[name](texts) for name in FIGURES]
    low, high = bootstrap_interval(
        lambda times_RX: torch.cat([statistic(times_RX) for statistic in statistics], dim=1),
        texts.group_X,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    ends = {"low": low.view(len(FIGURES), -1).T.tolist(), "high": high.view(len(FIGURES), -1).T.tolist()}
    return [
        {f"{name}_{end}": of[s][place] for place, name in enumerate(FIGURES) for end, of in ends.items()}
        for s in range(texts.act_sum_XS.shape[1])
    ]


Statistic = Callable[[Tensor], Tensor]


def weighted_auroc(values_XS: Tensor, is_target_X: Tensor) -> Statistic:
    """AUROC of columns of values, from how often each text counts `(R, X)` to `(R, S)`; ties count half, exact."""
    positive_PS, negative_QS = values_XS[is_target_X], values_XS[~is_target_X]
    ordered = [column.contiguous().sort() for column in negative_QS.T]
    ends = [
        [torch.searchsorted(column.values, own.contiguous(), side=side) for side in ("left", "right")]
        for column, own in zip(ordered, positive_PS.T, strict=True)
    ]

    def statistic(times_RX: Tensor) -> Tensor:
        positive_RP, negative_RQ = times_RX[:, is_target_X], times_RX[:, ~is_target_X]
        pairs_R = positive_RP.sum(1) * negative_RQ.sum(1)
        columns = []
        for column, (below, up_to) in zip(ordered, ends, strict=True):
            sums_RQ1 = torch.nn.functional.pad(negative_RQ[:, column.indices].cumsum(1), (1, 0))
            columns.append((positive_RP * (sums_RQ1[:, below] + sums_RQ1[:, up_to])).sum(1) / (2 * pairs_R))
        return torch.stack(columns, dim=1)

    return statistic


def _mean_difference(texts: TextRows) -> Statistic:
    mine_X = (texts.group_X == 0).double()
    return lambda times: _mean(texts, times * mine_X) - _mean(texts, times * (1 - mine_X))


def _monolinguality(texts: TextRows) -> Statistic:
    masks = [(texts.group_X == group).double() for group in range(int(texts.group_X.max()) + 1)]

    def statistic(times_RX: Tensor) -> Tensor:
        means = [_mean(texts, times_RX * mask) for mask in masks]
        return means[0] - torch.stack(means[1:]).mean(0)

    return statistic


def _delta(texts: TextRows) -> Statistic:
    def statistic(times_RX: Tensor) -> Tensor:
        (fires, count), (fires_others, count_others) = _firing(texts, times_RX)
        return fires / count - fires_others / count_others

    return statistic


def _log_odds(texts: TextRows) -> Statistic:
    def statistic(times_RX: Tensor) -> Tensor:
        (fires, count), (fires_others, count_others) = _firing(texts, times_RX)
        return log_odds(fires, count, fires_others, count_others)

    return statistic


def _mean(texts: TextRows, times_RX: Tensor) -> Tensor:
    return times_RX @ texts.act_sum_XS / (times_RX @ texts.tokens_X.double())[:, None]


def _firing(texts: TextRows, times_RX: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Texts in which each candidate fires and texts there are, of the target and of the others."""
    fires_XS = (texts.act_max_XS > 0).double()
    mine_X = (texts.group_X == 0).double()
    parts = [times_RX * mine_X, times_RX * (1 - mine_X)]
    return [(part @ fires_XS, part.sum(1, keepdim=True)) for part in parts]


_STATISTICS: dict[str, Callable[[TextRows], Statistic]] = {
    "mean_difference": _mean_difference,
    "delta": _delta,
    "log_odds": _log_odds,
    "monolinguality": _monolinguality,
    "auroc": lambda texts: weighted_auroc(texts.act_max_XS, texts.group_X == 0),
    "auroc_pre_act": lambda texts: weighted_auroc(texts.pre_act_max_XS, texts.group_X == 0),
}
