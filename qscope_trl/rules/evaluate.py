"""Whether a rule holds for documents, and by what margin.

`holds` needs nothing but comparison, `&`, `|`, `~` and addition of the arrays it is given, so it works on NumPy arrays
and, without leaving the GPU, on torch tensors. Left out: where the values come from.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from qscope_trl.errors import DataError
from qscope_trl.rules.tree import And, Comparison, Group, Node, Not, Sum
from qscope_trl.rules.values import FeatureValues

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def holds(node: Node, values: FeatureValues) -> Any:
    """Whether the rule holds, one boolean per document."""
    if isinstance(node, Comparison):
        return _COMPARE[node.op](_term(node, values), node.threshold)
    if isinstance(node, Sum):
        return _COMPARE[node.op](total(node, values), node.threshold)
    if isinstance(node, Group):
        count: Any = 0
        for comparison in node.comparisons:
            count = count + holds(comparison, values)
        return count >= node.needed
    if isinstance(node, Not):
        return ~holds(node.part, values)
    found = holds(node.parts[0], values)
    for rest in node.parts[1:]:
        other = holds(rest, values)
        found = found & other if isinstance(node, And) else found | other
    return found


def margin(node: Node, values: FeatureValues) -> NDArray[np.float64]:
    """By how much the rule holds (positive) or fails (negative), one number per document; see `Rule.score`."""
    import numpy as np

    if isinstance(node, Comparison | Sum):
        value = _term(node, values) if isinstance(node, Comparison) else total(node, values)
        above: NDArray[np.float64] = np.asarray(value, dtype=np.float64) - node.threshold
        return above if node.op.startswith(">") else -above
    if isinstance(node, Not):
        return -margin(node.part, values)
    if isinstance(node, Group):
        margins = np.sort(np.stack([margin(part, values) for part in node.comparisons]), axis=0)
        kth: NDArray[np.float64] = margins[-node.needed]
        return kth
    choose = np.minimum if isinstance(node, And) else np.maximum
    found: NDArray[np.float64] = choose.reduce([margin(part, values) for part in node.parts])
    return found


def total(node: Sum, values: FeatureValues) -> Any:
    """The sum that a `Sum` compares, one number per document."""
    found: Any = 0
    for term in node.terms:
        for part in term.parts():
            found = found + read(part.features[0], part.aggregation, values)
    return found


def read(feature: Any, aggregation: str, values: FeatureValues) -> Any:
    """Values of one feature; refused if they are not finite, where that can be seen without waiting for a GPU.

    Raises:
        DataError: If a value is NaN or infinite.
    """
    import numpy as np

    found = values.values(feature, aggregation)
    if isinstance(found, np.ndarray) and not np.isfinite(found).all():
        raise DataError(
            f"`{aggregation}` of {feature} is NaN or infinite in {int((~np.isfinite(found)).sum())} of "
            f"{values.num_documents} documents, so no rule can be decided by it."
        )
    return found


def _term(node: Comparison, values: FeatureValues) -> Any:
    return read(node.term.features[0], node.term.aggregation, values)
