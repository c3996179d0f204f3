"""Text-level detectors, and their intervals against scipy's."""

from __future__ import annotations

import pytest

from qscope_trl.errors import ConfigError
from qscope_trl.monitor.detectors import num_chinese, num_letters, rate_interval, ratio, ratio_interval, text_detector


def test_chinese_counts_texts_and_letters() -> None:
    found = text_detector("chinese")
    assert [found.is_shown(text) for text in ("file", "a 文件 b", "文件夹", "文 件 夹")] == [False, False, True, True]
    assert found.parts is not None
    assert found.parts("ab 文件, é 3") == (2, 5)
    assert (num_chinese("。「」"), num_letters("1 _ -")) == (0, 0)


def test_repetition_and_patterns() -> None:
    loop = text_detector("repetition")
    assert loop.is_shown("a b c a b c a b c")
    assert not loop.is_shown("a b c a b c a b d")
    found = text_detector("regex:^no+$")
    assert [found.is_shown(text) for text in ("noo", "nope")] == [True, False]
    assert found.parts is None


def test_unknown_detectors_raise() -> None:
    with pytest.raises(ConfigError, match="`behaviour` is 'chines'; write `chinese`, `repetition` or `regex:PATTERN`"):
        text_detector("chines")
    with pytest.raises(ConfigError, match=r"`behaviour` is 'regex:\(', which is no regular expression"):
        text_detector("regex:(")


@pytest.mark.parametrize(("hits", "total"), [(0, 7), (3, 7), (7, 7), (40, 512), (1, 1)])
def test_the_rates_interval_is_wilsons(hits: int, total: int) -> None:
    from scipy.stats import binomtest

    wanted = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert rate_interval(hits, total) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_the_ratios_interval_covers_what_resampling_gives() -> None:
    import numpy as np

    parts = [(n % 4, 5 + n % 7) for n in range(200)]
    low, high = ratio_interval(parts)
    draws = np.array(parts)[np.random.default_rng(0).integers(0, 200, (4000, 200))].sum(1)
    wanted = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(wanted), rel=0.02)
    assert low < ratio(parts) < high
    assert ratio([(0, 0)]) == 0
    assert ratio_interval([(1, 2)] * 5) == (0.5, 0.5)
