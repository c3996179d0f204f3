"""Pieces of HTML reports: one file that needs nothing else, no script and no network, and shows any text as it is.

What comes from data is escaped; what is markup already is `Html`. A content security policy in every page forbids to
load or run anything, whatever a text holds. Charts are in `charts`. Left out: scripts.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qscope_trl.files import write_whole

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #6a6a6a; --high: 255, 140, 0; --low: 40, 120, 255; }
@media (prefers-color-scheme: dark) { :root { --dim: #a2a2a2; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1, h2, h3, h4, p, li, summary, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; line-height: 1.7; }
.text span { border-radius: .2rem; }
.high { background: rgba(var(--high), var(--a)); } .low { background: rgba(var(--low), var(--a)); }
.unread, .dim { color: var(--dim); }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .6rem 0; padding: .3rem .8rem; }
summary { cursor: pointer; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# Control characters are no HTML; they have pictures. Tab and line feed stay.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Html(str):
    """Markup, as against text that must be escaped first."""

    __slots__ = ()


def text(value: object) -> Html:
    """Any value as text: escaped, control characters and lone surrogates made visible; `Html` stays as it is."""
    if isinstance(value, Html):
        return value
    plain = _SURROGATE.sub("\ufffd", str(value)).translate(_PICTURES)
    return Html(html.escape(plain, quote=True))


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after another, those that are not `Html` escaped; `between` is text as well."""
    return Html(text(between).join(text(part) for part in parts))


def coded(value: object) -> Html:
    """Text in which what stands between backticks is shown as code."""
    parts = str(value).split("`")
    # An odd one out opens nothing.
    if len(parts) % 2 == 0:
        return text(value)
    return joined(element("code", part) if place % 2 else part for place, part in enumerate(parts))


def element(name: str, *parts: object, **attributes: object) -> Html:
    """`<name attributes>parts</name>`, all of it escaped but what is `Html`; `class_` is written `class`."""
    given = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{given}>{joined(parts)}</{name}>")


def section(heading: str, *parts: object, level: int = 2, id: str | None = None) -> Html:
    """A heading and what belongs to it."""
    return Html(element(f"h{level}", heading, id=id) + joined(parts))


def details(summary: object, *parts: object, is_open: bool = False) -> Html:
    """A part that the reader folds out."""
    mark = " open" if is_open else ""
    return Html(f"<details{mark}>{element('summary', summary)}{joined(parts)}</details>")


def figure(value: object, digits: int = 3) -> str:
    """A value for a cell: a number with so many decimals, tiny ones in powers of ten, nothing as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    # Never `-0.000`.
    return f"{value + 0.0:.{digits}f}"


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table; numbers are set to the right and rounded by `figure`, other cells are escaped unless `Html`.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
    """
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(_is_number(row[i]) or row[i] is None for row in rows if i < len(row))
        for i in range(len(header))
    ]

    def line(kind: str, cells: Sequence[object]) -> Html:
        return element(
            "tr",
            *(
                element(kind, cell if isinstance(cell, Html) else figure(cell), class_="number" if right else None)
                for cell, right in zip(cells, numeric, strict=False)
            ),
        )

    head = element("thead", line("th", header))
    return element("table", head, element("tbody", *(line("td", row) for row in rows)))


def settings(values: Mapping[str, Any]) -> Html:
    """Names and values as a table of two columns."""
    return table(["setting", "value"], [[name, Html(text(value))] for name, value in values.items()])


def highlighted(tokens: Sequence[str], values: Sequence[float | None], maximum: float) -> Html:
    """A text whose tokens are shaded by a value, which the pointer shows.

    Args:
        tokens: Text of each token, as `token_texts` gives it. An empty one belongs to the next that is not empty, as
            the bytes of one character do; their values are shown together and the largest one shades.
        values: Value of each token: positive ones orange, negative ones blue, 0 without shade. None or NaN: not read,
            grey.
        maximum: Value of the full shade.

    Raises:
        ValueError: If there are not as many values as tokens.
    """
    parts: list[Html] = []
    waiting: list[float | None] = []
    last = len(tokens) - 1
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        waiting.append(None if value is None or math.isnan(value) else float(value))
        if token or place == last:
            parts.append(_shaded(token or "\ufffd", waiting, maximum))
            waiting = []
    return element("div", *parts, class_="text", dir="auto")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, such that all together are the text.

    A token that ends inside a character, as in byte-level BPE, has an empty text; the token that completes the
    character has all of it. Time grows with the square of the length: give the part that is to be shown.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids of the text.
    """

    def decoded(piece: Sequence[int]) -> str:
        return str(tokenizer.decode(list(piece), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole = decoded(ids)
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        # Half a character is decoded to a mark that the whole text has not, so this is no beginning of it.
        so_far = decoded(ids[:end]) if end < len(ids) else whole
        is_complete = len(so_far) >= done and whole.startswith(so_far)
        texts.append(whole[done : len(so_far)] if is_complete else "")
        done = len(so_far) if is_complete else done
    return texts


def page(title: str, body: object, style: str = "") -> str:
    """A whole page: the title as heading, then the body, whose parts are `Html`.

    Args:
        title: Its title.
        body: What follows.
        style: CSS beside the page's own. It is written as it is, so nothing of data may be in it.
    """
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{element('title', title)}<style>{_STYLE}{style}</style>"
    )
    heading = element("h1", title)
    return f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>{heading}\n{text(body)}\n</body></html>\n"


def frame(body: object) -> str:
    """A part that is shown alone in a small frame, such as a table's cell: the page's style and policy, no heading."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    small = "body { margin: 0; padding: .2rem; max-width: none; }"
    return (
        f"<!DOCTYPE html>\n<html><head>{head}<style>{_STYLE}{small}</style></head><body>{text(body)}</body></html>\n"
    )


def write_page(path: str | Path, title: str, body: object, style: str = "") -> None:
    """Write a page, as `page` makes it, whole or not at all; its folder is made if there is none.

    Raises:
        OSError: If it cannot be written.
    """
    write_whole(Path(path), page(title, body, style))


def _shaded(token: str, values: Sequence[float | None], maximum: float) -> Html:
    # A line break has no width to shade.
    shown = text(token.replace("\n", "\u21b5\n"))
    read = [value for value in values if value is not None]
    if not read:
        return element("span", shown, class_="unread", title="not read")
    value = max(read, key=abs)
    if value == 0:
        return shown if "\n" not in token else text(token)
    share = min(1.0, abs(value) / maximum) if maximum > 0 else 0.0
    title = ", ".join(figure(item) for item in values)
    return element(
        "span", shown, class_="high" if value > 0 else "low", style=f"--a:{0.1 + 0.8 * share:.2f}", title=title
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
