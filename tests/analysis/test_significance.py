"""Significance against scipy, scikit-learn and brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from qscope_trl.analysis import significance, text_scores
from qscope_trl.analysis.evidence import auroc, log_odds
from qscope_trl.analysis.significance import (
    benjamini_hochberg,
    bootstrap_interval,
    familywise_p,
    hypergeometric_tail,
    midranks,
    permutation_p,
    permutation_test,
    spearman,
    split_half,
)
from qscope_trl.analysis.text_scores import LEFT_OUT, TextScores
from qscope_trl.errors import ConfigError

SCORES = ["mean_difference", "delta", "log_odds", "monolinguality", "auroc"]


def dense_texts(
    features: int = 30, sizes: tuple[int, ...] = (7, 6, 5), seed: int = 0, rate: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each feature comes to in each text (whole numbers, so that ties are common), tokens, groups."""
    draw = np.random.default_rng(seed)
    count = sum(sizes)
    values = draw.integers(1, 6, (count, features)) * (draw.random((count, features)) < rate)
    return values.astype(np.float32), draw.integers(1, 9, count), np.repeat(np.arange(len(sizes)), sizes)


def sparse(rank_by: str, values: np.ndarray, tokens: np.ndarray, groups: np.ndarray) -> TextScores:
    """The same as `TextScores.of` makes it."""
    by_feature = [np.nonzero(column)[0] for column in values.T]
    if rank_by == "auroc":
        by_feature = [rows[np.argsort(values[rows, f], kind="stable")] for f, rows in enumerate(by_feature)]
    return TextScores(
        rank_by,
        torch.tensor([0, *np.cumsum([len(rows) for rows in by_feature])]),
        torch.from_numpy(np.concatenate(by_feature).astype(np.int32)),
        torch.from_numpy(np.concatenate([values[rows, f] for f, rows in enumerate(by_feature)])),
        torch.from_numpy(tokens),
        torch.from_numpy(groups),
    )


