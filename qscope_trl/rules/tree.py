"""What a rule is made of, and how it is written: a tree whose canonical text parses to an equal tree.

Every leaf compares an activation, summed up over a text's tokens, with a number. Activations are those after TopK and
ReLU, so never negative; a comparison that therefore holds always or never is refused. Left out: arithmetic between
features other than a plain sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from qscope_trl.errors import RuleError
from qscope_trl.features import FeatureId

AGGREGATIONS = ("max", "mean", "last", "rate")
"""What the activations of a feature over a text's tokens are summed up to; `rate` is the share at which it fires."""

OPERATORS = (">", ">=", "<", "<=")
"""Comparisons with a threshold."""

KINDS = ("any", "all", "atleast")
"""Kinds of `Group`."""


@dataclass(frozen=True)
class Term:
    """One aggregated feature, or those of a named set.

    Args:
        features: One feature; of a set, all of them.
        aggregation: `max`, `mean`, `last` or `rate`.
        name: Name of the set, or None.
        position: Place in the text the rule was written in, counted in characters from 0; None if it was not written.
    """

    features: tuple[FeatureId, ...]
    aggregation: str = "max"
    name: str | None = None
    position: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.aggregation not in AGGREGATIONS:
            raise RuleError(f"`{self.aggregation}` is no aggregation; choose one of {', '.join(AGGREGATIONS)}.")
        if not self.features or (self.name is None and len(self.features) != 1):
            raise RuleError(f"A term is one feature or a named set, got {len(self.features)} features without a name.")

    def parts(self) -> Iterator[Term]:
        """One term per feature."""
        for feature in self.features:
            yield Term((feature,), self.aggregation, None, self.position)


@dataclass(frozen=True)
class Comparison:
    """Holds where the aggregated activation compares with the threshold: `mean(L12F345) > 0.2`.

    In a `Group`, the comparison of a set stands for one of each of its features.

    Args:
        term: What is compared.
        op: `>`, `>=`, `<` or `<=`.
        threshold: A finite number. `> 0` is "fires".
    """

    term: Term
    op: str = ">"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        _check_comparison(self.op, self.threshold, 1.0 if self.term.aggregation == "rate" else math.inf)

    def parts(self) -> Iterator[Comparison]:
        """One comparison per feature."""
        if self.term.name is None:
            yield self
            return
        for term in self.term.parts():
            yield replace(self, term=term)


@dataclass(frozen=True)
class Sum:
    """Holds where the sum of aggregated activations compares with the threshold: `sum(L12: 31, 407) > 1.5`.

    Args:
        terms: What is added up, unweighted.
        op: `>`, `>=`, `<` or `<=`.
        threshold: A finite number.
    """

    terms: tuple[Term, ...]
    op: str
    threshold: float

    def __post_init__(self) -> None:
        if not self.terms:
            raise RuleError("`sum(...)` of nothing: name at least one feature.")
        parts = [part for term in self.terms for part in term.parts()]
        is_share = all(part.aggregation == "rate" for part in parts)
        _check_comparison(self.op, self.threshold, float(len(parts)) if is_share else math.inf)
        _refuse_repeats([(part.features[0], part.aggregation) for part in parts], "sum(...)")


