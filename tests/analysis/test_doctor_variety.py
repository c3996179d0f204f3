"""Texts too uniform to judge an SAE by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qscope_trl import SAESuite
from qscope_trl.analysis.doctor.diagnosis import diagnose
from qscope_trl.analysis.doctor.result import Finding
from qscope_trl.analysis.doctor.thresholds import UNIFORM
from qscope_trl.analysis.doctor.variety import effective_tokens, withheld
from qscope_trl.bundled import MODEL, saes
from qscope_trl.demo import assets
from tests.analysis.test_doctor_findings import layer_fit
from tests.tiny import tiny_tokenizer

FAIL = Finding(check="reconstruction", severity="fail", what="x")
VARIED, UNVARIED = [[0, *range(1, 41)]], [[0, *[5] * 39, 6]]


def test_tokens_count_by_their_shares() -> None:
    assert effective_tokens([[9, 1, 2], [9, 3, 4]]) == pytest.approx(4)  # position 0 does not count
    assert effective_tokens([[9, 1, 1, 1, 2]]) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert effective_tokens([[9], []]) == 0
    texts = [row["text"] for row in assets.rows("rules_test")[:40]]
    assert effective_tokens(AutoTokenizer.from_pretrained(MODEL)(texts)["input_ids"]) > 10 * UNIFORM


def test_no_misfit_rests_on_uniform_texts() -> None:
    ok, outliers = (Finding(check=check, severity="ok", what="x") for check in ("l0", "outliers"))
    note = Finding(check="k", severity="note", what="x")
    [kept, told] = withheld([FAIL, note, ok], [layer_fit(fvu=80.0)], tiny_tokenizer(), UNVARIED)
    assert (kept, told.check, told.severity) == (ok, "texts", "warn")
    assert "40 tokens, 2 of them different, and 'w5' is 98% of all (fvu 80.000 in layer 3)." in told.what
    assert withheld([FAIL, outliers], [layer_fit()], tiny_tokenizer(), VARIED) == [FAIL, outliers]


def test_what_uniform_texts_do_not_touch_stands() -> None:
    for found in (
        Finding(check="k", severity="warn", what="x"),
        Finding(check="dtype", severity="fail", what="x"),
    ):
        assert withheld([found], [layer_fit()], tiny_tokenizer(), UNVARIED) == [found]
    weights = Finding(check="weights", severity="fail", what="x")
    assert withheld([weights], [layer_fit(alignment_reshaped=0.6)], tiny_tokenizer(), UNVARIED) == [weights]
    assert [one.check for one in withheld([weights], [layer_fit()], tiny_tokenizer(), UNVARIED)] == ["texts"]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, SAESuite]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(MODEL), SAESuite.from_pretrained(saes())


@pytest.mark.parametrize("text", ["word " * 100, "a" * 100, "a b"])
def test_the_right_saes_are_in_doubt_on_one_word_again_and_again(demo: tuple[Any, Any, SAESuite], text: str) -> None:
    result = diagnose(*demo, [text], layers=[4], scan=1, show_progress=False)
    assert result.layers[0].fvu > 10 or result.layers[0].fvu != result.layers[0].fvu
    assert result.verdict == "doubtful"
    assert any("too uniform to judge by" in finding.what for finding in result.findings)
