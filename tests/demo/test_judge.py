"""The text-level detector, and which tokens it calls Chinese."""

from __future__ import annotations

import pytest

from qscope_trl.demo.judge import judge, unwanted_tokens


def test_rate_counts_generations_with_three_chinese_characters_or_more() -> None:
    verdict = judge(["plain English", "the file 文件 opens", "the file 文件夹 opens", "打开文件夹"])
    assert verdict.rate == 0.5
    assert verdict.total == 4
    assert verdict.share == pytest.approx((2 + 3 + 5) / (12 + 14 + 15 + 5))


def test_standard_error_is_the_binomial_one() -> None:
    assert judge(["文件夹"] * 1 + ["x"] * 3).standard_error == pytest.approx((0.25 * 0.75 / 4) ** 0.5)


def test_punctuation_and_accents_are_not_chinese() -> None:
    assert judge(["naïve “quotes” — résumé … ©"]).share == 0


def test_unwanted_tokens_hold_a_chinese_lead_byte() -> None:
    from transformers import AutoTokenizer

    from qscope_trl.demo import assets

    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL)
    marks = unwanted_tokens(tokenizer)
    assert 100 < int(marks.sum()) < len(tokenizer) / 2 + 500
    for text, wanted in [("文件夹打开", True), ("Open the file.", False), ("…—“”é", False)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert bool(marks[ids].any()) == wanted, text
    assert not marks[tokenizer.all_special_ids].any()
