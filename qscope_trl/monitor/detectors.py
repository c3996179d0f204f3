"""Detectors that read text, not features: so a feature that is silent cannot pass for a behaviour that is gone.

Left out: detectors that need a model; a rule over features is `qscope_trl.rules`.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qscope_trl.errors import ConfigError

_CHINESE = re.compile(r"[㐀-䶿一-鿿豈-﫿]")
_LETTER = re.compile(r"[^\W\d_]")
_LOOP_WORDS, _LOOP_TIMES = 3, 3
_Z_95 = 1.959963984540054
_RESAMPLES = 1000

MIN_CHARACTERS = 3
"""Chinese characters from which a text counts as switched; fewer may be a stray byte sequence."""


class Detector(NamedTuple):
    """A behaviour that shows in a text by itself."""

    name: str
    """What the user called it."""

    is_shown: Callable[[str], bool]
    """Whether a text shows it."""

    parts: Callable[[str], tuple[int, int]] | None = None
    """How much of a text shows it, of how much; None if there is no such count."""

    parts_name: str = ""
    """What the parts are, for tables and figures."""


def num_chinese(text: str) -> int:
    """Chinese characters in a text."""
    return len(_CHINESE.findall(text))


def num_letters(text: str) -> int:
    """Letters in a text, of any script; each Chinese character is one."""
    return len(_LETTER.findall(text))


def is_switched(text: str) -> bool:
    """Whether a text holds `MIN_CHARACTERS` Chinese characters or more."""
    return num_chinese(text) >= MIN_CHARACTERS


def is_loop(text: str) -> bool:
    """Whether three words occur together, in their order, three times or more."""
    words = text.split()
    counts = Counter(tuple(words[n : n + _LOOP_WORDS]) for n in range(len(words) - _LOOP_WORDS + 1))
    return any(count >= _LOOP_TIMES for count in counts.values())


def text_detector(name: str) -> Detector:
    """The detector that a name stands for.

    Args:
        name: `chinese` (three Chinese characters or more), `repetition` (three words together, three times or more),
            or `regex:PATTERN` (Python's `re`, found anywhere).

    Raises:
        ConfigError: If the name is unknown or the pattern is none.
    """
    if name == "chinese":
        return Detector(
            name, is_switched, lambda text: (num_chinese(text), num_letters(text)), "Chinese among all letters"
        )
    if name == "repetition":
        return Detector(name, is_loop)
    if name.startswith("regex:"):
        try:
            pattern = re.compile(name.removeprefix("regex:"))
        except re.error as err:
            raise ConfigError(f"`behaviour` is {name!r}, which is no regular expression: {err}.") from err
        return Detector(name, lambda text: pattern.search(text) is not None)
    raise ConfigError(
        f"`behaviour` is {name!r}; write `chinese`, `repetition` or `regex:PATTERN`. `qscope steer --sweep` also "
        f"takes `rule:RULE`."
    )


def rate_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a binomial share by Wilson's score method; it holds at 0 and 1 as well."""
    share, z2 = hits / total, _Z_95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # Rounding must not put the ends inside of what was counted.
    return min(share, middle - half) if hits else 0.0, max(share, middle + half) if hits < total else 1.0


def ratio_interval(parts: Sequence[tuple[int, int]], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of `sum of the first / sum of the second`, texts drawn with replacement."""
    generator = random.Random(seed)
    found = sorted(ratio(generator.choices(parts, k=len(parts))) for _ in range(_RESAMPLES))
    return found[round(0.025 * (_RESAMPLES - 1))], found[round(0.975 * (_RESAMPLES - 1))]


def ratio(parts: Sequence[tuple[int, int]]) -> float:
    """`sum of the first / sum of the second`; 0 of nothing is 0."""
    return sum(first for first, _ in parts) / max(1, sum(second for _, second in parts))
