"""Checks of single values in feature files: YAML turns unquoted ones into other types than were meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qscope_trl.errors import FeatureSetError


def is_number(value: Any) -> bool:
    """Whether a value is a number; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_text(what: str, value: Any) -> None:
    """Raise `FeatureSetError` unless a value is a text; `what` begins the message."""
    if not isinstance(value, str):
        kind = "no, yes, off or on as a boolean" if isinstance(value, bool) else "number or date as one"
        hint = "" if isinstance(value, Mapping | list | None) else f" YAML reads a bare {kind}: put it into quotes."
        raise FeatureSetError(f"{what} {value!r}; it is a text.{hint}")


def require_mapping(what: str, value: Any, form: str) -> None:
    """Raise `FeatureSetError` unless a value is a mapping from texts; `form` says of what to what."""
    if not isinstance(value, Mapping):
        raise FeatureSetError(f"{what} is {value!r}; it is a mapping from {form}.")
    for key in value:
        require_text(f"{what} has the key", key)


def unquote(value: Any) -> str:
    """A hint for a number that came as a text, or an empty string."""
    if not isinstance(value, str) or re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value) is None:
        return ""
    return " YAML reads 1e-3 as a text: write 1.0e-3." if "e" in value else " Write it without quotes."
