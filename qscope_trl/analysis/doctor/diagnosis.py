"""All checks in order: what cannot fit by its shape, what overflows, then layer by layer a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qscope_trl.activations.encode import tokenize
from qscope_trl.analysis.doctor import chosen, context, surroundings, variety
from qscope_trl.analysis.doctor import findings as judging
from qscope_trl.analysis.doctor.fit import Run, Survey, fit, places_of, survey
from qscope_trl.analysis.doctor.result import (
    ContextFit,
    Diagnosis,
    FeatureFiring,
    Finding,
    LayerFit,
    TunedFit,
)
from qscope_trl.analysis.doctor.tuned import check_same_shape, compare_tuned, divergence
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.layers import d_model, find_layers
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE

_ORDER = ("fail", "warn", "note", "ok")


@dataclass
class _Measured:
    layers: list[LayerFit] = field(default_factory=list)
    bos: list[ContextFit] = field(default_factory=list)
    chat: list[ContextFit] = field(default_factory=list)
    tuned: list[TunedFit] = field(default_factory=list)
    firing: list[FeatureFiring] = field(default_factory=list)


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    tuned: nn.Module | None = None,
    features: FeatureSet | None = None,
    max_length: int = 512,
    batch_size: int = 8,
    probe_tokens: int = 2048,
    scan: int = 1,
    layers_at_once: int = 4,
    seed: int = 0,
    is_chat: bool = False,
    model_name: str = "model",
    saes_name: str | None = None,
    tuned_name: str = "tuned model",
    show_progress: bool = True,
) -> Diagnosis:
    """Measure whether SAEs fit a model on texts, and conclude.

    Memory is that of the models, of `layers_at_once` SAEs with decoders in fp32, of one batch, and of the residuals of
    `probe_tokens` tokens at the layers being looked at. The texts run through the model once, and once more for each
    lot of layers; those of a tuned model likewise.

    Args:
        model: The model the SAEs are said to be for, on its device. Left as it was.
        tokenizer: Its tokenizer.
        saes: The SAEs.
        texts: Texts like those the features will be used on; 2,000 tokens or more give steady figures.
        layers: Layers to check; by default all of `saes`.
        tuned: A tuned version of the model to compare, on its device.
        features: A FeatureSet to check too.
        max_length: Tokens kept of each text.
        batch_size: Texts in one forward.
        probe_tokens: Tokens, about, on which other readings are tried; see `alternatives` and `context`.
        scan: Layers to either side that each SAE is tried on.
        layers_at_once: SAEs in memory at a time.
        seed: Decides the noise that chance is measured with.
        is_chat: Whether the texts are conversations already, so that the chat template's effect is no question.
        model_name: Name of the model for the record.
        saes_name: Name of the SAEs for the record; by default the suite's own.
        tuned_name: Name of the tuned one.
        show_progress: Whether to show progress bars on stderr.

    Returns:
        Figures, findings and the verdict.

    Raises:
        CheckpointError: If a layer has no SAE, or its file is damaged.
        DataError: If no text has a token after position 0.
        ModelStructureError: If the tuned model is no version of the model.
    """
    layers = tuple(sorted(set(saes.layers if layers is None else layers)))
    token_ids = tokenize(tokenizer, texts, max_length=max_length)
    run = Run(
        token_ids=token_ids,
        batch_size=batch_size,
        probe_tokens=probe_tokens,
        scan=scan,
        seed=seed,
        show_progress=show_progress,
    )
    if not run.probe_texts:
        raise DataError(
            f"No token is left to read: none of the {len(texts)} texts has a token after position 0, which is outside "
            f"the SAEs' training data. Give longer texts."
        )
    if tuned is not None:
        check_same_shape(model, tuned, token_ids)
    num_layers = len(find_layers(model))
    usable, found = _by_shape(model, saes, layers)
    weights = next(find_layers(model)[0].parameters())
    dtype = _dtype(model)
    measured = _Measured()
    kl = None
    with _evaluating(model, tuned):
        if usable:
            places = places_of(usable, num_layers, scan)
            norms = survey(model, run, places)
            overflow = surroundings.judge_overflow(norms.not_finite, num_layers, dtype)
            found += overflow
            if not overflow:
                comparable = tuned
                if tuned is not None:
                    broken = _tuned_overflow(tuned, run, places, num_layers)
                    found += broken
                    comparable = None if broken else tuned
                if comparable is not None:
                    kl = divergence(model, comparable, run)
                    found += surroundings.judge_divergence(kl)
                    kl = None if kl is not None and math.isnan(kl) else kl
                for start in range(0, len(usable), layers_at_once):
                    lot = usable[start : start + layers_at_once]
                    plain = None if is_chat else texts
                    _measure(
                        measured, model, comparable, tokenizer, saes, lot, features, plain, run, norms, max_length
                    )
                found += _judge(measured, norms, tokenizer, run, num_layers, kl, is_chat, dtype)
    if features is not None:
        found += chosen.check_set(features, saes, layers, num_layers)
        found += chosen.judge_firing(measured.firing)
    return Diagnosis(
        model=model_name,
        saes=saes_name or saes.source,
        dtype=dtype,
        device=str(weights.device),
        num_texts=sum(len(row) > 1 for row in token_ids),
        num_tokens=sum(max(0, len(row) - 1) for row in token_ids),
        layers=tuple(measured.layers),
        bos=tuple(measured.bos),
        chat=tuple(measured.chat),
        tuned_name=None if tuned is None else tuned_name,
        tuned=tuple(measured.tuned),
        kl=kl,
        features=tuple(measured.firing),
        findings=tuple(sorted(found, key=lambda finding: _ORDER.index(finding.severity))),
    )


def _by_shape(model: nn.Module, saes: SAESuite, layers: Sequence[int]) -> tuple[list[int], list[Finding]]:
    """The layers whose SAEs can be read at all, and why others cannot."""
    width, num_layers = d_model(model), len(find_layers(model))
    beyond = [layer for layer in layers if layer >= num_layers]
    found = []
    if beyond:
        found.append(
            Finding(
                check="shape",
                severity="fail",
                what=f"There are SAEs for {judging.listed(beyond)}, but the model has layers 0-{num_layers - 1}.",
                why="They are of another model, or count entries of `hidden_states`, where 0 is the embeddings."
                if beyond == [num_layers]
                else "They are of another model.",
                action="Check the names; `--layers` leaves layers out.",
                layers=tuple(beyond),
            )
        )
    usable, other = [], {}
    for layer in layers:
        if layer in beyond:
            continue
        spec = saes.spec(layer)
        if spec.d_model == width:
            usable.append(layer)
        else:
            other[layer] = spec.d_model
    if other:
        found.append(
            Finding(
                check="shape",
                severity="fail",
                what=f"The SAEs of {judging.listed(list(other))} read residuals of width "
                f"{', '.join(str(size) for size in sorted(set(other.values())))}, the model's are {width} wide.",
                why="They are of another model.",
                action="Use the SAEs made for this model.",
                layers=tuple(other),
            )
        )
    return usable, found


def _measure(
    measured: _Measured,
    model: nn.Module,
    tuned: nn.Module | None,
    tokenizer: Any,
    saes: SAESuite,
    lot: Sequence[int],
    features: FeatureSet | None,
    texts: Sequence[str] | None,
    run: Run,
    norms: Survey,
    max_length: int,
) -> None:
    """All figures of some layers, whose SAEs are in memory meanwhile."""
    modules = find_layers(model)
    loaded: dict[int, TopKSAE] = {
        layer: saes.load(layer, device=next(modules[layer].parameters()).device) for layer in lot
    }
    layers, firing = fit(model, loaded, run, norms, len(modules), features)
    measured.layers += layers
    measured.firing += firing
    sample = sorted(run.probe_texts)
    is_added = context.has_bos(tokenizer, run.token_ids)
    if is_added is not None:
        pairing = context.with_bos(
            [run.token_ids[i] for i in sample], tokenizer.bos_token_id, is_there=is_added, max_length=max_length
        )
        measured.bos += context.compare(model, loaded, pairing, run, norms, "BOS")
    if texts is not None and getattr(tokenizer, "chat_template", None):
        rendered = context.in_template(tokenizer, [texts[i] for i in sample], max_length)
        if rendered is not None:
            measured.chat += context.compare(model, loaded, rendered, run, norms, "chat template")
    if tuned is not None:
        measured.tuned += compare_tuned(model, tuned, loaded, run, norms)


def _judge(
    measured: _Measured,
    norms: Survey,
    tokenizer: Any,
    run: Run,
    num_layers: int,
    kl: float | None,
    is_chat: bool,
    dtype: str,
) -> list[Finding]:
    layers = measured.layers
    has_bos, has_template = context.has_bos(tokenizer, run.token_ids), bool(getattr(tokenizer, "chat_template", None))
    beside_bos = "without BOS" if has_bos else "after BOS"
    return variety.withheld(
        [
            *judging.judge_readings(layers, num_layers),
            *judging.judge_fit(layers),
            *judging.judge_weights(layers),
            *surroundings.judge_positions(layers, norms, tokenizer, run.token_ids),
            *(
                surroundings.judge_contexts(measured.bos, num_layers, dtype, beside_bos)
                or surroundings.judge_bos(measured.bos, has_bos)
            ),
            *(
                surroundings.judge_contexts(measured.chat, num_layers, dtype, "in the chat template")
                or surroundings.judge_chat(measured.chat, has_template, is_chat)
            ),
            *surroundings.judge_roundings(layers),
            *surroundings.judge_tuned(measured.tuned, layers, kl),
        ],
        layers,
        tokenizer,
        run.token_ids,
    )


def _tuned_overflow(tuned: nn.Module, run: Run, places: Sequence[int], num_layers: int) -> list[Finding]:
    """Residuals of the tuned model that are not finite: they drop out of a comparison as outliers do."""
    not_finite = survey(tuned, run, places).not_finite
    return surroundings.judge_overflow(
        not_finite, num_layers, _dtype(tuned), where="of the tuned model", flag="--tuned-dtype"
    )


def _dtype(model: nn.Module) -> str:
    return str(next(find_layers(model)[0].parameters()).dtype).removeprefix("torch.")


@contextmanager
def _evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Models in evaluation mode, each module's own mode put back afterwards."""
    before = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for model in models:
        if model is not None:
            model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
