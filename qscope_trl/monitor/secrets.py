"""What may be a secret among settings: left out of records and pages, which are shown to others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
"""What stands in a secret's place."""

_NAME = re.compile(r"(?:.*[_-])?(?:token|secret|password|passwd|key|credentials?)", re.IGNORECASE)
_SHAPE = re.compile(r"\b(?:hf|sk|ghp|wandb_v\d)[_-][A-Za-z0-9_-]{16,}")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def is_secret(name: str) -> bool:
    """Whether a setting of this name may hold a secret: `hub_token` and `api_key`, but not `pad_token_id`."""
    return _NAME.fullmatch(name) is not None


def without_secrets(value: Any) -> Any:
    """Settings, however nested, with secrets hidden: by their names, by their shape, and logins in addresses.

    Values that are empty, and whether something is set at all, stay.
    """
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and item and is_secret(str(key)) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        return _LOGIN.sub(HIDDEN, _SHAPE.sub(HIDDEN, value))
    return value
