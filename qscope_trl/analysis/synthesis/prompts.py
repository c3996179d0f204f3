"""What a generator is asked: templates with placeholders, the list of prompts in an answer, beginnings to go on from.

A template is a few texts, in one YAML file or built in, with `{description}` and the like. Left out: conditions and
loops in templates, and few-shot prompts for base models, whose examples would fire the feature by themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import text_of
from qscope_trl.analysis.synthesis.coverage import Example
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureId
from qscope_trl.files import read_yaml_mapping

PLACEHOLDERS = {
    "system": (),
    "prompts": ("description", "examples", "count"),
    "rewrite": ("prompt", "description"),
    "response": ("prompt", "description", "examples"),
    "plain": ("count",),
}
"""Which placeholders each part of a template may hold."""

_NEEDED = {"prompts": ("description", "examples"), "rewrite": ("prompt",), "response": ("prompt",)}
_EXAMPLE_CHARACTERS = 400
_BULLET = re.compile(r"^\s*(?:[-*\u2022\u00b7]|\(?\d{1,3}[.):])\s+")
_THINKING = re.compile(r"^\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u300c": "\u300d"}


@dataclass(frozen=True)
class Template:
    """Texts that a generator is asked with; see `PLACEHOLDERS`. Literal braces are doubled.

    Args:
        name: What it is called in the output.
        system: System message of every request; none if empty.
        prompts: Asks for `{count}` prompts, one a line, whose answers would show `{description}`.
        rewrite: Asks to rewrite `{prompt}`.
        response: Asks for the response to `{prompt}`.
        plain: Asks for `{count}` prompts without a target: the control.
    """

    name: str = "built-in"
    system: str = ""
    prompts: str = (
        "I collect training examples that contain the following: {description}\n"
        "{examples}"
        "Write {count} different requests that a user could send to an assistant, such that a good answer contains "
        "this. Vary topic, length and wording. Do not describe the property itself. Write one request a line, "
        "without numbers and without quotation marks."
    )
    rewrite: str = (
        "Rewrite this request: another topic detail, another wording, the same kind of answer. Reply with the "
        "rewritten request alone.\n\n{prompt}"
    )
    response: str = "{prompt}"
    plain: str = (
        "Write {count} different requests that a user could send to an assistant. Vary topic, length and wording. "
        "Write one request a line, without numbers and without quotation marks."
    )

    def __post_init__(self) -> None:
        for part, allowed in PLACEHOLDERS.items():
            found = _placeholders(part, getattr(self, part))
            for name in found:
                if name not in allowed:
                    raise ConfigError(
                        f"The template's `{part}` holds the unknown placeholder `{{{name}}}`; it may hold "
                        f"{', '.join(f'`{{{other}}}`' for other in allowed) or 'none'}. Double the braces of a "
                        f"literal one: `{{{{{name}}}}}`."
                    )
            needed = _NEEDED.get(part, ())
            if needed and not found & set(needed):
                raise ConfigError(
                    f"The template's `{part}` lacks {' and '.join(f'`{{{name}}}`' for name in needed)}, so it would "
                    f"ask for the same whatever the {'feature' if part == 'prompts' else 'prompt'}."
                )

    @property
    def digest(self) -> str:
        """16 hex digits that change with any of its texts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def messages(self, part: str, **values: object) -> tuple[dict[str, str], ...]:
        """The chat messages that one part comes to."""
        system = [{"role": "system", "content": self.system.format()}] if self.system.strip() else []
        return (*system, {"role": "user", "content": getattr(self, part).format(**values)})


def _placeholders(part: str, text: str) -> set[str]:
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as err:
        raise ConfigError(
            f"The template's `{part}` has a brace that stands alone: {err}. Double literal ones."
        ) from err
    found = set()
    for _, name, form, conversion in parsed:
        if name is None:
            continue
        if form or conversion:
            raise ConfigError(
                f"The template's `{part}` holds `{{{name}}}` with a format; write the name alone, or double literal "
                f"braces."
            )
        found.add(name)
    return found


def load_template(path: str | None) -> Template:
    """The built-in template, or one from a file.

    Args:
        path: `.yaml` or `.yml`: a mapping from the parts of `Template` to texts. Any other file: the text of
            `prompts`. Parts that are not given are the built-in ones.

    Raises:
        ConfigError: If the file is missing or malformed, names an unknown part or placeholder, or lacks a needed one.
    """
    if path is None:
        return Template()
    file = Path(path)
    if file.suffix in (".yaml", ".yml"):
        parts = read_yaml_mapping(file, what="template", examples="docs/synthesize.md")
    elif file.is_file():
        try:
            parts = {"prompts": file.read_text(encoding="utf-8")}
        except UnicodeDecodeError as err:
            raise ConfigError(f"'{path}' is not a text in UTF-8: {err}") from err
    else:
        raise ConfigError(f"No template at '{path}'.")
    known = [item.name for item in fields(Template)]
    for name, text in parts.items():
        if name not in known:
            raise ConfigError(f"Unknown key `{name}` in '{path}'; a template has {', '.join(known)}.")
        if not isinstance(text, str):
            raise ConfigError(f"`{name}` in '{path}' is {text!r}; it is a text.")
    try:
        return Template(**{"name": file.name, **parts})
    except ConfigError as err:
        raise ConfigError(f"'{path}': {err}") from err


