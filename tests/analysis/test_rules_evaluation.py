"""Figures of classifiers against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from qscope_trl.analysis.rules.evaluation import PlattScaling, calibration, figures, precision_recall
from qscope_trl.analysis.rules.metrics import best_threshold, metric
from qscope_trl.errors import DataError

NUM = 240


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.random(NUM) < 0.3
    # Rounded, so that there are ties.
    scores = (generator.normal(size=NUM) + labels).round(1)
    return scores, labels


def test_figures_equal_scikit_learns(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    decisions = scores > 0.4
    found = figures(scores, decisions, labels)
    assert found.precision == pytest.approx(sk.precision_score(labels, decisions))
    assert found.recall == pytest.approx(sk.recall_score(labels, decisions))
    assert found.f1 == pytest.approx(sk.f1_score(labels, decisions))
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, decisions))
    assert found.auroc == pytest.approx(sk.roc_auc_score(labels, scores))
    assert found.average_precision == pytest.approx(sk.average_precision_score(labels, scores))
    assert (found.texts, found.positive, found.told) == (NUM, labels.sum(), decisions.sum())


def test_the_curve_is_scikit_learns(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    points, _ = precision_recall(scores, labels)
    precision, recall, thresholds = sk.precision_recall_curve(labels, scores)
    np.testing.assert_allclose([p.threshold for p in points], thresholds[::-1])
    np.testing.assert_allclose([p.precision for p in points], precision[:-1][::-1])
    np.testing.assert_allclose([p.recall for p in points], recall[:-1][::-1])


def test_long_curves_are_thinned_but_their_area_is_not() -> None:
    generator = np.random.default_rng(1)
    labels = generator.random(1000) < 0.5
    scores = generator.normal(size=1000) + labels
    points, area = precision_recall(scores, labels)
    assert len(points) == 200
    assert points[-1].recall == 1
    assert area == pytest.approx(sk.average_precision_score(labels, scores))


def test_nothing_told_has_no_precision_and_f1_zero(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    found = figures(scores, np.zeros(NUM, dtype=bool), labels)
    assert np.isnan(found.precision)
    assert found.to_dict()["precision"] is None
    assert found.f1 == 0


def test_calibration_equals_scikit_learns_brier_and_a_loop_over_bins(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    probabilities = 1 / (1 + np.exp(-scores))
    found = calibration(probabilities, labels)
    assert found.brier == pytest.approx(sk.brier_score_loss(labels, probabilities))
    error = 0.0
    for low in range(10):
        inside = [i for i in range(NUM) if int(probabilities[i] * 10) == low]
        if inside:
            error += abs(sum(probabilities[i] - labels[i] for i in inside)) / NUM
    assert found.error == pytest.approx(error)
    assert sum(one.texts for one in found.bins) == NUM
    assert calibration(labels.astype(float), labels).brier == 0


def test_platt_scaling_is_the_logistic_curve_of_softened_targets(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    found = PlattScaling(scores, labels)(scores)
    positive, negative = labels.sum(), (~labels).sum()
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
    model = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(
        np.concatenate([scores, scores])[:, None],
        np.repeat([True, False], NUM),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    np.testing.assert_allclose(found, model.predict_proba(scores[:, None])[:, 1], atol=1e-5)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0, 0.0], [1e6, 2e6, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
def test_platt_scaling_ends_for_constant_huge_and_separable_scores(scores: list[float]) -> None:
    labels = np.array([True, True, False, False])
    found = PlattScaling(np.array(scores), labels)(np.array(scores))
    assert ((found > 0) & (found < 1)).all()
    assert found[:2].min() >= found[2:].max() - 1e-9


def test_intervals_are_those_of_resampled_groups(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    decisions = scores > 0.4
    groups = [f"page {i // 4}" for i in range(NUM)]
    found = figures(scores, decisions, labels, groups=groups, resamples=50, seed=3)
    times = np.random.default_rng(3).multinomial(NUM // 4, np.full(NUM // 4, 4 / NUM), size=50)
    f1, auroc = [], []
    for row in times:
        weight = np.repeat(row, 4)
        f1.append(sk.f1_score(labels, decisions, sample_weight=weight))
        auroc.append(sk.roc_auc_score(labels, scores, sample_weight=weight))
    np.testing.assert_allclose(found.f1_interval, np.quantile(f1, [0.025, 0.975]))
    np.testing.assert_allclose(found.auroc_interval, np.quantile(auroc, [0.025, 0.975]))


def test_one_class_and_endless_scores_are_refused(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    with pytest.raises(DataError, match="are of one class; precision, recall and AUROC need both"):
        figures(scores, labels, np.ones(NUM, dtype=bool))
    broken = scores.copy()
    broken[[1, 5]] = [np.nan, np.inf]
    with pytest.raises(DataError, match=f"2 of {NUM} scores are not finite"):
        figures(broken, labels, labels)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("f1", sk.f1_score),
        ("f0.5", lambda t, d: sk.fbeta_score(t, d, beta=0.5)),
        ("f2", lambda t, d: sk.fbeta_score(t, d, beta=2)),
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("mcc", sk.matthews_corrcoef),
    ],
)
def test_metrics_equal_scikit_learns(name: str, theirs: object, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = drawn
    for decisions in (scores > 0.4, scores > -1.2):
        assert metric(name, decisions, labels) == pytest.approx(theirs(labels, decisions))  # type: ignore[operator]
    # No threshold between two scores, nor below or above all, does better.
    chosen = best_threshold(name, scores, labels)
    levels = np.unique(scores)
    tried = [-np.inf, *((levels[1:] + levels[:-1]) / 2), np.inf]
    assert metric(name, scores > chosen, labels) == pytest.approx(max(metric(name, scores > t, labels) for t in tried))
