"""The Python and commands of the pages: what runs, and why the rest does not.

Every block of `python` or `bash` in `docs/` runs, page by page and in order, unless the line above its fence says why
not: `<!-- not run: the reason -->`.
"""

from __future__ import annotations

import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RUN = ("bash", "python")
SHOWN = ("text", "yaml", "json")
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?```(?P<language>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Args:
        language: What stands after the backticks.
        code: Its lines.
        reason: Why it is not run, or None.
    """

    language: str
    code: str
    reason: str | None


def snippets(text: str) -> list[Snippet]:
    return [Snippet(found["language"], found["code"], found["reason"]) for found in _FENCE.finditer(text)]


def to_run(text: str) -> list[tuple[str, str]]:
    """Language and code of the blocks that run, in order."""
    return [(one.language, one.code) for one in snippets(text) if one.language in RUN and one.reason is None]


def pages_that_run() -> list[Path]:
    return [page for page in sorted(DOCS.glob("*.md")) if to_run(page.read_text(encoding="utf-8"))]


def run_blocks(found: list[tuple[str, str]], name: str) -> None:
    """Python and `qscope` commands, one after the other, in this process."""
    from qscope_trl.cli import main

    variables: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for language, block in found:
            if language == "python":
                exec(compile(block, name, "exec"), variables)
                continue
            for command in block.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                if words:
                    assert words[0] == "qscope", command
                    assert main(words[1:]) == 0, command
