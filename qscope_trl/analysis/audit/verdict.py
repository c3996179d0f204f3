"""Where the audit's figures turn into words. Ends of 95 % intervals decide, never points.

What is asked, and by which figure:

* Did the behaviour go away? The share of generations that show it, tuned over base.
* Did the features fall silent? The score of those trained on, tuned over base: on the negative texts, which are like
  what a penalty was trained on; on the positive ones; and where a model itself shows the behaviour. Beside a behaviour
  that is still there, silence in one of these places counts.
* Can it still be decoded? The best retrained probe on the tuned model, against shuffled labels.

The first decides alone where it is decided at all. The last never says that a behaviour stayed: a model that reads
Chinese without ever writing it must tell Chinese texts from others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from qscope_trl.analysis.audit.result import ActivityRow, Behaviour, Collateral, DetectorRow
from qscope_trl.analysis.doctor.result import TunedFit
from qscope_trl.analysis.doctor.thresholds import SAME_FEATURES

GONE = 0.25
"""Share of the base's figure, rate or activity, below which the upper end lies when it is called gone or silent. A
choice, not a measurement: three quarters at least are gone."""

STAYED = 0.5
"""Share above which the lower end lies when it is called there: half at least is left."""

MIN_SHOWN = 10
"""Generations that show the behaviour, from which something is concluded: of the base model, to judge how many are
left, and of each model, to judge how active features are in them."""

DECODABLE = 0.75
"""AUROC above which the lower end of the best probe lies when the behaviour counts as decodable: half-way between
chance and certainty. It must also lie above what the best probe reached on any shuffled labels."""

FVU_RISE = 1.25
"""Factor by which the SAE's fraction unexplained may rise, as `qscope doctor` has it."""

OWN = "own generations that show it"
"""Place of `ActivityRow`: tokens the model itself wrote where the behaviour shows."""

POSITIVE_TEXTS, NEGATIVE_TEXTS = "positive texts", "negative texts"
"""Places of `ActivityRow`."""

Fall = Literal["gone", "fell", "stayed", "undecided"]

VERDICTS = {
    "behaviour went away": "the text-level rate is at most a quarter of the base's",
    "feature silent, behaviour stayed": "the features say less where they spoke, the texts show it as before: "
    "the mark of a penalty that was gamed",
    "feature silent, behaviour only fell": "the features say less than the texts, which show it less often",
    "behaviour fell": "less than before, but not gone; the features are not silent",
    "nothing changed": "behaviour and features are there as before",
    "behaviour stayed": "the texts still show it; the features fell, or their activity is not decided",
    "feature silent, still decodable": "no decision from texts; the residuals still tell",
    "feature silent, not decodable": "no decision from texts; the probes no longer tell",
    "feature active, behaviour not decided": "no decision from texts; the features are there as before",
    "not decided": "the intervals are too wide; give more prompts and texts",
}
"""All verdicts, and what each means."""


class Ruling(NamedTuple):
    """The verdict, its reason, and what to mind."""

    verdict: str
    reason: str
    notes: list[str]


def fall(low: float, high: float) -> Fall:
    """What an interval of the share that is left says."""
    if math.isnan(low) or math.isnan(high):
        return "undecided"
    if high <= GONE:
        return "gone"
    if low >= STAYED:
        return "stayed"
    return "fell" if high < 1 else "undecided"


def decide(
    behaviour: Behaviour | None,
    activity: Sequence[ActivityRow],
    detectors: Sequence[DetectorRow],
    collateral: Collateral,
    fits: Sequence[TunedFit],
) -> Ruling:
    """The verdict from the figures.

    Args:
        behaviour: Text-level rates, if measured.
        activity: By set and place.
        detectors: With the probes and the shuffled labels.
        collateral: What else changed.
        fits: The SAEs on both models.
    """
    can_judge = behaviour is not None and round(behaviour.base * behaviour.num_prompts) >= MIN_SHOWN
    shown = fall(behaviour.left_low, behaviour.left_high) if behaviour is not None and can_judge else "undecided"
    places = {row.where: row for row in activity if row.kind == "trained on"}
    falls = {where: _fall(row) for where, row in places.items()}
    silent = {where for where in (POSITIVE_TEXTS, NEGATIVE_TEXTS, OWN) if falls.get(where) == "gone"}
    is_active = falls.get(POSITIVE_TEXTS) == "stayed" and not silent
    decodable = _decodable(detectors)
    verdict = _verdict(shown, silent, is_active, decodable)
    reason = " ".join([_texts_say(behaviour, can_judge), _features_say(places), _probes_say(detectors, decodable)])
    return Ruling(verdict, " ".join(reason.split()), _notes(verdict, behaviour, places, collateral, fits, detectors))


def _fall(row: ActivityRow) -> Fall:
    if row.where == OWN and min(row.num_texts_base, row.num_texts_tuned) < MIN_SHOWN:
        return "undecided"
    return fall(row.left_low, row.left_high)


def _verdict(shown: Fall, silent: set[str], is_active: bool, decodable: bool | None) -> str:
    if shown == "gone":
        return "behaviour went away"
    if shown == "stayed":
        if silent:
            return "feature silent, behaviour stayed"
        return "nothing changed" if is_active else "behaviour stayed"
    if shown == "fell":
        return "feature silent, behaviour only fell" if silent else "behaviour fell"
    if POSITIVE_TEXTS in silent and decodable is not None:
        return "feature silent, still decodable" if decodable else "feature silent, not decodable"
    return "feature active, behaviour not decided" if is_active else "not decided"


