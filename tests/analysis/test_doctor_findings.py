"""From figures to findings: each rule at, below and above its threshold, on made figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from qscope_trl.analysis.doctor import alternatives as other
from qscope_trl.analysis.doctor import findings as judging
from qscope_trl.analysis.doctor import surroundings
from qscope_trl.analysis.doctor import thresholds as limits
from qscope_trl.analysis.doctor.fit import Survey
from qscope_trl.analysis.doctor.report import format_text
from qscope_trl.analysis.doctor.result import (
    ContextFit,
    Diagnosis,
    Finding,
    FirstPosition,
    LayerFit,
    TunedFit,
)

NUM_LAYERS = 8
READINGS = {
    other.AS_READ: 0.2, other.HALF_K: 0.3, other.DOUBLE_K: 0.22, other.NO_RELU: 0.2, other.SUBTRACTED: 0.4,
    other.ADDED: 0.5, other.UNIT_NORM: 9.0, other.LAYER_NORM: 2.0,
}  # fmt: skip
SURVEY = Survey({3: 10.0}, {3: 11.0}, {3: []}, {})


def layer_fit(layer: int = 3, **changes: Any) -> LayerFit:
    """A good fit."""
    readings = {**READINGS, **changes.pop("readings", {})}
    given: dict[str, Any] = {
        "layer": layer, "d_sae": 1024, "k": 50, "num_tokens": 5000, "fvu": 0.2, "chance": 0.6, "cosine": 0.9,
        "l0": 50.0, "short_share": 0.0, "silent_share": 0.05, "norm": 10.0, "norm_ratio": 0.9, "outlier_share": 0.0,
        "fvu_with_outliers": 0.2, "first": FirstPosition(num_tokens=9, fvu=0.21, cosine=0.9, l0=50, norm_ratio=1.1),
        "places": {layer - 1: 0.3, layer: readings[other.AS_READ], layer + 1: 0.28}, "readings": readings,
        "scale": 1.0,
        "roundings": {name: {"jaccard": 0.99, "value_error": 0.001} for name in ("bfloat16", "float16")},
        "chance_jaccard": 0.1, "alignment": 0.6, "alignment_reshaped": math.nan,
    }  # fmt: skip
    return LayerFit(**{**given, **changes})


def only(found: list[Finding], check: str) -> Finding:
    [one] = [finding for finding in found if finding.check == check]
    return one


def verdict_of(*severities: str) -> tuple[str, int]:
    findings = tuple(Finding(check="x", severity=one, what="x") for one in severities)  # type: ignore[arg-type]
    result = Diagnosis(
        model="m", saes="s", dtype="float32", device="cpu", num_texts=1, num_tokens=1, findings=findings
    )
    return result.verdict, result.exit_code


def test_the_worst_finding_decides_the_verdict() -> None:
    assert verdict_of() == verdict_of("ok", "note") == ("fits", 0)
    assert verdict_of("ok", "warn", "note") == ("doubtful", 1)
    assert verdict_of("warn", "fail", "ok") == ("does not fit", 3)


def test_words_for_figures() -> None:
    assert judging.span([0.17, 0.045, math.nan]) == "0.045 to 0.170"
    assert judging.span([0.1701, 0.1699]) == "0.170"
    assert judging.span([math.nan]) == "-"
    assert judging.listed([3]) == "layer 3"
    assert judging.listed([0, 1, 2, 3, 7]) == "layers 0-3, 7"
    assert judging.geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)
    assert math.isnan(judging.geometric_mean([]))


@pytest.mark.parametrize(
    ("fvu", "chance", "severity"),
    [
        (0.2, 0.6, "ok"),
        (0.39, 0.5, "ok"),
        (0.41, 0.6, "warn"),
        (0.3, 0.36, "warn"),  # 0.83 of chance
        (0.35, 0.36, "warn"),  # at chance, but low all the same
        (0.5, 0.55, "fail"),
        (0.95, 1.6, "fail"),  # noise is worse than the mean alone, which leaves 1
        (0.85, math.nan, "warn"),
        (math.nan, 0.6, "fail"),
    ],
)
def test_a_fit_is_judged_beside_chance(fvu: float, chance: float, severity: str) -> None:
    assert judging.worse_of(fvu, chance) == severity
    found = only(judging.judge_fit([layer_fit(fvu=fvu, chance=chance)]), "reconstruction")
    assert found.severity == severity
    assert found.layers == (() if severity == "ok" else (3,))


def test_layers_are_judged_apart() -> None:
    layers = [layer_fit(2), layer_fit(3, fvu=0.5, chance=0.8), layer_fit(4, fvu=0.7, chance=0.7)]
    found = {one.severity: one for one in judging.judge_fit(layers)}
    assert (found["fail"].layers, found["warn"].layers) == ((4,), (3,))
    assert "no better than chance: fvu 0.700 in layer 4" in found["fail"].what
    assert "fvu 0.200 in layer 2" in found["ok"].what


def test_few_tokens_make_a_doubtful_verdict() -> None:
    few = only(judging.judge_fit([layer_fit(num_tokens=limits.FEW_TOKENS - 1)]), "texts")
    assert (few.severity, few.what) == ("warn", "Only 199 tokens were measured.")
    assert all(one.check != "texts" for one in judging.judge_fit([layer_fit(num_tokens=limits.FEW_TOKENS)]))


@pytest.mark.parametrize(
    ("check", "name", "value", "severity"),
    [
        ("k", other.HALF_K, 0.1, "warn"),
        ("k", other.DOUBLE_K, 0.1, "warn"),
        ("k", other.DOUBLE_K, 0.195, "ok"),  # within 5 %
        ("ReLU", other.NO_RELU, 0.1, "warn"),
        ("b_dec", other.SUBTRACTED, 0.1, "fail"),
        ("b_dec", other.SUBTRACTED, 0.17, "warn"),  # better, but not by a fifth
        ("b_dec", other.ADDED, 0.1, "fail"),
        ("normalisation", other.UNIT_NORM, 0.1, "fail"),
        ("normalisation", other.LAYER_NORM, 0.1, "fail"),
        ("scale", other.SCALED, 0.1, "fail"),
    ],
)
def test_a_better_reading_is_a_finding(check: str, name: str, value: float, severity: str) -> None:
    layers = [layer_fit(n, readings={name: value}, scale=2.0 if name == other.SCALED else 1.0) for n in (2, 3)]
    found = only(judging.judge_readings(layers, NUM_LAYERS), check)
    assert found.severity == severity
    if severity == "ok":
        assert found.what.startswith("No other reading is clearly better: fvu 0.200 as stated")
    else:
        assert f"fvu {value:.3f} instead of 0.200 in layers 2-3 (2 of 2 tried)" in found.what


def test_a_better_reading_no_better_than_noise_is_none() -> None:
    poor = layer_fit(fvu=0.9, chance=0.6, readings={other.AS_READ: 0.9, other.SUBTRACTED: 0.55, other.ADDED: 1.0})
    assert only(judging.judge_readings([poor], NUM_LAYERS), "b_dec").severity == "ok"


def test_a_reading_better_in_one_layer_of_many_is_a_note() -> None:
    layers = [layer_fit(n, readings={other.SUBTRACTED: 0.1} if n == 2 else {}) for n in (2, 3, 4)]
    found = only(judging.judge_readings(layers, NUM_LAYERS), "b_dec")
    assert (found.severity, found.layers) == ("note", (2,))
    assert "(1 of 3 tried)" in found.what


def test_a_scale_found_in_one_layer_is_judged_among_all() -> None:
    layers = [layer_fit(2, readings={other.SCALED: 0.02}, scale=3.0), layer_fit(3), layer_fit(4)]
    found = only(judging.judge_readings(layers, NUM_LAYERS), "scale")
    assert found.severity == "note"
    assert "(1 of 3 tried)" in found.what


def test_of_several_better_readings_the_best_is_the_finding() -> None:
    layers = [layer_fit(readings={other.SUBTRACTED: 0.05, other.DOUBLE_K: 0.1, other.UNIT_NORM: 0.15})]
    found = judging.judge_readings(layers, NUM_LAYERS)
    assert only(found, "b_dec").severity == "fail"
    for check in ("k", "normalisation"):
        assert only(found, check).severity == "note"
        assert only(found, check).action.startswith("Mend that one first")


@pytest.mark.parametrize(("step", "where"), [(-1, "1 layer earlier"), (1, "1 layer later"), (2, "2 layers later")])
def test_a_shift_is_named_with_what_to_rename(step: int, where: str) -> None:
    layers = [layer_fit(n, places={n: 0.2, n + step: 0.1}) for n in (2, 3)]
    found = only(judging.judge_readings(layers, NUM_LAYERS), "layer")
    assert found.severity == "fail"
    assert found.what.startswith(f"Read {where}, the SAEs reconstruct better")
    assert found.action == f"Rename each file from layer n to n{step:+d}, and run the doctor again."
    assert ("entries of `hidden_states`" in found.why) == (step == -1)


def test_a_small_shift_of_every_layer_is_a_misfit_and_of_one_layer_alone_is_not() -> None:
    slightly = [layer_fit(n, places={n: 0.2, n + 1: 0.18}) for n in (2, 3)]
    assert only(judging.judge_readings(slightly, NUM_LAYERS), "layer").severity == "fail"
    assert only(judging.judge_readings(slightly[:1], NUM_LAYERS), "layer").severity == "warn"


def test_one_misplaced_layer_makes_the_verdict_doubtful() -> None:
    layers = [layer_fit(n, places={n: 0.2, n + 1: 0.1 if n == 3 else 0.3}) for n in (2, 3, 4)]
    found = only(judging.judge_readings(layers, NUM_LAYERS), "layer")
    assert (found.severity, found.layers) == ("warn", (3,))


def test_an_sae_of_the_final_norm_is_told() -> None:
    last = NUM_LAYERS - 1
    found = only(
        judging.judge_readings([layer_fit(last, places={last: 0.2, NUM_LAYERS: 0.1})], NUM_LAYERS), "final norm"
    )
    assert found.severity == "fail"
    assert "after that norm" in found.why


def test_the_closest_other_layer_is_named() -> None:
    found = judging.judge_readings([layer_fit(0, places={-1: 5.0, 0: 0.2, 1: 0.5}), layer_fit(7)], NUM_LAYERS)
    assert only(found, "layer").what == (
        "Each SAE reconstructs its own layer best. The closest is that of layer 7 at the final norm, where it leaves "
        "1.40 times as much."
    )
    worse = judging.judge_readings([layer_fit(3, places={3: 0.2, 4: 0.195})], NUM_LAYERS)
    assert only(worse, "layer").what.startswith("No other layer explains the figures. The closest")


def test_encoders_and_decoders_of_different_saes() -> None:
    mixed = only(judging.judge_weights([layer_fit(alignment=0.02, fvu=1.4)]), "weights")
    assert (mixed.severity, "of different SAEs" in mixed.why) == ("fail", True)
    assert only(judging.judge_weights([layer_fit(alignment=0.02)]), "weights").severity == "note"
    reshaped = only(judging.judge_weights([layer_fit(alignment=0.0, alignment_reshaped=0.7)]), "weights")
    assert (reshaped.severity, reshaped.action) == ("fail", "Store `W_dec.reshape(d_sae, d_model).T`.")
    assert all(one.check != "weights" for one in judging.judge_weights([layer_fit(alignment=math.nan)]))


def test_features_that_do_not_fire() -> None:
    dead = judging.judge_weights([layer_fit(l0=0.0, silent_share=1.0, short_share=1.0)])
    assert [(one.check, one.severity) for one in dead] == [("l0", "fail")]
    assert "No feature fires at any token in layer 3" in dead[0].what
    half = layer_fit(silent_share=0.5)
    assert only(judging.judge_weights([half]), "silent features").severity == "note"
    for usual in (replace(half, silent_share=0.29), replace(half, num_tokens=400)):  # 400 * 50 / 1024 = 19.5 firings
        assert [one.check for one in judging.judge_weights([usual])] == ["l0"]


def test_tokens_short_of_k_features() -> None:
    some = only(judging.judge_weights([layer_fit(short_share=0.3, l0=45.0)]), "l0")
    assert (some.severity, "30 % of tokens have fewer than k" in some.what) == ("note", True)
    assert only(judging.judge_weights([layer_fit(short_share=0.9, l0=24.0)]), "l0").severity == "warn"
    assert only(judging.judge_weights([layer_fit()]), "l0").what == "L0 is 50.0, k as stated."
    assert judging.judge_weights([layer_fit(k=None)]) == []


def test_position_zero_and_outliers() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    tokens = [[9, 4, 4, 5]]
    usual = surroundings.judge_positions([layer_fit()], SURVEY, Tokenizer(), tokens)
    assert [(one.check, one.severity) for one in usual] == [("position 0", "ok"), ("outliers", "ok")]
    first = FirstPosition(num_tokens=1, fvu=0.26, cosine=0.5, l0=20, norm_ratio=40)
    sink = layer_fit(first=first, outlier_share=0.01, fvu_with_outliers=0.7)
    far = SURVEY._replace(outliers={3: [(0, 1), (0, 2), (0, 3)]})
    told = surroundings.judge_positions([sink], far, Tokenizer(), tokens)
    assert [(one.check, one.severity) for one in told] == [("position 0", "note"), ("outliers", "note")]
    assert "norm 40.0 times the median" in told[0].what
    assert "1.00% of tokens after position 0" in told[1].what
    assert "(most often '<4>', '<5>'); with them its fvu is 0.700, without 0.200" in told[1].what


def context(fvu: float, plain: float = 0.2, overlap: float = 0.8) -> list[ContextFit]:
    return [ContextFit(layer=3, num_tokens=9, fvu_plain=plain, fvu=fvu, l0_plain=50, l0=50, jaccard=overlap)]


@pytest.mark.parametrize(
    ("fvu", "is_added", "severity"),
    [(0.2, True, "ok"), (0.2, False, "ok"), (0.25, True, "warn"), (0.15, False, "warn"), (0.15, True, "ok")],
)
def test_bos_is_judged_by_what_the_tokenizer_does(fvu: float, is_added: bool, severity: str) -> None:
    [found] = surroundings.judge_bos(context(fvu), is_added)
    assert found.severity == severity
    if severity == "warn":
        assert found.action == f"Have the tokenizer add {'no ' if is_added else ''}BOS."


def test_bos_that_cannot_be_judged() -> None:
    assert "has no BOS token" in surroundings.judge_bos([], None)[0].what
    assert surroundings.judge_bos([], True)[0].severity == "note"


def test_the_chat_template_is_judged_by_fit_and_by_features() -> None:
    for fvu, overlap, severity, told in (
        (0.2, 0.8, "ok", "changes little"),
        (0.2, 0.4, "note", "other features are active"),
        (0.26, 0.8, "warn", "less well"),
    ):
        [found] = surroundings.judge_chat(context(fvu, overlap=overlap), True)
        assert (found.severity, told in found.what) == (severity, True)
    assert [surroundings.judge_chat([], has)[0].severity for has in (True, False)] == ["note", "ok"]


def test_a_rounded_encoder_that_picks_other_features_is_told() -> None:
    assert surroundings.judge_roundings([layer_fit()])[0].severity == "ok"
    coarse = layer_fit(roundings={"bfloat16": {"jaccard": 0.85, "value_error": 0.02}, "float16": READINGS_16})
    [found] = surroundings.judge_roundings([coarse])
    assert found.severity == "note"
    assert "bfloat16 0.850 (values off by 2.00 %), float16 1.000." in found.what


READINGS_16 = {"jaccard": 1.0, "value_error": math.nan}


def tuned(fvu: float, overlap: float = 0.9, layer: int = 3) -> TunedFit:
    return TunedFit(
        layer=layer, num_tokens=5000, fvu_base=0.2, fvu=fvu, cosine_base=0.9, cosine=0.9, l0=50.0, jaccard=overlap,
        residual_cosine=0.9, changed_share=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fvu", "overlap", "expected"),
    [
        (0.205, 0.7, [("tuned", "ok")]),
        (0.205, 0.4, [("tuned features", "warn")]),
        (0.3, 0.9, [("tuned", "warn")]),
        (0.45, 0.9, [("tuned", "warn")]),
        (0.58, 0.1, [("tuned", "fail"), ("tuned features", "warn")]),
    ],
)
def test_a_tuned_model_is_judged_by_fit_and_by_features(fvu: float, overlap: float, expected: list[Any]) -> None:
    found = surroundings.judge_tuned([tuned(fvu, overlap)], [layer_fit()], 0.25)
    assert [(one.check, one.severity) for one in found] == expected
    assert all("KL(base || tuned) 0.250 nats a token" in one.what for one in found)


def test_tokens_that_only_the_tuned_model_makes_outliers_are_told() -> None:
    for tokens, checks in ((4800, ["tuned"]), (4700, ["tuned outliers"])):
        found = surroundings.judge_tuned([replace(tuned(0.2), num_tokens=tokens)], [layer_fit()], None)
        assert [one.check for one in found] == checks
    assert found[0].severity == "warn"
    assert found[0].what.startswith("6 % of tokens in layer 3 are left out of the comparison")


def test_drift_in_one_layer_of_many_is_a_note() -> None:
    layers = [layer_fit(n) for n in (2, 3, 4)]
    [found] = surroundings.judge_tuned([tuned(0.3, layer=2), tuned(0.2), tuned(0.2, layer=4)], layers, None)
    assert (found.severity, found.layers) == ("note", (2,))
    assert "KL" not in found.what
    assert surroundings.judge_tuned([], layers, None) == []


def test_overflow_names_the_first_place_and_the_way_out() -> None:
    assert surroundings.judge_overflow({}, NUM_LAYERS, "float16") == []
    [found] = surroundings.judge_overflow({5: 7, 8: 7}, NUM_LAYERS, "float16")
    assert (found.severity, found.layers) == ("fail", (5,))
    assert "In float16 the residuals of 7 tokens are NaN or inf at layer 5, and at 1 place after it." in found.what
    assert "bfloat16 or float32 (`--dtype`)" in found.action


def test_overflow_in_one_context_is_a_misfit() -> None:
    fits = [replace(context(0.2)[0], layer=layer, not_finite=bad) for layer, bad in ((2, 0), (3, 7), (4, 9))]
    assert surroundings.judge_contexts(fits[:1], NUM_LAYERS, "float16", "after BOS") == []
    [found] = surroundings.judge_contexts(fits, NUM_LAYERS, "float16", "after BOS")
    assert (found.check, found.severity, found.layers) == ("dtype", "fail", (3, 4))
    assert "In float16 the residuals of 7 tokens after BOS are NaN or inf at layer 3, and at 1 place" in found.what


def test_a_divergence_that_is_nan_is_a_misfit_and_no_figure() -> None:
    assert surroundings.judge_divergence(None) == surroundings.judge_divergence(0.3) == []
    [found] = surroundings.judge_divergence(math.nan)
    assert (found.check, found.severity) == ("dtype", "fail")
    assert "Next-token probabilities of the base or the tuned model are NaN" in found.what


def test_long_findings_are_wrapped_under_their_heads() -> None:
    result = Diagnosis(
        model="m", saes="s", dtype="float32", device="cpu", num_texts=2, num_tokens=30, layers=(layer_fit(),),
        findings=(Finding(check="b_dec", severity="fail", what="x " * 100, why="why", action="act"),),
    )  # fmt: skip
    lines = format_text(result).splitlines()
    assert lines[0] == "SAEs 's' on model 'm' (float32, cpu): 2 texts, 30 tokens after position 0"
    assert " ".join(lines[2].split()) == "layer fvu chance cosine l0 silent norm pos 0 at n-1 at n at n+1"
    assert " ".join(lines[3].split()) == "3 0.200 0.600 0.900 50.0 5.0% 10.0 0.210 0.300 0.200 0.280"
    assert lines[5].startswith("fail  b_dec            x x")
    assert lines[6].startswith(" " * 23 + "x")
    assert lines[7].endswith("why act")
    assert all(len(line) <= 118 for line in lines)
    assert lines[-1] == "Verdict: does not fit (exit code 3)"
