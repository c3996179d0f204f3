"""What settings of several commands share: the check of a choice, and the form of a list of layers."""

from __future__ import annotations

import re
from typing import Any

from qscope_trl.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` if a setting is none of the allowed values."""
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}; choose one of {', '.join(allowed)}.")


def at_least(name: str, value: float | None, least: float) -> None:
    """Raise `ConfigError` if a setting is given and below `least`."""
    if value is not None and value < least:
        raise ConfigError(f"`{name}` is {value}; it is {least} or more.")


def layer_list(layers: str, available: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that a text names, ascending.

    Args:
        layers: `26,27`, `20-27` or `all`.
        available: Layers there are, for `all`.

    Raises:
        ConfigError: If `layers` is not of the documented form.
    """
    if layers.strip() == "all":
        return available
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ConfigError(f"`layers` is {layers!r}; write it as `26,27`, `20-27` or `all`.")
        chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not chosen:
        raise ConfigError(f"`layers` is {layers!r}, which names no layer; ranges run upwards, as in `20-27`.")
    return tuple(sorted(chosen))