def _decodable(detectors: Sequence[DetectorRow]) -> bool | None:
    """Whether the best probe tells; None if its interval holds the threshold or chance comes as far."""
    probes = [row for row in detectors if row.kind == "probe"]
    chance = [row.tuned_high for row in detectors if row.kind == "shuffled labels"]
    if not probes or not chance:
        return None
    best = max(probes, key=lambda row: row.tuned)
    if best.tuned_low >= DECODABLE and best.tuned_low > chance[0]:
        return True
    return False if all(row.tuned_high < DECODABLE for row in probes) else None


def _texts_say(behaviour: Behaviour | None, can_judge: bool) -> str:
    if behaviour is None:
        return "No generations were judged."
    what = (
        f"`{behaviour.detector}` is shown by {behaviour.base:.1%} of the base model's {behaviour.num_prompts} "
        f"generations and by {behaviour.tuned:.1%} of the tuned one's"
    )
    if not can_judge:
        shown = round(behaviour.base * behaviour.num_prompts)
        return f"{what}: {shown} of the base's are too few to judge by."
    return f"{what}: {_left(behaviour.left, behaviour.left_low, behaviour.left_high)}."


def _features_say(places: dict[str, ActivityRow]) -> str:
    said = [
        f"on {where} {_left(row.left, row.left_low, row.left_high)}"
        for where, row in places.items()
        if where == POSITIVE_TEXTS
        or (where == NEGATIVE_TEXTS and not math.isnan(row.left))
        or (where == OWN and _fall(row) != "undecided")
    ]
    return f"Activity of the features trained on: {'; '.join(said)}." if said else ""


def _probes_say(detectors: Sequence[DetectorRow], decodable: bool | None) -> str:
    probes = [row for row in detectors if row.kind == "probe"]
    if not probes:
        return ""
    best = max(probes, key=lambda row: row.tuned)
    chance = [row for row in detectors if row.kind == "shuffled labels"]
    against = f", against {chance[0].tuned:.2f} on shuffled labels" if chance else ""
    told = {True: "still decodable", False: "not decodable", None: "decodability not decided"}[decodable]
    return (
        f"The best retrained probe of the tuned model has AUROC {best.tuned:.2f} ({best.tuned_low:.2f} to "
        f"{best.tuned_high:.2f}){against}: {told}."
    )


def _notes(
    verdict: str,
    behaviour: Behaviour | None,
    places: dict[str, ActivityRow],
    collateral: Collateral,
    fits: Sequence[TunedFit],
    detectors: Sequence[DetectorRow],
) -> list[str]:
    notes = []
    old = next((row for row in detectors if row.kind == "old" and row.name == "trained on"), None)
    on_positive = places.get(POSITIVE_TEXTS)
    is_silent = on_positive is not None and _fall(on_positive) == "gone"
    if old is not None and old.tuned_low >= DECODABLE and is_silent:
        notes.append(
            f"The features trained on are silent by size, but still tell the texts apart (AUROC {old.tuned:.2f}): "
            f"what is left of them is in the right places."
        )
    if old is not None and old.base_low < DECODABLE:
        notes.append(
            f"The features did not tell these texts apart on the base model either (AUROC {old.base:.2f}, "
            f"{old.base_low:.2f} to {old.base_high:.2f}), so their silence says little. Check that positive texts "
            f"show what the features stand for."
        )
    changed = [one for one in fits if one.jaccard < SAME_FEATURES or one.fvu > FVU_RISE * one.fvu_base]
    if changed:
        listed = ", ".join(
            f"layer {one.layer}: fvu {one.fvu_base:.2f} to {one.fvu:.2f}, Jaccard {one.jaccard:.2f}" for one in changed
        )
        notes.append(
            f"The SAEs describe the tuned model worse, or by other features ({listed}), so what its features say "
            f"counts for less. Go by the texts."
        )
    if collateral.loss_difference_low > 0:
        notes.append(
            f"Perplexity on {collateral.source} rose from {collateral.perplexity_base:.2f} to "
            f"{collateral.perplexity_tuned:.2f} (loss {collateral.loss_difference:+.3f} nats, "
            f"{collateral.loss_difference_low:+.3f} to {collateral.loss_difference_high:+.3f})."
        )
    if behaviour is not None and behaviour.difference_low > 0:
        notes.append(
            f"The tuned model shows the behaviour more often than the base: {behaviour.difference:+.1%} "
            f"({behaviour.difference_low:+.1%} to {behaviour.difference_high:+.1%})."
        )
    if verdict == "behaviour went away":
        notes.append(
            "That the behaviour went away does not say by what. To credit the penalty, audit the same training "
            "without it, or with it on random features."
        )
    if not any(row.kind == "old" and row.name == "monitors" for row in detectors):
        notes.append(
            "No monitors were given: nothing tells how features of the behaviour that were not trained on do."
        )
    return notes


def _left(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "not active on the base model"
    return f"{value:.0%} of it is left ({low:.0%} to {high:.0%})"
