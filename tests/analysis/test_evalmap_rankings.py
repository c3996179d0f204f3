"""Rankings against SciPy and against all subsets; scores files that are right, and those that are not."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qscope_trl.analysis.evalmap.rankings import (
    Scores,
    bootstrap,
    kendall,
    pair_agreement,
    partial_correlation,
    pearson,
    rank_agreement,
    read_scores,
    spearman,
    subset_agreement,
)
from qscope_trl.errors import DataError


def test_correlations_equal_scipys_and_a_regression() -> None:
    generator = np.random.default_rng(0)
    a, b, c = generator.normal(size=(3, 15))
    b, a = b + c, a + 2 * c
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, b.round(0)) == pytest.approx(stats.spearmanr(a, b.round(0)).statistic)
    assert kendall(a, b.round(0)) == pytest.approx(stats.kendalltau(a, b.round(0)).statistic)
    left = [v - np.polyval(np.polyfit(c, v, 1), c) for v in (a, b)]
    assert partial_correlation(a, b, c) == pytest.approx(stats.pearsonr(*left).statistic)
    assert all(np.isnan(f(np.ones(5), a[:5])) for f in (pearson, spearman, kendall))


def test_subsets_agree_as_all_of_them_do() -> None:
    scores = np.random.default_rng(3).random((6, 6)) < np.linspace(0.2, 0.9, 6)[:, None]
    found = subset_agreement(scores.astype(float), draws=800, num_sizes=6)
    whole = scores.mean(1)
    for place, size in enumerate(found.sizes):
        wanted = [np.nan_to_num(kendall(whole, scores[:, list(r)].mean(1))) for r in combinations(range(6), int(size))]
        assert abs(found.tau[place] - np.mean(wanted)) < 4 * found.error[place] + 1e-12
    assert found.tau[-1] == pytest.approx(1)
    assert found.performance_redundancy == pytest.approx(found.tau.mean())


def test_the_bootstrap_interval_covers_a_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        values = generator.normal(size=40)
        found = bootstrap(lambda rows, values=values: float(values[rows].mean()), 40, draws=200, seed=trial)
        assert found.low <= found.value <= found.high
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 200 <= 0.98


def test_sets_that_share_features_are_seen_to_agree() -> None:
    """Scores built from abilities that the sets share by just their overlap, beside one general ability."""
    generator = np.random.default_rng(2)
    shares = np.array([[1, 0.9, 0.5, 0.1], [0.9, 1, 0.5, 0.1], [0.5, 0.5, 1, 0.2], [0.1, 0.1, 0.2, 1]])
    own = np.linalg.cholesky(shares) @ generator.normal(size=(4, 400))
    general = generator.normal(size=400)
    names = ["a", "b", "c", "d", "all"]
    by_set = {name: own[i] + 2 * general for i, name in enumerate("abcd")} | {"all": general}
    overlap = np.full((5, 5), 0.5)
    overlap[:4, :4] = shares
    scores = Scores(tuple(map(str, range(400))), by_set, {})
    found = pair_agreement(overlap, names, scores, given="all", draws=200)
    assert found is not None
    assert len(found.pairs) == 6
    assert np.allclose(found.correlation, found.overlap, atol=0.12)
    assert found.agreement.low > 0.9
    plain = pair_agreement(overlap, names, scores, draws=50)
    assert plain is not None
    assert plain.correlation.min() > 0.7  # the general ability hides what the sets share
    assert pair_agreement(overlap[:2, :2], names[:2], scores) is None


def test_redundancies_are_compared_over_common_sets() -> None:
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    found = rank_agreement(first, {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.9, "e": 0.0}, draws=100)
    assert found is not None
    assert found.value == pytest.approx(0.8)
    assert rank_agreement(first, {"a": 1.0, "b": 2.0}) is None


def write(folder: Path, text: str) -> Path:
    path = folder / "scores.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_scores_by_set_and_by_sample_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "model,b,a/1,a/0\none,0.5,1,0\ntwo,0.25,1,1\n\n")
    found = read_scores(path, {"a": 2, "b": 7})
    assert found.models == ("one", "two")
    assert found.by_sample["a"].tolist() == [[0, 1], [1, 1]]
    assert {name: value.tolist() for name, value in found.by_set.items()} == {"b": [0.5, 0.25], "a": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,b\none,1\n", r"holds 1 models; rankings need two or more"),
        ("model,b\none,1\none,1\n", r"names a model twice: one"),
        ("model,x\none,1\ntwo,1\n", r"has the column `x`, which is neither a set \(a, b\) nor a row of one"),
        ("model,a/2\none,1\ntwo,1\n", r"has the column `a/2`"),
        ("model,a/0\none,1\ntwo,1\n", r"lacks 1 of the 2 rows of `a`, such as `a/1`"),
        ("model,b\none,good\ntwo,1\n", r"the score of `one` on `b` is 'good', not a number"),
        ("model,b\none,nan\ntwo,1\n", r"the score of `one` on `b` is 'nan', not a number"),
        ("model,b\none,1,2\ntwo,1\n", r"the row of `one` has 2 scores, the header 1"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_scores(write(tmp_path, text), {"a": 2, "b": 7})


def test_a_missing_scores_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The scores '.*none.csv' cannot be read"):
        read_scores(tmp_path / "none.csv", {"a": 2})
