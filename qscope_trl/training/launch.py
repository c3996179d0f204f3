"""What `qscope sft` and `qscope grpo` share: data, features, the model's settings, and the end of a run."""

from __future__ import annotations

import errno
import gc
import importlib.util
import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_trl.config.training import SAEConfig
from qscope_trl.errors import CheckpointError, ConfigError, DataError, QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.features.hub import is_hub_id

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left.

    Args:
        output_dir: Folder with the trained model or adapter.
        is_main_process: Whether this process speaks for the run.
        metrics: The trainer's final training metrics.
    """

    output_dir: str
    is_main_process: bool
    metrics: dict[str, float]


def use_cpu_if_alone() -> None:
    """Let accelerate join several processes on a machine without a GPU.

    Started by `accelerate launch` with a GPU configuration there, it would let each process train a model of its own,
    without a word; told to use the CPU, it joins them by gloo. It has neither FSDP nor DeepSpeed there: a
    configuration that names one trains data-parallel, with a warning.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if "LOCAL_RANK" not in os.environ or (accelerator is not None and accelerator.type != "mps"):
        return
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            # Left as it is, transformers would prepare the model for an engine that never comes.
            os.environ[variable] = "false"
            if os.environ.get("RANK", "0") == "0":
                warnings.warn(
                    f"The configuration asks for {engine}, which accelerate does not have on a CPU. Training is "
                    f"data-parallel here (DDP), with the same gradients and more memory.",
                    QScopeWarning,
                    stacklevel=2,
                )


def load_features(entries: Sequence[str]) -> FeatureSet:
    """Features from one file or Hub repository, or from a list of names.

    Raises:
        FeatureSetError: As `FeatureSet.load`.
    """
    is_name = len(entries) != 1 or (
        Path(entries[0]).suffix not in (".yaml", ".yml", ".json") and "/" not in entries[0]
    )
    return FeatureSet.load(list(entries) if is_name else entries[0])


def open_suite(sae: SAEConfig, layers: Sequence[int] | None = None) -> Any:
    """The SAEs of a run's settings, as `SAESuite.from_pretrained`."""
    import torch

    from qscope_trl.sae.suite import SAESuite

    dtype = None if sae.sae_dtype == "auto" else getattr(torch, sae.sae_dtype)
    return SAESuite.from_pretrained(
        str(sae.sae_path), layers=layers, revision=sae.sae_revision, k=sae.sae_k, dtype=dtype
    )


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


def trainer_kwargs(trl: Any, trainer_class: Any, model: Any, args: Any) -> dict[str, Any]:
    """Put the model's settings into `args.model_init_kwargs`, and return what the trainer takes as arguments.

    Args:
        trl: The module.
        trainer_class: The trainer that will be built.
        model: `trl.ModelConfig`.
        args: The trainer's configuration; changed.

    Raises:
        ConfigError: If the model is to be quantised and bitsandbytes is not installed.
    """
    model_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        # TRL moved this field from ModelConfig to its trainers' configurations in 1.x.
        "trust_remote_code": getattr(model, "trust_remote_code", getattr(args, "trust_remote_code", False)),
    }
    args.model_init_kwargs = {
        **{name: value for name, value in model_kwargs.items() if value is not None},
        **(args.model_init_kwargs or {}),
    }
    extra: dict[str, Any] = {"peft_config": trl.get_peft_config(model)}
    if (model.load_in_4bit or model.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "`load_in_4bit` and `load_in_8bit` need bitsandbytes, which is not installed. Install it by `pip install "
            "bitsandbytes`, or leave the setting out."
        )
    quantization = trl.get_quantization_config(model)
    if quantization is not None:
        if "quantization_config" in inspect.signature(trainer_class.__init__).parameters:
            extra["quantization_config"] = quantization
        else:
            args.model_init_kwargs["quantization_config"] = quantization
    return extra


def evaluates(args: Any) -> bool:
    """Whether the run evaluates while it trains."""
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def refuse_unused_evaluation(data_eval_path: str | None, args: Any) -> None:
    """Raise `ConfigError` for evaluation data that would never be used."""
    if data_eval_path and not evaluates(args):
        raise ConfigError(
            "`data_eval_path` is set, but `eval_strategy` is 'no', so it would never be used. Set `eval_strategy` to "
            "'steps' or 'epoch'."
        )


