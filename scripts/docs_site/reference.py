"""The reference: Python names from docstrings, flags from the settings' help texts, errors and messages from source.

Left out: TRL's and transformers' own flags, which `qscope sft` and `qscope grpo` take too.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import messages

import qscope_trl
from qscope_trl import cli, errors

PACKAGE = "qscope_trl"
TITLES = {
    "training": "Training",
    "config": "Settings",
    "features": "Features",
    "sae": "SAEs",
    "hooks": "Hooks",
    "activations": "Activations and stores",
    "rules": "Rules",
    "steering": "Steering",
    "monitor": "Monitoring",
    "analysis": "Analysis",
    "ops": "Operations",
}
# Both also take TRL's flags: their settings are several classes, in the modules named here.
_TRAINING = {"sft": ("training",), "grpo": ("training", "rollouts")}
_NOT_FOR_GRPO = ("penalty_group_column",)
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def pages(root: Path) -> dict[str, str]:
    """All generated pages, by name."""
    made = {f"reference/{group}.md": _python(group, names) for group, names in public_names(root).items()}
    return made | {
        "reference/command-line.md": _command_line(),
        "reference/errors.md": _errors(),
        "reference/messages.md": _messages(root / PACKAGE),
    }


def public_names(root: Path) -> dict[str, list[str]]:
    """Dotted names by group: what the package exports, and what the Python of the pages imports from its modules."""
    dotted = {f"{module}.{name}" for name, module in qscope_trl._PUBLIC.items()}
    for page in sorted((root / "docs").glob("*.md")):
        for block in _PYTHON.findall(page.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                    dotted |= {f"{node.module}.{alias.name}" for alias in node.names if _is_code(node.module, alias)}
    groups: dict[str, list[str]] = {}
    for name in sorted(dotted, key=lambda name: (name.split(".")[-1].lower(), name)):
        if name.split(".")[1] in TITLES:
            groups.setdefault(name.split(".")[1], []).append(name)
    return {group: groups[group] for group in TITLES if group in groups}


def _is_code(module: str | None, alias: ast.alias) -> bool:
    """Whether a name is a class or function, not a module."""
    value = getattr(importlib.import_module(module or ""), alias.name, None)
    return callable(value)


def _python(group: str, names: list[str]) -> str:
    places: dict[str, list[str]] = {}
    for name in names:
        module, _, short = name.rpartition(".")
        places.setdefault(PACKAGE if qscope_trl._PUBLIC.get(short) == module else module, []).append(short)
    imports = "\n".join(_import(module, places[module]) for module in sorted(places))
    shown = "\n".join(f"::: {name}\n" for name in names)
    return f"# {TITLES[group]}\n\n```python\n{imports}\n```\n\n{shown}"


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 88:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _errors() -> str:
    names = [name for name, value in vars(errors).items() if isinstance(value, type)]
    listed = "\n".join(f"::: {PACKAGE}.errors.{name}\n" for name in names)
    return f"# Errors\n\nWhat to do about each: [Troubleshooting](../troubleshooting.md).\n\n{listed}"


def _messages(package: Path) -> str:
    lines = [
        "# Every message",
        "",
        "What this version can raise or warn about, read from its source; `…` stands for what varies. What is behind "
        "them, and what to do beyond what they say: [Troubleshooting](../troubleshooting.md).",
    ]
    found = messages.messages(package, frozenset(_error_names()))
    for kind in sorted({message.kind for message in found}):
        lines += ["", f"## {kind}", ""]
        lines += [
            f"- {_escaped(message.text)} <small>`{message.place}`</small>" for message in found if message.kind == kind
        ]
    return "\n".join(lines) + "\n"


def _error_names() -> Iterator[str]:
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.QScopeError):
            yield name


def _command_line() -> str:
    lines = [
        "# Command line",
        "",
        "Every flag of every command, from the settings themselves. `-` and `_` within a name are the same. "
        "`qscope COMMAND --help` prints the same texts.",
    ]
    for command, about in cli._ABOUT.items():
        lines += ["", f"## qscope {command}", "", f"{about[0].upper()}{about[1:]}."]
        kinds = command_settings(command)
        if command in _TRAINING:
            lines += ["", "Keys of the YAML file, or flags; TRL's own come beside them, with the same names as there."]
        for title, kind in kinds:
            lines += ["", f"### {title}", ""] if len(kinds) > 1 else [""]
            lines += _flags(kind, leave_out=_NOT_FOR_GRPO if command == "grpo" else ())
        if not kinds:
            lines += ["", *_help(command)]
    return "\n".join(lines) + "\n"


def command_settings(command: str) -> list[tuple[str, type]]:
    """The settings classes of a command with a title for each; none where argparse alone holds the flags."""
    if command in _TRAINING:
        modules = [importlib.import_module(f"{PACKAGE}.config.{name}") for name in _TRAINING[command]]
        kinds = [kind for module in modules for kind in _settings_in(module)]
        return [(f"{command}: {kind._argument_group_name}", kind) for kind in kinds]
    try:
        module = importlib.import_module(f"{PACKAGE}.config.{command}")
    except ModuleNotFoundError:
        return []
    kinds = [kind for kind in _settings_in(module) if kind.__name__.lower().startswith(command)]
    words = [re.sub(r"config$", "", kind.__name__.lower().removeprefix(command)) for kind in kinds]
    return [(f"qscope {command} {word}".rstrip(), kind) for word, kind in zip(words, kinds, strict=True)]


def _settings_in(module: types.ModuleType) -> list[Any]:
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    return [value for value in own if dataclasses.is_dataclass(value) and isinstance(value, type)]


def _flags(kind: type, *, leave_out: tuple[str, ...]) -> list[str]:
    lines = ["| flag | value | default | |", "|---|---|---|---|"]
    hints = get_type_hints(kind)
    items = [item for item in dataclasses.fields(kind) if item.name not in leave_out and "help" in item.metadata]
    for item in items:
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        default = "**needed**" if needed else _default(item)
        choices = item.metadata.get("choices")
        value = ", ".join(f"`{choice}`" for choice in choices) if choices else _type(hints[item.name])
        text = _escaped(item.metadata["help"])
        lines.append(f"| `--{item.name}` | {value} | {default} | {text} |")
    return lines


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING or item.default is None:
        return ""
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def _type(hint: Any) -> str:
    inner = [one for one in get_args(hint) if one is not type(None)] if _is_union(hint) else [hint]
    if get_origin(inner[0]) is list:
        return "several"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return " or ".join(dict.fromkeys(names.get(one, "text") for one in inner))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _help(command: str) -> list[str]:
    lines = []
    for words in [[command], ["demo", "grpo"]] if command == "demo" else [[command]]:
        lines += ["```text", f"$ qscope {' '.join(words)} --help", *_help_text(words).splitlines(), "```", ""]
    return lines


def _help_text(words: list[str]) -> str:
    shown = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    return shown.getvalue()


def _escaped(text: str) -> str:
    """Markdown that shows a text as it is, its code spans as code, in a table cell too."""
    parts = re.split(r"(`[^`]*`)", text)
    for n in range(0, len(parts), 2):
        parts[n] = re.sub(r"([\\*_\[\]<>#~])", r"\\\1", parts[n])
    return "".join(parts).replace("|", "\\|").replace("\n", " ")
