"""Pieces of pages: numbers, code in texts, styles."""

from __future__ import annotations

import pytest

from qscope_trl.monitor import html


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.5, "0.500"), (-0.0, "0.000"), (2e-5, "2.0e-05"), (3, "3"), (True, "True"), (None, "-"), (float("nan"), "-")],
)
def test_figures_are_short_and_zero_has_no_sign(value: object, wanted: str) -> None:
    assert html.figure(value) == wanted


def test_what_stands_between_backticks_is_code_and_nothing_else_is_markup() -> None:
    assert html.coded("a `b<c` d `e`") == "a <code>b&lt;c</code> d <code>e</code>"
    assert html.coded("a `b <i>") == "a `b &lt;i&gt;"


def test_a_page_takes_a_style_beside_its_own() -> None:
    shown = html.page("<t>", "body", ".mine { color: red; }")
    assert shown.count("<style>") == 1
    assert ".mine { color: red; }</style>" in shown
    assert "<h1>&lt;t&gt;</h1>" in shown
