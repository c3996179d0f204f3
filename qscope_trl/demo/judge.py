"""The judge of the demo: a detector that reads text, not features.

Shape legend: `V` vocabulary. Left out: any use of the SAEs, so that a silenced feature cannot pass for a changed
behaviour.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHINESE = re.compile(r"[㐀-䶿一-鿿豈-﫿]")
_LETTER = re.compile(r"[^\W\d_]")
MIN_CHARACTERS = 3
"""Chinese characters from which a generation counts as switched; fewer may be a stray byte sequence."""


_LOOP_WORDS, _LOOP_TIMES = 3, 3


class Verdict(NamedTuple):
    """What the detector found in some generations."""

    rate: float
    """Share of generations with `MIN_CHARACTERS` Chinese characters or more."""

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
    chinese = [len(_CHINESE.findall(text)) for text in texts]
    letters = sum(len(_LETTER.findall(text)) for text in texts)
    switched = sum(count >= MIN_CHARACTERS for count in chinese)
    return Verdict(switched / len(texts), sum(chinese) / max(1, letters), len(texts))


def is_switched(text: str) -> bool:
    """Whether a generation holds `MIN_CHARACTERS` Chinese characters or more."""
    return len(_CHINESE.findall(text)) >= MIN_CHARACTERS


def is_loop(text: str) -> bool:
    """Whether three words occur together, in their order, three times or more."""
    words = text.split()
    counts = Counter(tuple(words[n : n + _LOOP_WORDS]) for n in range(len(words) - _LOOP_WORDS + 1))
    return any(count >= _LOOP_TIMES for count in counts.values())


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