def shown_examples(examples: Sequence[Example], peaks: Sequence[int]) -> str:
    """The block that `{examples}` stands for: one line each, cut around the peak; empty if there are none.

    Args:
        examples: The examples.
        peaks: Character at which the feature is strongest, for each.
    """
    if not examples:
        return ""
    lines = []
    for example, peak in zip(examples, peaks, strict=True):
        start = max(0, min(peak - _EXAMPLE_CHARACTERS * 3 // 4, len(example.text) - _EXAMPLE_CHARACTERS))
        piece = example.text[start : start + _EXAMPLE_CHARACTERS]
        mark = "..." if start else ""
        end = "..." if start + _EXAMPLE_CHARACTERS < len(example.text) else ""
        lines.append(f"- {mark}{' '.join(piece.split())}{end}\n")
    return "Passages that contain it:\n" + "".join(lines)


def beginning(tokenizer: Any, example: Example, num_tokens: int) -> tuple[str, int]:
    """The text just before an example's peak, and the character of the peak.

    The token of the peak itself is left out, for the generator to write it or something like it.

    Args:
        tokenizer: The tokenizer that the peak was found with.
        example: The example.
        num_tokens: Tokens to keep before the peak, the last ones.
    """
    first = max(0, example.place - num_tokens)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(example.text, add_special_tokens=True, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return example.text[offsets[first][0] : offsets[example.place][0]], offsets[example.place][0]
    ids = tokenizer(example.text, add_special_tokens=True, verbose=False)["input_ids"]

    def text(start: int, stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=True))

    return text(first, example.place).strip("\ufffd"), len(text(0, example.place))


def opening_of(tokenizer: Any, text: str, num_tokens: int) -> str:
    """The first tokens of a text: `num_tokens`, or the first half of a text that is not twice as long."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return text[: offsets[min(num_tokens, (len(offsets) + 1) // 2) - 1][1]] if offsets else ""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    kept = ids[: min(num_tokens, (len(ids) + 1) // 2)]
    return str(tokenizer.decode(kept, skip_special_tokens=True)).rstrip("\ufffd")


def parse_prompts(answer: str, count: int) -> list[str]:
    """The prompts in an answer, at most `count`: a JSON list of texts, or one a line; numbers and quotes taken off."""
    text = answer.strip()
    fenced = re.fullmatch(r"```[a-z]*\n(.*?)\n?```", text, re.DOTALL)
    text = fenced[1] if fenced else text
    found: list[str] = []
    try:
        data = json.loads(text) if text.startswith("[") else None
    except ValueError:
        data = None
    if isinstance(data, list) and all(isinstance(item, str) for item in data):
        found = [item.strip() for item in data]
    else:
        for line in text.splitlines():
            piece = _BULLET.sub("", line).strip()
            if len(piece) > 1 and _QUOTES.get(piece[0]) == piece[-1]:
                piece = piece[1:-1].strip()
            found.append(piece)
    return [prompt for prompt in dict.fromkeys(found) if prompt][:count]


def visible(answer: str) -> str:
    """What an answer shows: without a block of thinking at its start, half characters and lone surrogates.

    A block that does not end (the answer ran out of tokens) leaves nothing.
    """
    text = answer.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = _THINKING.sub("", text, count=1)
    if re.match(r"\s*<think(?:ing)?>", text):
        return ""
    return text.rstrip("\ufffd")


def normalised(text: str) -> str:
    """The form in which texts are compared: compatibility characters, case and white space made one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_prompts(source: RowSource, column: str) -> tuple[list[str], dict[FeatureId, list[str]]]:
    """Prompts for all features, and those of rows whose column `feature` names one, in order; blank ones left out.

    Raises:
        DataError: If there is none, or a row lacks the column.
        FeatureSetError: If `feature` holds something else than a name such as `L12F345`.
    """
    common: list[str] = []
    own: dict[FeatureId, list[str]] = {}
    for index, row in source.rows():
        prompt = text_of(row, text_column=column, source_name=source.name, index=index)
        if not prompt.strip():
            continue
        name = row.get("feature")
        (own.setdefault(FeatureId.parse(name), []) if name else common).append(prompt)
    if not common and not own:
        raise DataError(f"'{source.name}' holds no prompt: every row is blank or there is none.")
    return common, own


def describe(labels: Mapping[FeatureId, str], examples: Mapping[FeatureId, Sequence[Example]]) -> dict[FeatureId, str]:
    """The description of each feature: its label, or a reference to its examples.

    Raises:
        ConfigError: If a feature has neither.
    """
    bare = [feature for feature, label in labels.items() if not label.strip() and not examples.get(feature)]
    if bare:
        raise ConfigError(
            f"{len(bare)} of {len(labels)} features have neither a label nor examples, the first is {bare[0]}, so "
            f"there is nothing to ask for. Write a `label` for each into the feature file, or name a dataset in "
            f"which they fire by `--examples`."
        )
    return {feature: label.strip() or "what the passages below have in common" for feature, label in labels.items()}
