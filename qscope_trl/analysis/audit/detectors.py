"""Who tells positive from negative texts on each model: the old features, probes and features found anew.

What is retrained learns on some texts and is tested on the others, on each model by itself. Probes are also trained on
shuffled labels, and tested on these: what they reach then is chance, however the texts are. Left out: probes by token.

Shape legend: `X` texts of both groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qscope_trl.analysis.audit.estimates import Estimate, auroc
from qscope_trl.analysis.audit.reading import Material, Measured
from qscope_trl.analysis.audit.result import DetectorRow, FeatureRow
from qscope_trl.analysis.contrast import weighted_auroc
from qscope_trl.analysis.probes import DifferenceOfMeansProbe, LogisticProbe, has_scikit_learn, keyword_scores
from qscope_trl.features import FeatureSet

# Inverse strengths of the L2 penalty that the logistic probe chooses from, by cross-validation.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)


class Pair(NamedTuple):
    """The same of both models."""

    base: Measured
    tuned: Measured


def old_detectors(pair: Pair, material: Material, *, resamples: int, seed: int) -> list[DetectorRow]:
    """The features that were trained on, and the monitors: each set's score, over all texts."""
    rows = []
    for name, features in _sets(material):
        ends = []
        for one in pair:
            activity = one.score(features)
            score_X = activity.sum_X / activity.tokens_X.clamp(min=1)
            ends.append(auroc(score_X, material.group_X, resamples=resamples, seed=seed))
        rows.append(_row("old", name, None, *ends))
    return rows


def feature_rows(pair: Pair, material: Material) -> list[FeatureRow]:
    """Each feature that was trained on, and each monitor."""
    rows = []
    is_positive_X = material.group_X == 0
    for kind, features in _sets(material):
        for feature in features.features:
            found: dict[str, float] = {}
            for end, one in zip(("base", "tuned"), pair, strict=True):
                texts = one.feature(feature.layer, feature.index)
                for name, mask_X in (("rate", is_positive_X), ("rate_negative", ~is_positive_X)):
                    tokens = texts.tokens_X[mask_X].sum()
                    found[f"{name}_{end}"] = float(texts.fired_X[mask_X].sum() / tokens)
                    if name == "rate":
                        found[f"mean_{end}"] = float(texts.sum_X[mask_X].sum() / tokens)
                found[f"auroc_{end}"] = _auroc(texts.max_X, material.group_X)
            rows.append(FeatureRow(feature=str(feature.id), kind=kind, label=feature.label, **found))
    return rows


def retrained(
    pair: Pair, material: Material, *, permutations: int, resamples: int, seed: int, show_progress: bool
) -> list[DetectorRow]:
    """Probes and newly found features, trained and tested on each model by itself, and what chance gives.

    Args:
        pair: Both models' figures.
        material: Texts and features.
        permutations: Times that labels are shuffled.
        resamples: Of the intervals.
        seed: Decides shuffles, folds and resamples.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        A row a probe and layer, one a layer for the best other feature, and one for shuffled labels: of the best probe
        the mean over shuffles, with the least and the largest.
    """
    from tqdm.auto import tqdm

    rows = [
        _row("probe", name, layer, *(_tested(scores, material, resamples, seed) for scores in both))
        for (layer, name), both in zip(
            _places(material), zip(*(_probes(one, material, seed) for one in pair), strict=True), strict=True
        )
    ]
    for layer in sorted(material.encoders):
        found = [index for one in pair if (index := _best_other(one, layer, material)) is not None]
        if len(found) == len(pair):
            ends = [
                _tested(one.feature(layer, index).max_X, material, resamples, seed)
                for one, index in zip(pair, found, strict=True)
            ]
            names = list(dict.fromkeys(f"L{layer}F{index}" for index in found))
            rows.append(_row("new feature", " / ".join(names), layer, *ends))
    generator = torch.Generator().manual_seed(seed)
    best: list[list[float]] = []
    count = material.group_X.numel()
    for _ in tqdm(range(permutations), desc="shuffled labels", disable=not show_progress, leave=False):
        shuffled_X = material.group_X[torch.randperm(count, generator=generator)]
        if _has_both(shuffled_X, material.heldout_X):
            best.append([max(_shuffled(one, material, shuffled_X, seed)) for one in pair])
    if best:
        ends = [Estimate(sum(of) / len(of), min(of), max(of)) for of in zip(*best, strict=True)]
        rows.append(_row("shuffled labels", "best probe", None, *ends))
    return rows


