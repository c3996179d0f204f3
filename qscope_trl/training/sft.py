"""`qscope sft`: supervised fine-tuning with a feature penalty, from one YAML file and flags.

Everything that can be known to be wrong from names, files and columns is refused before the model is loaded. Left out:
quantisation beyond what `trl.ModelConfig` offers, chat-template surgery, and image data; a script of one's own with
`SAEPenaltyCallback` has all of TRL.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_trl.config import DataConfig, MonitorConfig, PenaltyConfig, SAEConfig
from qscope_trl.errors import ConfigError, DataError, QScopeError
from qscope_trl.features import FeatureSet
from qscope_trl.parsing import parse_training

DESCRIPTION = "Fine-tune a model with TRL's SFTTrainer and a penalty on SAE features."

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


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


@dataclass(frozen=True, kw_only=True)
class SFTResult:
    """What a run left.

    Args:
        output_dir: Folder with the trained model or adapter.
        is_main_process: Whether this process speaks for the run.
        metrics: The trainer's final training metrics.
    """

    output_dir: str
    is_main_process: bool
    metrics: dict[str, float]


def parse(argv: Sequence[str]) -> SFTRun:
    """Parse `--config FILE` and flags.

    Raises:
        ConfigError: If a key or flag is unknown, a value does not fit, or something needed is missing.
    """
    trl: Any = importlib.import_module("trl")
    use_cpu_if_alone()
    theirs = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig)
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
    if data.data_eval_path and str(getattr(training.eval_strategy, "value", training.eval_strategy)) == "no":
        raise ConfigError(
            "`data_eval_path` is set, but `eval_strategy` is 'no', so it would never be used. Set `eval_strategy` to "
            "'steps' or 'epoch'."
        )
    if data.penalty_group_column and training.packing:
        raise ConfigError(
            "`penalty_group_column` needs one sample per row, but `packing` joins samples. Turn packing off, or name "
            "groups by `group_fn` in a script of your own."
        )
    return SFTRun(script=script, training=training, model=model, sae=sae, penalty=penalty, monitor=monitor, data=data)


def use_cpu_if_alone() -> None:
    """Let accelerate join several processes on a machine without a GPU.

    Started by `accelerate launch` with a GPU configuration there, it would let each process train a model of its own,
    without a word; told to use the CPU, it joins them by gloo.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if "LOCAL_RANK" in os.environ and (accelerator is None or accelerator.type == "mps"):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def run(settings: SFTRun) -> SFTResult:
    """Train, save the model to `output_dir`, and end.

    Raises:
        QScopeError: If features, SAEs, data and model do not fit together.
    """
    trainer = build_trainer(settings)
    resume = settings.training.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    outcome = trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(settings.training.output_dir)
    result = SFTResult(
        output_dir=settings.training.output_dir,
        is_main_process=trainer.is_world_process_zero(),
        metrics=dict(outcome.metrics),
    )
    if settings.training.push_to_hub:
        trainer.push_to_hub(dataset_name=settings.script.dataset_name)
    trainer.accelerator.end_training()
    return result


