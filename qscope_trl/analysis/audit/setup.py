"""What an audit is made of: settings completed from a run's record, features, and texts; read before any model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qscope_trl.activations.chat import model_chat_renderer
from qscope_trl.activations.sources import ChatRenderer, open_source, text_columns, text_of
from qscope_trl.config.audit import AuditConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.detectors import Detector, text_detector
from qscope_trl.monitor.run_record import RECORD_FOLDER, RunRecord

MIN_TEXTS = 4
"""Different texts a group needs: two to train on and two to test on."""


class Inputs(NamedTuple):
    """Everything but models and SAEs."""

    config: AuditConfig
    """Completed: `model`, `saes` and `tuned` are set."""

    record: RunRecord | None
    features: FeatureSet
    monitors: FeatureSet | None
    detector: Detector | None
    texts: dict[str, list[str]]
    """`positive`, `negative` and `neutral`; `prompts` if there are any."""

    is_control: bool
    """Whether the run's penalty was put on random features."""


def read_inputs(config: AuditConfig) -> Inputs:
    """Complete the settings and read features and texts.

    Raises:
        ConfigError: If the record does not say what is not given, or a setting does not fit.
        DataError: If there is no record, or a dataset is missing, lacks the column or holds no text.
        FeatureSetError: If a set of features cannot be read.
    """
    record, known = _record(config)
    if not config.saes:
        _check_place(known.get("saes"))
    config = replace(
        config,
        model=_known(config, "model", known),
        saes=_known(config, "saes", known),
        tuned=_known(config, "tuned", known),
    )
    given = config.features
    features = config.of_layers(FeatureSet.from_dict(known["features"]) if given is None else _features(given))
    monitors = None
    if config.monitors is not None:
        monitors = _features(config.monitors)
    elif given is None and known.get("monitors"):
        monitors = FeatureSet.from_dict(known["monitors"])
    _refuse_both(features, monitors)
    detector = None if config.behaviour is None else _detector(config.behaviour)
    chat = model_chat_renderer(config.model, revision=config.model_revision)
    asked = model_chat_renderer(config.model, revision=config.model_revision, add_generation_prompt=True)
    texts = {
        name: _texts(config, str(getattr(config, name)), config.text_column, config.max_texts, chat)
        for name in ("positive", "negative")
    }
    for name in ("positive", "negative"):
        if len(set(texts[name])) < MIN_TEXTS:
            raise DataError(
                f"'{getattr(config, name)}' has {len(set(texts[name]))} different texts; detectors are trained on "
                f"some and tested on others. Give {MIN_TEXTS} or more, and a hundred for narrow intervals."
            )
    texts["neutral"] = texts["negative"]
    if config.neutral is not None:
        column = config.neutral_column or config.text_column
        texts["neutral"] = _texts(config, config.neutral, column, config.max_texts, chat)
    if config.prompts is not None:
        texts["prompts"] = _texts(config, config.prompts, config.prompt_column, config.max_prompts, asked)
    return Inputs(config, record, features, monitors, detector, texts, bool(known.get("control")))


def _record(config: AuditConfig) -> tuple[RunRecord | None, dict[str, Any]]:
    if config.run_dir is None:
        return None, {}
    record = RunRecord(config.run_dir)
    run = record.get("run")
    if run is None:
        raise DataError(
            f"'{config.run_dir}' has no record of a run (`{RECORD_FOLDER}/run.json`), which training with this "
            f"package leaves. Name the folder that was `output_dir`, or leave `--run-dir` out and say what was "
            f"trained."
        )
    sae = run.get("sae") or {}
    known = {
        "model": run.get("model"),
        "saes": sae.get("source") or sae.get("name"),
        "tuned": _checkpoint(Path(config.run_dir)),
        "features": run.get("features"),
        "monitors": run.get("monitors"),
        "control": run.get("control"),
    }
    if config.features is None and not known["features"]:
        raise ConfigError(
            f"The record in '{config.run_dir}' names no penalised features, so it is not known what to audit. Name "
            f"them by `--features`."
        )
    return record, known


def _check_place(name: Any) -> None:
    """A folder's name alone, as sets of features have it, does not say where the folder is."""
    if name and "/" not in name and not Path(name).exists():
        raise ConfigError(
            f"The record says '{name}' of the SAEs, which is neither a folder here nor an id on the Hub. Say where "
            f"they are by `--saes`."
        )


def _checkpoint(folder: Path) -> str | None:
    """What a run saved: into its folder, or else its last checkpoint."""
    steps = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    for path in [folder, *(steps[step] for step in sorted(steps, reverse=True))]:
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            return str(path)
    return None


def _known(config: AuditConfig, name: str, known: Mapping[str, Any]) -> str:
    value = getattr(config, name) or known.get(name)
    if not value:
        where = "holds no saved model" if name == "tuned" else f"does not know the {name}"
        raise ConfigError(f"'{config.run_dir}' {where}. Name it by `--{name}`.")
    return str(value)


def _features(source: str) -> FeatureSet:
    if source.endswith((".yaml", ".yml", ".json")):
        return FeatureSet.load(source)
    return FeatureSet.from_names([name.strip() for name in source.split(",")])


def _refuse_both(features: FeatureSet, monitors: FeatureSet | None) -> None:
    both = [str(one) for one in (monitors.ids if monitors is not None else ()) if one in features.ids]
    if both:
        raise ConfigError(
            f"{', '.join(both[:5])} is among the features trained on and among the monitors. A monitor tells "
            f"something only if it was not trained on: take it out of one of the two."
        )


def _detector(behaviour: str) -> Detector:
    if behaviour.startswith("rule:"):
        raise ConfigError(
            f"`behaviour` is {behaviour!r}, which reads features; the audit asks whether the behaviour is gone where "
            f"features cannot tell. Write `chinese`, `repetition` or `regex:PATTERN`."
        )
    return text_detector(behaviour)


def _texts(config: AuditConfig, name: str, column: str, count: int, chat: ChatRenderer) -> list[str]:
    source = open_source(
        name, split=config.data_split, config=config.data_config, revision=config.data_revision, streaming=True
    )
    found: list[str] = []
    for index, row in source.rows(columns=text_columns(column)):
        text = text_of(row, text_column=column, source_name=source.name, index=index, chat=chat)
        if text.strip():
            found.append(text)
        if len(found) == count:
            break
    if not found:
        raise DataError(f"'{name}' holds no text: every row is blank or there is none.")
    return found