def words(texts: Sequence[str], material: Material, *, resamples: int, seed: int) -> DetectorRow | None:
    """What the words alone tell, which no training changes; None without scikit-learn."""
    if not has_scikit_learn():
        return None
    kept_X = (~material.heldout_X).tolist()
    learned = [text for text, kept in zip(texts, kept_X, strict=True) if kept]
    score_X = keyword_scores(learned, (material.group_X[~material.heldout_X] == 0).numpy(), list(texts))
    end = _tested(torch.from_numpy(score_X), material, resamples, seed)
    return _row("words", "words", None, end, end)


def _sets(material: Material) -> Iterator[tuple[str, FeatureSet]]:
    yield "trained on", material.features
    if material.monitors is not None:
        yield "monitors", material.monitors


def _places(material: Material) -> list[tuple[int, str]]:
    names = ["difference of means", *(["logistic probe"] if has_scikit_learn() else [])]
    return [(layer, name) for layer in material.probe_layers for name in names]


def _probes(one: Measured, material: Material, seed: int) -> list[Tensor]:
    """Scores of all texts by each probe, in the order of `_places`."""
    learn_X = ~material.heldout_X
    truth = (material.group_X[learn_X] == 0).numpy()
    return [
        torch.from_numpy(_probe(name, seed).fit(one.means[layer][learn_X], truth).score(one.means[layer]))
        for layer, name in _places(material)
    ]


def _shuffled(one: Measured, material: Material, group_X: Tensor, seed: int) -> list[float]:
    learn_X = ~material.heldout_X
    truth = (group_X[learn_X] == 0).numpy()
    found = []
    for layer, name in _places(material):
        # One strength: a choice among several by labels that mean nothing changes nothing.
        probe: Any = LogisticProbe(0.01, seed=seed) if name == "logistic probe" else DifferenceOfMeansProbe()
        score_X = torch.from_numpy(probe.fit(one.means[layer][learn_X], truth).score(one.means[layer]))
        found.append(_auroc(score_X[material.heldout_X], group_X[material.heldout_X]))
    return found


def _probe(name: str, seed: int) -> Any:
    return LogisticProbe(_STRENGTHS, seed=seed) if name == "logistic probe" else DifferenceOfMeansProbe()


def _best_other(one: Measured, layer: int, material: Material) -> int | None:
    """Of the features found anew in a layer, the one that does best on the texts it was found on."""
    inside_X = ~material.heldout_X
    return max(
        one.found[layer],
        key=lambda index: _auroc(one.feature(layer, index).max_X[inside_X], material.group_X[inside_X]),
        default=None,
    )


def _tested(score_X: Tensor, material: Material, resamples: int, seed: int) -> Estimate:
    return auroc(score_X[material.heldout_X], material.group_X[material.heldout_X], resamples=resamples, seed=seed)


def _auroc(score_X: Tensor, group_X: Tensor) -> float:
    once = torch.ones(1, group_X.numel(), dtype=torch.float64)
    return float(weighted_auroc(score_X[:, None].double(), group_X == 0)(once))


def _has_both(group_X: Tensor, heldout_X: Tensor) -> bool:
    return all(len(set(group_X[mask_X].tolist())) == 2 for mask_X in (heldout_X, ~heldout_X))


def _row(kind: str, name: str, layer: int | None, base: Estimate, tuned: Estimate) -> DetectorRow:
    return DetectorRow(
        kind=kind, name=name, layer=layer, base=base.value, base_low=base.low, base_high=base.high, tuned=tuned.value,
        tuned_low=tuned.low, tuned_high=tuned.high,
    )  # fmt: skip
