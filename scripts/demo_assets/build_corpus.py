"""Turn freely licensed Debian documentation into paragraphs of English and Chinese text.

The packages of `PACKAGES` are fetched by name with `apt-get download` and unpacked with `dpkg -x` (`--download`);
nothing is installed. Output is one JSON line per document: `{"source": ..., "doc": ..., "paragraphs": [[en, zh],
...]}` in reading order, an empty string where a language is missing. English and Chinese are aligned by paragraph id
in LibreOffice's help, by position where two HTML pages have the same number of blocks. `--sources` writes package,
version, licence and amount of text as Markdown.

Left out: code blocks, menus, paragraphs which the translation left in English, and every paragraph already seen
elsewhere.
"""

import argparse
import gzip
import json
import logging
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TypedDict

logger = logging.getLogger("build_corpus")

# Package -> licence of its text, read from the package's copyright file (checked by hand for Debian 12).
PACKAGES = {
    "libreoffice-help-en-us": "MPL-2.0",
    "libreoffice-help-zh-cn": "MPL-2.0",
    "debian-handbook": "GPL-2.0+ or CC-BY-SA-3.0",
    "debian-reference-en": "GPL-2+",
    "debian-reference-zh-cn": "GPL-2+",
    "installation-guide-amd64": "GPL-2",
    "debian-faq": "permissive copyleft of the FAQ: copies and modified versions under the same notice",
    "debian-faq-zh-cn": "the same as debian-faq",
    "maint-guide": "GPL-2.0+",
    "maint-guide-zh-cn": "GPL-2.0+",
    "debmake-doc": "Expat",
    "developers-reference": "GPL-2+",
    "debian-edu-doc-en": "GPL-2+",
    "debian-edu-doc-zh-cn": "GPL-2+",
    "kicad-doc-en": "GPL-3+",
    "kicad-doc-zh": "GPL-3+",
    "manpages": "per page: Linux-man-pages-copyleft, GPL-2+, BSD, Expat, public domain",
    "manpages-zh": "per page: GFDL-1.2+, GPL-2.0+, Linux-man-pages-copyleft, BSD, public domain",
}
TRANSLATION_OF = {
    "libreoffice-help-zh-cn": "libreoffice-help-en-us",
    "debian-reference-zh-cn": "debian-reference-en",
    "debian-faq-zh-cn": "debian-faq",
    "maint-guide-zh-cn": "maint-guide",
    "debian-edu-doc-zh-cn": "debian-edu-doc-en",
    "kicad-doc-zh": "kicad-doc-en",
}
# Glob of the English pages, and what to replace in a page's path to get its translation's (nothing: not translated).
HTML_SOURCES: list[tuple[str, dict[str, str]]] = [
    (
        "libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text/**/*.html",
        {"help-en-us": "help-zh-cn", "/en-US/": "/zh-CN/"},
    ),
    ("debian-handbook/usr/share/doc/debian-handbook/html/en-US/*.html", {"/en-US/": "/zh-CN/"}),
    (
        "debian-reference-en/usr/share/debian-reference/*.en.html",
        {"reference-en": "reference-zh-cn", ".en.": ".zh-cn."},
    ),
    ("installation-guide-amd64/usr/share/doc/installation-guide-amd64/en/*.html", {"/en/": "/zh_CN/"}),
    (
        "debian-faq/usr/share/doc/debian/FAQ/*.en.html",
        {"debian-faq": "debian-faq-zh-cn", "FAQ/": "FAQ/zh-cn/", ".en.": ".zh-cn."},
    ),
    ("maint-guide/usr/share/doc/maint-guide/html/*.en.html", {"maint-guide": "maint-guide-zh-cn", ".en.": ".zh-cn."}),
    ("debmake-doc/usr/share/doc/debmake-doc/html/*.en.html", {".en.": ".zh-cn."}),
    ("developers-reference/usr/share/developers-reference/*.html", {}),
    ("debian-edu-doc-en/usr/share/doc/debian-edu-doc-en/*bookworm*.html", {"edu-doc-en": "edu-doc-zh-cn"}),
    ("kicad-doc-en/usr/share/doc/kicad/help/en/*.html", {"kicad-doc-en": "kicad-doc-zh", "/en/": "/zh/"}),
]
MAN_SOURCES = ["manpages/usr/share/man/man*/*.gz", "manpages-zh/usr/share/man/zh_CN/man*/*.gz"]

