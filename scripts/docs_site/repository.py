"""Files of the repository outside `docs/` that pages link to, as pages of the site.

A link `../PATH` of `docs/x.md` becomes `repository/PATH` (Markdown) or `repository/PATH.md` (source, shown as code; a
folder, listed). Linked Markdown may link further. These pages are left out of the search.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = "repository"
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ \t]*$)", re.DOTALL | re.MULTILINE)
_HEADER = "---\nsearch:\n  exclude: true\n---\n"
_LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".cu": "cpp"}


class MissingFileError(Exception):
    """A page links to a file that the repository does not have."""


def linked_pages(root: Path, pages: Mapping[str, str]) -> dict[str, str]:
    """The pages, by name, for every file outside `docs/` that these pages, or such files, link to.

    Args:
        root: Folder of the repository.
        pages: Markdown of the site's own pages, by name.

    Raises:
        MissingFileError: If a linked file does not exist.
    """
    made: dict[str, str] = {}
    waiting = [(name, text) for name, text in pages.items()]
    while waiting:
        name, text = waiting.pop()
        for path in _outside(text, name):
            target = page_name(path)
            if target in made:
                continue
            if not (root / path).exists():
                raise MissingFileError(f"{name} links to '{path}', which the repository does not have.")
            made[target] = _page(root, path)
            if path.endswith(".md"):
                waiting.append((target, made[target]))
    return made


def page_name(path: str) -> str:
    """Name of the page for a file of the repository."""
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path.rstrip('/')}.md"


def rewrite(text: str, page: str) -> str:
    """The Markdown of a page, with its links to files of the repository leading to pages of the site."""

    def replaced(match: re.Match[str]) -> str:
        path = _resolved(match[1], page)
        if path is None:
            return match[0]
        target = path.removeprefix("docs/") if path.startswith("docs/") else page_name(path)
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + (match[2] or "")

    return _outside_fences(text, lambda part: _LINK.sub(replaced, part))


def _outside(text: str, page: str) -> list[str]:
    found: list[str] = []
    _outside_fences(text, lambda part: found.extend(match[1] for match in _LINK.finditer(part)) or part)
    paths = [_resolved(link, page) for link in found]
    return [path for path in paths if path is not None and not path.startswith("docs/")]


def _resolved(link: str, page: str) -> str | None:
    """Path within the repository, or None for links that need no change."""
    if re.match(r"[a-z]+:", link) or link.startswith("/"):
        return None
    inside = page.startswith(f"{FOLDER}/") or page == "changelog.md"
    # Where the page's file is in the repository: a copy of PATH stands for PATH.
    own = page.removeprefix(f"{FOLDER}/") if inside else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(own), link))
    return path if inside or not path.startswith("docs/") else None


def _page(root: Path, path: str) -> str:
    file = root / path
    if file.is_dir():
        listed = sorted(item.name for item in file.iterdir() if not item.name.startswith(("_", ".")))
        return f"{_HEADER}# `{path}`\n\n" + "".join(f"- `{name}`\n" for name in listed)
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return _HEADER + text
    return f"{_HEADER}# `{path}`\n\n~~~~{_LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n~~~~\n"


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts = _FENCE.split(text)
    return "".join(part if n % 2 else change(part) for n, part in enumerate(parts))