@dataclass(frozen=True)
class Group:
    """Holds where enough of its comparisons hold: one (`any`), every (`all`), or `count` (`atleast`).

    Args:
        kind: `any`, `all` or `atleast`.
        members: The comparisons; of a set, one for each of its features.
        count: How many must hold; for `atleast` alone.
    """

    kind: str
    members: tuple[Comparison, ...]
    count: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RuleError(f"`{self.kind}` is no group; choose one of {', '.join(KINDS)}.")
        if (self.kind == "atleast") is not (self.count is not None):
            raise RuleError(f"A count belongs to `atleast` alone; got {self.count!r} for `{self.kind}`.")
        if not self.members:
            raise RuleError(f"`{self.kind}(...)` of nothing: name at least one feature.")
        comparisons = list(self.comparisons)
        if self.count is not None and not 1 <= self.count <= len(comparisons):
            fate = "always holds" if self.count < 1 else "never holds"
            raise RuleError(f"`atleast({self.count}, ...)` of {len(comparisons)} comparisons {fate}.")
        _refuse_repeats(comparisons, f"{self.kind}(...)")

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparisons that are counted, sets taken apart."""
        return tuple(part for member in self.members for part in member.parts())

    @property
    def needed(self) -> int:
        """How many comparisons must hold."""
        if self.count is not None:
            return self.count
        return 1 if self.kind == "any" else len(self.comparisons)


@dataclass(frozen=True)
class Not:
    """Holds where its part does not."""

    part: Node


@dataclass(frozen=True)
class And:
    """Holds where all parts do. A part that is itself an `And` is taken apart."""

    parts: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _flat(self.parts, And))


@dataclass(frozen=True)
class Or:
    """Holds where at least one part does. A part that is itself an `Or` is taken apart."""

    parts: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _flat(self.parts, Or))


Node = Comparison | Sum | Group | Not | And | Or


def terms(node: Node) -> Iterator[Term]:
    """Every term of a tree, from left to right; sets whole."""
    if isinstance(node, Comparison):
        yield node.term
    elif isinstance(node, Sum):
        yield from node.terms
    elif isinstance(node, Group):
        for member in node.members:
            yield member.term
    else:
        for part in (node.part,) if isinstance(node, Not) else node.parts:
            yield from terms(part)


def without_sets(node: Node) -> Node:
    """The same rule with the features of its sets written out."""
    if isinstance(node, Sum):
        return replace(node, terms=tuple(part for term in node.terms for part in term.parts()))
    if isinstance(node, Group):
        return replace(node, members=node.comparisons)
    if isinstance(node, Not):
        return Not(without_sets(node.part))
    if isinstance(node, And | Or):
        return type(node)(tuple(without_sets(part) for part in node.parts))
    return node


def to_text(node: Node) -> str:
    """Canonical text of a tree."""
    if isinstance(node, Or):
        return " or ".join(to_text(part) for part in node.parts)
    if isinstance(node, And):
        return " and ".join(_in_parentheses(part, Or) for part in node.parts)
    if isinstance(node, Not):
        return f"not {_in_parentheses(node.part, Or, And)}"
    if isinstance(node, Comparison):
        return _list_text([node.term]) + _comparison_text(node.op, node.threshold)
    if isinstance(node, Sum):
        return f"sum({_list_text(node.terms)}) {node.op} {number_text(node.threshold)}"
    clauses = [
        _list_text([member.term for member in members]) + _comparison_text(*comparison)
        for comparison, members in groupby(node.members, key=lambda member: (member.op, member.threshold))
    ]
    count = "" if node.count is None else f"{node.count}, "
    return f"{node.kind}({count}{'; '.join(clauses)})"


def number_text(value: float) -> str:
    """The shortest text that reads back as the same number; whole numbers without a point."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _list_text(items: Sequence[Term]) -> str:
    texts = []
    for aggregation, run in groupby(items, key=lambda term: term.aggregation):
        text = _names_text(list(run))
        texts.append(text if aggregation == "max" else f"{aggregation}({text})")
    return ", ".join(texts)


def _names_text(items: Sequence[Term]) -> str:
    texts = []
    for (layer, name), run in groupby(items, key=lambda term: (term.features[0].layer, term.name)):
        found = list(run)
        if name is not None:
            texts += [f"set:{name}"] * len(found)
        elif len(found) == 1:
            texts.append(str(found[0].features[0]))
        else:
            texts.append(f"L{layer}: {', '.join(str(term.features[0].index) for term in found)}")
    return ", ".join(texts)


def _comparison_text(op: str, threshold: float) -> str:
    return "" if (op, threshold) == (">", 0) else f" {op} {number_text(threshold)}"


def _in_parentheses(node: Node, *kinds: type) -> str:
    text = to_text(node)
    return f"({text})" if isinstance(node, kinds) else text


def _flat(parts: Sequence[Node], kind: type[And] | type[Or]) -> tuple[Node, ...]:
    if len(parts) < 2:
        raise RuleError(f"`{kind.__name__.lower()}` joins two parts or more, got {len(parts)}.")
    flat: list[Node] = []
    for part in parts:
        flat += part.parts if isinstance(part, kind) else (part,)
    return tuple(flat)


def _check_comparison(op: str, threshold: float, largest: float) -> None:
    """Raise for a comparison with values from 0 to `largest` that no value can decide."""
    if op not in OPERATORS:
        raise RuleError(f"`{op}` is no comparison; choose one of {', '.join(OPERATORS)}.")
    if not math.isfinite(threshold):
        raise RuleError(f"A threshold is a finite number, got {threshold!r}.")
    below = threshold < 0 or (threshold == 0 and op in (">=", "<"))
    above = threshold > largest or (threshold == largest and op in (">", "<="))
    if below or above:
        fate = "always holds" if below is op.startswith(">") else "never holds"
        values = "activations are 0 or more" if math.isinf(largest) else f"the values are from 0 to {largest:g}"
        raise RuleError(f"`{op} {number_text(threshold)}` {fate}: {values}. `> 0` says that a feature fires.")


def _refuse_repeats(items: Sequence[Comparison] | Sequence[tuple[FeatureId, str]], where: str) -> None:
    seen = set()
    for item in items:
        if item in seen:
            feature = item.term.features[0] if isinstance(item, Comparison) else item[0]
            raise RuleError(f"{feature} stands twice in `{where}`, so it would count twice. Leave one out.")
        seen.add(item)
