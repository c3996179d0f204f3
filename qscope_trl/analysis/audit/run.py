"""`qscope audit`: base and tuned model on the same texts and prompts, the verdict, and where it is written.

Both models are in memory. Left out: several processes, and resuming; nothing but the generations takes long.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qscope_trl.activations.encode import tokenize
from qscope_trl.activations.opening import load_encoders, open_model, require_fit
from qscope_trl.activations.sampling import Generation, Sampling, generate
from qscope_trl.analysis.audit import report
from qscope_trl.analysis.audit.collateral import collateral
from qscope_trl.analysis.audit.detectors import Pair, feature_rows, old_detectors, retrained, words
from qscope_trl.analysis.audit.estimates import Activity, rates, share_left
from qscope_trl.analysis.audit.reading import NEGATIVE, POSITIVE, Material, measure, read_generated
from qscope_trl.analysis.audit.result import ActivityRow, Audit, Behaviour, DetectorRow, Sample
from qscope_trl.analysis.audit.setup import Inputs, read_inputs
from qscope_trl.analysis.audit.verdict import NEGATIVE_TEXTS, OWN, POSITIVE_TEXTS, decide
from qscope_trl.analysis.doctor.fit import Run, survey
from qscope_trl.analysis.doctor.result import TunedFit
from qscope_trl.analysis.doctor.tuned import check_same_shape, compare_tuned, open_tuned
from qscope_trl.analysis.outliers import norm_limits
from qscope_trl.analysis.probes import has_scikit_learn
from qscope_trl.analysis.texts import prepare_group
from qscope_trl.bundled import model_path, sae_path
from qscope_trl.config.audit import AuditConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.layers import find_layers
from qscope_trl.monitor import model_card
from qscope_trl.monitor.detectors import Detector, ratio
from qscope_trl.sae.suite import SAESuite

SAMPLES = 12
"""Generations that the report shows."""


def run(config: AuditConfig, *, show_progress: bool = True) -> Audit:
    """Audit as the settings say; writes `config.output`, `config.json`, and into the run's record and model card.

    Args:
        config: The settings.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        CheckpointError: If the SAEs cannot be read.
        ConfigError: If a model or adapter cannot be loaded, or something is neither given nor in the record.
        DataError: If texts cannot be read, there are too few, or residuals are not finite.
        FeatureSetError: If the features do not fit the SAEs.
        ModelStructureError: If the tuned model is no version of the base.
    """
    inputs = read_inputs(config)
    config = inputs.config
    suite = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
    for features in _both(inputs):
        require_fit(None, suite, features)
    base, tokenizer = open_model(
        config.model, revision=config.model_revision, dtype=config.dtype, device=config.device
    )
    tuned = _open_tuned(config, base)
    result = audit(base, tuned, tokenizer, suite, inputs, show_progress=show_progress)
    if config.json is not None:
        report.write_json(result, config.json)
    if config.output is not None:
        report.write_html(result, config.output)
    if inputs.record is not None:
        inputs.record.put("audit", result.to_dict())
        model_card.update_if_possible(str(config.run_dir))
    return result


def format_result(result: Audit) -> str:
    """The audit as text for the terminal."""
    return report.format_text(result)


def audit(
    base: nn.Module, tuned: nn.Module, tokenizer: Any, saes: SAESuite, inputs: Inputs, *, show_progress: bool = True
) -> Audit:
    """Measure both models and decide.

    Args:
        base: The model before fine-tuning, on its device.
        tuned: The model after it; the base's tokenizer is used for both.
        tokenizer: The base's.
        saes: The base's SAEs.
        inputs: Settings, features and texts.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        DataError: If there are too few texts, or residuals are not finite.
        FeatureSetError: If the features do not fit the SAEs.
        ModelStructureError: If the tuned model is no version of the base, or the SAEs are of another.
    """
    config = inputs.config
    material = _material(base, tokenizer, saes, inputs, show_progress)
    ids = [row for name in (POSITIVE, NEGATIVE) for row in material.groups[name].token_ids]
    neutral, asked = (
        tokenize(tokenizer, inputs.texts.get(name, []), max_length=config.max_length)
        for name in ("neutral", "prompts")
    )
    if not any(len(row) > 1 for row in neutral):
        raise DataError(
            "No neutral text has a token after position 0, so there is nothing to predict. Give longer ones."
        )
    check_same_shape(base, tuned, [*ids, *neutral, *asked])
    drawn = {"resamples": config.resamples, "seed": config.seed}
    pair = Pair(measure(base, material, "base"), measure(tuned, material, "tuned"))
    activity = [row for kind, features in _named(inputs) for row in _on_texts(kind, features, pair, material, drawn)]
    detectors = old_detectors(pair, material, **drawn)
    detectors += retrained(pair, material, permutations=config.permutations, show_progress=show_progress, **drawn)
    plain = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    told: DetectorRow | None = words(plain, material, **drawn)
    detectors += [] if told is None else [told]
    behaviour, samples = None, []
    if inputs.detector is not None:
        written = _generate(base, tuned, tokenizer, inputs, show_progress)
        behaviour, shown = _behaviour(inputs.detector, written, drawn)
        for kind, features in _named(inputs):
            activity += _on_generations(kind, features, (base, tuned), written, shown, material, drawn)
        samples = _samples(inputs.texts["prompts"], written, shown)
    lost = collateral(
        base, tuned, neutral, source=config.neutral or str(config.negative), show_progress=show_progress, **drawn
    )
    fits = _fits(base, tuned, material, neutral, config, show_progress)
    activity.sort(key=lambda row: row.kind == "monitors")
    ruling = decide(behaviour, activity, detectors, lost, fits)
    return Audit(
        verdict=ruling.verdict, reason=ruling.reason, model=config.model, tuned=str(config.tuned), saes=config.saes,
        num_positive=len(material.groups[POSITIVE].token_ids), num_negative=len(material.groups[NEGATIVE].token_ids),
        num_heldout=int(material.heldout_X.sum()), behaviour=behaviour, activity=activity, detectors=detectors,
        features=feature_rows(pair, material), collateral=lost, fits=fits, samples=samples,
        notes=[*ruling.notes, *_more_notes(inputs)],
        settings={name: value for name, value in asdict(config).items() if value is not None},
    )  # fmt: skip


def _both(inputs: Inputs) -> list[FeatureSet]:
    return [features for _, features in _named(inputs)]


def _named(inputs: Inputs) -> list[tuple[str, FeatureSet]]:
    named = [("trained on", inputs.features)]
    return named if inputs.monitors is None else [*named, ("monitors", inputs.monitors)]


def _open_tuned(config: AuditConfig, base: nn.Module) -> nn.Module:
    from transformers.utils import find_adapter_config_file

    name, place = str(config.tuned), model_path(str(config.tuned))
    is_adapter = not (Path(place) / "config.json").is_file() and (
        find_adapter_config_file(place, revision=config.tuned_revision) is not None
    )
    # In one dtype, so that rounding is no difference between the two.
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    return open_tuned(
        config.model if is_adapter else name,
        place if is_adapter else None,
        revision=config.model_revision if is_adapter else config.tuned_revision,
        dtype=dtype,
        device=config.device,
    )


def _material(base: nn.Module, tokenizer: Any, saes: SAESuite, inputs: Inputs, show_progress: bool) -> Material:
    config = inputs.config
    for features in _both(inputs):
        require_fit(base, saes, features)
    last = len(find_layers(base)) - 1
    layers = {layer for features in _both(inputs) for layer in features.layers}
    layers |= {last} & set(saes.layers)
    probed = tuple(sorted({*inputs.features.layers, last}))
    positions: Any = config.positions
    groups = {
        name: prepare_group(
            name,
            inputs.texts[name],
            tokenizer,
            positions=positions,
            max_length=config.max_length,
            holdout=config.holdout,
            seed=config.seed,
        )
        for name in (POSITIVE, NEGATIVE)
    }
    limits = norm_limits(
        base,
        [group.token_ids for group in groups.values()],
        sorted({*layers, *probed}),
        positions=positions,
        batch_size=config.batch_size,
        show_progress=show_progress,
    )
    return Material(
        groups=groups,
        encoders=load_encoders(base, saes, sorted(layers), decoder=True),
        features=inputs.features,
        monitors=inputs.monitors,
        probe_layers=probed,
        limits=limits,
        positions=positions,
        batch_size=config.batch_size,
        show_progress=show_progress,
    )


def _on_texts(
    kind: str, features: FeatureSet, pair: Pair, material: Material, drawn: dict[str, int]
) -> list[ActivityRow]:
    rows = []
    for group, where in enumerate((POSITIVE_TEXTS, NEGATIVE_TEXTS)):
        here_X = material.group_X == group
        ends = [Activity(*(part[here_X] for part in one.score(features))) for one in pair]
        rows.append(_activity_row(kind, where, ends[0], ends[1], is_paired=True, drawn=drawn))
    return rows


def _on_generations(
    kind: str,
    features: FeatureSet,
    models: tuple[nn.Module, nn.Module],
    written: tuple[list[Generation], list[Generation]],
    shown: tuple[list[bool], list[bool]],
    material: Material,
    drawn: dict[str, int],
) -> list[ActivityRow]:
    ends = [
        read_generated(model, generations, features, material, f"{kind}: generations")
        for model, generations in zip(models, written, strict=True)
    ]
    rows = [_activity_row(kind, "own generations", ends[0], ends[1], is_paired=True, drawn=drawn)]
    if all(any(one) for one in shown):
        chosen = [Activity(*(part[torch.tensor(mask)] for part in end)) for end, mask in zip(ends, shown, strict=True)]
        rows.append(_activity_row(kind, OWN, chosen[0], chosen[1], is_paired=False, drawn=drawn))
    return rows


def _activity_row(
    kind: str, where: str, base: Activity, tuned: Activity, *, is_paired: bool, drawn: dict[str, int]
) -> ActivityRow:
    left = share_left(base, tuned, is_paired=is_paired, **drawn)
    return ActivityRow(
        kind=kind, where=where, num_texts_base=base.sum_X.numel(), num_texts_tuned=tuned.sum_X.numel(),
        base=base.mean, tuned=tuned.mean, left=left.value, left_low=left.low, left_high=left.high,
    )  # fmt: skip


def _generate(
    base: nn.Module, tuned: nn.Module, tokenizer: Any, inputs: Inputs, show_progress: bool
) -> tuple[list[Generation], list[Generation]]:
    config = inputs.config
    sampling = Sampling.of(config, show_progress=show_progress)
    prompts = inputs.texts["prompts"]
    return generate(base, tokenizer, prompts, sampling), generate(tuned, tokenizer, prompts, sampling)


def _behaviour(
    detector: Detector, written: tuple[list[Generation], list[Generation]], drawn: dict[str, int]
) -> tuple[Behaviour, tuple[list[bool], list[bool]]]:
    base, tuned = ([detector.is_shown(one.text) for one in generations] for generations in written)
    found = rates(base, tuned, **drawn)
    parts: dict[str, Any] = {}
    if detector.parts is not None:
        ends = [ratio([detector.parts(one.text) for one in generations]) for generations in written]
        parts = {"parts_name": detector.parts_name, "parts_base": ends[0], "parts_tuned": ends[1]}
    figures = {
        f"{name}{end}": value
        for name, estimate in found._asdict().items()
        for end, value in zip(("", "_low", "_high"), estimate, strict=True)
    }
    return Behaviour(detector=detector.name, num_prompts=len(base), **figures, **parts), (base, tuned)


def _samples(
    prompts: list[str], written: tuple[list[Generation], list[Generation]], shown: tuple[list[bool], list[bool]]
) -> list[Sample]:
    """The first few, those where either model shows the behaviour before the others."""
    order = sorted(range(len(prompts)), key=lambda n: not (shown[0][n] or shown[1][n]))
    return [
        Sample(
            prompt=prompts[n], base=written[0][n].text, tuned=written[1][n].text, base_shows=shown[0][n],
            tuned_shows=shown[1][n],
        )
        for n in sorted(order[:SAMPLES])
    ]  # fmt: skip


def _fits(
    base: nn.Module,
    tuned: nn.Module,
    material: Material,
    neutral: list[list[int]],
    config: AuditConfig,
    show_progress: bool,
) -> list[TunedFit]:
    run_on = Run(token_ids=neutral, batch_size=config.batch_size, seed=config.seed, show_progress=show_progress)
    saes = {layer: material.encoders[layer] for layer in material.features.layers}
    return compare_tuned(base, tuned, saes, run_on, survey(base, run_on, tuple(saes)))


def _more_notes(inputs: Inputs) -> list[str]:
    notes = []
    if inputs.is_control:
        notes.append(
            "This run was a control: the penalty was put on random features, and what counts as monitors here are the "
            "named ones."
        )
    if not has_scikit_learn():
        notes.append("Logistic probes were left out: scikit-learn is not installed (pip install 'qscope-trl[data]').")
    return notes