def load_both(script: Any, args: Any, data_eval_path: str | None) -> tuple[Any, Any]:
    """Training and evaluation dataset; the latter is None without evaluation. Errors as `load_split`."""
    named = (script.dataset_name, script.dataset_config)
    train = load_split(*named, script.dataset_train_split, script.dataset_streaming)
    if not evaluates(args):
        return train, None
    if data_eval_path:
        return train, load_split(data_eval_path, None, "train", False)
    return train, load_split(*named, script.dataset_test_split, script.dataset_streaming)


def find_resumed(args: Any) -> str | None:
    """The checkpoint a run goes on from: the last whole one for `resume_from_checkpoint: true`, or the one named.

    Raises:
        CheckpointError: If there is none, or the named one is half-written.
    """
    from qscope_trl.training.checkpoints import find_fault, last_complete_checkpoint
    from qscope_trl.training.opening import on_every_process

    chosen = args.resume_from_checkpoint
    if isinstance(chosen, str) and chosen.lower() in ("true", "false"):
        chosen = chosen.lower() == "true"
    if not chosen:
        return None
    if chosen is True:
        chosen = last_complete_checkpoint(args.output_dir)
        if chosen is None:
            raise CheckpointError(
                f"`resume_from_checkpoint` is true, but '{args.output_dir}' holds no checkpoint that was written to "
                f"its end. Start without it, or name a checkpoint's folder."
            )
        return str(chosen)

    def check() -> str:
        if not Path(chosen).is_dir():
            raise CheckpointError(f"There is no checkpoint '{chosen}' to resume from.")
        fault = find_fault(Path(chosen))
        if fault is not None:
            raise CheckpointError(f"'{chosen}' cannot be resumed from: {fault}.")
        return str(chosen)

    return on_every_process(check)


def own_checkpoints(args: Any) -> Any:
    """Takes the deleting of old checkpoints over from the trainer; put it into the trainer's callbacks."""
    from qscope_trl.training.checkpoints import CompleteCheckpoints

    # The trainer would delete the last whole checkpoint while the next one may still be unfinished.
    limit, args.save_total_limit = args.save_total_limit, None
    return CompleteCheckpoints(limit)


def is_disk_error(err: BaseException) -> bool:
    """Whether something failed because no more could be written, whichever library wrote."""
    if isinstance(err, OSError) and err.errno in _DISK_ERRORS:
        return True
    # safetensors raises an error of its own with the system's number in it; torch.save one of its zip writer.
    text = str(err)
    return any(f"os error {number}" in text for number in _DISK_ERRORS) or (
        isinstance(err, RuntimeError) and ("inline_container.cc" in text or "PytorchStreamWriter" in text)
    )


def train_and_save(trainer: Any, args: Any, dataset_name: str) -> RunResult:
    """Train, save the model to `output_dir`, push it if asked to, and end.

    Raises:
        CheckpointError: If there is no whole checkpoint to resume from, or the disk is full.
    """
    resume = find_resumed(args)
    try:
        outcome = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(args.output_dir)
    except Exception as err:
        if not is_disk_error(err):
            raise
        where = getattr(err, "filename", None) or args.output_dir
        raise CheckpointError(
            f"Nothing more can be written to '{where}': {str(err).splitlines()[0].rstrip('.')}. Free space there, "
            f"then run the same command with `--resume_from_checkpoint true`: it goes on from the last checkpoint "
            f"that was written to its end."
        ) from err
    result = RunResult(
        output_dir=args.output_dir,
        is_main_process=trainer.is_world_process_zero(),
        metrics=dict(outcome.metrics),
    )
    # A card links to its dataset on the Hub, where a local file is not.
    named = dataset_name if is_hub_id(dataset_name) else None
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=named)
    else:
        trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=named)
    # A DDP wrapper that outlives its process group can hang or abort the process when it is freed.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.accelerator.end_training()
    return result
