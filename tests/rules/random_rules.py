"""Random rules: their text, and independently of the package what they mean for one document of plain numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from qscope_trl import FeatureSet

Document = dict[tuple[int, int, str], float]
SETS = {"one": FeatureSet.from_names(["L1F0", "L2F3", "L2F1"]), "two-b.c": FeatureSet.from_names(["L3F2", "L1F4"])}
MEMBERS = {"one": [(1, 0), (2, 3), (2, 1)], "two-b.c": [(3, 2), (1, 4)]}
AGGREGATIONS = ("max", "mean", "last", "rate")
LAYERS, FEATURES = (1, 2, 3), 5


class Meaning(NamedTuple):
    text: str
    holds: Callable[[Document], bool]
    margin: Callable[[Document], float]


def document(rng: random.Random) -> Document:
    """Values among which a threshold, zero and equal ones are common."""
    found: Document = {}
    for layer in LAYERS:
        for index in range(FEATURES):
            for name in AGGREGATIONS:
                value = rng.choice([0.0, 0.0, 0.25, 0.5, rng.random()])
                found[layer, index, name] = value if name == "rate" else 2 * value
    return found


def random_rule(rng: random.Random, depth: int = 3) -> Meaning:
    kind = rng.choice(["condition", "group", "group", "sum"] if depth == 0 else ["or", "and", "not", "group", "sum"])
    if kind in ("or", "and"):
        parts = [random_rule(rng, depth - 1) for _ in range(rng.randint(2, 3))]
        text = f" {kind} ".join(f"({part.text})" for part in parts)
        each, best = (any, max) if kind == "or" else (all, min)
        return Meaning(
            text,
            lambda d: each([part.holds(d) for part in parts]),
            lambda d: best(part.margin(d) for part in parts),
        )
    if kind == "not":
        part = random_rule(rng, depth - 1)
        return Meaning(f"not ({part.text})", lambda d: not part.holds(d), lambda d: -part.margin(d))
    return {"condition": _condition, "group": _group, "sum": _sum}[kind](rng)


def _compare(op: str, threshold: float) -> tuple[Callable[[float], bool], Callable[[float], float]]:
    holds = {
        ">": lambda v: v > threshold,
        ">=": lambda v: v >= threshold,
        "<": lambda v: v < threshold,
        "<=": lambda v: v <= threshold,
    }[op]
    return holds, (lambda v: v - threshold) if op[0] == ">" else (lambda v: threshold - v)


def _comparison(rng: random.Random) -> tuple[str, str, float]:
    if rng.random() < 0.3:
        return "", ">", 0.0
    op, threshold = rng.choice([">", ">=", "<", "<="]), rng.choice([0.25, 0.5, rng.random() * 0.9 + 0.05])
    return f" {op} {threshold!r}", op, threshold


def _entry(rng: random.Random) -> tuple[str, list[tuple[int, int, str]]]:
    """A list of features as written, and what it names."""
    name = rng.choice(AGGREGATIONS)
    how = rng.choice(["one", "layer", "set"])
    if how == "set":
        chosen = rng.choice(list(MEMBERS))
        text, ids = f"set:{chosen}", MEMBERS[chosen]
    elif how == "layer":
        layer = rng.choice(LAYERS)
        indices = rng.sample(range(FEATURES), rng.randint(1, 3))
        text, ids = f"L{layer}: {', '.join(map(str, indices))}", [(layer, index) for index in indices]
    else:
        ids = [(rng.choice(LAYERS), rng.randrange(FEATURES))]
        text = f"L{ids[0][0]}F{ids[0][1]}"
    written = text if name == "max" and rng.random() < 0.7 else f"{name}({text})"
    return written, [(*feature, name) for feature in ids]


def _condition(rng: random.Random) -> Meaning:
    name, layer, index = rng.choice(AGGREGATIONS), rng.choice(LAYERS), rng.randrange(FEATURES)
    written, op, threshold = _comparison(rng)
    holds, margin = _compare(op, threshold)
    text = f"L{layer}F{index}" if name == "max" else f"{name}(L{layer}F{index})"
    key = (layer, index, name)
    return Meaning(f"{text}{written}", lambda d: holds(d[key]), lambda d: margin(d[key]))


def _group(rng: random.Random) -> Meaning:
    clauses, members, seen = [], [], set()
    for _ in range(rng.randint(1, 3)):
        text, keys = _entry(rng)
        written, op, threshold = _comparison(rng)
        fresh = [(key, op, threshold) for key in keys]
        if seen & set(fresh):
            continue
        seen |= set(fresh)
        clauses.append(text + written)
        members += [(key, *_compare(op, threshold)) for key in keys]
    kind = rng.choice(["any", "all", "atleast"])
    count = {"any": 1, "all": len(members), "atleast": rng.randint(1, len(members))}[kind]
    head = f"atleast({count}, " if kind == "atleast" else f"{kind}("
    return Meaning(
        f"{head}{'; '.join(clauses)})",
        lambda d: sum(holds(d[key]) for key, holds, _ in members) >= count,
        lambda d: sorted((margin(d[key]) for key, _, margin in members), reverse=True)[count - 1],
    )


def _sum(rng: random.Random) -> Meaning:
    text, keys = _entry(rng)
    op, threshold = rng.choice([">", ">=", "<", "<="]), rng.choice([0.25, 0.5, 0.75])
    holds, margin = _compare(op, threshold)

    def total(d: Document) -> float:
        return sum(d[key] for key in keys)

    return Meaning(f"sum({text}) {op} {threshold}", lambda d: holds(total(d)), lambda d: margin(total(d)))
