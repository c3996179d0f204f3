"""Texts too uniform to judge by: a token or two again and again leave no variance for an SAE to explain.

Left out: whether texts are of the kind the SAEs were trained on; see `reconstruction`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from qscope_trl.analysis.doctor import thresholds as limits
from qscope_trl.analysis.doctor.findings import listed, span
from qscope_trl.analysis.doctor.result import Finding, LayerFit

# Checks that rest on something else than how much of the texts' variance is explained.
_STANDS = ("texts", "dtype", "outliers", "SAE dtype")


def effective_tokens(token_ids: Sequence[Sequence[int]]) -> float:
    """How many different tokens after position 0 there are, counted by their shares: n if n are equally frequent."""
    counts = Counter(token for row in token_ids for token in row[1:])
    return counts.total() ** 2 / max(1, sum(count * count for count in counts.values()))


def withheld(
    found: Sequence[Finding], layers: Sequence[LayerFit], tokenizer: Any, token_ids: Sequence[Sequence[int]]
) -> list[Finding]:
    """Findings without a misfit that rests on too uniform texts; one warning says so instead.

    Args:
        found: Findings on figures.
        layers: The figures by layer.
        tokenizer: To show the most frequent token.
        token_ids: Token ids per text.
    """
    stands = [finding for finding in found if finding.severity == "ok" or _stands(finding, layers)]
    is_misfit = any(finding.severity == "fail" and finding not in stands for finding in found)
    if not is_misfit or effective_tokens(token_ids) >= limits.UNIFORM:
        return list(found)
    counts = Counter(token for row in token_ids for token in row[1:])
    [(token, most)] = counts.most_common(1)
    return [
        *stands,
        Finding(
            check="texts",
            severity="warn",
            what=f"The texts are too uniform to judge by: {counts.total()} tokens, {len(counts)} of them different, "
            f"and {tokenizer.decode([token])!r} is {most / counts.total():.0%} of all (fvu "
            f"{span(fit.fvu for fit in layers)} in {listed([fit.layer for fit in layers])}).",
            why="Where hardly anything varies, the smallest error is large beside it, for the right SAEs too.",
            action="Give ordinary, varied texts.",
        ),
    ]


def _stands(finding: Finding, layers: Sequence[LayerFit]) -> bool:
    # Whether a decoder was reshaped is read off the weights alone.
    is_reshaped = any(fit.alignment_reshaped >= limits.UNALIGNED for fit in layers)
    return finding.check in _STANDS or (finding.check == "weights" and is_reshaped)
