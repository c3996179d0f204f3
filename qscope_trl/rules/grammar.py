"""From text to tree: the grammar, by lark, and errors that show the place.

Keywords and `L12F345` may be written in either case; names of sets keep theirs. `#` starts a comment. Left out:
looking features up in SAEs; that is `Rule.check`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from qscope_trl.errors import ConfigError, RuleError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.rules.tree import AGGREGATIONS, And, Comparison, Group, Node, Not, Or, Sum, Term

T = TypeVar("T")

GRAMMAR = r"""
start: disjunction
disjunction: conjunction (_OR conjunction)*
conjunction: _negation (_AND _negation)*
_negation: negated | atom
negated: _NOT _negation
atom: "(" disjunction ")" | condition | group | total
condition: entry [comparison]
group: KIND "(" clauses ")" | ATLEAST "(" NUMBER _COMMA clauses ")"
total: SUM "(" list ")" [comparison]
clauses: clause (_SEMICOLON clause)*
clause: list [comparison]
list: entry (_COMMA entry)*
entry: FEATURE | layered | NUMBER | SET | aggregated
layered: LAYER _COLON NUMBER
aggregated: AGGREGATION "(" list ")"
comparison: OPERATOR NUMBER

_OR: /or(?!\w)/i
_AND: /and(?!\w)/i
_NOT: /not(?!\w)/i
KIND: /(any|all)(?!\w)/i
ATLEAST: /atleast(?!\w)/i
SUM: /sum(?!\w)/i
AGGREGATION: /(max|mean|last|rate)(?!\w)/i
SET: /set:\w[\w.-]*/
FEATURE: /L\d+F\d+(?!\w)/i
LAYER: /L\d+(?!\w)/i
OPERATOR: />=|<=|>|</
NUMBER: /[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(?!\w)/i
_COMMA: ","
_COLON: ":"
_SEMICOLON: ";"
COMMENT: /#[^\n]*/

%ignore /\s+/
%ignore COMMENT
"""

_SHOWN = {
    "_OR": "`or`",
    "_AND": "`and`",
    "_NOT": "`not`",
    "KIND": "`any(...)` or `all(...)`",
    "ATLEAST": "`atleast(2, ...)`",
    "SUM": "`sum(...)`",
    "AGGREGATION": "`max(...)`, `mean(...)`, `last(...)` or `rate(...)`",
    "SET": "a set such as `set:toxic`",
    "FEATURE": "a feature such as `L12F345`",
    "LAYER": "a layer such as `L12: 31, 407`",
    "OPERATOR": "a comparison such as `> 0.5`",
    "NUMBER": "a number",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "_COMMA": "`,`",
    "_COLON": "`:`",
    "_SEMICOLON": "`;`",
    "$END": "the end of the rule",
}
"""What each terminal of the grammar is called in messages."""

_BEGINNINGS = ("KIND", "ATLEAST", "SUM", "LPAR", "_NOT", "FEATURE", "LAYER", "SET", "AGGREGATION", "NUMBER")
_OTHERS = {
    **dict.fromkeys(("&", "|", "!", "~", "&&", "||"), "`and`, `or`, `not`"),
    **dict.fromkeys(("=", "==", "≥", "≤", "≠"), "`>`, `>=`, `<` or `<=`"),
    **dict.fromkeys(("avg", "average"), "`mean(...)`"),
    **dict.fromkeys(("some", "one", "exists"), "`any(...)`"),
    **dict.fromkeys(("every", "each"), "`all(...)`"),
    **dict.fromkeys(("count", "min"), "`atleast(2, ...)`"),
}
"""What is written elsewhere for what is meant here."""

_WORDS = ("or", "and", "not", "any", "all", "atleast", "sum", "set", *AGGREGATIONS)
_DEEPEST = 50
_MAX_SHOWN = 100


def parse(text: str, sets: Mapping[str, FeatureSet], default_aggregation: str = "max") -> Node:
    """The tree of a rule.

    Args:
        text: The rule.
        sets: What `set:NAME` stands for.
        default_aggregation: Aggregation of features that are written without one.

    Raises:
        RuleError: If the text is no rule; the message shows the place.
        ConfigError: If lark is not installed.
    """
    lark: Any = _lark()
    if not text.strip():
        raise RuleError("The rule is empty. Write one such as `any(L12: 31, 407 > 0.5) and not L20F99`.")
    try:
        tree = _parser().parse(text)
    except lark.exceptions.UnexpectedInput as err:
        raise _unexpected(text, _position(text, err)) from None
    return _Builder(text, sets, default_aggregation).disjunction(tree.children[0], 0)


def located(text: str, position: int | None, message: str) -> RuleError:
    """The error that says where: line and column in the message, then the line with a caret below the place."""
    if position is None:
        return RuleError(message)
    start = text.rfind("\n", 0, position) + 1
    line, column = text.count("\n", 0, position) + 1, position - start
    shown = text[start:].split("\n", 1)[0].replace("\t", " ")
    if len(shown) > _MAX_SHOWN:
        cut = max(0, column - _MAX_SHOWN // 2)
        shown = ("..." if cut else "") + shown[cut : cut + _MAX_SHOWN]
        column = column - cut + (3 if cut else 0)
    return RuleError(f"Line {line}, column {position - start + 1}: {message}\n  {shown}\n  {' ' * column}^")


def _lark() -> Any:
    try:
        import lark
    except ImportError as err:
        raise ConfigError("Rules are parsed by lark. Install it: pip install 'qscope-trl[data]'.") from err
    return lark


@functools.cache
def _parser() -> Any:
    return _lark().Lark(GRAMMAR, parser="lalr", maybe_placeholders=True)


def _unexpected(text: str, position: int) -> RuleError:
    parser = _parser().parse_interactive(text[:position])
    parser.exhaust_lexer()
    expected = {str(name) for name in parser.accepts()}
    known = [shown for name, shown in _SHOWN.items() if name in expected]
    if "FEATURE" in expected:
        # One of everything that can begin a condition is shorter said in a word.
        what = "a condition such as `L12F345 > 0.5` or `any(L12: 31, 407)`"
        if "KIND" not in expected:
            what = "a feature such as `L12F345`, a layer such as `L12: 31, 407`, or a set such as `set:toxic`"
        hidden = {_SHOWN[name] for name in _BEGINNINGS}
        known = [what, *(shown for shown in known if shown not in hidden)]
    word = re.match(r"[\w.]+|\S", text[position:])
    found = f"`{word[0]}` is not understood here; expected" if word else "the rule ends too early; expected"
    hint = _hint(word[0], expected) if word else ""
    return located(text, position, f"{found} {_alternatives(known)}.{hint}")


def _position(text: str, err: Any) -> int:
    """Where lark stopped; the end of the text if that is what it met."""
    is_end = getattr(getattr(err, "token", None), "type", "") == "$END"
    return len(text.rstrip()) if is_end or err.pos_in_stream < 0 else int(err.pos_in_stream)


def _hint(word: str, expected: set[str]) -> str:
    name = word.lower()
    if re.fullmatch(r"l\d+f?|f\d+", name):
        return " A feature is written with layer and index, as in `L12F345`."
    if name == "," and "_SEMICOLON" in expected:
        return " A comparison holds for every feature of the list before it; `;` begins another list."
    if name in _OTHERS:
        return f" Write {_OTHERS[name]}."
    if name in _WORDS or ("NUMBER" in expected and "FEATURE" not in expected):
        return ""
    close = get_close_matches(name, _WORDS, n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def _alternatives(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} or {items[-1]}"


class _Builder:
    """From lark's tree to ours; every refusal is shown at its place."""

    def __init__(self, text: str, sets: Mapping[str, FeatureSet], default: str) -> None:
        self.text, self.sets, self.default = text, sets, default

    def fail(self, position: int | None, message: str) -> RuleError:
        return located(self.text, position, message)

    def at(self, position: int | None, make: Callable[[], T]) -> T:
        """What `make` gives; its refusal gets the place."""
        try:
            return make()
        except RuleError as err:
            raise self.fail(position, str(err)) from None

    def disjunction(self, tree: Any, depth: int) -> Node:
        parts = [self.conjunction(child, depth) for child in tree.children]
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def conjunction(self, tree: Any, depth: int) -> Node:
        parts = [self.negation(child, depth) for child in tree.children]
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def negation(self, tree: Any, depth: int) -> Node:
        if depth > _DEEPEST:
            raise RuleError(f"The rule is nested deeper than {_DEEPEST} levels. Write it flat, or as several rules.")
        if tree.data == "negated":
            return Not(self.negation(tree.children[0], depth + 1))
        inner = tree.children[0]
        if inner.data == "disjunction":
            return self.disjunction(inner, depth + 1)
        made: Node = getattr(self, str(inner.data))(inner)
        return made

    def condition(self, tree: Any) -> Comparison:
        entry, comparison = tree.children
        found = self.entries([entry], self.default, False)
        position = found[0].position
        if len(found) != 1 or found[0].name is not None:
            what = f"`set:{found[0].name}`" if found[0].name else f"a list of {len(found)} features"
            raise self.fail(
                position,
                f"{what} needs a word for how many of them must hold: any(...), all(...) or atleast(2, ...), or "
                f"sum(...).",
            )
        return self.comparison(found[0], comparison)

    def group(self, tree: Any) -> Group:
        head, *rest = tree.children
        kind, position = str(head).lower(), head.start_pos
        count = None
        if kind == "atleast":
            count = self.whole(rest[0], "the number of `atleast` is a whole number from 1")
        members = []
        for clause in rest[-1].children:
            listed, comparison = clause.children
            members += [
                self.comparison(term, comparison) for term in self.entries(listed.children, self.default, False)
            ]
        return self.at(position, lambda: Group(kind, tuple(members), count))

    def total(self, tree: Any) -> Sum:
        head, listed, comparison = tree.children
        if comparison is None:
            raise self.fail(head.start_pos, "`sum(...)` needs a comparison, as in `sum(L12: 31, 407) > 1.5`.")
        found = tuple(self.entries(listed.children, self.default, False))
        op, number = comparison.children
        return self.at(op.start_pos, lambda: Sum(found, str(op), float(number)))

    def comparison(self, term: Term, tree: Any) -> Comparison:
        if tree is None:
            return Comparison(term)
        op, number = tree.children
        return self.at(op.start_pos, lambda: Comparison(term, str(op), float(number)))

    def entries(self, trees: Sequence[Any], aggregation: str, is_inside: bool) -> list[Term]:
        """The terms of a list; after `L12: 31` a bare number is a further feature of that layer."""
        found: list[Term] = []
        layer: int | None = None
        for tree in trees:
            item = tree.children[0]
            if getattr(item, "data", None) == "layered":
                name, number = item.children
                layer = int(name[1:])
                found.append(self.feature(layer, number, aggregation, name.start_pos))
                continue
            if getattr(item, "type", None) == "NUMBER":
                if layer is None:
                    raise self.fail(
                        item.start_pos,
                        f"`{item}` has no layer. Write it after one, as in `L12: 31, {item}`, or as `L12F{item}`.",
                    )
                found.append(self.feature(layer, item, aggregation, item.start_pos))
                continue
            layer = None
            if getattr(item, "data", None) == "aggregated":
                name, listed = item.children
                if is_inside:
                    raise self.fail(name.start_pos, "an aggregation inside an aggregation; write one of them.")
                found += self.entries(listed.children, str(name).lower(), True)
            elif item.type == "FEATURE":
                feature = FeatureId.parse(str(item).upper())
                found.append(Term((feature,), aggregation, None, item.start_pos))
            else:
                found.append(self.named(item, aggregation))
        return found

    def feature(self, layer: int, number: Any, aggregation: str, position: int) -> Term:
        index = self.whole(number, "a feature's index is a whole number from 0")
        return Term((FeatureId(layer, index),), aggregation, None, position)

    def named(self, token: Any, aggregation: str) -> Term:
        name = str(token).split(":", 1)[1]
        if name not in self.sets:
            known = ", ".join(f"`{known}`" for known in self.sets) or "none"
            raise self.fail(
                token.start_pos,
                f"no set `{name}` was given; there are {known}. Name its file by `--set {name}=FILE`, or pass "
                f"`sets={{'{name}': ...}}`.",
            )
        return Term(self.sets[name].ids, aggregation, name, token.start_pos)

    def whole(self, token: Any, what: str) -> int:
        if not str(token).isdecimal():
            raise self.fail(token.start_pos, f"{what}, got `{token}`.")
        return int(token)
