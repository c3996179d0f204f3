"""From figures to findings, around the SAEs: positions, BOS, chat template, dtypes, and a tuned version.

Nothing is measured here. Thresholds are in `thresholds`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qscope_trl.analysis.doctor import thresholds as limits
from qscope_trl.analysis.doctor.findings import geometric_mean, listed, span, worse_of
from qscope_trl.analysis.doctor.fit import Survey
from qscope_trl.analysis.doctor.reading import place_name
from qscope_trl.analysis.doctor.result import ContextFit, Finding, LayerFit, TunedFit
from qscope_trl.analysis.doctor.tuned import CHANGE
from qscope_trl.monitor.fit_sums import MAX_NORM_RATIO


def judge_overflow(
    not_finite: Mapping[int, int], num_layers: int, dtype: str, *, where: str = "", flag: str = "--dtype"
) -> list[Finding]:
    """Residuals that are NaN or inf.

    Args:
        not_finite: Tokens with such residuals, by place; only places that have any.
        num_layers: Layers of the model.
        dtype: Dtype of its weights.
        where: Of which model or in which context, in words; empty for the model on the plain texts.
        flag: Setting of the dtype.
    """
    if not not_finite:
        return []
    first, more = min(not_finite), len(not_finite) - 1
    return [
        Finding(
            check="dtype",
            severity="fail",
            what=f"In {dtype} the residuals of {not_finite[first]} tokens{where and ' '}{where} are NaN or inf at "
            f"{place_name(first, num_layers)}"
            + (f", and at {more} place{'s' if more > 1 else ''} after it." if more else "."),
            why="Nothing can be read from them; the model itself computes nonsense there.",
            action=f"Load the model in bfloat16 or float32 (`{flag}`); float16 overflows in many models."
            if dtype == "float16"
            else "Check the model's weights.",
            layers=tuple(place for place in sorted(not_finite) if 0 <= place < num_layers),
        )
    ]


def judge_contexts(fits: Sequence[ContextFit], num_layers: int, dtype: str, where: str) -> list[Finding]:
    """Residuals that are NaN or inf in one of two contexts alone."""
    not_finite = {one.layer: one.not_finite for one in fits if one.not_finite}
    return judge_overflow(not_finite, num_layers, dtype, where=where)


def judge_divergence(kl: float | None) -> list[Finding]:
    """Next-token distributions that are NaN though the residuals are finite."""
    if kl is None or not math.isnan(kl):
        return []
    return [
        Finding(
            check="dtype",
            severity="fail",
            what="Next-token probabilities of the base or the tuned model are NaN.",
            why="Their divergence cannot be told, and such a model writes nonsense.",
            action="Check the weights of the model's head and final norm, or load it in float32.",
        )
    ]


def judge_positions(
    layers: Sequence[LayerFit], survey: Survey, tokenizer: Any, token_ids: Sequence[Sequence[int]]
) -> list[Finding]:
    """Position 0, and tokens of far larger norm than the others."""
    found = []
    first = [(fit, fit.first) for fit in layers if fit.first is not None and fit.first.fvu == fit.first.fvu]
    if first:
        figures = (
            f"error over variance {span(one.fvu for _, one in first)} against {span(fit.fvu for fit, _ in first)} "
            f"elsewhere, cosine {span(one.cosine for _, one in first)}, norm "
            f"{span((one.norm_ratio for _, one in first), 1)} times the median."
        )
        if any(one.fvu > fit.fvu / limits.MUCH_BETTER for fit, one in first):
            found.append(
                Finding(
                    check="position 0",
                    severity="note",
                    what=f"Position 0 is described less well: {figures}",
                    why="Most models have an attention sink there, and SAE training leaves it out.",
                    action="Leave it out of everything, as the commands and penalties of this package do by default.",
                )
            )
        else:
            found.append(Finding(check="position 0", severity="ok", what=f"Position 0 is like the others: {figures}"))
    far = [fit for fit in layers if fit.outlier_share > 0]
    if far:
        worst = max(far, key=lambda fit: fit.outlier_share)
        ids = Counter(token_ids[text][position] for text, position in survey.outliers[worst.layer])
        tokens = ", ".join(f"{tokenizer.decode([token])!r}" for token, _ in ids.most_common(3))
        found.append(
            Finding(
                check="outliers",
                severity="note",
                what=f"{worst.outlier_share:.2%} of tokens after position 0 have more than {MAX_NORM_RATIO:.0f} times "
                f"the median norm in layer {worst.layer} (most often {tokens}); with them its fvu is "
                f"{worst.fvu_with_outliers:.3f}, without {worst.fvu:.3f}.",
                why="Such attention sinks are outside the SAEs' training data and can lead any ranking by activation.",
                action="They are left out of the table; `qscope find` leaves them out too.",
                layers=tuple(fit.layer for fit in far),
            )
        )
    elif layers:
        found.append(
            Finding(
                check="outliers",
                severity="ok",
                what=f"No token after position 0 has more than {MAX_NORM_RATIO:.0f} times the median norm.",
            )
        )
    return found


def judge_bos(bos: Sequence[ContextFit], is_added: bool | None) -> list[Finding]:
    """With BOS (`fvu`) against without (`fvu_plain`).

    Args:
        bos: Per layer; empty if nothing was compared.
        is_added: Whether the tokenizer adds BOS by itself; None if it has none.
    """
    if is_added is None:
        return [
            Finding(check="BOS", severity="ok", what="The tokenizer has no BOS token, so texts begin as they are.")
        ]
    if not bos:
        return [Finding(check="BOS", severity="note", what="No text was long enough to compare with and without BOS.")]
    ratio = geometric_mean([one.fvu / one.fvu_plain for one in bos if one.fvu_plain > 0])
    figures = (
        f"fvu {span(one.fvu for one in bos)} with BOS, {span(one.fvu_plain for one in bos)} without; Jaccard index of "
        f"active features {span((one.jaccard for one in bos), 2)}."
    )
    wrong = ratio > 1 / limits.BETTER if is_added else ratio < limits.BETTER
    if not wrong:
        habit = "adds BOS" if is_added else "adds no BOS"
        return [Finding(check="BOS", severity="ok", what=f"The tokenizer {habit}, which suits the SAEs: {figures}")]
    return [
        Finding(
            check="BOS",
            severity="warn",
            what=f"The SAEs do better {'without' if is_added else 'with'} a BOS token, which the tokenizer "
            f"{'adds' if is_added else 'does not add'}: {figures}",
            why="They were trained on texts made that way; BOS changes the residuals of all later tokens.",
            action="Have the tokenizer add no BOS." if is_added else "Have the tokenizer add BOS.",
        )
    ]


def judge_chat(chat: Sequence[ContextFit], has_template: bool, is_chat: bool = False) -> list[Finding]:
    """The chat template's effect on the content.

    Args:
        chat: Per layer; empty if nothing was compared.
        has_template: Whether the tokenizer has one.
        is_chat: Whether the texts are conversations already.
    """
    if is_chat:
        what = "The texts are conversations in the chat template already; all figures are of these."
        return [Finding(check="chat template", severity="ok", what=what)]
    if not chat:
        what = "In the chat template no token of the texts could be told." if has_template else "No chat template."
        return [Finding(check="chat template", severity="note" if has_template else "ok", what=what)]
    figures = (
        f"fvu {span(one.fvu for one in chat)} in the template, {span(one.fvu_plain for one in chat)} plain; Jaccard "
        f"index of active features {span((one.jaccard for one in chat), 2)} ({chat[0].num_tokens} tokens)."
    )
    ratio = geometric_mean([one.fvu / one.fvu_plain for one in chat if one.fvu_plain > 0])
    if ratio > 1 / limits.MUCH_BETTER:
        return [
            Finding(
                check="chat template",
                severity="warn",
                what=f"In the chat template the SAEs reconstruct the same tokens less well: {figures}",
                why="What is found on plain text holds less for conversations.",
                action="Find features on conversations, and read `fvu` there before trusting them.",
            )
        ]
    if min(one.jaccard for one in chat) < limits.SAME_FEATURES:
        return [
            Finding(
                check="chat template",
                severity="note",
                what=f"In the chat template other features are active at the same tokens: {figures}",
                why="Thresholds and firing rates from plain text do not carry over to conversations.",
                action="Find features on texts rendered as they will be used.",
            )
        ]
    return [Finding(check="chat template", severity="ok", what=f"The chat template changes little: {figures}")]


def judge_roundings(layers: Sequence[LayerFit]) -> list[Finding]:
    """The SAE's matrices in other dtypes."""
    told, worst = [], 1.0
    for name in ("bfloat16", "float16"):
        overlaps = [fit.roundings[name]["jaccard"] for fit in layers]
        errors = [fit.roundings[name]["value_error"] for fit in layers]
        worst = min(worst, *overlaps)
        off = span((100 * error for error in errors), 2)
        told.append(f"{name} {span(overlaps)}" + (f" (values off by {off} %)" if off != "-" else ""))
    what = f"Jaccard index of active features with the SAE in another dtype: {', '.join(told)}."
    if worst >= limits.ROUNDED_SAME:
        return [Finding(check="SAE dtype", severity="ok", what=what)]
    return [
        Finding(
            check="SAE dtype",
            severity="note",
            what=what,
            why="Rounding changes which features are among the top k.",
            action="Keep whole encoders in fp32: `SAESuite.from_pretrained(..., dtype=torch.float32)`.",
        )
    ]


