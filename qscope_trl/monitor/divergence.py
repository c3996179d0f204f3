"""KL divergence from a frozen model's next-token distributions, of which only the largest probabilities are kept.

A row of logits has as many numbers as the vocabulary; a thousand of them per token hold nearly all of the probability,
and the rest counts as one event.

Shape legend: `N` tokens, `V` vocabulary, `P` kept log-probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qscope_trl.ops.reference import token_chunks


class TopLogProbs(NamedTuple):
    """The largest log-probabilities of each token's next-token distribution, and that of all others together."""

    log_p_NP: Tensor
    """fp32."""

    indices_NP: Tensor
    """Of which tokens of the vocabulary, int32."""

    log_rest_N: Tensor
    """Log-probability of the rest of the vocabulary, fp32; -inf if there is none."""


@torch.no_grad()
def top_log_probs(logits_NV: Tensor, top: int) -> TopLogProbs:
    """The `top` largest log-probabilities of each row of logits, in host memory."""
    parts = []
    for rows in token_chunks(*logits_NV.shape):
        log_p_nV = logits_NV[rows].float().log_softmax(dim=1)
        log_p_nP, indices_nP = log_p_nV.topk(min(top, log_p_nV.shape[1]), dim=1)
        parts.append((log_p_nP.cpu(), indices_nP.int().cpu(), _log_rest(log_p_nV, indices_nP).cpu()))
    return TopLogProbs(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def divergence(frozen: TopLogProbs, logits_NV: Tensor) -> Tensor:
    """KL(frozen || now) of each token, nats, with the frozen model's small probabilities taken together.

    Exact if all probabilities of the frozen model were kept. Else it is that of the distributions in which the rest of
    the vocabulary is one event, which is never above the exact one (Cover and Thomas, Elements of Information Theory,
    theorem 2.7.1, the log sum inequality).

    Returns:
        `(N,)`, fp64.
    """
    parts = [torch.zeros(0, dtype=torch.float64)]
    for rows in token_chunks(*logits_NV.shape):
        log_q_nV = logits_NV[rows].float().log_softmax(dim=1)
        log_p_nP, indices_nP, log_rest_n = (part[rows].to(log_q_nV.device) for part in frozen)
        log_q_nP = log_q_nV.gather(1, indices_nP.long())
        log_p = torch.cat([log_p_nP, log_rest_n[:, None]], dim=1).double()
        log_q = torch.cat([log_q_nP, _log_rest(log_q_nV, indices_nP.long())[:, None]], dim=1).double()
        # What the frozen model rules out adds nothing, whatever the model says of it now.
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        parts.append(terms.sum(1).cpu())
    return torch.cat(parts)


def _log_rest(log_p_nV: Tensor, indices_nP: Tensor) -> Tensor:
    if indices_nP.shape[1] == log_p_nV.shape[1]:
        return log_p_nV.new_full((log_p_nV.shape[0],), -torch.inf)
    return log_p_nV.scatter(1, indices_nP, -torch.inf).logsumexp(dim=1)