def build_trainer(settings: SFTRun) -> Any:
    """The `SFTTrainer` with the penalty attached, ready for `train()`.

    Raises:
        QScopeError: If features, SAEs, data and model do not fit together.
    """
    from qscope_trl.sae.suite import SAESuite
    from qscope_trl.training.callback import SAEPenaltyCallback

    trl: Any = importlib.import_module("trl")
    features = load_features(settings.sae.sae_features or [])
    monitors = load_features(settings.monitor.monitor_features) if settings.monitor.monitor_features else None
    layers = sorted({*features.layers, *(monitors.layers if monitors else ())})
    suite = SAESuite.from_pretrained(
        str(settings.sae.sae_path), layers=layers, revision=settings.sae.sae_revision, k=settings.sae.sae_k
    )
    train, evaluation = load_data(settings, features)
    callback = SAEPenaltyCallback(suite, features, config=settings.penalty, monitor_features=monitors)

    args = settings.training
    model_kwargs = {
        "revision": settings.model.model_revision,
        "attn_implementation": settings.model.attn_implementation,
        "dtype": settings.model.dtype,
        # TRL moved this field from ModelConfig to its trainers' configurations in 1.x.
        "trust_remote_code": getattr(settings.model, "trust_remote_code", getattr(args, "trust_remote_code", False)),
    }
    args.model_init_kwargs = {
        **{name: value for name, value in model_kwargs.items() if value is not None},
        **(args.model_init_kwargs or {}),
    }
    if settings.data.penalty_group_column:
        args.remove_unused_columns = False
    extra: dict[str, Any] = {}
    quantization = trl.get_quantization_config(settings.model)
    if quantization is not None:
        if "quantization_config" in inspect.signature(trl.SFTTrainer.__init__).parameters:
            extra["quantization_config"] = quantization
        else:
            args.model_init_kwargs["quantization_config"] = quantization
    try:
        peft = trl.get_peft_config(settings.model)
        trainer = trl.SFTTrainer(
            model=settings.model.model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            peft_config=peft,
            callbacks=[callback],
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


def load_features(entries: Sequence[str]) -> FeatureSet:
    """Features from one file, or from a list of names.

    Raises:
        FeatureSetError: As `FeatureSet.load`.
    """
    one_file = len(entries) == 1 and Path(entries[0]).suffix in (".yaml", ".yml", ".json")
    return FeatureSet.load(entries[0] if one_file else list(entries))


def load_data(settings: SFTRun, features: FeatureSet) -> tuple[Any, Any]:
    """Training and evaluation dataset; the latter is None without evaluation.

    Raises:
        DataError: If a dataset cannot be loaded, is empty, or lacks a column.
        ConfigError: If the group column names none of the features' groups.
    """
    script, args = settings.script, settings.training
    named = (script.dataset_name, script.dataset_config)
    train = load_split(*named, script.dataset_train_split, script.dataset_streaming)
    evaluation = None
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        if settings.data.data_eval_path:
            evaluation = load_split(settings.data.data_eval_path, None, "train", False)
        else:
            evaluation = load_split(*named, script.dataset_test_split, script.dataset_streaming)
    for dataset in (train, evaluation):
        if dataset is not None:
            _check_columns(dataset, args.dataset_text_field, settings.data.penalty_group_column, features)
    return train, evaluation


def load_split(name: str, config: str | None, split: str, streaming: bool) -> Any:
    """One split of a local file, a local folder or a Hub dataset.

    Args:
        name: File (`.json`, `.jsonl`, `.parquet`, `.csv`, `.txt`, also compressed), folder, or Hub id.
        config: Configuration of a Hub dataset.
        split: Split, also a part of one such as `train[:1000]`. A single file has only `train`.
        streaming: Whether to stream instead of preparing the whole dataset.

    Raises:
        DataError: If there is no such file, dataset or split, it cannot be read, or is empty.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]
    builder = _BUILDERS.get(suffixes[-1] if suffixes else "")
    if path.is_file() and builder is None:
        raise DataError(f"'{name}' is of no known kind. Known: {', '.join(_BUILDERS)}, also compressed.")
    if not path.exists() and (builder is not None or name.count("/") > 1 or name.startswith(".")):
        raise DataError(f"No data at '{name}'. Paths are relative to '{Path.cwd()}'.")
    source = {"path": builder, "data_files": str(path)} if path.is_file() else {"path": name, "name": config}
    try:
        dataset = load_dataset(**source, split=split, streaming=streaming)
    except StopIteration as err:
        raise DataError(f"Split `{split}` of '{name}' is empty.") from err
    except (OSError, ValueError, TypeError, DatasetsError) as err:
        raise DataError(f"Split `{split}` of '{name}' cannot be loaded: {err}") from err
    if not streaming and len(dataset) == 0:
        raise DataError(f"Split `{split}` of '{name}' is empty.")
    return dataset


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
