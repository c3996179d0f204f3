"""Why a rule holds for one document, or does not: the value beside every comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qscope_trl.features import FeatureId
from qscope_trl.rules.evaluate import holds, margin, read, total
from qscope_trl.rules.tree import Comparison, Group, Node, Not, Sum, to_text
from qscope_trl.rules.values import FeatureValues

_MAX_SILENT = 5


@dataclass(frozen=True)
class Explanation:
    """One part of a rule on one document.

    Args:
        text: The part as it is written.
        holds: Whether it holds.
        margin: By how much, as `Rule.score` gives it.
        value: Of a comparison or a sum, what was compared with the threshold; else None.
        label: Of a comparison, what its feature stands for, if that is known.
        parts: The parts it consists of, from left to right.
    """

    text: str
    holds: bool
    margin: float
    value: float | None = None
    label: str = ""
    parts: tuple[Explanation, ...] = ()

    def leaves(self) -> Iterator[Explanation]:
        """Every comparison, from left to right."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def format(self) -> str:
        """Indented lines: `yes` or `no`, the part, the value. Of long lists, what holds and a few more."""
        return "\n".join(self._lines(0)) + "\n"

    def _lines(self, depth: int) -> Iterator[str]:
        value = "" if self.value is None else f"   [{self.value:.4g}]"
        label = f"   {self.label}" if self.label else ""
        yield f"{'  ' * depth}{'yes' if self.holds else 'no '} {self.text}{value}{label}"
        silent = 0
        for part in self.parts:
            silent += not part.holds
            if part.holds or silent <= _MAX_SILENT:
                yield from part._lines(depth + 1)
        if silent > _MAX_SILENT:
            yield f"{'  ' * (depth + 1)}no  ... and {silent - _MAX_SILENT} more that do not hold"

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        found: dict[str, Any] = {"rule": self.text, "holds": self.holds, "margin": self.margin}
        if self.value is not None:
            found["value"] = self.value
        if self.label:
            found["label"] = self.label
        if self.parts:
            found["parts"] = [part.to_dict() for part in self.parts]
        return found


def explain(node: Node, values: FeatureValues, labels: Mapping[FeatureId, str]) -> Explanation:
    """Explain a rule on the one document that `values` holds."""
    value: float | None = None
    label = ""
    inner: tuple[Node, ...] = ()
    if isinstance(node, Comparison):
        feature = node.term.features[0]
        value, label = float(read(feature, node.term.aggregation, values)[0]), labels.get(feature, "")
    elif isinstance(node, Sum):
        value = float(total(node, values)[0])
    elif isinstance(node, Group):
        inner = node.comparisons
    else:
        inner = (node.part,) if isinstance(node, Not) else node.parts
    return Explanation(
        text=to_text(node),
        holds=bool(holds(node, values)[0]),
        margin=float(margin(node, values)[0]),
        value=value,
        label=label,
        parts=tuple(explain(part, values, labels) for part in inner),
    )


class OneDocument:
    """One document of some values.

    Args:
        values: The values of all documents.
        document: Which one.
    """

    num_documents = 1

    def __init__(self, values: FeatureValues, document: int) -> None:
        self._values, self._document = values, document

    def values(self, feature: FeatureId, aggregation: str) -> Any:
        """Its value, `(1,)`."""
        return self._values.values(feature, aggregation)[self._document : self._document + 1]
