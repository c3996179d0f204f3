from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from qscope_trl.activations.encode import tokenize
from qscope_trl.analysis import probes
from qscope_trl.analysis.probes import (
    DifferenceOfMeansProbe,
    LogisticProbe,
    ResidualMeans,
    has_scikit_learn,
    keyword_scores,
    residual_means,
)
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.hooks.layers import find_layers
from tests.tiny import D_MODEL, tiny_model, tiny_tokenizer


def clouds(count: int = 60, width: int = 5, shift: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 3 == 0
    x = draw.normal(0, 1 + 4 * np.arange(width), (count, width))
    x[:, 0] += shift * labels
    return x, labels


@pytest.mark.parametrize("positions", ["all", "last"])
def test_residual_means_equal_those_of_texts_run_alone(positions: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["w3 w4 w5 w6", "w9", "w7 w8", "w20 w21 w22 w23 w24 w25", "w5 w6 w7"]
    ids = tokenize(tokenizer, texts)
    found = residual_means(model, ids, [1, 3], batch_size=2, positions=positions, show_progress=False)
    assert list(found) == [1, 3]
    for layer, means in found.items():
        assert means.dtype == torch.float32
        for place, row in enumerate(ids):
            seen: list[torch.Tensor] = []
            handle = find_layers(model)[layer].register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([row]))
            handle.remove()
            kept = seen[0][0, 1:] if positions == "all" else seen[0][0, 1:][-1:]
            wanted = kept.mean(0) if len(kept) else torch.zeros(D_MODEL)
            torch.testing.assert_close(means[place], wanted, rtol=1e-4, atol=1e-5)


def test_means_do_not_depend_on_how_texts_fall_into_batches() -> None:
    x, text = torch.randn(20, 4), torch.tensor([3, 0, 0, 3, 1] * 4)
    whole, parts = ResidualMeans(5, 4), ResidualMeans(5, 4)
    whole.update(x, text)
    for rows in (slice(0, 7), slice(7, 20)):
        parts.update(x[rows], text[rows])
    for t in (0, 1, 3):
        torch.testing.assert_close(whole.means[t], x[text == t].mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.means, whole.means, rtol=0, atol=1e-6)
    assert whole.means[2].tolist() == whole.means[4].tolist() == [0.0] * 4


def test_difference_of_means_is_the_projection_on_the_line_between_them() -> None:
    x, labels = clouds()
    probe = DifferenceOfMeansProbe().fit(torch.from_numpy(x), labels.tolist())
    high, low = x[labels].mean(0), x[~labels].mean(0)
    np.testing.assert_allclose(probe.direction, high - low)
    np.testing.assert_allclose(probe.score(x), (x - (high + low) / 2) @ (high - low))
    assert float(probe.score(high[None])[0]) == pytest.approx(-float(probe.score(low[None])[0]))
    assert float(probe.score(high[None])[0]) > 0


def test_logistic_probe_equals_scikit_learn_on_standardised_inputs() -> None:
    x, labels = clouds()
    probe = LogisticProbe(0.3).fit(x, labels)
    scaler = StandardScaler().fit(x)
    plain = LogisticRegression(C=0.3, max_iter=2000).fit(scaler.transform(x), labels)
    np.testing.assert_allclose(probe.score(x), plain.decision_function(scaler.transform(x)), rtol=1e-9)
    np.testing.assert_allclose(probe.probability(x), plain.predict_proba(scaler.transform(x))[:, 1], rtol=1e-9)
    np.testing.assert_allclose(probe.probability(x), 1 / (1 + np.exp(-probe.score(x))), rtol=1e-9)


def test_logistic_probe_chooses_its_penalty_by_cross_validation() -> None:
    # Forty texts, thirty columns, one of which tells: little penalty fits the noise.
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 2 == 0
    x = draw.normal(size=(40, 30))
    x[:, 0] += 1.0 * labels
    test = draw.normal(size=(400, 30))
    truth = np.arange(400) % 2 == 0
    test[:, 0] += 1.0 * truth
    by_C = {C: roc_auc_score(truth, LogisticProbe(C).fit(x, labels).score(test)) for C in (1e-3, 1e4)}
    probe = LogisticProbe([1e4, 1e-3]).fit(x, labels)
    assert by_C[1e-3] > by_C[1e4]
    assert probe.C == 1e-3
    assert roc_auc_score(truth, probe.score(test)) == by_C[1e-3]
    # Two texts of a class leave two folds, one leaves none and the first is taken.
    assert LogisticProbe([1.0, 2.0]).fit(x[:5], [True, False, False, False, True]).C in (1.0, 2.0)
    assert LogisticProbe([7.0, 2.0]).fit(x[:3], [True, False, False]).C == 7.0


@pytest.mark.parametrize("probe", [DifferenceOfMeansProbe(), LogisticProbe()], ids=["means", "logistic"])
def test_probes_of_noise_tell_nothing_and_of_a_shift_nearly_all(probe: Any) -> None:
    draw = np.random.default_rng(1)
    labels, truth = np.arange(200) % 2 == 0, np.arange(400) % 2 == 0
    for shift, low, high in ((0.0, 0.38, 0.62), (4.0, 0.98, 1.0)):
        x, test = draw.normal(size=(200, 8)), draw.normal(size=(400, 8))
        x[labels, 2] += shift
        test[truth, 2] += shift
        assert low <= roc_auc_score(truth, probe.fit(x, labels).score(test)) <= high


def test_keyword_scores_read_words_and_signs_of_scripts_without_spaces() -> None:
    train = ["the cat sat here", "a cat and a dog", "no pets here", "the house is red", "猫在这里", "红色的房子"]
    labels = [True, True, False, False, True, False]
    scores = keyword_scores(train, labels, ["one cat", "one house", "小猫", "房子"])
    assert scores[0] > scores[1]
    assert scores[2] > scores[3]
    with pytest.raises(DataError, match="None of the 2 texts has a character"):
        keyword_scores([" ", ""], [True, False], ["a"])


@pytest.mark.parametrize("probe", [DifferenceOfMeansProbe(), LogisticProbe()], ids=["means", "logistic"])
def test_rows_and_labels_that_do_not_fit_are_refused(probe: Any) -> None:
    with pytest.raises(DataError, match=r"one row per text, got an array of the shape \(4,\)"):
        probe.fit(np.zeros(4), [True, False, True, False])
    with pytest.raises(DataError, match=r"There are 4 texts and labels of the shape \(3,\)"):
        probe.fit(np.zeros((4, 2)), [True, False, True])
    with pytest.raises(DataError, match=r"All 2 texts are positive\. A probe needs texts of both classes"):
        probe.fit(np.zeros((2, 2)), [True, True])
    with pytest.raises(DataError, match="All 2 texts are negative"):
        keyword_scores(["a", "b"], [False, False], ["a"])


@pytest.mark.parametrize("C", [0.0, [], [1.0, -1.0]])
def test_a_penalty_that_is_none_is_refused(C: Any) -> None:
    with pytest.raises(ConfigError, match="give one positive number or several"):
        LogisticProbe(C)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_scikit_learn()

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for call in (LogisticProbe, lambda: keyword_scores(["a", "b"], [True, False], ["a"])):
        with pytest.raises(ConfigError, match=r"need scikit-learn, .* `pip install 'qscope-trl\[data\]'`"):
            call()
    assert probes.DifferenceOfMeansProbe().fit([[0.0], [1.0]], [False, True]).score([[2.0]])[0] > 0
