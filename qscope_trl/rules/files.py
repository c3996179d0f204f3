"""Rule files: YAML or JSON with the rule's text, its sets, the SAEs it belongs to, and its evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qscope_trl.errors import FeatureSetError, RuleError
from qscope_trl.features import FeatureSet
from qscope_trl.files import write_whole

if TYPE_CHECKING:
    from qscope_trl.rules.rule import Rule

FORMAT_VERSION = 1
FIELDS = ("name", "model", "sae", "sae_revision", "sae_fingerprints", "evidence")
"""Fields of a `Rule` that a file states beside the rule and its sets."""

_KNOWN = ("format_version", "rule", "sets", *FIELDS)


def read_rule_file(path: Path) -> dict[str, Any]:
    """What a rule file states, checked; sets are loaded, paths in it being relative to the file.

    Raises:
        RuleError: If the file is missing, unreadable, or has unknown or ill-typed entries.
        FeatureSetError: If a set in it cannot be read.
    """
    if not path.is_file():
        raise RuleError(f"No rule file at '{path}'. Write one with `qscope rules learn`, or give the rule itself.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise RuleError(f"'{path}' is neither YAML nor JSON: {err}") from err
    if not isinstance(data, dict):
        raise RuleError(f"'{path}' holds a {type(data).__name__}, not a mapping with a `rule`.")
    data = {key: value for key, value in data.items() if value is not None}
    if "features" in data and "rule" not in data:
        raise RuleError(
            f"'{path}' has no `rule`. It looks like a FeatureSet: name it by `--set NAME=FILE` and write "
            f"`any(set:NAME)`."
        )
    unknown = [key for key in data if key not in _KNOWN]
    if unknown:
        raise RuleError(f"'{path}' has the unknown key `{unknown[0]}`. Known: {', '.join(_KNOWN)}.")
    version = data.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise RuleError(
            f"'{path}': `format_version` is {version!r}, but this version of qscope_trl reads {FORMAT_VERSION}. "
            f"Update the package."
        )
    if "rule" not in data:
        raise RuleError(f"'{path}' has no `rule`.")
    for key in ("rule", "name", "model", "sae", "sae_revision"):
        if key in data and not isinstance(data[key], str):
            raise RuleError(f"'{path}': `{key}` is {data[key]!r}; it is a text. Put it into quotes.")
    for key in ("sets", "sae_fingerprints", "evidence"):
        if key in data and not isinstance(data[key], dict):
            raise RuleError(f"'{path}': `{key}` is {data[key]!r}; it is a mapping.")
    data["sets"] = {str(name): _set(path, str(name), value) for name, value in data.get("sets", {}).items()}
    if "sae_fingerprints" in data:
        data["sae_fingerprints"] = _fingerprints(path, data["sae_fingerprints"])
    return data


def rule_file_mapping(rule: Rule) -> dict[str, Any]:
    """Plain mapping of a rule, for YAML or JSON."""
    data: dict[str, Any] = {"format_version": FORMAT_VERSION, "rule": str(rule)}
    if rule.sets:
        data["sets"] = {name: chosen.to_dict() for name, chosen in rule.sets.items()}
    for key in FIELDS:
        value = getattr(rule, key)
        if value is not None and value != {}:
            data[key] = dict(value) if isinstance(value, Mapping) else value
    return data


def write_rule_file(path: Path, data: Mapping[str, Any]) -> None:
    """Write the mapping of a rule whole or not at all."""
    text = (
        json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        if path.suffix == ".json"
        else yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=100)
    )
    write_whole(path, text)


def _set(path: Path, name: str, value: Any) -> FeatureSet:
    try:
        if isinstance(value, str):
            return FeatureSet.load(path.parent / value)
        return FeatureSet.load(value) if isinstance(value, list) else FeatureSet.from_dict(value)
    except FeatureSetError as err:
        raise FeatureSetError(f"'{path}', set `{name}`: {err}") from err
    except (AttributeError, TypeError, ValueError) as err:
        raise FeatureSetError(
            f"'{path}', set `{name}`: {value!r} is neither a path, a list of names, nor a FeatureSet."
        ) from err


def _fingerprints(path: Path, prints: Mapping[Any, Any]) -> dict[int, str]:
    found = {}
    for layer, value in prints.items():
        if not str(layer).isdecimal() or not isinstance(value, str):
            raise RuleError(
                f"'{path}': `sae_fingerprints` has {layer!r}: {value!r}; it is a mapping from layer to fingerprint, "
                f"as in {{12: '0a1b'}}."
            )
        found[int(layer)] = value
    return found
