"""From figures to words: each verdict, each note, and the intervals they rest on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qscope_trl.analysis.audit.estimates import Activity, auroc, mean_difference, rates, share_left
from qscope_trl.analysis.audit.result import ActivityRow, Behaviour, Collateral, DetectorRow
from qscope_trl.analysis.audit.verdict import NEGATIVE_TEXTS, OWN, POSITIVE_TEXTS, VERDICTS, Ruling, decide, fall
from qscope_trl.analysis.doctor.result import TunedFit

GONE, FELL, STAYED, WIDE = (0.1, 0.05, 0.2), (0.4, 0.3, 0.5), (0.9, 0.8, 1.0), (0.6, 0.2, 1.2)
NAN = (math.nan, math.nan, math.nan)


def behaviour(left: tuple[float, float, float] | None, base: float = 0.3, **changes: Any) -> Behaviour | None:
    if left is None:
        return None
    given = {
        "detector": "chinese", "num_prompts": 200, "base": base, "base_low": 0.2, "base_high": 0.4,
        "tuned": base * left[0], "tuned_low": 0.0, "tuned_high": 1.0, "difference": -0.1, "difference_low": -0.2,
        "difference_high": 0.0, "left": left[0], "left_low": left[1], "left_high": left[2],
    }  # fmt: skip
    return Behaviour(**{**given, **changes})


def activity(left: tuple[float, float, float], where: str = POSITIVE_TEXTS, texts: int = 50) -> ActivityRow:
    return ActivityRow(
        kind="trained on", where=where, num_texts_base=texts, num_texts_tuned=texts, base=2.0, tuned=2.0 * left[0],
        left=left[0], left_low=left[1], left_high=left[2],
    )  # fmt: skip


def detector(kind: str, low: float, high: float, name: str = "x", base: float = 0.95) -> DetectorRow:
    return DetectorRow(
        kind=kind, name=name, layer=2, base=base, base_low=base - 0.05, base_high=base + 0.05, tuned=(low + high) / 2,
        tuned_low=low, tuned_high=high,
    )  # fmt: skip


def fit(fvu_base: float = 0.1, fvu: float = 0.1, jaccard: float = 0.9) -> TunedFit:
    return TunedFit(
        layer=4, num_tokens=100, fvu_base=fvu_base, fvu=fvu, cosine_base=0.9, cosine=0.9, l0=16.0, jaccard=jaccard,
        residual_cosine=0.99, changed_share=0.0,
    )  # fmt: skip


def lost(low: float = -0.01, high: float = 0.01) -> Collateral:
    return Collateral(
        source="neutral", num_texts=9, num_tokens=99, perplexity_base=20.0, perplexity_tuned=21.0,
        loss_difference=(low + high) / 2, loss_difference_low=low, loss_difference_high=high, kl=0.01,
    )  # fmt: skip


DECODABLE = [detector("probe", 0.9, 1.0), detector("shuffled labels", 0.4, 0.6)]
BLIND = [detector("probe", 0.4, 0.6), detector("shuffled labels", 0.4, 0.6)]
UNSURE = [detector("probe", 0.6, 0.9), detector("shuffled labels", 0.4, 0.6)]


def ruling(shown: Behaviour | None, rows: list[ActivityRow], detectors: list[DetectorRow], **others: Any) -> Ruling:
    given = {"collateral": lost(), "fits": [fit()], **others}
    return decide(shown, rows, detectors, **given)


@pytest.mark.parametrize(
    ("shown", "feature", "detectors", "verdict"),
    [
        (GONE, GONE, DECODABLE, "behaviour went away"),
        (GONE, STAYED, DECODABLE, "behaviour went away"),
        (STAYED, GONE, DECODABLE, "feature silent, behaviour stayed"),
        (STAYED, GONE, BLIND, "feature silent, behaviour stayed"),
        (STAYED, STAYED, DECODABLE, "nothing changed"),
        (STAYED, FELL, DECODABLE, "behaviour stayed"),
        (STAYED, NAN, DECODABLE, "behaviour stayed"),
        (FELL, GONE, DECODABLE, "feature silent, behaviour only fell"),
        (FELL, FELL, DECODABLE, "behaviour fell"),
        (WIDE, GONE, DECODABLE, "feature silent, still decodable"),
        (None, GONE, DECODABLE, "feature silent, still decodable"),
        (None, GONE, BLIND, "feature silent, not decodable"),
        (None, GONE, UNSURE, "not decided"),
        (None, STAYED, DECODABLE, "feature active, behaviour not decided"),
        (WIDE, WIDE, DECODABLE, "not decided"),
        (None, FELL, DECODABLE, "not decided"),
        (None, GONE, [], "not decided"),
    ],
)
def test_intervals_decide_the_verdict(
    shown: tuple[float, float, float] | None,
    feature: tuple[float, float, float],
    detectors: list[DetectorRow],
    verdict: str,
) -> None:
    assert ruling(behaviour(shown), [activity(feature)], detectors).verdict == verdict


def test_each_verdict_can_be_reached_and_is_explained() -> None:
    [mark] = [m for m in test_intervals_decide_the_verdict.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {case[3] for case in mark.args[1]} == set(VERDICTS)


@pytest.mark.parametrize("place", [POSITIVE_TEXTS, NEGATIVE_TEXTS, OWN])
def test_beside_a_behaviour_that_is_there_silence_in_one_place_counts(place: str) -> None:
    rows = {where: activity(STAYED, where) for where in (POSITIVE_TEXTS, NEGATIVE_TEXTS, OWN, "own generations")}
    rows[place] = activity(GONE, place)
    told = ruling(behaviour(STAYED), [*rows.values()], DECODABLE)
    assert told.verdict == "feature silent, behaviour stayed"
    assert f"on {place} 10% of it is left" in told.reason
    assert ruling(behaviour(FELL), [*rows.values()], DECODABLE).verdict == "feature silent, behaviour only fell"
    alone = "feature silent, still decodable" if place == POSITIVE_TEXTS else "not decided"
    assert ruling(None, [*rows.values()], DECODABLE).verdict == alone


def test_silence_counts_neither_in_a_few_texts_nor_in_those_that_no_longer_show_it() -> None:
    few = [activity(STAYED), activity(GONE, OWN, texts=9), activity(GONE, "own generations")]
    told = ruling(behaviour(STAYED), few, DECODABLE)
    assert told.verdict == "nothing changed"
    assert "own generations" not in told.reason


def test_a_base_that_hardly_shows_the_behaviour_cannot_lose_it() -> None:
    told = ruling(behaviour(GONE, base=0.045), [activity(GONE)], DECODABLE)
    assert told.verdict == "feature silent, still decodable"
    assert "9 of the base's are too few to judge by" in told.reason
    assert ruling(behaviour(GONE, base=0.05), [activity(GONE)], DECODABLE).verdict == "behaviour went away"


def test_as_many_generations_as_are_needed_suffice_whatever_their_share_is_rounded_to() -> None:
    """10 / 77 * 77 is below 10."""
    shown = behaviour(GONE, base=10 / 77, num_prompts=77)
    assert ruling(shown, [activity(STAYED)], BLIND).verdict == "behaviour went away"
    shown = behaviour(GONE, base=9 / 77, num_prompts=77)
    assert ruling(shown, [activity(STAYED)], BLIND).verdict == "feature active, behaviour not decided"


def test_a_probe_no_better_than_one_on_shuffled_labels_decodes_nothing() -> None:
    lucky = [detector("probe", 0.8, 1.0), detector("shuffled labels", 0.4, 0.85)]
    assert ruling(None, [activity(GONE)], lucky).verdict == "not decided"


def test_the_reason_holds_the_figures() -> None:
    reason = ruling(behaviour(GONE), [activity(STAYED)], DECODABLE).reason
    assert "`chinese` is shown by 30.0% of the base model's 200 generations and by 3.0% of the tuned one's" in reason
    assert "10% of it is left (5% to 20%)" in reason
    assert "on positive texts 90% of it is left (80% to 100%)" in reason
    assert "AUROC 0.95 (0.90 to 1.00), against 0.50 on shuffled labels: still decodable" in reason
    none = ruling(None, [activity(NAN)], UNSURE).reason
    assert none.startswith("No generations were judged.")
    assert "not active on the base model" in none
    assert "decodability not decided" in none


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"detectors": [*DECODABLE, detector("old", 0.8, 0.9, "trained on")]}, "silent by size, but still tell"),
        ({"detectors": [*DECODABLE, detector("old", 0.4, 0.6, "trained on", 0.6)]}, "on the base model either"),
        ({"fits": [fit(), fit(fvu=0.2)]}, "layer 4: fvu 0.10 to 0.20, Jaccard 0.90"),
        ({"fits": [fit(jaccard=0.3)]}, "Jaccard 0.30"),
        ({"collateral": lost(0.02, 0.06)}, r"rose from 20.00 to 21.00 (loss +0.040 nats, +0.020 to +0.060)"),
        ({"shown": behaviour(GONE, difference=0.1, difference_low=0.05)}, "more often than the base: +10.0%"),
        ({}, "does not say by what"),
        ({}, "No monitors were given"),
    ],
    ids=["silent", "blunt", "fvu", "jaccard", "perplexity", "rose", "credit", "monitors"],
)
def test_what_to_mind_is_noted(changes: dict[str, Any], note: str) -> None:
    given: dict[str, Any] = {"shown": behaviour(GONE), "rows": [activity(GONE)], "detectors": DECODABLE}
    assert sum(note in text for text in ruling(**{**given, **changes}).notes) == 1


def test_nothing_is_noted_of_a_clean_audit() -> None:
    monitors = detector("old", 0.9, 1.0, "monitors")
    assert ruling(behaviour(STAYED), [activity(STAYED)], [*DECODABLE, monitors]).notes == []


def test_an_interval_falls_into_one_of_four() -> None:
    assert [fall(*ends) for ends in ((0.0, 0.25), (0.1, 0.3), (0.5, 2.0), (0.4, 1.0), NAN[:2])] == [
        "gone", "fell", "stayed", "undecided", "undecided",
    ]  # fmt: skip


# Estimates


def test_an_auroc_without_an_error_has_the_width_of_its_smaller_group() -> None:
    group_X = torch.tensor([0] * 5 + [1] * 50)
    found = auroc(torch.where(group_X == 0, 1.0, 0.0), group_X, resamples=100, seed=0)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(5 / (5 + 1.96**2), rel=1e-3)
    turned = auroc(torch.where(group_X == 0, 0.0, 1.0), group_X, resamples=100, seed=0)
    assert (turned.value, turned.low, turned.high) == (0.0, 0.0, pytest.approx(1 - found.low))


def test_an_aurocs_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator = torch.Generator().manual_seed(0)
    group_X = torch.tensor([0] * 60 + [1] * 60)
    # Two normal distributions one standard deviation apart: Phi(1 / sqrt 2).
    truth = 0.5 * (1 + math.erf(0.5))
    hits = 0
    for seed in range(200):
        score_X = torch.randn(120, generator=generator) + (group_X == 0)
        found = auroc(score_X, group_X, resamples=200, seed=seed)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_rates_are_paired_by_prompt() -> None:
    base = [True] * 40 + [False] * 60
    same = rates(base, base, resamples=200, seed=0)
    assert same.difference == (0.0, 0.0, 0.0)
    assert (same.left.value, same.left.low) == (1.0, 1.0)
    other = rates(base, [False] * 60 + [True] * 40, resamples=200, seed=0)
    assert other.difference.value == 0
    assert other.difference.low < -0.1 < 0.1 < other.difference.high


@pytest.mark.parametrize(("left", "wrong"), [(1.0, {"fell", "gone"}), (0.5, {"stayed"}), (0.25, {"gone"})])
def test_a_word_is_wrong_in_a_few_of_a_hundred_audits(left: float, wrong: set[str]) -> None:
    # At the border of a word, where it is wrong most often; nominally in 2.5 of 100.
    generator = torch.Generator().manual_seed(0)
    words = []
    for seed in range(150):
        base, tuned = ((torch.rand(100, generator=generator) < rate).tolist() for rate in (0.3, 0.3 * left))
        found = rates(base, tuned, resamples=200, seed=seed)
        words.append(fall(found.left.low, found.left.high))
    assert sum(word in wrong for word in words) / len(words) <= 0.08


def test_no_case_at_all_leaves_room_for_some() -> None:
    found = rates([True] * 40 + [False] * 60, [False] * 100, resamples=200, seed=0)
    assert (found.left.value, found.left.low) == (0.0, 0.0)
    assert found.left.high == pytest.approx(found.tuned.high / 0.4)
    assert found.tuned.high == pytest.approx(1.96**2 / (100 + 1.96**2), rel=1e-3)
    nothing = rates([False] * 10, [True] * 10, resamples=200, seed=0)
    assert math.isnan(nothing.left.value)
    assert nothing.difference.value == 1


def test_shares_of_the_same_texts_move_together_and_those_of_others_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    base = Activity(torch.rand(50, generator=generator) * 10, torch.randint(1, 20, (50,), generator=generator))
    half = Activity(base.sum_X / 2, base.tokens_X)
    paired = share_left(base, half, is_paired=True, resamples=200, seed=0)
    assert paired == pytest.approx((0.5, 0.5, 0.5))
    alone = share_left(base, half, is_paired=False, resamples=200, seed=0)
    assert alone.value == pytest.approx(0.5)
    assert alone.low < 0.45 < 0.55 < alone.high


def test_there_is_no_share_of_nothing() -> None:
    some, none = Activity(torch.ones(3), torch.ones(3)), Activity(torch.zeros(3), torch.ones(3))
    assert math.isnan(share_left(none, some, is_paired=True, resamples=100, seed=0).value)
    empty = Activity(torch.zeros(3), torch.zeros(3))
    assert math.isnan(share_left(some, empty, is_paired=True, resamples=100, seed=0).value)
    assert share_left(some, none, is_paired=True, resamples=100, seed=0) == (0, 0, 0)


def test_a_difference_of_means_counts_tokens_not_texts() -> None:
    tokens = torch.tensor([1, 99])
    found = mean_difference(
        Activity(torch.tensor([5.0, 0.0]), tokens), Activity(torch.tensor([15.0, 99.0]), tokens), resamples=100, seed=0
    )
    assert found.value == pytest.approx(1.09)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(10.0))
