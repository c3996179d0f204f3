"""`qscope steer`: plain and steered text side by side, or a sweep of strengths.

Left out: batching over several processes, and engines other than transformers; `export` writes what those read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qscope_trl.activations.encode import residual_batches
from qscope_trl.activations.opening import open_model
from qscope_trl.activations.sampling import Generation, Sampling, generate
from qscope_trl.activations.sources import open_source, text_columns, text_of
from qscope_trl.bundled import sae_path
from qscope_trl.config.steer import PHASES, SteerConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureSet
from qscope_trl.files import write_whole
from qscope_trl.monitor.html import token_texts
from qscope_trl.sae.chosen import ChosenEncoder
from qscope_trl.sae.suite import SAESuite
from qscope_trl.steering import show
from qscope_trl.steering.calibration import Calibration, calibrate
from qscope_trl.steering.exports import export
from qscope_trl.steering.steer import steer
from qscope_trl.steering.sweep import Sweep, run_sweep

_CALIBRATION_TEXTS = 64


@dataclass(frozen=True, kw_only=True)
class SteerResult:
    """What `run` made; texts are of the prompts in their order, each as often as `num_generations` says.

    Args:
        features: What was steered along.
        strength: The strength used: as set, or as calibrated.
        prompts: Prompt of each generation.
        plain: Texts without steering.
        steered: Texts with steering.
        num_edits: Tokens steered.
        calibration: How the strength was found, if it was.
        is_narrowed: Whether phases, positions or a gate leave tokens out, as a calibration does not.
        sweep: The sweep, instead of texts.
        written: Files written, with what each is.
    """

    features: FeatureSet
    strength: float
    prompts: list[str]
    plain: list[str]
    steered: list[str]
    num_edits: int
    calibration: Calibration | None
    sweep: Sweep | None
    written: dict[str, str]
    is_narrowed: bool = False


def run(config: SteerConfig, *, show_progress: bool = True) -> SteerResult:
    """Steer as the settings say, and write what they ask for.

    Args:
        config: Settings.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        ConfigError: If settings do not fit, an exported file is there already, or the model cannot be loaded.
        DataError: If there is no prompt.
        CheckpointError: If an SAE cannot be read.
        FeatureSetError: If the features do not fit the SAEs.
        RuleError: If a rule cannot be read.
        SteeringError: If nothing was steered, or the calibration did not reach its target.
    """
    for file in config.export_files:
        if file.exists() and not config.overwrite:
            raise ConfigError(f"'{file}' is there already. Choose another `--output`, or give `--overwrite`.")
    if config.figure:
        show.require_figure(config.figure)
    features = _features(config)
    prompts = _prompts(config)
    saes = SAESuite.from_pretrained(sae_path(config.saes), revision=config.sae_revision, k=config.sae_k)
    model, tokenizer = open_model(
        config.model, revision=config.model_revision, dtype=config.dtype, device=config.device
    )
    sampling = Sampling.of(config, show_progress=show_progress and config.sweep is None)
    given = [prompt for prompt in prompts for _ in range(config.num_generations)]

    def steered(chosen: FeatureSet, strength: float) -> AbstractContextManager[Any]:
        return steer(
            model,
            saes,
            chosen,
            strength=strength,
            mode=config.mode,
            unit=config.unit,
            phases=config.phase_list,
            positions=slice(1, None) if config.skip_first else None,
            gate=config.gate,
            gate_reads=config.gate_reads,
        )

    if config.sweep is not None:
        sweep = run_sweep(
            model,
            tokenizer,
            saes,
            features,
            given,
            config.sweep_list,
            config.behaviour or "",
            steered,
            sampling,
            control_draws=config.control_draws,
            same_length=config.mode == "add",
            show_progress=show_progress,
        )
        result = SteerResult(
            features=features, strength=config.strength, prompts=given, plain=[], steered=[], num_edits=0,
            calibration=None, sweep=sweep, written={},
        )  # fmt: skip
        if config.figure:
            show.write_figure(config.figure, sweep)
            result.written["figure"] = config.figure
        return _finish(config, result, model, saes)

    plain = generate(model, tokenizer, given, sampling) if given else []
    calibration = None
    if config.calibrate is not None:
        calibration = calibrate(
            model,
            tokenizer,
            saes,
            features,
            _calibration_texts(config, given, plain),
            config.calibrate,
            unit=config.unit,
            negative=config.strength < 0,
            max_length=config.max_length,
            batch_size=config.batch_size,
            show_progress=show_progress,
        )
    strength = config.strength if calibration is None else calibration.strength
    other: list[Generation] = []
    num_edits = 0
    if given:
        with steered(features, strength) as steering:
            other = generate(model, tokenizer, given, sampling)
        num_edits = steering.num_edits
    result = SteerResult(
        features=features, strength=strength, prompts=given, plain=[one.text for one in plain],
        steered=[one.text for one in other], num_edits=num_edits, calibration=calibration, sweep=None, written={},
        is_narrowed=config.skip_first or config.gate is not None or set(config.phase_list) != set(PHASES),
    )  # fmt: skip
    if config.report:
        _report(config, result, model, tokenizer, saes, list(zip(plain, other, strict=True)))
        result.written["report"] = config.report
    return _finish(config, result, model, saes)


def format_result(result: SteerResult) -> str:
    """What the command prints."""
    parts = []
    if result.calibration is not None:
        found = result.calibration
        parts.append(
            f"strength {found.strength:.4g}: KL divergence {found.kl:.4g} over {found.num_tokens} tokens, "
            f"{len(found.tried)} strengths tried"
            f"{'; measured at every position, without gate' if result.is_narrowed else ''}\n\n"
        )
    if result.sweep is not None:
        parts.append(show.format_sweep(result.sweep))
    elif result.prompts:
        parts.append(show.format_pairs(result.prompts, result.plain, result.steered))
        parts.append(f"{result.num_edits} tokens steered\n")
    parts += [f"{what.capitalize()} written to {path}\n" for what, path in result.written.items()]
    return "".join(parts)


def _finish(config: SteerConfig, result: SteerResult, model: Any, saes: SAESuite) -> SteerResult:
    if config.export and config.output:
        export(
            config.output,
            config.export,
            saes,
            result.features,
            strength=result.strength,
            mode=config.mode,
            unit=config.unit,
            phases=config.phase_list,
            positions=slice(1, None) if config.skip_first else None,
            gate=config.gate,
            model=model,
            overwrite=config.overwrite,
        )
        result.written["steering vector"] = config.output
    if config.json:
        write_whole(Path(config.json), json.dumps(_facts(config, result), indent=2, ensure_ascii=False) + "\n")
        result.written["figures"] = config.json
    return result


def _facts(config: SteerConfig, result: SteerResult) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "settings": asdict(config),
        "features": {str(feature.id): feature.weight for feature in result.features.features},
        "strength": result.strength,
    }
    if result.calibration is not None:
        facts["calibration"] = asdict(result.calibration)
    if result.sweep is not None:
        facts["points"] = [asdict(point) for point in result.sweep.points]
        facts["controls"] = [
            {str(feature.id): feature.weight for feature in control.features} for control in result.sweep.controls
        ]
        facts["warnings"] = result.sweep.warned
        return facts
    facts["num_edits"] = result.num_edits
    facts["texts"] = [
        {"prompt": prompt, "plain": plain, "steered": steered}
        for prompt, plain, steered in zip(result.prompts, result.plain, result.steered, strict=True)
    ]
    return facts


def _features(config: SteerConfig) -> FeatureSet:
    is_file = [name.endswith((".yaml", ".yml", ".json")) for name in config.features]
    if any(is_file) and len(config.features) > 1:
        raise ConfigError(
            f"`features` names a file and more: {', '.join(config.features)}. Give one file, or names such as L5F23."
        )
    if any(is_file):
        found = FeatureSet.load(config.features[0])
    else:
        found = FeatureSet.from_names([name.strip() for part in config.features for name in part.split(",")])
    return config.of_layers(found)


def _prompts(config: SteerConfig) -> list[str]:
    if not config.data:
        return list(config.prompt)
    found = _texts(config.data, config.text_column, config.max_prompts, config.data_split)
    if not found:
        raise DataError(f"'{config.data}' has no rows, so there is no prompt.")
    return found


def _calibration_texts(config: SteerConfig, prompts: Sequence[str], plain: Sequence[Generation]) -> list[str]:
    if config.calibrate_data:
        return _texts(config.calibrate_data, config.calibrate_column, _CALIBRATION_TEXTS, None)
    texts = [prompt + one.text for prompt, one in zip(prompts, plain, strict=True)]
    return texts[:_CALIBRATION_TEXTS]


def _texts(name: str, column: str, count: int, split: str | None) -> list[str]:
    source, found = open_source(name, split=split), []
    for index, row in source.rows(columns=text_columns(column)):
        found.append(text_of(row, text_column=column, source_name=name, index=index))
        if len(found) == count:
            break
    return found


def _report(
    config: SteerConfig,
    result: SteerResult,
    model: Any,
    tokenizer: Any,
    saes: SAESuite,
    pairs: Sequence[tuple[Generation, Generation]],
) -> None:
    encoders = {
        layer: ChosenEncoder.open(saes, layer, [feature.index for feature in result.features.for_layer(layer)])
        for layer in result.features.layers
    }

    def read(one: Generation) -> tuple[list[str], dict[str, list[float | None]]]:
        ids = [*one.prompt_ids, *one.ids]
        acts: dict[str, list[float | None]] = {
            str(feature.id): [None] * len(ids) for feature in result.features.features
        }
        if len(ids) > 1:
            batch = next(residual_batches(model, [ids], tuple(encoders), batch_size=1, show_progress=False))
            for layer, encoder in encoders.items():
                values = encoder(batch.residuals[layer]).acts
                for feature, column in zip(result.features.for_layer(layer), values.T.tolist(), strict=True):
                    acts[str(feature.id)] = [None, *column]
        return token_texts(tokenizer, ids), acts

    texts = [
        (prompt, [(name, *read(one)) for name, one in (("plain", plain), ("steered", steered))])
        for prompt, (plain, steered) in zip(result.prompts, pairs, strict=True)
    ]
    chosen = replace(config, strength=result.strength)
    shown = ("model", "saes", "strength", "mode", "unit", "phases", "gate", "temperature", "top_p", "seed")
    facts = {name: getattr(chosen, name) for name in shown if getattr(chosen, name) is not None}
    facts["features"] = ", ".join(str(feature.id) for feature in result.features.features)
    if config.report:
        show.write_report(config.report, facts, texts)
