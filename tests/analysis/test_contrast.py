"""Figures of a few features against scikit-learn, and their intervals against resamples drawn one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from qscope_trl.analysis.contrast import FIGURES, TextRows, contrast, intervals, rows, weighted_auroc
from qscope_trl.analysis.evidence import TextFigures
from qscope_trl.sae.topk_sae import TopKSAE
from tests.tiny import K, random_sae

GROUPS = np.repeat([0, 1, 2], [20, 15, 12])


def make_texts(seed: int = 0, shift: float = 0.5, size: int = 1) -> TextRows:
    draw = np.random.default_rng(seed)
    groups = np.repeat(GROUPS, size)
    tokens = draw.integers(1, 30, len(groups))
    maxima = np.maximum(0, draw.normal(0.3, 1, (len(groups), 3)) + shift * (groups == 0)[:, None]).round(1)
    sums = maxima * draw.integers(1, 4, maxima.shape)
    columns = (groups, tokens, sums, maxima, maxima - draw.random(maxima.shape))
    return TextRows(*(torch.from_numpy(column) for column in columns))


def by_definition(texts: TextRows, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Every figure on the texts of a list, in which a text may occur more than once."""
    group, tokens, sums, maxima, pre = (column.numpy()[chosen] for column in texts)
    mine, fires = group == 0, maxima > 0
    mean = [sums[group == g].sum(0) / tokens[group == g].sum() for g in range(3)]
    a, b, c, d = (x.sum(0) + 0.5 for x in (fires[mine], ~fires[mine], fires[~mine], ~fires[~mine]))
    return {
        "mean_difference": mean[0] - sums[~mine].sum(0) / tokens[~mine].sum(),
        "delta": fires[mine].mean(0) - fires[~mine].mean(0),
        "log_odds": np.log(a * d / (b * c)),
        "monolinguality": mean[0] - (mean[1] + mean[2]) / 2,
        "auroc": auroc(mine, maxima),
        "auroc_pre_act": auroc(mine, pre),
    }


def auroc(mine: np.ndarray, values: np.ndarray) -> np.ndarray:
    wins = stats.mannwhitneyu(values[mine], values[~mine], axis=0, method="asymptotic").statistic
    return np.asarray(wins / (mine.sum() * (~mine).sum()))


def test_every_figure_equals_its_definition() -> None:
    texts = make_texts()
    wanted = by_definition(texts, np.arange(len(GROUPS)))
    found = contrast(texts)
    assert [tuple(one) for one in found] == [FIGURES] * 3
    for name in FIGURES:
        np.testing.assert_allclose([one[name] for one in found], wanted[name], rtol=1e-12, atol=1e-15)


def test_log_odds_equal_scipys_ratio_of_a_table_with_the_halves_added() -> None:
    texts = make_texts()
    fires, mine = texts.act_max_XS.numpy()[:, 0] > 0, GROUPS == 0
    table = np.array([[(fires & mine).sum(), (~fires & mine).sum()], [(fires & ~mine).sum(), (~fires & ~mine).sum()]])
    wanted = stats.contingency.odds_ratio(2 * table + 1, kind="sample").statistic
    assert contrast(texts)[0]["log_odds"] == pytest.approx(np.log(wanted))


def test_weighted_auroc_counts_a_text_as_often_as_it_was_drawn() -> None:
    draw = np.random.default_rng(1)
    values, is_target = draw.integers(0, 5, (30, 2)).astype(float), np.arange(30) < 12
    times = draw.integers(0, 4, (6, 30))
    found = weighted_auroc(torch.from_numpy(values), torch.from_numpy(is_target))(torch.from_numpy(times).double())
    for row, counts in zip(found, times, strict=True):
        wanted = [roc_auc_score(is_target, column, sample_weight=counts) for column in values.T]
        np.testing.assert_allclose(row, wanted, rtol=1e-12)


def test_intervals_equal_the_percentiles_of_resamples_drawn_one_by_one() -> None:
    texts = make_texts()
    found = intervals(texts, resamples=1500, confidence=0.9, seed=3)
    draw = np.random.default_rng(0)
    places = [np.nonzero(g == GROUPS)[0] for g in range(3)]
    drawn = [
        by_definition(texts, np.concatenate([draw.choice(place, len(place)) for place in places])) for _ in range(200)
    ]
    for name in FIGURES:
        values = np.stack([one[name] for one in drawn])
        ends, spread = np.quantile(values, [0.05, 0.95], axis=0), values.std(0)
        for s, one in enumerate(found):
            # The 5 % point of 200 draws is known to about a seventh of their spread: 4 standard errors.
            assert abs(one[f"{name}_low"] - ends[0, s]) < 0.6 * spread[s], name
            assert abs(one[f"{name}_high"] - ends[1, s]) < 0.6 * spread[s], name


def test_intervals_are_narrower_with_more_texts_and_contain_no_effect_where_there_is_none() -> None:
    few, many = (intervals(make_texts(size=size), resamples=300)[0] for size in (1, 16))
    assert many["auroc_high"] - many["auroc_low"] < 0.5 * (few["auroc_high"] - few["auroc_low"])
    none = intervals(make_texts(size=16, shift=0.0), resamples=300)
    assert sum(one["delta_low"] < 0 < one["delta_high"] for one in none) >= 2
    assert all(one["delta_low"] > 0 for one in intervals(make_texts(size=16), resamples=300))


def test_rows_join_groups_and_leave_out_texts_without_a_token() -> None:
    weights = random_sae(5)
    sae = TopKSAE(W_enc=weights["W_enc"], b_enc=weights["b_enc"], k=K)
    parts = []
    for count in (3, 2):
        figures = TextFigures(sae, torch.tensor([4, 9]), count)
        figures.update(torch.randn(4, sae.d_model), torch.tensor([0, 0, 1, 1]))
        parts.append(figures)
    found = rows(parts, [torch.tensor([True, True, True]), torch.tensor([False, True])])
    assert found.group_X.tolist() == [0, 0, 1]
    assert found.tokens_X.tolist() == [2, 2, 2]
    assert torch.equal(found.pre_act_max_XS[2], parts[1].pre_act_max_XS[1])
    assert torch.isfinite(found.pre_act_max_XS).all()
