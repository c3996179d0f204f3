"""From YAML and flags to settings: unknown names, wrong types and unquoted booleans fail before anything is loaded.

`parse_training` puts TRL's classes and ours on one flat command line by `trl.TrlParser`; `add_flags` makes an ordinary
argparse command line of one dataclass. Left out: sub-keys, interpolation and several YAML files; TRL's form is kept.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from qscope_trl.errors import ConfigError
from qscope_trl.files import read_yaml_mapping

T = TypeVar("T")

# transformers declares it `str | None`, but its Trainer takes True for "the last checkpoint of output_dir".
_ALSO_BOOL = ("resume_from_checkpoint",)


def parse_training(argv: Sequence[str], classes: Sequence[type], *, prog: str, description: str) -> tuple[Any, ...]:
    """Parse `--config FILE.yaml` and flags into one object per class; a flag overrides the file.

    Args:
        argv: Command line without the command's name.
        classes: Argument dataclasses, TRL's and ours; their field names are disjoint.
        prog: Name of the command, for the help text.
        description: One line about the command.

    Returns:
        One object per class, in order.

    Raises:
        ConfigError: If the file is missing or no mapping, a key or flag is unknown, or a value does not fit.
    """
    trl: Any = importlib.import_module("trl")
    parser = trl.TrlParser(list(classes), prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings, without the dashes.")
    parser.error = refuse
    argv = list(argv)
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    refuse_unknown_flags(argv, parser._option_string_actions)
    path, rest = _take_config(argv)
    if path is not None:
        hints = {name: hint for kind in classes for name, hint in get_type_hints(kind).items()}
        actions = {action.dest: action for action in reversed(parser._actions)}
        settings = read_yaml_mapping(path, what="configuration file", examples="configs/")
        for key, value in settings.items():
            if key == "env":
                continue
            if key not in actions or key not in known:
                raise ConfigError(f"Unknown key `{key}` in '{path}'.{suggestion(key, known)}")
            settings[key] = _checked(key, value, hints[key], actions[key], path)
        environment = settings.pop("env", {})
        if not isinstance(environment, dict):
            raise ConfigError(f"`env` in '{path}' is {environment!r}; it is a mapping of environment variables.")
        _set_environment(environment)
        parser.set_defaults_with_config(**settings)
    try:
        return tuple(parser.parse_args_and_config(rest)[: len(classes)])
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as err:
        raise ConfigError(f"The settings do not fit together: {err}") from err


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add one flag per field of a dataclass: `--text-column` or `--text_column` for `text_column`.

    A field with `is_positional` in its metadata is a word of its own, without a flag.
    """
    hints = get_type_hints(kind)
    for item in fields(kind):
        # argparse formats help texts, and a bare percent sign ends in its traceback.
        about = item.metadata["help"].replace("%", "%%")
        names = dict.fromkeys([f"--{item.name.replace('_', '-')}", f"--{item.name}"])
        inner = next(hint for hint in _alternatives(hints[item.name]) if hint is not type(None))
        if inner is bool:
            parser.add_argument(
                *names,
                dest=item.name,
                action=argparse.BooleanOptionalAction,
                default=item.default,
                help=about,
            )
            continue
        if item.metadata.get("is_positional"):
            parser.add_argument(item.name, metavar=item.name.upper(), type=inner, help=about)
            continue
        is_list = get_origin(inner) is list
        required = item.default is MISSING and item.default_factory is MISSING
        default = item.default if item.default is not MISSING else None
        note = "" if default in (None, "") else f" Default: {default}."
        parser.add_argument(
            *names,
            dest=item.name,
            type=get_args(inner)[0] if is_list else inner,
            action="append" if is_list else "store",
            required=required,
            default=[] if is_list else default,
            choices=item.metadata.get("choices"),
            help=about + note,
        )


def parse_flags(argv: Sequence[str], kind: type[T], *, prog: str, description: str) -> T:
    """Parse a command line whose flags are the fields of one dataclass.

    Args:
        argv: Command line without the command's name.
        kind: The dataclass.
        prog: Name of the command, for the help text.
        description: One line about the command.

    Raises:
        ConfigError: If a flag is unknown or missing, or a value does not fit.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_flags(parser, kind)
    refuse_unknown_flags(argv, parser._option_string_actions)
    parser.error = refuse  # type: ignore[method-assign]
    return kind(**vars(parser.parse_args(argv)))


def refuse(message: str) -> NoReturn:
    """Stands in for `ArgumentParser.error`: the same message, without the pages of usage."""
    raise ConfigError(f"{message[:1].upper()}{message[1:]}. `--help` lists every flag.")


def refuse_unknown_flags(argv: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first flag that is not known, with the nearest known one.

    Raises:
        ConfigError: If there is one.
    """
    known = list(known)
    for word in argv:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name != "--" and name not in known:
            raise ConfigError(f"Unknown flag `{name}`.{suggestion(name, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` Did you mean `...`?``, or an empty string if nothing is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else " `--help` lists what there is."


def _take_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", action="append", default=[])
    only.error = refuse  # type: ignore[method-assign]
    found, rest = only.parse_known_args(argv)
    if len(found.config) > 1:
        raise ConfigError(f"`--config` was given {len(found.config)} times; one file holds all settings.")
    return (Path(found.config[0]) if found.config else None), rest


def _set_environment(variables: Mapping[str, Any]) -> None:
    for name, value in variables.items():
        os.environ[name] = str(value)


def _checked(key: str, value: Any, hint: Any, action: argparse.Action, path: Path) -> Any:
    """The value to use as the flag's default, or an error: argparse checks only defaults that are strings."""
    where = f"`{key}` in '{path}' is {value!r}"
    wanted = _describe(hint)
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if isinstance(value, str):
        if len(kinds) == 1 and get_origin(kinds[0]) is list:
            return [value]
        if action.choices and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise ConfigError(f"{where}; choose one of {', '.join(choices)}.")
        convert = action.type
        if callable(convert):
            try:
                convert(value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as err:
                raise ConfigError(f"{where}; {wanted} is needed.") from err
        return value
    if isinstance(value, bool) and key in _ALSO_BOOL:
        return value
    if any(_fits(value, kind) for kind in _alternatives(hint)):
        return value
    quote = (
        " YAML reads a bare no, yes, off or on as a boolean: put it into quotes."
        if isinstance(value, bool) and any(_is_text(kind) for kind in kinds)
        else ""
    )
    raise ConfigError(f"{where}; {wanted} is needed.{quote}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum))


def _fits(value: Any, kind: Any) -> bool:
    if value is None or kind is type(None):
        return value is None and kind in (type(None), Any)
    if get_origin(kind) is list or kind is list:
        inner = get_args(kind)
        return isinstance(value, list) and (
            not inner or all(any(_fits(item, one) for one in _alternatives(inner[0])) for item in value)
        )
    if get_origin(kind) is dict or kind is dict:
        return isinstance(value, dict)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (bool, int, str):
        return type(value) is kind
    return not (isinstance(kind, type) and issubclass(kind, enum.Enum))


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
    parts = []
    for kind in _alternatives(hint):
        origin = get_origin(kind)
        if kind in names:
            parts.append(names[kind])
        elif origin is list or kind is list:
            parts.append("a list")
        elif origin is dict or kind is dict:
            parts.append("a mapping")
        elif _is_text(kind):
            parts.append("a string")
    return " or ".join(dict.fromkeys(parts)) or "another value"
