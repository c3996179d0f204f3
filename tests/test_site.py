"""The docs site: it builds without a warning, loads nothing from elsewhere, and is complete."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import qscope_trl
from qscope_trl import cli, errors
from tests.snippets import DOCS, RUN, SHOWN, snippets

ROOT = DOCS.parent
PACKAGE = ROOT / "qscope_trl"
PAGES = sorted(DOCS.glob("*.md"))
ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
# Where every message needs its heading: what only shows when a run is under way. The others have one for each family.
IN_FULL = (
    "AttachError",
    "EndpointError",
    "KernelError",
    "ModelStructureError",
    "NonFiniteError",
    "PenaltySelfCheckError",
    "QScopeWarning",
    "SteeringError",
)


class Page(HTMLParser):
    """Ids, links and loaded files of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "canonical" not in values.get("rel", ""):
            self.loaded.append(values["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once by whichever of the test processes comes first."""
    pytest.importorskip("mkdocs", reason="the site is built with the extra `docs`")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").is_file():
            build(folder)
            (folder / "built").touch()
    return folder


def build(folder: Path) -> None:
    # Without `--quiet`: with it, warnings are not counted, and strict mode lets them pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    # A proxy that refuses everything: a build that asks for anything on the net fails.
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **closed, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def messages() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts" / "docs_site"))
    try:
        import messages
    finally:
        sys.path.pop(0)
    return messages


def test_every_page_is_in_the_site(site: Path) -> None:
    missing = [page.name for page in PAGES if not (site / page.with_suffix(".html").name).is_file()]
    assert not missing


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    outside = {(path.name, file) for path, page in pages.items() for file in page.loaded if urlsplit(file).netloc}
    assert not outside
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert styles
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s)\"']*", styles)


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[target].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_the_reference_has_every_public_name(pages: dict[Path, Page]) -> None:
    ids = {one for path, page in pages.items() if path.parent.name == "reference" for one in page.ids}
    names = [f"{module}.{name}" for name, module in qscope_trl._PUBLIC.items()]
    names += [f"qscope_trl.errors.{kind.__name__}" for kind in ERRORS]
    assert [name for name in names if name not in ids] == []


def test_the_reference_has_every_flag_of_every_command(site: Path) -> None:
    from qscope_trl.config.rules import RulesEvaluateConfig, RulesLearnConfig
    from qscope_trl.config.steer import SteerConfig
    from qscope_trl.training.grpo_run import GRPORun
    from qscope_trl.training.sft import SFTRun

    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    parts = dict(re.findall(r'<h2 id="qscope-(\w+)">(.*?)(?=<h2|</article>)', text, re.DOTALL))
    assert set(parts) == set(cli._ABOUT)
    settings = {"steer": [SteerConfig], "rules": [RulesLearnConfig, RulesEvaluateConfig]}
    for name, run in (("sft", SFTRun), ("grpo", GRPORun)):
        kinds = [qscope_trl.config.training, sys.modules["qscope_trl.config.rollouts"]]
        settings[name] = [getattr(module, kind) for kind in _hints(run) for module in kinds if hasattr(module, kind)]
        assert len(settings[name]) >= 4
    for command, kinds in settings.items():
        flags = {item.name for kind in kinds for item in dataclasses.fields(kind)}
        shown = set(re.findall(r"<code>--(\w+)</code>", parts[command]))
        # Batches of GRPO carry no columns into the loss; `qscope grpo` refuses it.
        assert flags - shown == ({"penalty_group_column"} if command == "grpo" else set()), command
    for command, content in parts.items():
        assert "--" in content, command


def _hints(kind: type) -> list[str]:
    return [str(item.type) for item in dataclasses.fields(kind) if item.type != "Any"]


def test_the_search_knows_messages_and_not_copies_of_files(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert {"troubleshooting.html", "reference/messages.html", "index.html"} <= places
    assert not [place for place in places if place.startswith("repository/")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = snippets(text)
    assert len(found) * 2 == len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)), "a fence that is not understood"
    assert {one.language for one in found} <= {*RUN, *SHOWN}
    marks = re.findall(r"<!-- not run", text)
    reasons = [one.reason for one in found if one.reason is not None]
    assert len(marks) == len(reasons), "a mark that stands before no block"
    assert all(len(reason.split()) >= 4 for reason in reasons)
    assert all(one.language in RUN for one in found if one.reason is not None)


@functools.cache
def quotes() -> list[tuple[str, str]]:
    """Class and text of every message that the page of troubles quotes."""
    found = []
    for one in snippets((DOCS / "troubleshooting.md").read_text(encoding="utf-8")):
        for line in one.code.splitlines():
            kind, _, text = line.partition(": ")
            found.append((kind, text))
    return found


def is_of(quote: str, message: str) -> bool:
    """Whether the parts of a quote, between what varies, stand in a message in this order."""
    place = 0
    for part in (part.strip() for part in quote.split("...")):
        at = message.find(part, place)
        if at < 0:
            return False
        place = at + len(part)
    return True


def test_quotes_match_parts_in_order_only() -> None:
    assert is_of("No SAE for ... in '...'", "No SAE for layer … in '…': found")
    assert not is_of("in '...' No SAE", "No SAE for layer … in '…'")


def test_quoted_messages_exist_in_the_source(messages: ModuleType) -> None:
    known, texts = {one.__name__ for one in ERRORS}, messages.texts(PACKAGE)
    assert {kind for kind, _ in quotes()} <= known
    too_short = [quote for _, quote in quotes() if max(len(part.strip()) for part in quote.split("...")) < 6]
    assert not too_short
    assert [quote for _, quote in quotes() if not any(is_of(quote, text) for text in texts)] == []


def test_every_error_class_has_a_heading() -> None:
    assert {kind for kind, _ in quotes()} == {one.__name__ for one in ERRORS} - {"QScopeError"}
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        outside = re.sub(r"```.*?```", "", rest.split("\n## ")[0], flags=re.DOTALL)
        assert len(outside.split()) >= 8, f"`{title}` says neither why nor what to do"


def test_every_message_of_a_running_job_has_a_heading(messages: ModuleType) -> None:
    there = messages.messages(PACKAGE, frozenset(IN_FULL))
    assert {one.kind for one in there} == set(IN_FULL)
    without = [
        f"{one.place}: {one.kind}: {one.text}"
        for one in there
        if not any(kind == one.kind and is_of(quote, one.text) for kind, quote in quotes())
    ]
    assert not without, "\n".join(["no heading in docs/troubleshooting.md for:", *without])


def test_methods_name_files_and_functions_that_exist() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(\.\./(qscope_trl/[\w/]+\.py)\)\s+\(([^()]*)\)", text)
    found += re.findall(r"\[[\w/]+\.py\]\(\.\./(qscope_trl/[\w/]+\.py)\):\s+([^()]*)\)", text)
    assert len(found) >= 20
    for path, names in found:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        defined |= {
            t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
        }
        named = re.findall(r"`(\w+)`", names.split(", kind")[0])
        assert named, path
        assert set(named) <= defined, path
