"""The HTML report of `qscope find`: what was chosen, how sure that is, what else would have done, and examples.

Left out: charts, and features that were not chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qscope_trl.analysis.baselines import Baseline
from qscope_trl.analysis.discovery import Discovery
from qscope_trl.analysis.examples import Example
from qscope_trl.features import Feature, FeatureId
from qscope_trl.monitor.html import (
    Html,
    details,
    element,
    figure,
    highlighted,
    joined,
    section,
    settings,
    table,
    write_page,
)

COLUMNS = {
    "mean_act": "mean activation",
    "mean_act_others": "others",
    "text_rate": "texts",
    "text_rate_others": "others",
    "heldout_auroc": "held-out AUROC",
    "p_value": "p",
    "q_value": "q",
    "familywise_p": "family-wise p",
    "selection_rate": "selected",
}
"""Evidence that the table of features shows, where a feature has it."""


def write_report(
    path: str | Path,
    discovery: Discovery,
    examples: Mapping[FeatureId, Sequence[Example]],
    baselines: Sequence[Baseline] = (),
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: File to write, `.html`.
        discovery: What `discover` gave.
        examples: What `top_examples` gave.
        baselines: What `baselines.compare` gave.

    Raises:
        OSError: If it cannot be written.
    """
    found = discovery.found
    parts = [
        element(
            "p",
            f"{len(found)} features of the group ",
            element("b", found.target_group),
            f" in {', '.join(f'layer {layer}' for layer in found.layers)} of {found.model or 'the model'}, ranked by ",
            element("code", discovery.settings.rank_by),
            ".",
        ),
        section("Features", _features(found.features)),
        *([section("Beside them", _beside(baselines))] if baselines else []),
        section("Texts", _texts(discovery)),
        section("Examples", _reading(), *(_examples(f, examples.get(f.id, ())) for f in found.features)),
        section("Settings", settings(found.origin["settings"])),
    ]
    write_page(path, f"Features of {found.target_group}", joined(parts))


def _features(features: Sequence[Feature]) -> Html:
    shown = [name for name in COLUMNS if any(name in feature.evidence for feature in features)]
    has_ends = any("heldout_auroc_low" in feature.evidence for feature in features)
    rows: list[list[object]] = []
    for feature in features:
        link = element("a", str(feature.id), href=f"#{feature.id}")
        row: list[object] = [link, feature.label, *(feature.evidence.get(name) for name in shown)]
        if has_ends:
            row.append(interval(feature.evidence.get("heldout_auroc_low"), feature.evidence.get("heldout_auroc_high")))
        rows.append([*row, feature.threshold])
    ends = ["95 % interval of it"] if has_ends else []
    return table(["feature", "label", *(COLUMNS[name] for name in shown), *ends, "threshold"], rows)


def _beside(baselines: Sequence[Baseline]) -> Html:
    rows = [[one.layer, one.name, one.heldout_auroc, interval(one.low, one.high)] for one in baselines]
    note = (
        "How well each tells the target's held-out texts from the others'; fitted on the texts that features were "
        "chosen on. The range is a 95 % interval, and of random features the worst and the best draw."
    )
    return joined([table(["layer", "classifier", "held-out AUROC", "range"], rows), element("p", note)])


def interval(low: float | None, high: float | None) -> str:
    """Both ends in brackets, or a dash."""
    return "-" if low is None or high is None else f"{figure(low)} to {figure(high)}"


def _texts(discovery: Discovery) -> Html:
    origin = discovery.found.origin
    masked = origin["masked"]
    halves = origin.get("search", {}).get("split_half", {})
    groups = [
        [name, origin["texts"][name], origin["heldout_texts"][name], origin["tokens"][name]]
        for name in origin["texts"]
    ]
    layers = [
        [layer, masked["median_norm"].get(layer), count, *halves.get(layer, {}).values()]
        for layer, count in masked["norm_outliers"].items()
    ]
    titles = ["layer", "median norm", "tokens masked", *(["rank correlation", "top overlap"] if halves else [])]
    ratio = discovery.settings.max_norm_ratio
    note = f"Position 0 of {masked['first_positions']} texts is masked" + (
        f", and tokens whose residual is longer than {ratio:g} times the median." if ratio else "."
    )
    more = "Correlation and overlap are those of two halves of the texts." if halves else ""
    return joined(
        [
            table(["group", "texts", "held out", "tokens searched"], groups),
            table(titles, layers),
            element("p", note, " ", more),
        ]
    )


def _reading() -> Html:
    note = (
        "The texts in which each feature is most active. Orange: active, fuller for a higher activation, which the "
        "pointer shows. Grey: masked, not read."
    )
    return element("p", note)


def _examples(feature: Feature, examples: Sequence[Example]) -> Html:
    highest = max((example.act_max for example in examples), default=1.0)
    shown = [
        joined(
            [
                element(
                    "p",
                    element("b", example.group),
                    ", held out" if example.is_heldout else "",
                    f", highest {figure(example.act_max)}",
                    class_="dim",
                ),
                highlighted(
                    [
                        *([" \u2026"] if example.is_cut[0] else []),
                        *example.tokens,
                        *(["\u2026"] if example.is_cut[1] else []),
                    ],
                    [*([0.0] if example.is_cut[0] else []), *example.acts, *([0.0] if example.is_cut[1] else [])],
                    highest,
                ),
            ]
        )
        for example in examples
    ]
    return section(
        str(feature.id), details("Evidence", _evidence(feature.evidence)), *shown, level=3, id=str(feature.id)
    )


def _evidence(evidence: Mapping[str, float]) -> Html:
    """Every figure once: on the texts that features were chosen on, on those held out, and the interval there is."""
    ends = ("_low", "_high")
    rows = []
    for name, value in evidence.items():
        if not name.startswith("heldout_") and not name.endswith(ends):
            of = f"heldout_{name}" if f"heldout_{name}{ends[0]}" in evidence else name
            enclosed = interval(*(evidence.get(of + end) for end in ends))
            rows.append([name, value, evidence.get(f"heldout_{name}"), enclosed])
    return table(["figure", "value", "held out", "95 % interval"], rows)