def judge_tuned(tuned: Sequence[TunedFit], layers: Sequence[LayerFit], kl: float | None) -> list[Finding]:
    """Whether the SAEs still describe the tuned model, and whether by the same features."""
    if not tuned:
        return []
    chance = {fit.layer: fit.chance for fit in layers}
    extent = f"; KL(base || tuned) {kl:.3f} nats a token" if kl is not None else ""
    bad = [one for one in tuned if worse_of(one.fvu, chance[one.layer]) != "ok"]
    found = []
    if bad:
        fails = any(worse_of(one.fvu, chance[one.layer]) == "fail" for one in bad)
        found.append(
            Finding(
                check="tuned",
                severity="fail" if fails else "warn",
                what=f"On the tuned model the SAEs reconstruct {'no better than chance' if fails else 'poorly'}: fvu "
                f"{span(one.fvu for one in bad)} in {listed([one.layer for one in bad])}, on the base model "
                f"{span(one.fvu_base for one in bad)}{extent}.",
                why="Their features do not describe it any more.",
                action="Use them on the base model only, or train less far away from it.",
                layers=tuple(one.layer for one in bad),
            )
        )
    drifted = [one for one in tuned if one not in bad and one.fvu > one.fvu_base / limits.MUCH_BETTER]
    if drifted:
        mean = geometric_mean([one.fvu / one.fvu_base for one in tuned])
        found.append(
            Finding(
                check="tuned",
                severity="warn" if mean > 1 / limits.MUCH_BETTER else "note",
                what=f"On the tuned model the SAEs reconstruct less well: fvu {span(one.fvu for one in drifted)} "
                f"instead of {span(one.fvu_base for one in drifted)} in {listed([one.layer for one in drifted])}"
                f"{extent}.",
                why="The model has moved away from what they were trained on.",
                action="Mind that features found on the base model say less here.",
                layers=tuple(one.layer for one in drifted),
            )
        )
    others = [one for one in tuned if one.jaccard < limits.SAME_FEATURES]
    overlap = f"mean Jaccard index {span((one.jaccard for one in others or tuned), 2)}"
    if others:
        found.append(
            Finding(
                check="tuned features",
                severity="warn",
                what=f"At the same tokens the tuned model activates other features: {overlap} in "
                f"{listed([one.layer for one in others])}, though fvu is {span(one.fvu for one in others)} against "
                f"{span(one.fvu_base for one in others)}; {span((100 * one.changed_share for one in others), 0)} % of "
                f"features fire more than {CHANGE:.0f} times as often, or as seldom{extent}.",
                why="The SAEs may still reconstruct, but their features stand for something else than on the base "
                "model: labels and thresholds from there do not hold.",
                action="Find features again on the tuned model, and compare their examples.",
                layers=tuple(one.layer for one in others),
            )
        )
    tokens = {fit.layer: fit.num_tokens for fit in layers}
    gone = [one for one in tuned if one.num_tokens < (1 - limits.LEFT_OUT) * tokens[one.layer]]
    if gone:
        shares = span((100 * (1 - one.num_tokens / tokens[one.layer]) for one in gone), 0)
        found.append(
            Finding(
                check="tuned outliers",
                severity="warn",
                what=f"{shares} % of tokens in {listed([one.layer for one in gone])} are left out of the comparison: "
                f"on the tuned model their norm exceeds {MAX_NORM_RATIO:.0f} times the base model's median.",
                why="The figures say nothing of them, and so large residuals are outside the SAEs' training data.",
                action="Compare the norms of both models' residuals, and check the weights of the tuned one.",
                layers=tuple(one.layer for one in gone),
            )
        )
    if not found:
        found.append(
            Finding(
                check="tuned",
                severity="ok",
                what=f"On the tuned model the SAEs fit as on the base: fvu {span(one.fvu for one in tuned)} against "
                f"{span(one.fvu_base for one in tuned)}, {overlap}{extent}.",
            )
        )
    return found