BLOCK_TAGS = frozenset(
    [
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "li",
        "dt",
        "dd",
        "td",
        "th",
        "div",
        "section",
        "body",
        "title",
        "br",
        "tr",
        "table",
        "ul",
        "ol",
        "dl",
        "blockquote",
    ]
)
SKIP_TAGS = frozenset(["script", "style", "nav", "header", "footer", "aside", "head", "button", "pre", "svg"])
VOID_TAGS = frozenset(["br", "img", "input", "meta", "link", "hr", "col"])
CJK = re.compile(r"[\u3400-\u9fff]")
LETTER = re.compile(r"[A-Za-z\u3400-\u9fff]")


class Document(TypedDict):
    """Paragraphs of one page as `[en, zh]`, translations of each other; an empty string where there is none."""

    source: str
    doc: str
    paragraphs: list[list[str]]


class BlockParser(HTMLParser):
    """Collect the text of block elements as `(id, text)`, without code blocks and navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        self._skipped: list[str] = []
        self._id = ""
        self._parts: list[str] = []

    def flush(self) -> None:
        """Close the block under construction."""
        text = " ".join("".join(self._parts).split())
        if text:
            self.blocks.append((self._id, text))
        self._parts, self._id = [], ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a block, or a region to be skipped."""
        attributes = dict(attrs)
        if (
            self._skipped
            or tag in SKIP_TAGS
            or attributes.get("class") in {"navheader", "navfooter", "docnav top", "toc"}
        ):
            if tag not in VOID_TAGS:
                self._skipped.append(tag)
            return
        if tag == "br" and self._id:
            self._parts.append(" ")
        elif tag in BLOCK_TAGS:
            self.flush()
            self._id = attributes.get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        """Close a block or a skipped region (an unclosed element inside the region ends with it)."""
        if self._skipped:
            if tag in self._skipped:
                while self._skipped.pop() != tag:
                    pass
        elif tag in BLOCK_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Add running text."""
        if not self._skipped:
            self._parts.append(data)


def html_blocks(path: Path) -> list[tuple[str, str]]:
    """Return `(id, text)` of every block of an HTML page, in order."""
    parser = BlockParser()
    parser.feed(path.read_text("utf-8", errors="replace"))
    parser.close()
    parser.flush()
    return [(block_id, clean(text)) for block_id, text in parser.blocks]


def clean(text: str) -> str:
    """Normalise typography, and drop spaces which an HTML line break put between two Chinese characters."""
    text = text.translate(
        str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u200b": ""})
    )
    text = re.sub(r"(?<=[\u3000-\u9fff\uff00-\uffef]) +(?=[\u3000-\u9fff\uff00-\uffef])", "", text)
    return " ".join(text.split())


def man_blocks(path: Path) -> list[str]:
    """Return the paragraphs of a man page's source: macros and escapes removed, preformatted regions skipped."""
    paragraphs: list[str] = []
    lines: list[str] = []
    is_preformatted = False
    for line in gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace").splitlines():
        macro = line.split(" ", 1)[0].split("\t", 1)[0] if line[:1] in ".'" else ""
        if macro in {".nf", ".EX", ".TS"}:
            is_preformatted = True
        elif macro in {".fi", ".EE", ".TE"}:
            is_preformatted = False
        elif is_preformatted or macro.startswith(('.\\"', "'\\\"")):
            continue
        elif macro in {".B", ".I", ".BR", ".IR", ".RB", ".RI", ".BI", ".IB", ".SM"}:
            words = line.partition(" ")[2].replace('"', "")
            lines.append(words if len(macro) == 2 else words.replace(" ", ""))
        elif not macro and line.strip():
            lines.append(line)
        else:
            paragraphs.append(" ".join(lines))
            lines = []
    paragraphs.append(" ".join(lines))
    replacements = {
        r"\\f(\[\w*\]|\(..|.)": "",
        r"\\[&/,|^%]": "",
        r"\\\(aq": "'",
        r"\\\((lq|rq|dq)": '"',
        r"\\-": "-",
        r"\\e": r"\\",
    }
    for pattern, replacement in (replacements | {r"\\\(..|\\\[\w+\]|\\s[-+]?\d|\\.": ""}).items():
        paragraphs = [re.sub(pattern, replacement, paragraph) for paragraph in paragraphs]
    return [clean(paragraph) for paragraph in paragraphs]


def language(text: str) -> str | None:
    """Return `en` (no Chinese character), `zh` (mostly Chinese), or None for neither or too little running text."""
    num_letters, num_cjk = len(LETTER.findall(text)), len(CJK.findall(text))
    if num_letters < max(4, 0.4 * len(text.replace(" ", ""))):
        return None
    if num_cjk == 0:
        return "en" if text.isascii() or num_letters > 0.6 * len(text) else None
    return "zh" if num_cjk > 0.4 * num_letters else None


