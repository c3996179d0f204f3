"""What else a tuned model changed: perplexity and KL divergence on texts that it should write as before.

Left out: benchmarks; lm-evaluation-harness has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from qscope_trl.analysis.audit.estimates import Activity, mean_difference
from qscope_trl.analysis.audit.result import Collateral
from qscope_trl.analysis.doctor.tuned import log_probabilities, summed_divergence


def collateral(
    base: nn.Module,
    tuned: nn.Module,
    token_ids: Sequence[Sequence[int]],
    *,
    source: str,
    resamples: int,
    seed: int,
    show_progress: bool,
) -> Collateral:
    """Both models on the same texts, one text at a time; two matrices of tokens by vocabulary are held.

    Args:
        base: The base model, on its device.
        tuned: The tuned model.
        token_ids: Token ids per text; those of one token are left out.
        source: Where the texts are from.
        resamples: Of the interval.
        seed: Decides them.
        show_progress: Whether to show a progress bar on stderr.
    """
    losses: list[list[float]] = [[], []]
    counts: list[int] = []
    kl = 0.0
    rows = [row for row in token_ids if len(row) > 1]
    modes = [(model, model.training) for model in (base, tuned)]
    try:
        for model, _ in modes:
            model.eval()
        for row in tqdm(rows, desc="perplexity", unit="text", disable=not show_progress, leave=False):
            both = [log_probabilities(model, row) for model in (base, tuned)]
            counts.append(len(row) - 1)
            for one, log_p in zip(losses, both, strict=True):
                target = torch.tensor(list(row[1:]), device=log_p.device)[:, None]
                one.append(-float(log_p[:-1].gather(1, target).double().sum()))
            # The last token's distribution counts for KL too: it needs no target.
            kl += summed_divergence(*both) if both[0].shape == both[1].shape else math.nan
    finally:
        for model, was_training in modes:
            model.train(was_training)
    tokens = torch.tensor(counts)
    ends = [Activity(torch.tensor(one, dtype=torch.float64), tokens) for one in losses]
    difference = mean_difference(*ends, resamples=resamples, seed=seed)
    return Collateral(
        source=source, num_texts=len(rows), num_tokens=sum(counts), perplexity_base=_exp(ends[0].mean),
        perplexity_tuned=_exp(ends[1].mean), loss_difference=difference.value, loss_difference_low=difference.low,
        loss_difference_high=difference.high, kl=kl / (sum(counts) + len(rows)),
    )  # fmt: skip


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
