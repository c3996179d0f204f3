"""From figures to findings: does each SAE reconstruct its layer, and would another reading do better?

`surroundings` judges what lies around the SAEs: positions, BOS, chat template, dtype, a tuned version. Nothing is
measured here. Thresholds are in `thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from qscope_trl.analysis.doctor import alternatives as other
from qscope_trl.analysis.doctor import thresholds as limits
from qscope_trl.analysis.doctor.reading import place_name
from qscope_trl.analysis.doctor.result import Finding, LayerFit, Severity


def span(values: Iterable[float], digits: int = 3) -> str:
    """`0.045 to 0.170`, or one figure if both ends round to it; NaN is left out."""
    shown = sorted(value for value in values if not math.isnan(value))
    if not shown:
        return "-"
    low, high = f"{shown[0]:.{digits}f}", f"{shown[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def listed(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 0-3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'layer' if len(layers) == 1 else 'layers'} {shown}"


def geometric_mean(ratios: Sequence[float]) -> float:
    """Of positive numbers; NaN of none."""
    return math.exp(sum(math.log(max(r, 1e-12)) for r in ratios) / len(ratios)) if ratios else math.nan


def worse_of(fvu: float, chance: float) -> Severity:
    """How a fraction unexplained is judged beside that of like noise (the mean alone leaves 1)."""
    floor = min(1.0, chance) if not math.isnan(chance) else 1.0
    if math.isnan(fvu):
        return "fail"
    if fvu >= limits.CHANCE_FAIL * floor and fvu > limits.FVU_DOUBTFUL:
        return "fail"
    return "warn" if fvu > limits.FVU_DOUBTFUL or fvu >= limits.CHANCE_DOUBTFUL * floor else "ok"


def judge_fit(layers: Sequence[LayerFit]) -> list[Finding]:
    """Whether the SAEs reconstruct the residuals."""
    found = []
    few = [fit for fit in layers if fit.num_tokens < limits.FEW_TOKENS]
    if few:
        found.append(
            Finding(
                check="texts",
                severity="warn",
                what=f"Only {min(fit.num_tokens for fit in few)} tokens were measured.",
                why=f"Below {limits.FEW_TOKENS} tokens the figures change from text to text.",
                action="Give more or longer texts.",
            )
        )
    for severity in ("fail", "warn", "ok"):
        mine = [fit for fit in layers if worse_of(fit.fvu, fit.chance) == severity]
        if not mine:
            continue
        figures = (
            f"fvu {span(fit.fvu for fit in mine)} in {listed([fit.layer for fit in mine])}; noise with the same mean "
            f"and covariance gets {span(fit.chance for fit in mine)}."
        )
        if severity == "ok":
            found.append(Finding(check="reconstruction", severity="ok", what=f"The SAEs reconstruct: {figures}"))
            continue
        is_fail = severity == "fail"
        found.append(
            Finding(
                check="reconstruction",
                severity="fail" if is_fail else "warn",
                what=f"The SAEs reconstruct {'no better than chance' if is_fail else 'poorly'}: {figures}",
                why="Features of an SAE that does not describe the residuals mean nothing."
                if is_fail
                else f"Published SAEs leave about 0.2; above {limits.FVU_DOUBTFUL} much of what the model holds is "
                f"outside the features.",
                action="If no other finding explains it: check that model, revision and SAEs belong together."
                if is_fail
                else "Check that the model is the right one, and the texts of a kind the SAEs were trained on.",
                layers=tuple(fit.layer for fit in mine),
            )
        )
    return found


@dataclass(frozen=True)
class _Candidate:
    """Another reading, with what to say if it is better."""

    check: str
    figure: Callable[[LayerFit], float | None]
    what: str
    why: str
    action: str
    most: Severity = "fail"


def judge_readings(layers: Sequence[LayerFit], num_layers: int) -> list[Finding]:
    """Whether another layer, k or convention reconstructs better than what is stated.

    Of several that do, the one that leaves least keeps its severity; the others become notes, because one error makes
    several other readings look better.
    """
    better: list[tuple[float, Finding]] = []
    partly: list[tuple[float, Finding]] = []
    for candidate in _candidates(layers, num_layers):
        pairs = {fit.layer: pair for fit in layers if (pair := _pair(fit, candidate)) is not None}
        ahead = [
            fit.layer
            for fit in layers
            if fit.layer in pairs
            and pairs[fit.layer][1] < limits.BETTER * pairs[fit.layer][0]
            and pairs[fit.layer][1] < limits.CHANCE_DOUBTFUL * min(1.0, fit.chance)
        ]
        if not ahead:
            continue
        ratio = geometric_mean([theirs / mine for mine, theirs in pairs.values()])
        is_general = 2 * len(ahead) > len(pairs) and ratio < limits.BETTER
        # A right SAE is best at its own layer, so several that all do better at the same other step need no margin.
        is_shift = candidate.check == "layer" and len(ahead) == len(pairs) > 1
        severity = candidate.most if is_general and (ratio < limits.MUCH_BETTER or is_shift) else "warn"
        mine, theirs = ([pairs[layer][side] for layer in ahead] for side in (0, 1))
        finding = Finding(
            check=candidate.check,
            severity=severity if is_general or candidate.check == "layer" else "note",
            what=f"{candidate.what}: fvu {span(theirs)} instead of {span(mine)} in {listed(ahead)} ({len(ahead)} of "
            f"{len(pairs)} tried).",
            why=candidate.why,
            action=candidate.action,
            layers=tuple(ahead),
        )
        (better if is_general else partly).append((ratio, finding))
    better.sort(key=lambda pair: pair[0])
    found = [finding for _, finding in better[:1]]
    found += [_also(finding) for _, finding in better[1:]]
    found += [_also(finding) if better else finding for _, finding in partly]
    checks = {finding.check for finding in found}
    return found + [finding for finding in _in_order(layers, num_layers) if finding.check not in checks]


def _also(finding: Finding) -> Finding:
    return replace(
        finding,
        severity="note",
        why="Another finding explains more; this may be its consequence.",
        action="Mend that one first and run the doctor again.",
    )


def _pair(fit: LayerFit, candidate: _Candidate) -> tuple[float, float] | None:
    mine, theirs = fit.readings[other.AS_READ], candidate.figure(fit)
    return None if theirs is None or math.isnan(theirs) or math.isnan(mine) else (mine, theirs)


def _candidates(layers: Sequence[LayerFit], num_layers: int) -> list[_Candidate]:
    steps = sorted({place - fit.layer for fit in layers for place in fit.places if place != num_layers} - {0})
    found = [_shifted(step, num_layers) for step in steps]
    found.append(
        _Candidate(
            check="final norm",
            figure=lambda fit: fit.places.get(num_layers),
            what="The last SAE reconstructs what leaves the final norm better than the last layer's output",
            why="The last entry of `hidden_states` is after that norm: this SAE was trained on it.",
            action="Do not use this layer's SAE here: what this package reads is the layer's own output.",
        )
    )

    def reading(name: str) -> Callable[[LayerFit], float | None]:
        return lambda fit: fit.readings.get(name)

    def scaled(fit: LayerFit) -> float | None:
        # Absent where no factor is better than 1: the layer counts as tried, and as no better.
        return fit.readings.get(other.SCALED, fit.readings[other.AS_READ])

    ks = sorted({fit.k for fit in layers if fit.k is not None})
    stated, half, double = (" and ".join(str(size) for size in sizes) for sizes in (
        ks, [max(1, k // 2) for k in ks], [2 * k for k in ks],
    ))  # fmt: skip
    scale = span((fit.scale for fit in layers if fit.scale != 1), 2)
    trained = "The SAEs were trained on other inputs than they are given; every activation is wrong."
    for check, name, what, why, action, most in (
        (
            "k", other.HALF_K, f"Half of k={stated} reconstructs better",
            "An SAE does best with the k it was trained with, so the stated one seems too large.",
            f"Check the k in the release's name or configuration, and try `--sae-k {half}`.", "warn",
        ),
        (
            "k", other.DOUBLE_K, f"Twice k={stated} reconstructs better",
            "An SAE does best with the k it was trained with, so the stated one seems too small.",
            f"Check the k in the release's name or configuration, and try `--sae-k {double}`.", "warn",
        ),
        (
            "ReLU", other.NO_RELU, "Keeping negative values of the top k reconstructs better",
            "The SAEs may have been trained without ReLU after TopK; this package applies it.",
            "Check the release; features that fire with negative values are silent here.", "warn",
        ),
        (
            "b_dec", other.SUBTRACTED, "With `b_dec` subtracted from the input the SAEs reconstruct better",
            trained, "Store `b_enc - W_enc @ b_dec` as `b_enc`, or use the format that says so "
            "(docs/sae-formats.md).", "fail",
        ),
        (
            "b_dec", other.ADDED, "With `b_dec` added to the input the SAEs reconstruct better",
            trained, "The format subtracts `b_dec`, but the SAEs were trained without: for SAELens set "
            "`apply_b_dec_to_input: false`; else store `b_enc + W_enc @ b_dec` as `b_enc`.", "fail",
        ),
        (
            "normalisation", other.UNIT_NORM, "With every input scaled to norm 1 the SAEs reconstruct better",
            trained, "This package has no normalisation at run time; such SAEs cannot be used.", "fail",
        ),
        (
            "normalisation", other.LAYER_NORM, "With every input standardised the SAEs reconstruct better",
            trained, "This package has no normalisation at run time; such SAEs cannot be used.", "fail",
        ),
        (
            "scale", other.SCALED, f"With inputs multiplied by {scale} the SAEs reconstruct better",
            trained, "Fold the factor in: `W_enc * factor`, `W_dec / factor`, `b_dec / factor`.", "fail",
        ),
    ):  # fmt: skip
        figure = scaled if name == other.SCALED else reading(name)
        found.append(_Candidate(check, figure, what, why, action, most))  # type: ignore[arg-type]
    return found


def _shifted(step: int, num_layers: int) -> _Candidate:
    def figure(fit: LayerFit) -> float | None:
        place = fit.layer + step
        return None if place == num_layers else fit.places.get(place)

    where = f"{abs(step)} layer{'s' if abs(step) > 1 else ''} {'earlier' if step < 0 else 'later'}"
    return _Candidate(
        check="layer",
        figure=figure,
        what=f"Read {where}, the SAEs reconstruct better",
        why="Their files are numbered from another start"
        + (" (by entries of `hidden_states`, of which the first is the embeddings)" if step == -1 else "")
        + f": the one named layer n describes the output of layer n{step:+d}.",
        action=f"Rename each file from layer n to n{step:+d}, and run the doctor again.",
    )


def _in_order(layers: Sequence[LayerFit], num_layers: int) -> list[Finding]:
    """What to say of checks in which nothing was better."""
    found = []
    beside = [
        (fit.places[place] / fit.places[fit.layer], fit, place)
        for fit in layers
        for place in fit.places
        if place != fit.layer and fit.places[fit.layer] > 0 and not math.isnan(fit.places[place])
    ]
    if beside:
        ratio, nearest, place = min(beside, key=lambda one: one[0])
        told = "Each SAE reconstructs its own layer best" if ratio > 1 else "No other layer explains the figures"
        found.append(
            Finding(
                check="layer",
                severity="ok",
                what=f"{told}. The closest is that of layer {nearest.layer} at {place_name(place, num_layers)}, where "
                f"it leaves {ratio:.2f} times as much.",
            )
        )
    for check, names in (
        ("b_dec", (other.SUBTRACTED, other.ADDED)),
        ("normalisation", (other.UNIT_NORM, other.LAYER_NORM)),
        ("k", (other.HALF_K, other.DOUBLE_K)),
    ):
        tried = [
            f"{name} {span(fit.readings[name] for fit in layers if name in fit.readings)}"
            for name in names
            if any(name in fit.readings for fit in layers)
        ]
        if tried:
            stated = span(fit.readings[other.AS_READ] for fit in layers)
            what = f"No other reading is clearly better: fvu {stated} as stated, {', '.join(tried)}."
            found.append(Finding(check=check, severity="ok", what=what))
    return found


def judge_weights(layers: Sequence[LayerFit]) -> list[Finding]:
    """Whether encoder and decoder are of one SAE, and whether its features fire."""
    found = []
    apart = [fit for fit in layers if fit.alignment < limits.UNALIGNED]
    reshaped = [fit for fit in apart if fit.alignment_reshaped >= limits.UNALIGNED]
    for mine, is_reshaped in ((reshaped, True), ([fit for fit in apart if fit not in reshaped], False)):
        if not mine:
            continue
        fails = is_reshaped or any(worse_of(fit.fvu, fit.chance) == "fail" for fit in mine)
        found.append(
            Finding(
                check="weights",
                severity="fail" if fails else "note",
                what=f"The encoder and decoder vectors of a feature have a mean cosine of "
                f"{span((fit.alignment for fit in mine), 2)} in {listed([fit.layer for fit in mine])}"
                + (
                    f", but {span((fit.alignment_reshaped for fit in mine), 2)} if `W_dec` is taken as reshaped."
                    if is_reshaped
                    else "."
                ),
                why="`W_dec` was reshaped to `(d_model, d_sae)` where it should have been transposed."
                if is_reshaped
                else "In trained SAEs they are similar; here `W_enc` and `W_dec` seem to be of different SAEs.",
                action="Store `W_dec.reshape(d_sae, d_model).T`."
                if is_reshaped
                else "Fetch the file again, or ask its authors.",
                layers=tuple(fit.layer for fit in mine),
            )
        )
    return found + _judge_firing(layers)


def _judge_firing(layers: Sequence[LayerFit]) -> list[Finding]:
    """Whether features fire at all, and whether tokens reach k of them."""
    found = []
    dead = [fit.layer for fit in layers if fit.l0 == 0]
    if dead:
        found.append(
            Finding(
                check="l0",
                severity="fail",
                what=f"No feature fires at any token in {listed(dead)}: the SAEs are dead.",
                why="Every pre-activation is below zero, so what is reconstructed is `b_dec` alone.",
                action="Fetch the files again; if that changes nothing, their bias or scale is not for this model.",
                layers=tuple(dead),
            )
        )
    silent = [fit for fit in layers if fit.l0 > 0 and _expected(fit) >= limits.ENOUGH_FIRINGS]
    silent = [fit for fit in silent if fit.silent_share > limits.SILENT]
    if silent:
        found.append(
            Finding(
                check="silent features",
                severity="note",
                what=f"{span((100 * fit.silent_share for fit in silent), 0)} % of features fire at no token in "
                f"{listed([fit.layer for fit in silent])}, though a feature fires "
                f"{span((_expected(fit) for fit in silent), 0)} times on average.",
                why="They are dead, or stand for what these texts do not hold. Dead features leave the others too few "
                "for k, and a larger k or scale can then look better.",
                action="Run on texts of more kinds; features silent there too are of no use.",
                layers=tuple(fit.layer for fit in silent),
            )
        )
    short = [fit for fit in layers if fit.k is not None and fit.l0 > 0 and fit.short_share > limits.SHORT]
    if short:
        halved = any(fit.l0 < fit.k / 2 for fit in short if fit.k)
        found.append(
            Finding(
                check="l0",
                severity="warn" if halved else "note",
                what=f"{span((100 * fit.short_share for fit in short), 0)} % of tokens have fewer than k positive "
                f"pre-activations in {listed([fit.layer for fit in short])}: L0 is "
                f"{span((fit.l0 for fit in short), 1)} "
                f"where k is {span((float(fit.k or 0) for fit in short), 0)}.",
                why="An SAE on its own kind of input seldom runs out of positive pre-activations.",
                action="Look at the findings on model, layer and scale first.",
                layers=tuple(fit.layer for fit in short),
            )
        )
    elif not dead and any(fit.k is not None for fit in layers):
        found.append(
            Finding(check="l0", severity="ok", what=f"L0 is {span((fit.l0 for fit in layers), 1)}, k as stated.")
        )
    return found


def _expected(fit: LayerFit) -> float:
    """Firings of a feature, on average."""
    return fit.num_tokens * fit.l0 / fit.d_sae