def pair_blocks(english: list[tuple[str, str]], chinese: list[tuple[str, str]]) -> list[list[str]]:
    """Align two pages by block id, or by position if they have equally many blocks; else leave them unaligned."""
    by_id = {block_id: text for block_id, text in chinese if block_id.startswith(("par_", "hd_", "bm_"))}
    if by_id:
        return [[text, by_id.get(block_id, "")] for block_id, text in english]
    if len(english) == len(chinese):
        return [[left, right] for (_, left), (_, right) in zip(english, chinese, strict=True)]
    return [[text, ""] for _, text in english] + [["", text] for _, text in chinese]


def documents(root: Path) -> Iterator[Document]:
    """Yield every document below the folder of unpacked packages; a paragraph seen before is dropped."""
    seen: set[str] = set()

    def keep(text: str, wanted: str) -> str:
        if language(text) != wanted or text in seen:
            return ""
        seen.add(text)
        return text

    for pattern, replacements in HTML_SOURCES:
        for path in sorted(root.glob(pattern)):
            relative = str(path.relative_to(root))
            translated = relative
            for old, new in replacements.items():
                translated = translated.replace(old, new)
            chinese = html_blocks(root / translated) if replacements and (root / translated).exists() else []
            kept = [[keep(left, "en"), keep(right, "zh")] for left, right in pair_blocks(html_blocks(path), chinese)]
            yield {
                "source": relative.split("/")[0],
                "doc": relative,
                "paragraphs": [pair for pair in kept if any(pair)],
            }
    for pattern in MAN_SOURCES:
        for path in sorted(root.glob(pattern)):
            relative = str(path.relative_to(root))
            is_chinese = "/zh_CN/" in relative
            kept = [["", keep(text, "zh")] if is_chinese else [keep(text, "en"), ""] for text in man_blocks(path)]
            yield {
                "source": relative.split("/")[0],
                "doc": relative,
                "paragraphs": [pair for pair in kept if any(pair)],
            }


def download(root: Path) -> None:
    """Fetch the packages with apt and unpack them below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True)
    for archive in sorted(root.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive.name, archive.name.split("_")[0]], cwd=root, check=True)


def write_sources(path: Path, root: Path, num_chars: Counter[tuple[str, str]]) -> None:
    """Write the table of packages, versions and licences."""
    versions = {}
    for archive in sorted(root.glob("*.deb")):
        fields = subprocess.run(
            ["dpkg-deb", "-f", archive.name, "Package", "Version"], cwd=root, check=True, capture_output=True
        )
        name, version = (line.split(": ", 1)[1] for line in fields.stdout.decode().splitlines())
        versions[name] = version
    lines = [
        "# Sources of the demo assets",
        "",
        "The tokenizer, the model and the SAEs of this folder were trained from scratch on running text of these",
        "Debian 12 packages (`scripts/demo_assets/`); the licences are those of the packages' copyright files",
        "(`/usr/share/doc/<package>/copyright`).",
        "**The JSON lines files in `data/` are excerpts of LibreOffice's help alone**: (c) 2000, 2010 LibreOffice",
        "contributors and/or their affiliates, Mozilla Public License 2.0 (https://mozilla.org/MPL/2.0/), source code",
        "form at https://git.libreoffice.org/help. The rest of the package is Apache-2.0.",
        "",
        "| package | version | licence of the text | characters used, English | Chinese |",
        "|---|---|---|---|---|",
    ]
    for package, licence in PACKAGES.items():
        # A translation in a package of its own is booked by the documents under the English package.
        original = TRANSLATION_OF.get(package, package)
        english = 0 if package in TRANSLATION_OF else num_chars[package, "en"]
        chinese = 0 if package in TRANSLATION_OF.values() else num_chars[original, "zh"]
        lines.append(f"| {package} | {versions.get(package, '?')} | {licence} | {english:,} | {chinese:,} |")
    path.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Parse the command line and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument(
        "--download", action="store_true", help="fetch and unpack the packages first (needs apt and dpkg)"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file to write")
    parser.add_argument("--sources", type=Path, help="Markdown table of the sources to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    if args.download:
        download(args.packages)
    num_chars: Counter[tuple[str, str]] = Counter()
    num_pairs = 0
    with args.output.open("w", encoding="utf-8") as file:
        for document in documents(args.packages):
            if not document["paragraphs"]:
                continue
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
            source = document["source"]
            num_chars[source, "en"] += sum(len(english) for english, _ in document["paragraphs"])
            num_chars[source, "zh"] += sum(len(chinese) for _, chinese in document["paragraphs"])
            num_pairs += sum(all(pair) for pair in document["paragraphs"])
    logger.info("%d English-Chinese pairs", num_pairs)
    if args.sources:
        write_sources(args.sources, args.packages, num_chars)


if __name__ == "__main__":
    main()
