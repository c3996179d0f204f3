"""`qscope grpo`: GRPO with feature rewards, rollout policies and a feature penalty, from one YAML file and flags.

Left out: environments, tools and `rollout_func`, which are objects of a script; there `SAEGRPOTrainer` has all of TRL.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qscope_trl.config.rollouts import RewardConfig, RolloutConfig
from qscope_trl.config.training import DataConfig, MonitorConfig, PenaltyConfig, SAEConfig
from qscope_trl.errors import ConfigError, DataError, QScopeError
from qscope_trl.features import FeatureSet
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

DESCRIPTION = "Train a model with TRL's GRPOTrainer, feature rewards, a rollout policy and a feature penalty."


@dataclass(frozen=True, kw_only=True)
class GRPORun:
    """All settings of a run, as parsed.

    Args:
        script: `trl.ScriptArguments`: the data.
        training: `trl.GRPOConfig`.
        model: `trl.ModelConfig`: the model and PEFT.
        sae: Which SAEs, and which features are penalised in the loss.
        penalty: How they are.
        monitor: What is only measured.
        reward: Reward functions and the feature reward.
        rollout: The rollout policy.
        data: Evaluation file.
    """

    script: Any
    training: Any
    model: Any
    sae: SAEConfig
    penalty: PenaltyConfig
    monitor: MonitorConfig
    reward: RewardConfig
    rollout: RolloutConfig
    data: DataConfig


def parse(argv: Sequence[str], training_class: type | None = None) -> GRPORun:
    """Parse `--config FILE` and flags.

    Args:
        argv: Command line without the command's name.
        training_class: Class of the training arguments, by default `trl.GRPOConfig`.

    Raises:
        ConfigError: If a key or flag is unknown, a value does not fit, or something needed is missing.
    """
    trl: Any = importlib.import_module("trl")
    use_cpu_if_alone()
    ours = (SAEConfig, PenaltyConfig, MonitorConfig, RewardConfig, RolloutConfig, DataConfig)
    classes = (trl.ScriptArguments, training_class or trl.GRPOConfig, trl.ModelConfig, *ours)
    parsed = parse_training(argv, classes, prog="qscope grpo", description=DESCRIPTION)
    names = ("script", "training", "model", "sae", "penalty", "monitor", "reward", "rollout", "data")
    settings = GRPORun(**dict(zip(names, parsed, strict=True)))
    for name, value in (
        ("model_name_or_path", settings.model.model_name_or_path),
        ("dataset_name", settings.script.dataset_name),
        ("sae_path", settings.sae.sae_path),
    ):
        if not value:
            raise ConfigError(f"`{name}` is missing. Set it in the YAML file or by `--{name}`.")
    if not settings.reward.reward_functions and not settings.reward.reward_features:
        raise ConfigError("Nothing is rewarded: set `reward_functions`, `reward_features` or both.")
    if settings.penalty.penalty_weight > 0 and not settings.sae.sae_features:
        raise ConfigError("`penalty_weight` is set, but no `sae_features` to penalise. Name them, or leave it out.")
    if settings.data.penalty_group_column:
        raise ConfigError("`penalty_group_column` is for `qscope sft`; GRPO's batches carry no columns into the loss.")
    refuse_unused_evaluation(settings.data.data_eval_path, settings.training)
    return settings


def run(settings: GRPORun) -> RunResult:
    """Train, save the model to `output_dir`, and end.

    Raises:
        QScopeError: If rewards, features, SAEs, data and model do not fit together.
    """
    return train_and_save(build_trainer(settings), settings.training, settings.script.dataset_name)


def build_trainer(settings: GRPORun) -> Any:
    """The `SAEGRPOTrainer`, ready for `train()`.

    Raises:
        QScopeError: If rewards, features, SAEs, data and model do not fit together.
    """
    from qscope_trl.monitor.alarm import AlarmLimits
    from qscope_trl.training.callback import SAEPenaltyCallback
    from qscope_trl.training.grpo import SAEGRPOTrainer
    from qscope_trl.training.opening import on_every_process
    from qscope_trl.training.rewards import FeatureReward
    from qscope_trl.training.rollouts import RolloutPolicy
    from qscope_trl.training.watching import watchers

    trl: Any = importlib.import_module("trl")
    sae, reward, rollout, args = settings.sae, settings.reward, settings.rollout, settings.training
    # The processes join here, so that a file that one of them lacks ends them all.
    _ = args.device

    def open_files() -> tuple[Any, dict[str, FeatureSet], list[Any]]:
        entries = {
            "reward": reward.reward_features,
            "monitor": settings.monitor.monitor_features,
            "rollout": rollout.rollout_features,
            "penalty": sae.sae_features,
        }
        sets = {name: load_features(named) for name, named in entries.items() if named}
        layers = sorted({layer for features in sets.values() for layer in features.layers})
        suite = open_suite(sae, layers or None)
        return suite, sets, watchers(settings.monitor, suite, layers)

    suite, sets, watching = on_every_process(open_files)
    shared: dict[str, Any] = {
        "kind": reward.reward_kind,
        "reader": reward.reward_reader,
        "aggregation": reward.reward_aggregation,
        "last_k": reward.reward_last_k,
    }
    rewards = [load_function(path) for path in reward.reward_functions or []]
    if "reward" in sets:
        rewards.append(
            FeatureReward(
                sets["reward"],
                suite,
                sign=reward.reward_sign,
                scale=reward.reward_scale,
                clip=reward.reward_clip,
                schedule=reward.reward_schedule,
                schedule_steps=reward.reward_schedule_steps,
                **shared,
            )
        )
    if "monitor" in sets:
        rewards.append(FeatureReward(sets["monitor"], suite, name="monitor", scale=0.0, **shared))
    policy = None
    if rollout.rollout_policy:
        named = sets.get("rollout")
        if rollout.rollout_policy != "penalise":
            # A feature reward penalises already; the same features twice would be a mistake.
            named = named or sets.get("reward")
        if not named:
            raise ConfigError(
                f"`rollout_policy` is '{rollout.rollout_policy}', but no features are named: set "
                f"`rollout_features`, or (not for `penalise`) `reward_features`."
            )
        shared["feature_kind"] = shared.pop("kind")
        policy = RolloutPolicy(
            rollout.rollout_policy,
            named,
            suite,
            strength=rollout.rollout_strength,
            cutoff=rollout.rollout_cutoff,
            max_factor=rollout.rollout_max_factor,
            credit=rollout.rollout_credit,
            ratio=rollout.rollout_ratio,
            max_ratio=rollout.rollout_max_ratio,
            max_steered_tokens=rollout.rollout_max_steered_tokens,
            **shared,
        )
    callbacks: list[Any] = []
    if "penalty" in sets:
        callbacks.append(
            SAEPenaltyCallback(
                suite,
                sets["penalty"],
                config=settings.penalty,
                monitor_features=sets.get("monitor"),
                alarm=AlarmLimits() if settings.monitor.monitor_alarm else None,
                record=settings.monitor.monitor_record,
            )
        )
    callbacks += [*watching, own_checkpoints(args)]
    train, evaluation = load_both(settings.script, args, settings.data.data_eval_path)
    for dataset in (train, evaluation):
        if dataset is not None and dataset.column_names is not None and "prompt" not in dataset.column_names:
            listed = ", ".join(f"`{column}`" for column in dataset.column_names)
            raise DataError(f"The data has the columns {listed}, and no `prompt` to generate from. Rename a column.")
    try:
        extra = trainer_kwargs(trl, trl.GRPOTrainer, settings.model, args)
        return SAEGRPOTrainer(
            model=settings.model.model_name_or_path,
            reward_funcs=rewards,
            rollout_policy=policy,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=callbacks,
            **extra,
        )
    except QScopeError:
        raise
    except (OSError, ValueError, ImportError) as err:
        raise ConfigError(f"No trainer for '{settings.model.model_name_or_path}' with these settings: {err}") from err


def load_function(path: str) -> Any:
    """The object at a dotted path such as `my_rewards.correct`, also in a module of the current folder.

    Raises:
        ConfigError: If there is no such module or object, or it cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"Reward function `{path}` is no dotted path; write it as `module.function`.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as err:
        raise ConfigError(f"Module `{module_name}` of reward function `{path}` cannot be imported: {err}") from err
    found = getattr(module, name, None)
    if not callable(found):
        functions = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise ConfigError(f"`{module_name}` has no function `{name}`. It has: {', '.join(functions[:8]) or 'none'}.")
    return found
