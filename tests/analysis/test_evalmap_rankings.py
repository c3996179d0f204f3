"""Rankings against SciPy and against all subsets; scores files that are right, and those that are not."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qscope_trl.analysis.evalmap import rankings
from qscope_trl.analysis.evalmap.rankings import (
    Scores,
    bootstrap,
    kendall,
    mean_taus,
    model_weights,
    pair_agreement,
    partial_correlation,
    pearson,
    rank_agreement,
    read_scores,
    resampled_taus,
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
    assert found.interval.value == found.performance_redundancy
    assert -1 <= found.interval.low < found.interval.value < found.interval.high <= 1


def test_taus_over_resamples_equal_scipys_on_the_drawn_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankings, "_PAIRS", 4)
    generator = np.random.default_rng(5)
    whole, parts = generator.integers(0, 4, 6).astype(float), generator.integers(0, 3, (5, 6)).astype(float)
    parts[2] = 1  # ranks none
    weights = np.vstack([np.ones(6), model_weights(6, 30, 7), np.eye(6)[:1] * 6])
    found = resampled_taus(whole, parts, weights)
    for place, row in enumerate(weights):
        models = np.repeat(np.arange(6), row.astype(int))
        wanted = [kendall(whole[models], part[models]) for part in parts]
        np.testing.assert_allclose(found[place], wanted, atol=1e-12)
    means = mean_taus(whole, parts, weights)
    assert means[0] == pytest.approx(np.nan_to_num(found[0]).mean())
    assert np.isnan(means[-1])  # one model alone is not ranked by the whole set either
    assert (model_weights(6, 30, 7).sum(1) == 6).all()


def test_the_interval_of_performance_redundancy_is_that_of_drawing_models_anew() -> None:
    """With one size, the whole set's half and the whole: the same percentiles by a plain loop."""
    by_sample = np.random.default_rng(6).random((8, 2))
    found = subset_agreement(by_sample, draws=40, resamples=60, seed=3)
    draw, models = np.random.default_rng(3), np.random.default_rng(3)
    parts = [by_sample[:, draw.choice(2, 1, replace=False)].mean(1) for _ in range(40)]
    whole = by_sample.mean(1)
    values = []
    for _ in range(60):
        rows = models.integers(0, 8, 8)
        values.append((np.mean([np.nan_to_num(kendall(whole[rows], part[rows])) for part in parts]) + 1) / 2)
    assert found.interval[1:] == pytest.approx(np.quantile(values, [0.025, 0.975]))


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
        ("model;a;b\none;1;2\ntwo;1;2\n", r"has one column only, `model;a;b`, and no scores. .* with commas between"),
        ("model\none\ntwo\n", r"has one column only, `model`, and no scores"),
        ("model,a,a\none,1,1\ntwo,1,0\n", r"has scores of `a` twice. Leave one of the columns out"),
        ("model,a/0,a/00,a/1\none,1,1,0\ntwo,1,0,0\n", r"has scores of `a/00` twice"),
        (
            "model,a,a/0,a/1\none,1,1,0\ntwo,1,0,0\n",
            r"of `a` as a whole and of its samples.* Leave the column `a` out",
        ),
        ("model,b\none,1,2\ntwo,1\n", r"the row of `one` has 2 scores, the header 1"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_scores(write(tmp_path, text), {"a": 2, "b": 7})


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text('"model",b\none,1\ntwo,2\n', encoding="utf-8-sig")
    assert read_scores(path, {"b": 7}).by_set["b"].tolist() == [1, 2]


def test_a_missing_scores_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The scores '.*none.csv' cannot be read"):
        read_scores(tmp_path / "none.csv", {"a": 2})
