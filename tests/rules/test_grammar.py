"""The language: what is read, how it is written back, and what is refused at which place."""

from __future__ import annotations

import random
import re
import sys

import pytest

from qscope_trl import FeatureId, FeatureSet
from qscope_trl.errors import ConfigError, FeatureSetError, RuleError
from qscope_trl.rules import compile_rule
from qscope_trl.rules.tree import And, Comparison, Group, Not, Or, Sum, Term
from tests.rules.random_rules import SETS, random_rule

SET = {"toxic": FeatureSet.from_names(["L12F1", "L13F2", "L13F3"])}


def feature(layer: int, index: int, aggregation: str = "max") -> Term:
    return Term((FeatureId(layer, index),), aggregation)


def test_the_example_is_read_as_meant() -> None:
    rule = compile_rule("any(L12: 31, 407 > 0.5) and not L20F99 or atleast(2, set:toxic)", sets=SET)
    both = tuple(Comparison(feature(12, index), ">", 0.5) for index in (31, 407))
    named = Comparison(Term(SET["toxic"].ids, "max", "toxic"))
    assert rule.tree == Or(
        (And((Group("any", both), Not(Comparison(feature(20, 99))))), Group("atleast", (named,), 2)),
    )
    assert rule.tree.parts[1].comparisons == tuple(Comparison(feature(*pair)) for pair in ((12, 1), (13, 2), (13, 3)))
    assert str(rule) == "any(L12: 31, 407 > 0.5) and not L20F99 or atleast(2, set:toxic)"
    assert rule.layers == (12, 13, 20)
    assert (FeatureId(12, 407), "max") in rule.needs


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("l3f4", "L3F4"),
        ("L3F4>.50", "L3F4 > 0.5"),
        ("MEAN( L3F4 ) >= 1e-2", "mean(L3F4) >= 0.01"),
        ("L3F4 > 0 or (L1F2 or L1F3)", "L3F4 or L1F2 or L1F3"),
        ("not (L1F2 and not not L1F3)", "not (L1F2 and not not L1F3)"),
        ("(L1F2 or L1F3) and L2F4", "(L1F2 or L1F3) and L2F4"),
        ("L1F2 or L1F3 and L2F4", "L1F2 or L1F3 and L2F4"),
        ("L1F2 # why\n AND # and\n L1F3", "L1F2 and L1F3"),
        ("ANY(L1F2, L1F3; L2: 4 > 1; L2F5 > 1.0)", "any(L1: 2, 3; L2: 4, 5 > 1)"),
        ("AtLeast(2, rate(L1: 2, 3), L1F4 > 0.25)", "atleast(2, rate(L1: 2, 3), L1F4 > 0.25)"),
        ("all(L1: 2, L3: 4, 5, L6F7)", "all(L1F2, L3: 4, 5, L6F7)"),
        ("sum(mean(set:toxic), L1F2) <= 3", "sum(mean(set:toxic), L1F2) <= 3"),
        ("max(L1F2) < 1e-7", "L1F2 < 1e-07"),
        ("L1: 2", "L1F2"),
    ],
)
def test_writing_is_canonical(text: str, canonical: str) -> None:
    rule = compile_rule(text, sets=SET)
    assert str(rule) == canonical
    assert compile_rule(canonical, sets=SET) == rule


def test_canonical_text_of_random_rules_parses_to_an_equal_rule() -> None:
    rng = random.Random(0)
    lengths = set()
    for _ in range(300):
        rule = compile_rule(random_rule(rng, rng.randint(0, 4)).text, sets=SETS)
        again = compile_rule(str(rule), sets=SETS)
        assert again == rule
        assert str(again) == str(rule)
        assert hash(again) == hash(rule)
        assert compile_rule(str(rule.without_sets())) == rule.without_sets()
        lengths.add(len(str(rule)))
    assert len(lengths) > 100


def test_another_default_aggregation_is_written_out() -> None:
    rule = compile_rule("any(L1: 2, 3 > 0.5) and max(L2F4)", default_aggregation="mean")
    assert str(rule) == "any(mean(L1: 2, 3) > 0.5) and L2F4"
    assert compile_rule(str(rule)) == rule


