"""`qscope sft`: supervised fine-tuning with a feature penalty, from one YAML file and flags.

Everything that can be known to be wrong from names, files and columns is refused before the model is loaded. Left out:
quantisation beyond what `trl.ModelConfig` offers, chat-template surgery, and image data; a script of one's own with
`SAEPenaltyCallback` has all of TRL.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qscope_trl.config.training import DataConfig, MonitorConfig, PenaltyConfig, SAEConfig
from qscope_trl.errors import ConfigError, DataError, QScopeError
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.alarm import AlarmLimits
from qscope_trl.parsing import parse_training
from qscope_trl.training.launch import (
    RunResult,
    load_both,
    load_features,
    open_suite,
    own_checkpoints,
    refuse_unused_evaluation,
    train_and_save,
    trainer_kwargs,
    use_cpu_if_alone,
)

DESCRIPTION = "Fine-tune a model with TRL's SFTTrainer and a penalty on SAE features."


@dataclass(frozen=True, kw_only=True)
class SFTRun:
    """All settings of a run, as parsed.

    Args:
        script: `trl.ScriptArguments`: the data.
        training: `trl.SFTConfig`.
        model: `trl.ModelConfig`: the model and PEFT.
        sae: Which SAEs and features.
        penalty: What is penalised.
        monitor: What is only measured.
        data: Evaluation file and group column.
    """

    script: Any
    training: Any
    model: Any
    sae: SAEConfig
    penalty: PenaltyConfig
    monitor: MonitorConfig
    data: DataConfig


def parse(argv: Sequence[str], training_class: type | None = None) -> SFTRun:
    """Parse `--config FILE` and flags.

    Args:
        argv: Command line without the command's name.
        training_class: Class of the training arguments, by default `trl.SFTConfig`.

    Raises:
        ConfigError: If a key or flag is unknown, a value does not fit, or something needed is missing.
    """
    trl: Any = importlib.import_module("trl")
    use_cpu_if_alone()
    theirs = (trl.ScriptArguments, training_class or trl.SFTConfig, trl.ModelConfig)
    classes = (*theirs, SAEConfig, PenaltyConfig, MonitorConfig, DataConfig)
    script, training, model, sae, penalty, monitor, data = parse_training(
        argv, classes, prog="qscope sft", description=DESCRIPTION
    )
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset_name", script.dataset_name),
        ("sae_path", sae.sae_path),
        ("sae_features", sae.sae_features),
    ):
        if not value:
            raise ConfigError(f"`{name}` is missing. Set it in the YAML file or by `--{name}`.")
    refuse_unused_evaluation(data.data_eval_path, training)
    if data.penalty_group_column and training.packing:
        raise ConfigError(
            "`penalty_group_column` needs one sample per row, but `packing` joins samples. Turn packing off, or name "
            "groups by `group_fn` in a script of your own."
        )
    return SFTRun(script=script, training=training, model=model, sae=sae, penalty=penalty, monitor=monitor, data=data)


def run(settings: SFTRun) -> RunResult:
    """Train, save the model to `output_dir`, and end.

    Raises:
        QScopeError: If features, SAEs, data and model do not fit together.
    """
    return train_and_save(build_trainer(settings), settings.training, settings.script.dataset_name)


def build_trainer(settings: SFTRun) -> Any:
    """The `SFTTrainer` with the penalty attached, ready for `train()`.

    Raises:
        QScopeError: If features, SAEs, data and model do not fit together.
    """
    from qscope_trl.training.callback import SAEPenaltyCallback
    from qscope_trl.training.opening import on_every_process
    from qscope_trl.training.watching import watchers

    trl: Any = importlib.import_module("trl")
    # The processes join here, so that a file that one of them lacks ends them all.
    _ = settings.training.device

    def open_files() -> tuple[FeatureSet, FeatureSet | None, Any, list[Any]]:
        features = load_features(settings.sae.sae_features or [])
        monitors = load_features(settings.monitor.monitor_features) if settings.monitor.monitor_features else None
        layers = sorted({*features.layers, *(monitors.layers if monitors else ())})
        suite = open_suite(settings.sae, layers)
        return features, monitors, suite, watchers(settings.monitor, suite, layers)

    features, monitors, suite, watching = on_every_process(open_files)
    train, evaluation = load_data(settings, features)
    record = settings.monitor.monitor_record
    callback = SAEPenaltyCallback(
        suite,
        features,
        config=settings.penalty,
        monitor_features=monitors,
        alarm=AlarmLimits() if settings.monitor.monitor_alarm else None,
        record=record,
    )

    args = settings.training
    if settings.data.penalty_group_column:
        args.remove_unused_columns = False
    try:
        extra = trainer_kwargs(trl, trl.SFTTrainer, settings.model, args)
        trainer = trl.SFTTrainer(
            model=settings.model.model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[callback, *watching, own_checkpoints(args)],
            **extra,
        )
    except QScopeError:
        raise
    except (OSError, ValueError, ImportError) as err:
        raise ConfigError(f"No trainer for '{settings.model.model_name_or_path}' with these settings: {err}") from err
    if settings.data.penalty_group_column:
        from qscope_trl.training.collator import GroupCollator

        trainer.data_collator = GroupCollator(trainer.data_collator, settings.data.penalty_group_column)
    return trainer


def load_data(settings: SFTRun, features: FeatureSet) -> tuple[Any, Any]:
    """Training and evaluation dataset; the latter is None without evaluation.

    Raises:
        DataError: If a dataset cannot be loaded, is empty, or lacks a column.
        ConfigError: If the group column names none of the features' groups.
    """
    args = settings.training
    train, evaluation = load_both(settings.script, args, settings.data.data_eval_path)
    for dataset in (train, evaluation):
        if dataset is not None:
            _check_columns(dataset, args.dataset_text_field, settings.data.penalty_group_column, features)
    return train, evaluation


def _check_columns(dataset: Any, text_field: str, group_column: str | None, features: FeatureSet) -> None:
    columns = dataset.column_names
    if columns is None:
        return
    listed = ", ".join(f"`{column}`" for column in columns)
    usable = [{text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"}]
    if not any(needed <= set(columns) for needed in usable):
        raise DataError(
            f"The data has the columns {listed}, and none that can be trained on: `{text_field}`, `messages`, or "
            f"`prompt` with `completion`. Rename a column, or set `dataset_text_field`."
        )
    if group_column is None:
        return
    if group_column not in columns:
        raise DataError(f"The data has no column `{group_column}` for `penalty_group_column`; it has {listed}.")
    known = {*features.groups, *filter(None, [features.target_group])}
    unique = getattr(dataset, "unique", None)
    found = set(unique(group_column)) if unique is not None else known
    if not known & found:
        raise ConfigError(
            f"Column `{group_column}` holds {_some(found)}, and none of these is a group of the features: "
            f"{_some(known) or 'they have none'}. Name the groups alike, or leave `penalty_group_column` out."
        )


def _some(values: set[Any]) -> str:
    listed = sorted(map(str, values))
    return ", ".join(f"`{value}`" for value in listed[:8]) + (", ..." if len(listed) > 8 else "")
