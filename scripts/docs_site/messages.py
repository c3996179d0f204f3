"""Every message of an error or warning in the source, with `…` for what varies.

Read from the syntax tree, so nothing is imported. Messages that are put together from several places show the part
that stands where they are raised.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

VARIES = "…"
WARNING = "QScopeWarning"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One place that raises or warns.

    Args:
        kind: Name of the class.
        place: File and line, relative to the package.
        text: The message, `…` for what varies.
    """

    kind: str
    place: str
    text: str


def messages(package: Path, errors: frozenset[str]) -> list[Message]:
    """All messages of these classes and of `QScopeWarning`, by class and place."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            if name == "warnings.warn" and len(node.args) > 1:
                name = ast.unparse(node.args[1])
            if name in errors or name == WARNING:
                text = template(node.args[0])
                if text.strip(f"{VARIES} "):
                    found.append(Message(kind=name, place=f"{relative}:{node.lineno}", text=" ".join(text.split())))
    return sorted(found, key=lambda message: (message.kind, message.place))


def texts(package: Path) -> list[str]:
    """Every text in the source but docstrings, `…` for what varies: what a quoted message can be made of."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        inside -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside
            )
            if is_text and id(node) not in docstrings:
                found.append(" ".join(template(node).split()))
    return found


def template(node: ast.AST) -> str:
    """The text that an expression gives, `…` for what varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return VARIES
