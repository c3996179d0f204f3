"""The judge of the demo: a detector that reads text, not features.

Shape legend: `V` vocabulary. Left out: any use of the SAEs, so that a silenced feature cannot pass for a changed
behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qscope_trl.monitor.detectors import is_switched, num_chinese, num_letters


class Verdict(NamedTuple):
    """What the detector found in some generations."""

    rate: float
    """Share of generations with three Chinese characters or more."""

    share: float
    """Chinese characters among all letters."""

    total: int
    """Generations judged."""

    @property
    def standard_error(self) -> float:
        """Of `rate`, as a binomial share."""
        return math.sqrt(self.rate * (1 - self.rate) / self.total)


def judge(texts: Sequence[str]) -> Verdict:
    """Count code-switching in generations."""
    chinese, letters = sum(map(num_chinese, texts)), sum(map(num_letters, texts))
    return Verdict(sum(map(is_switched, texts)) / len(texts), chinese / max(1, letters), len(texts))


def unwanted_tokens(tokenizer: Any) -> Tensor:
    """Which tokens of a byte-level vocabulary hold a lead byte of a Chinese character, boolean `(V,)`."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids)
    marks = torch.zeros(len(tokenizer), dtype=torch.bool)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            marks[index] = any(0xE3 <= byte_of.get(c, 0) <= 0xE9 for c in token)
    return marks
