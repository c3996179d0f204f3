"""Ranking scores of every feature of a layer, under any way to part the texts into groups.

Significance and stability ask the same thing over and over: what would the scores be if the texts were parted
otherwise? A layer's texts are kept as a sparse matrix, feature by feature, and all partings of a block are one product
with it. No dense matrix of texts by features exists; what exists at a time is a block of features by partings.

Shape legend: `F` features, `X` texts of all groups, `P` partings, `M` entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qscope_trl.analysis.evidence import GroupSums, Keep, log_odds

_BLOCK_ELEMENTS = 2**22
# Sums of fp32 products differ by their order, so two equal ones may seem to differ by this share of their terms.
_ROUNDING = 2e-6

KEEP: dict[str, Keep] = {
    "mean_difference": "sum",
    "monolinguality": "sum",
    "delta": "max",
    "log_odds": "max",
    "auroc": "max",
}
"""What each score needs of a text."""

LEFT_OUT = -1
"""Instead of a group's number: the text takes no part."""


class TextScores:
    """One layer's texts, feature by feature, and the score that ranks features.

    Args:
        rank_by: The score; see `evidence.scores`, and `evidence.auroc` of the largest activation of each text.
        starts_F1: Where the entries of each feature begin, and where those of the last one end, int64.
        text_M: Text of each entry, int32.
        value_M: What the feature comes to in that text, fp32, positive; within a feature ascending for `auroc`.
        tokens_X: Kept tokens of each text, int64; a text without any counts nowhere.
        group_X: Number of the group of each text, int64; 0 is the target.
    """

    def __init__(
        self, rank_by: str, starts_F1: Tensor, text_M: Tensor, value_M: Tensor, tokens_X: Tensor, group_X: Tensor
    ) -> None:
        self.rank_by = rank_by
        self.starts_F1, self.text_M, self.value_M = starts_F1, text_M, value_M
        self.tokens_X, self.group_X = tokens_X, group_X
        self._num_groups = int(group_X.max()) + 1

    @classmethod
    def of(cls, rank_by: str, groups: Sequence[GroupSums], sizes: Sequence[int]) -> TextScores:
        """Join the groups of a layer.

        Args:
            rank_by: The score.
            groups: Sums of each group, made with `keep=KEEP[rank_by]`; the target first.
            sizes: Texts of each group.
        """
        offsets = [sum(sizes[:place]) for place in range(len(sizes))]
        parts = [group.entries() for group in groups]
        feature_M = torch.cat([part.feature for part in parts])
        text_M = torch.cat([part.text + offset for part, offset in zip(parts, offsets, strict=True)])
        value_M = torch.cat([part.value for part in parts])
        if rank_by == "auroc":
            order = value_M.argsort(stable=True)
            order = order[feature_M[order].argsort(stable=True)]
        else:
            order = feature_M.argsort(stable=True)
        counts_F = torch.bincount(feature_M, minlength=groups[0].sae.d_sae)
        starts_F1 = torch.cat([torch.zeros(1, dtype=torch.int64), counts_F.cumsum(0)])
        return cls(
            rank_by,
            starts_F1,
            text_M[order],
            value_M[order],
            torch.cat([group.text_tokens(size) for group, size in zip(groups, sizes, strict=True)]),
            torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)]),
        )

    @property
    def num_features(self) -> int:
        """Number of features."""
        return self.starts_F1.numel() - 1

    @property
    def fires_F(self) -> Tensor:
        """Number of texts in which each feature fires."""
        return self.starts_F1.diff()

    @property
    def target_fires_F(self) -> Tensor:
        """Number of texts of the target in which each feature fires."""
        return self._sums(self.group_X[self.text_M] == 0).long()

    def select(self, features: Tensor) -> TextScores:
        """The same for some features, in the order given."""
        counts = self.fires_F[features]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        shift = self.starts_F1[:-1][features] - starts[:-1]
        entries = torch.arange(int(starts[-1])) + shift.repeat_interleave(counts)
        return TextScores(
            self.rank_by, starts, self.text_M[entries], self.value_M[entries], self.tokens_X, self.group_X
        )

    def observed(self) -> Tensor:
        """The scores of the groups as they are, fp64. Shape `(F,)`."""
        if self.rank_by == "auroc":
            return self._auroc(self.group_X)
        return torch.cat([scores[:, 0] for _, scores in self.under(self.group_X[:, None])])

    def under(self, groups_XP: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The scores if the texts were parted otherwise, block by block of features.

        Args:
            groups_XP: Number of the group of each text, parting by parting; `LEFT_OUT` for none.

        Yields:
            Which features, and their scores in fp64 `(features, P)`; exact but for rounding of sums in fp32.
        """
        if self.rank_by != "auroc":
            yield from self._by_sums(groups_XP)
        elif bool((groups_XP == LEFT_OUT).any()):
            yield (
                slice(0, self.num_features),
                torch.stack([self._auroc(groups_XP[:, p]) for p in range(groups_XP.shape[1])], dim=1),
            )
        else:
            yield from self._by_ranks(groups_XP)

    def rounding(self) -> Tensor:
        """How far two scores that are equal may seem apart under `under`. Shape `(F,)`."""
        if self.rank_by in ("delta", "log_odds"):
            return torch.full((self.num_features,), 1e-9, dtype=torch.float64)
        target_X = (self.group_X == 0) & (self.tokens_X > 0)
        others_X = (self.group_X > 0) & (self.tokens_X > 0)
        if self.rank_by == "auroc":
            pairs = (target_X.sum() * others_X.sum()).clamp(min=1)
            return _ROUNDING * self._sums(self._midranks()[0]) / pairs
        fewest = torch.stack([self.tokens_X[self.group_X == g].sum() for g in range(self._num_groups)]).min()
        return _ROUNDING * self._sums(self.value_M) / fewest.clamp(min=1)

    def _by_sums(self, groups_XP: Tensor) -> Iterator[tuple[slice, Tensor]]:
        by_group = self.rank_by == "monolinguality"
        masks = [groups_XP == g for g in range(self._num_groups)] if by_group else [groups_XP == 0, groups_XP > 0]
        is_mean = KEEP[self.rank_by] == "sum"
        weight_X = self.tokens_X.double() if is_mean else (self.tokens_X > 0).double()
        counts = [(weight_X @ mask.double()).clamp(min=1) for mask in masks]
        values = self.value_M if is_mean else torch.ones_like(self.value_M)
        # Where every text has its part, the last group has what the others leave.
        total_F = None if bool((groups_XP == LEFT_OUT).any()) else self._sums(values)
        for rows in self._blocks(groups_XP.shape[1]):
            sums = [self._product(values, mask, rows) for mask in (masks if total_F is None else masks[:-1])]
            if total_F is not None:
                sums.append(total_F[rows, None] - torch.stack(sums).sum(0))
            if self.rank_by == "log_odds":
                yield rows, log_odds(sums[0], counts[0], sums[1], counts[1])
                continue
            means = [total / count for total, count in zip(sums, counts, strict=True)]
            yield rows, means[0] - torch.stack(means[1:]).mean(0)

    def _by_ranks(self, groups_XP: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """AUROC by the sum of the target's midranks: each that of a silent text, and what an entry adds to it."""
        above_M, silent_F = self._midranks()
        present_X = (self.tokens_X > 0)[:, None]
        mask = (groups_XP == 0) & present_X
        size_P = mask.sum(0).double()
        pairs_P = (size_P * ((groups_XP > 0) & present_X).sum(0)).clamp(min=1)
        for rows in self._blocks(groups_XP.shape[1]):
            ranks = self._product(above_M, mask, rows) + silent_F[rows, None] * size_P
            yield rows, (ranks - size_P * (size_P + 1) / 2) / pairs_P

    def _midranks(self) -> tuple[Tensor, Tensor]:
        """What each entry's midrank among all texts is above a silent text's, fp32, and the silent text's, fp64."""
        first_M, last_M = self._runs()
        start_M = self.starts_F1[:-1].repeat_interleave(self.fires_F)
        silent_F = int((self.tokens_X > 0).sum()) - self.fires_F
        rank_M = silent_F.repeat_interleave(self.fires_F) + (first_M + last_M - 2 * start_M + 1).double() / 2
        silent_rank_F = (silent_F.double() + 1) / 2
        return (rank_M - silent_rank_F.repeat_interleave(self.fires_F)).float(), silent_rank_F

    def _runs(self) -> tuple[Tensor, Tensor]:
        """First entry, and the one after the last, of the run of equal values of a feature that each entry is in."""
        count = self.value_M.numel()
        begins_M = torch.ones(count, dtype=torch.bool)
        begins_M[1:] = self.value_M[1:] != self.value_M[:-1]
        begins_M[self.starts_F1[:-1][self.fires_F > 0]] = True
        first = begins_M.nonzero()[:, 0]
        run_M = begins_M.cumsum(0) - 1
        last = torch.cat([first[1:], torch.tensor([count])])
        return first[run_M], last[run_M]

    def _auroc(self, group_X: Tensor) -> Tensor:
        """AUROC of every feature for one parting, exact: pairs below count whole, ties half."""
        here_X = self.tokens_X > 0
        target_X, others_X = (group_X == 0) & here_X, (group_X > 0) & here_X
        is_target_M, is_other_M = target_X[self.text_M].long(), others_X[self.text_M].long()
        before_M1 = torch.cat([torch.zeros(1, dtype=torch.int64), is_other_M.cumsum(0)])
        first_M, last_M = self._runs()
        counts = self.fires_F
        firing_F = before_M1[self.starts_F1].diff()
        silent_F = others_X.sum() - firing_F
        base_M = before_M1[self.starts_F1[:-1]].repeat_interleave(counts)
        # Twice the pairs an entry of the target wins: silent texts, others below, others equal once.
        wins_M = 2 * silent_F.repeat_interleave(counts) + before_M1[first_M] + before_M1[last_M] - 2 * base_M
        won_M1 = torch.cat([torch.zeros(1, dtype=torch.int64), (wins_M * is_target_M).cumsum(0)])
        target_firing_M1 = torch.cat([torch.zeros(1, dtype=torch.int64), is_target_M.cumsum(0)])
        target_silent_F = target_X.sum() - target_firing_M1[self.starts_F1].diff()
        twice_F = won_M1[self.starts_F1].diff() + target_silent_F * silent_F
        return twice_F.double() / (2 * target_X.sum() * others_X.sum()).clamp(min=1)

    def _sums(self, value_M: Tensor) -> Tensor:
        """Sum of values over each feature's entries, fp64."""
        feature_M = torch.arange(self.num_features).repeat_interleave(self.fires_F)
        return torch.zeros(self.num_features, dtype=torch.float64).index_add_(0, feature_M, value_M.double())

    def _product(self, value_M: Tensor, mask_XP: Tensor, rows: slice) -> Tensor:
        """Sum of each feature's values over the texts of every parting. Shape `(features, P)`."""
        begin, end = int(self.starts_F1[rows.start]), int(self.starts_F1[rows.stop])
        if begin == end:
            return torch.zeros(rows.stop - rows.start, mask_XP.shape[1], dtype=torch.float64)
        return functional.embedding_bag(
            self.text_M[begin:end],
            mask_XP.float(),
            (self.starts_F1[rows.start : rows.stop] - begin).int(),
            mode="sum",
            per_sample_weights=value_M[begin:end],
        ).double()

    def _blocks(self, columns: int) -> Iterator[slice]:
        size = max(1, _BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, self.num_features, size):
            yield slice(start, min(start + size, self.num_features))
