"""What a penalty measures: sums per feature while it runs, means in the trainer's log, sums in the checkpoint."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.errors import QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.alarm import AlarmLimits
from qscope_trl.monitor.statistics import FeatureStatistics, evaluation_prefix
from qscope_trl.training.alarm import AlarmWatch
from qscope_trl.training.penalty import VALUE_NAMES, PenaltyTerms

STATE_FILE = "sae_penalty_state.json"
"""File in each checkpoint with the penalty's settings and its running sums."""


class PenaltyMetrics:
    """Statistics of the penalised features and of the monitors, apart for training and evaluation.

    Args:
        config: The penalty's settings.
        features: Penalised features.
        monitors: Features that are only measured.
        alarm: From where on features are silent and what they stand for is not; None for no alarm.
    """

    def __init__(
        self, config: PenaltyConfig, features: FeatureSet, monitors: FeatureSet | None, alarm: AlarmLimits | None
    ) -> None:
        self._config = config
        # Without a penalty nothing is gamed, and a control is meant to leave the behaviour.
        acts = config.penalty_weight > 0 and config.penalty_control == "none"
        self.alarm = AlarmWatch(alarm) if alarm is not None and acts else None
        """Follows the log, if there is anything to watch for."""
        self._ids = [str(i) for i in features.ids]
        self.statistics = {
            mode: (
                FeatureStatistics(features.ids, VALUE_NAMES[config.penalty_kind]),
                None if monitors is None else FeatureStatistics(monitors.ids, VALUE_NAMES["preact_hinge"]),
            )
            for mode in ("train", "eval")
        }

    def update(self, mode: str, layer: int, is_monitor: bool, terms: PenaltyTerms, mask_BT: Tensor) -> None:
        """Add what one layer of one forward showed at the tokens of a mask."""
        statistics = self.statistics[mode][is_monitor]
        if statistics is not None:
            statistics.update(
                layer,
                terms.values_BTS.flatten(0, 1),
                terms.active_BTS.flatten(0, 1),
                terms.penalty_BT.detach().flatten(),
                mask_BT.flatten(),
            )

    def forget_evaluation(self) -> None:
        """Drop what was measured outside training since the last log event."""
        for statistics in self.statistics["eval"]:
            if statistics is not None:
                statistics.reset()

    def add_to(self, logs: dict[str, float], trainer: Any) -> None:
        """Put the means since the last log event into a trainer's log: those of all processes, which all call this."""
        prefix = evaluation_prefix(logs)
        if prefix is not None:
            logs.update({f"{prefix}_{key}": value for key, value in self._take("eval", trainer).items()})
        elif "loss" in logs:
            logs.update(self._take("train", trainer))
            if "sae/penalty" in logs:
                weight = self._config.weight_at(trainer.state.global_step - 1, trainer.state.max_steps)
                logs["sae/penalty_weight"] = weight
        if self.alarm is not None:
            self.alarm.see(logs, trainer)

    def after_step(self, trainer: Any) -> None:
        """Keep what the first optimizer step measured: its forward came before any change of the weights."""
        if self.alarm is not None and self.alarm.needs_first(trainer):
            self.alarm.begin(trainer, self._means("train", trainer))

    def _take(self, mode: str, trainer: Any) -> dict[str, float]:
        metrics = self._means(mode, trainer)
        for statistics in self.statistics[mode]:
            if statistics is not None:
                statistics.reset()
        return metrics

    def _means(self, mode: str, trainer: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for prefix, statistics in zip(("sae", "sae/monitor"), self.statistics[mode], strict=True):
            if statistics is not None:
                means = statistics.metrics(_reduce_fn(trainer), trainer.accelerator.device)
                metrics.update({f"{prefix}/{key}": value for key, value in means.items()})
        return metrics

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """What a checkpoint needs: settings and features to compare, sums since the last log event to go on with.

        The sums are those of all processes, so every process calls this, and one writes it.
        """
        reduce_fn = _reduce_fn(trainer)
        device = None if reduce_fn is None else trainer.accelerator.device
        sums = [None if s is None else s.state(reduce_fn, device) for s in self.statistics["train"]]
        first = {} if self.alarm is None else self.alarm.first
        return {**self._settings(), "statistics": sums, "first": first}

    def load_state_dict(self, state: Mapping[str, Any], trainer: Any) -> None:
        """Take up a checkpoint's state; a differing setting is kept as given now, with a warning."""
        mine = self._settings()
        for key, was in {**state.get("config", {}), "features": state.get("features")}.items():
            now = mine["features"] if key == "features" else mine["config"].get(key)
            if was != now:
                warnings.warn(
                    f"The checkpoint was trained with `{key}={was!r}`, this run says {now!r}. Training goes on with "
                    f"the new value.",
                    QScopeWarning,
                    stacklevel=2,
                )
        if self.alarm is not None and state.get("features") == mine["features"]:
            self.alarm.begin(trainer, state.get("first", {}))
        # Sums of all processes: taken up by one, so that the next reduction counts them once.
        if state.get("features") == mine["features"] and trainer.accelerator.is_main_process:
            for statistics, sums in zip(self.statistics["train"], state.get("statistics", ()), strict=False):
                if statistics is not None:
                    statistics.load_state(sums, trainer.accelerator.device)

    def _settings(self) -> dict[str, Any]:
        config = {name: getattr(self._config, name) for name in self._config.__dataclass_fields__}
        return {"config": config, "features": self._ids}


def _reduce_fn(trainer: Any) -> Callable[[Tensor], Tensor] | None:
    accelerator = trainer.accelerator
    return None if accelerator.num_processes == 1 else functools.partial(accelerator.reduce, reduction="sum")
