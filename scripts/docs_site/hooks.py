"""What mkdocs does for this site beyond the pages in `docs/`: generated pages, and the files that pages link to.

Reference pages are made from docstrings, settings and source, so nothing is written twice. Links from a page to a
file of the repository (`../benchmarks/results/x.md`), which work where the repository is browsed, lead to a copy of it
within the site. Nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reference
import repository
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = "changelog.md"


def on_config(config: Any) -> Any:
    """Put the groups of Python names into the navigation."""
    groups = [{reference.TITLES[group]: f"reference/{group}.md"} for group in reference.public_names(ROOT)]
    section = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    section[:0] = groups
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the linked files."""
    for name, text in {**reference.pages(ROOT), CHANGELOG: (ROOT / "CHANGELOG.md").read_text("utf-8")}.items():
        files.append(File.generated(config, name, content=text))
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    try:
        linked = repository.linked_pages(ROOT, texts)
    except repository.MissingFileError as err:
        raise PluginError(str(err)) from err
    for name, text in linked.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links within the site."""
    return repository.rewrite(markdown, page.file.src_uri)