def test_an_operator_binds_as_it_does_in_python() -> None:
    rule = compile_rule("not L1F1 and L1F2 or L1F3 and not (L1F4 or L1F5)")
    assert rule == compile_rule("((not L1F1) and L1F2) or (L1F3 and (not (L1F4 or L1F5)))")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("L12F", 1, r"`L12F` is not understood here; expected a condition .*layer and index, as in `L12F345`"),
        (
            "L1F2 & L1F3",
            6,
            r"`&` .*expected `or`, `and`, a comparison .*the end of the rule\. Write `and`, `or`, `not`",
        ),
        ("avg(L1F2)", 1, r"`avg` .*Write `mean\(\.\.\.\)`"),
        ("L1F2 = 3", 6, r"`=` .*Write `>`, `>=`, `<` or `<=`"),
        ("anny(L1F2)", 1, r"Did you mean `any`\?"),
        ("L1F2 >", 7, "the rule ends too early; expected a number"),
        ("L1F2 > nan", 8, r"`nan` is not understood here; expected a number\.\n"),
        ("L1F2 > 1e999", 6, "A threshold is a finite number, got inf"),
        ("any(L1: 2", 10, r"ends too early; expected a comparison such as `> 0.5`, `\)`, `,` or `;`"),
        ("any(L1: 2 > 0.5, L3F4 > 1)", 16, r"`,` .*`;` begins another list"),
        ("any(L1F2, 3)", 11, r"`3` has no layer.*`L12: 31, 3`, or as `L12F3`"),
        ("any(L1: 2.5)", 9, r"index is a whole number from 0, got `2\.5`"),
        ("any()", 5, r"`\)` is not understood here; expected a feature such as"),
        ("L1F2 L1F3", 6, "expected `or`, `and`, a comparison"),
        ("mean(max(L1F2))", 6, "aggregation inside an aggregation"),
        ("mean(L1: 2, 3) > 1", 6, r"a list of 2 features needs a word .*any\(\.\.\.\)"),
        ("set:toxic", 1, "`set:toxic` needs a word for how many"),
        ("any(set:other)", 5, r"no set `other` was given; there are `toxic`.*`--set other=FILE`"),
        ("sum(L1F2)", 1, r"`sum\(\.\.\.\)` needs a comparison"),
        ("L1F2 > -1", 6, "`> -1` always holds: activations are 0 or more"),
        ("L1F2 >= 0", 6, "`>= 0` always holds"),
        ("L1F2 < 0", 6, "`< 0` never holds"),
        ("L1F2 <= -0.5", 6, "`<= -0.5` never holds"),
        ("rate(L1F2) > 1", 12, "`> 1` never holds: the values are from 0 to 1"),
        ("rate(L1F2) <= 1", 12, "`<= 1` always holds"),
        ("sum(rate(L1: 2, 3)) >= 2.5", 21, "never holds: the values are from 0 to 2"),
        ("atleast(4, set:toxic)", 1, r"`atleast\(4, \.\.\.\)` of 3 comparisons never holds"),
        ("atleast(0, L1F2)", 1, "always holds"),
        ("atleast(1.5, L1F2)", 9, r"whole number from 1, got `1\.5`"),
        ("atleast(L1F2)", 9, "expected a number"),
        ("any(L1: 2, 2)", 1, r"L1F2 stands twice in `any\(\.\.\.\)`"),
        ("any(L12F1, set:toxic)", 1, "L12F1 stands twice"),
        ("sum(L1: 2, 2) > 1", 15, r"L1F2 stands twice in `sum\(\.\.\.\)`"),
    ],
)
def test_refused_at_its_place(text: str, column: int, message: str) -> None:
    with pytest.raises(RuleError, match=message) as caught:
        compile_rule(text, sets=SET)
    place, line, caret = str(caught.value).split("\n")
    assert place.startswith(f"Line 1, column {column}: ")
    assert line == f"  {text}"
    assert caret == " " * (column + 1) + "^"


def test_the_place_is_counted_by_lines_and_long_lines_are_cut() -> None:
    with pytest.raises(RuleError, match=r"Line 3, column 4: .*\n  or x\n {5}\^$"):
        compile_rule("L1F2 # a comment\nor L1F3\nor x")
    long = " or ".join(f"L1F{n}" for n in range(100)) + " or x or " + " or ".join(f"L2F{n}" for n in range(100))
    with pytest.raises(RuleError, match="`x` is not") as caught:
        compile_rule(long)
    _, line, caret = str(caught.value).split("\n")
    assert len(line) < 120
    assert line[caret.index("^")] == "x"


@pytest.mark.parametrize("text", ["(" * 60 + "L1F2" + ")" * 60, "not " * 70 + "L1F2"])
def test_endless_nesting_is_refused(text: str) -> None:
    with pytest.raises(RuleError, match="nested deeper than 50"):
        compile_rule(text)


def test_long_rules_are_read() -> None:
    rule = compile_rule(" or ".join(f"L1F{n} > 0.5" for n in range(5000)))
    assert len(rule.tree.parts) == 5000
    assert len(compile_rule(f"any(L1: {', '.join(map(str, range(5000)))})").features) == 5000


@pytest.mark.parametrize("text", ["", "  \n", "# nothing but a comment"])
def test_nothing_is_no_rule(text: str) -> None:
    with pytest.raises(RuleError, match=r"empty|ends too early"):
        compile_rule(text)


def test_other_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="`median` is no aggregation; choose one of max, mean, last, rate"):
        compile_rule("L1F2", default_aggregation="median")
    with pytest.raises(FeatureSetError, match=r"No feature file at 'nowhere\.yaml'"):
        compile_rule("any(set:x)", sets={"x": "nowhere.yaml"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Term((FeatureId(1, 2),), "median"), "`median` is no aggregation"),
        (lambda: Term((FeatureId(1, 2), FeatureId(1, 3))), "one feature or a named set, got 2"),
        (lambda: Comparison(feature(1, 2), "=", 1.0), "`=` is no comparison"),
        (lambda: Comparison(feature(1, 2), ">", float("nan")), "finite number, got nan"),
        (lambda: Sum((), ">", 1.0), "of nothing"),
        (lambda: Group("any", ()), "of nothing"),
        (lambda: Group("some", (Comparison(feature(1, 2)),)), "`some` is no group"),
        (lambda: Group("any", (Comparison(feature(1, 2)),), 1), "A count belongs to `atleast` alone"),
        (lambda: Or((Comparison(feature(1, 2)),)), "joins two parts or more, got 1"),
    ],
)
def test_trees_built_by_hand_are_checked(make: object, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        make()  # type: ignore[operator]


def test_without_lark_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lark", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'qscope-trl[data]'")):
        compile_rule("L1F2")