def score(rank_by: str, values: np.ndarray, tokens: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Every score from its definition; texts of group -1 and those without tokens take no part."""
    here = (groups >= 0) & (tokens > 0)
    values, tokens, groups = values[here].astype(float), tokens[here], groups[here]
    mine = groups == 0

    def mean(mask: np.ndarray) -> np.ndarray:
        return np.asarray(values[mask].sum(0) / tokens[mask].sum())

    if rank_by == "mean_difference":
        return mean(mine) - mean(~mine)
    if rank_by == "monolinguality":
        return mean(mine) - np.mean([mean(groups == g) for g in range(1, groups.max() + 1)], axis=0)
    if rank_by == "auroc":
        wins = stats.mannwhitneyu(values[mine], values[~mine], axis=0, method="asymptotic").statistic
        return np.asarray(wins / (mine.sum() * (~mine).sum()))
    fires = values > 0
    if rank_by == "delta":
        return np.asarray(fires[mine].mean(0) - fires[~mine].mean(0))
    a, b = fires[mine].sum(0) + 0.5, (~fires[mine]).sum(0) + 0.5
    c, d = fires[~mine].sum(0) + 0.5, (~fires[~mine]).sum(0) + 0.5
    return np.where(fires.any(0), np.log(a * d / (b * c)), 0.0)


@pytest.mark.parametrize("rank_by", SCORES)
def test_scores_under_any_parting_equal_their_definition(rank_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of seven features, so that their seams are crossed.
    monkeypatch.setattr(text_scores, "_BLOCK_ELEMENTS", 7 * 12)
    values, tokens, groups = dense_texts()
    tokens[3] = tokens[11] = 0
    values[tokens == 0] = 0
    values[:, 4] = 0
    texts = sparse(rank_by, values, tokens, groups)
    np.testing.assert_allclose(texts.observed(), score(rank_by, values, tokens, groups), rtol=1e-6, atol=1e-6)
    draw = np.random.default_rng(5)
    shuffled = np.stack([draw.permutation(groups) for _ in range(12)], axis=1)
    partial = np.where(draw.random(shuffled.shape) < 0.2, LEFT_OUT, shuffled)
    for partings in (shuffled, partial):
        found = np.concatenate([block.numpy() for _, block in texts.under(torch.from_numpy(partings))])
        wanted = np.stack([score(rank_by, values, tokens, partings[:, p]) for p in range(12)], axis=1)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    chosen = torch.tensor([9, 4, 22])
    np.testing.assert_allclose(texts.select(chosen).observed(), texts.observed()[chosen], rtol=1e-12)


def test_permutation_p_counts_the_observed_parting_and_is_never_zero() -> None:
    found = permutation_p(torch.tensor([0, 3, 99]), 99)
    assert found.tolist() == [0.01, 0.04, 1.0]


@pytest.mark.parametrize("rank_by", SCORES)
def test_p_values_approach_those_of_every_parting(rank_by: str) -> None:
    """Brute force: all 210 ways to part ten texts into six and four."""
    values, tokens, groups = dense_texts(features=12, sizes=(4, 6), seed=3)
    observed = score(rank_by, values, tokens, groups)
    reached = np.zeros(12)
    partings = list(itertools.combinations(range(10), 4))
    for mine in partings:
        parting = np.ones(10, dtype=int)
        parting[list(mine)] = 0
        reached += score(rank_by, values, tokens, parting) >= observed - 1e-9
    exact = reached / len(partings)
    test = permutation_test(sparse(rank_by, values, tokens, groups), permutations=4000, seed=1)
    if rank_by in ("delta", "log_odds"):
        np.testing.assert_allclose(test.p_value, exact, rtol=1e-12)
    else:
        # Five standard errors of a share of 4000 draws; features that stop early have drawn 1000.
        error = 5 * np.sqrt(exact * (1 - exact) / np.where(exact > 0.01, 1000, 4000)) + 1 / 1000
        assert (np.abs(test.p_value.numpy() - exact) < error).all()
    assert len(test.best) == 1000


def test_the_mean_difference_of_equal_texts_agrees_with_scipys_permutation_test() -> None:
    values, tokens, groups = dense_texts(features=6, sizes=(12, 15), seed=8, rate=0.8)
    tokens[:] = 1
    test = permutation_test(sparse("mean_difference", values, tokens, groups), permutations=1000, seed=0)
    for f in range(6):
        wanted = stats.permutation_test(
            (values[groups == 0, f], values[groups == 1, f]),
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            vectorized=True,
            n_resamples=4000,
            alternative="greater",
            rng=np.random.default_rng(f),
        ).pvalue
        assert abs(float(test.p_value[f]) - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 800) + 0.002


def test_fishers_test_equals_scipys() -> None:
    values, tokens, groups = dense_texts(features=25, sizes=(14, 9, 8), seed=2, rate=0.4)
    values[:, 0], values[:, 1] = 0, 1
    values[:, 2] = groups == 0
    p = permutation_test(sparse("delta", values, tokens, groups), permutations=1).p_value
    fires = values > 0
    for f in range(25):
        hits, others = fires[groups == 0, f].sum(), fires[groups > 0, f].sum()
        table = [[hits, 14 - hits], [others, 17 - others]]
        assert float(p[f]) == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue, rel=1e-9)


def test_small_tails_keep_their_digits() -> None:
    found = hypergeometric_tail(torch.tensor([200, 150]), torch.tensor([200, 200]), 400, 4000)
    wanted = stats.hypergeom.sf([199, 149], 4000, 200, 400)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert 0 < float(found[0]) < 1e-200


def test_benjamini_hochberg_equals_scipys() -> None:
    p = torch.tensor(np.random.default_rng(0).random(200) ** 3)
    p[7] = p[8]
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p), rtol=1e-12)
    assert benjamini_hochberg(torch.ones(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize("rank_by", ["mean_difference", "auroc", "delta"])
def test_p_values_of_texts_whose_groups_mean_nothing_are_uniform(rank_by: str) -> None:
    values, tokens, groups = dense_texts(features=600, sizes=(40, 40), seed=4, rate=0.9)
    # Real numbers: without ties a p-value has as many steps as there are permutations. One token a text: numbers of
    # tokens that all features share would make their p-values move together.
    values *= np.random.default_rng(1).random(values.shape).astype(np.float32)
    tokens[:] = 1
    p = permutation_test(sparse(rank_by, values, tokens, groups), permutations=300, seed=2).p_value.numpy()
    for level in (0.01, 0.05, 0.2, 0.5):
        # Never too often, whatever the score; three standard errors of 600 independent features.
        assert (p <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / 600)
    if rank_by != "delta":
        assert stats.kstest(p, "uniform").pvalue > 0.01


def test_false_discoveries_stay_at_the_rate_asked_for_and_true_ones_are_found() -> None:
    """450 features of noise and 50 that fire more in the target, ten times over."""
    shares = []
    for seed in range(10):
        values, tokens, groups = dense_texts(features=500, sizes=(30, 30), seed=100 + seed, rate=0.5)
        extra = np.random.default_rng(seed).random((30, 50)) < 0.8
        values[:30, :50] = np.maximum(values[:30, :50], 5 * extra)
        test = permutation_test(sparse("delta", values, tokens, groups), permutations=1)
        found = benjamini_hochberg(test.p_value).numpy() <= 0.1
        shares.append(found[50:].sum() / max(1, found.sum()))
        assert found[:50].sum() > 20
    assert np.mean(shares) < 0.1


def test_features_that_chance_reaches_stop_early_and_the_others_run_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, tokens, groups = dense_texts(features=40, sizes=(25, 25), seed=6, rate=0.9)
    values[:25, 0] += 4
    monkeypatch.setattr(significance, "_STAGE", 100)
    p = permutation_test(sparse("mean_difference", values, tokens, groups), permutations=1000).p_value
    assert float(p[0]) == pytest.approx(1 / 1001)
    # At the first stage 20 of 100 suffice to stop: fractions of 101.
    stopped = p[p > 0.3] * 101
    assert stopped.numel() > 10
    torch.testing.assert_close(stopped, stopped.round(), rtol=0, atol=1e-9)


def test_features_that_never_fire_are_not_tested() -> None:
    values, tokens, groups = dense_texts()
    values[:, 4] = 0
    for rank_by in SCORES:
        test = permutation_test(sparse(rank_by, values, tokens, groups), permutations=50)
        assert float(test.p_value[4]) == 1.0
        assert test.is_tested.nonzero()[:, 0].tolist() == [f for f in range(30) if f != 4]


def test_familywise_p_values_hold_for_the_best_of_all_features() -> None:
    """Under the null the best of 100 features is called significant at 20 % in about 20 % of the searches."""
    best, naive = [], []
    for seed in range(80):
        values, tokens, groups = dense_texts(features=100, sizes=(15, 15), seed=seed, rate=0.7)
        texts = sparse("mean_difference", values, tokens, groups)
        test = permutation_test(texts, permutations=99, seed=seed)
        best.append(float(familywise_p(texts.observed(), test.best, texts.rounding()).min()))
        naive.append(float(test.p_value.min()))
    # Binomial with 80 draws: 6 to 28 have a chance of 99.9 %.
    assert 6 <= sum(p <= 0.2 for p in best) <= 28
    assert sum(p <= 0.2 for p in naive) >= 78


def test_a_permutation_test_needs_a_permutation() -> None:
    with pytest.raises(ConfigError, match="`permutations` is 0; a permutation test needs 1 or more"):
        permutation_test(sparse("delta", *dense_texts()), permutations=0)


def test_midranks_and_spearman_equal_scipys() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 9, 60).astype(float), draw.integers(0, 9, 60).astype(float)
    np.testing.assert_array_equal(midranks(torch.tensor(a)), stats.rankdata(a))
    assert float(spearman(torch.tensor(a), torch.tensor(b))) == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize("rank_by", SCORES)
def test_halves_of_noise_do_not_agree_and_halves_of_a_signal_do(rank_by: str) -> None:
    values, tokens, groups = dense_texts(features=400, sizes=(40, 40), seed=9, rate=0.6)
    noise = split_half(sparse(rank_by, values, tokens, groups), top=10, splits=10, seed=0)
    assert noise is not None
    # Ten of 400 at random: 1.3 % of the union on average.
    assert float(noise.top_overlap.mean()) < 0.1
    # The luckiest feature of all texts is often among the best of a half too, noise or not, but not always.
    assert float(noise.selected.max()) < 0.8
    values[40:, :10] = 0
    values[:40, :10] = 9
    signal = split_half(sparse(rank_by, values, tokens, groups), top=10, splits=10, seed=0)
    assert signal is not None
    assert float(signal.top_overlap.min()) == 1.0
    assert signal.selected[:10].tolist() == [1.0] * 10
    assert float(signal.selected[10:].max()) == 0.0
    assert abs(float(noise.rank_correlation.mean())) < 0.1
    assert float(signal.rank_correlation.mean()) > float(noise.rank_correlation.mean())


def test_groups_of_one_text_cannot_be_halved() -> None:
    assert split_half(sparse("delta", *dense_texts(sizes=(1, 6))), splits=3) is None
    assert split_half(sparse("delta", *dense_texts()), splits=0) is None


def weighted_means(values: torch.Tensor, groups: torch.Tensor) -> Any:
    def statistic(times_RX: torch.Tensor) -> torch.Tensor:
        mine = times_RX * (groups == 0)
        others = times_RX * (groups == 1)
        return mine @ values / mine.sum(1) - others @ values / others.sum(1)

    return statistic


def test_bootstrap_intervals_agree_with_scipys() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(1, 1, 40), draw.normal(0, 2, 50)
    values, groups = torch.tensor(np.concatenate([a, b])), torch.tensor([0] * 40 + [1] * 50)
    found = bootstrap_interval(weighted_means(values, groups), groups, resamples=4000, confidence=0.9)
    wanted = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=4000, confidence_level=0.9,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    # The standard error of an end is about 0.012 of each of the two.
    assert float(found.low) == pytest.approx(wanted.low, abs=0.06)
    assert float(found.high) == pytest.approx(wanted.high, abs=0.06)


def test_bootstrap_intervals_contain_the_truth_about_as_often_as_they_say() -> None:
    groups = torch.tensor([0] * 60 + [1] * 60)
    hits = 0
    for seed in range(100):
        values = torch.tensor(np.random.default_rng(seed).exponential(1, 120)) + (groups == 0) * 0.5
        low, high = bootstrap_interval(weighted_means(values, groups), groups, resamples=300, seed=seed)
        hits += int(low <= 0.5 <= high)
    # Binomial with 100 draws at 0.93: 85 to 99.
    assert 85 <= hits <= 99


def test_bootstrap_in_blocks_equals_one_block_and_leaves_out_what_is_undefined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, groups = torch.rand(20, 3).double(), torch.tensor([0] * 5 + [1] * 15)
    sizes: list[tuple[int, ...]] = []

    def statistic(times_RX: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(times_RX.shape))
        assert (times_RX[:, :5].sum(1) == 5).all()
        assert (times_RX[:, 5:].sum(1) == 15).all()
        figures = times_RX @ values
        figures[times_RX[:, 0] == 0, 0] = torch.nan
        return figures

    monkeypatch.setattr(significance, "_DRAW_ELEMENTS", 20 * 30)
    low, high = bootstrap_interval(statistic, groups, resamples=100)
    assert sizes == [(30, 20)] * 3 + [(10, 20)]
    assert (low < high).all()
    again = bootstrap_interval(statistic, groups, resamples=100)
    assert torch.equal(low, again.low)
    assert torch.equal(high, again.high)


@pytest.mark.parametrize("settings", [{"resamples": 1}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_bootstrap_settings_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"`resamples` is .* give 2 or more, and a share above 0 and below 1"):
        bootstrap_interval(lambda times: times[:, 0], torch.zeros(4, dtype=torch.int64), **settings)


def test_log_odds_equal_the_definition_and_a_silent_feature_has_none() -> None:
    found = log_odds(torch.tensor([3, 0, 10]), 10, torch.tensor([1, 0, 4]), 4)
    wanted = [np.log((3.5 / 7.5) / (1.5 / 3.5)), 0.0, np.log((10.5 / 0.5) / (4.5 / 0.5))]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


def test_auroc_of_texts_equals_that_of_evidence() -> None:
    values, tokens, groups = dense_texts()
    found = sparse("auroc", values, tokens, groups).observed()
    for f in range(30):
        column = torch.from_numpy(values[:, f])
        assert float(found[f]) == auroc(column[groups == 0], column[groups > 0])
