"""The alarm of a run with a penalty: what raises it is `monitor.alarm`, here it meets the trainer's log.

Left out: any measuring of its own. It reads what is logged: the penalty's monitors, a text detector's rate, rules.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from qscope_trl.errors import QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.monitor import dashboard_wandb
from qscope_trl.monitor.alarm import RULES, Alarm, AlarmLimits, GamingAlarm
from qscope_trl.training.recording import RunRecorder

KEY = "sae/alarm"
"""1 in the log events in which features are silent and what they stand for is not; 0 in the others."""


_log = logging.getLogger("qscope_trl")


def say_if_nothing_is_held_out(trainer: Any, monitors: FeatureSet | None) -> None:
    """One line, on the main process, for a penalty without monitors."""
    if monitors is None and trainer.is_world_process_zero():
        _log.warning(
            "qscope_trl: no feature is held out: `monitor_features` is empty, so only a text detector or a rule could "
            "tell that the penalised features went silent and the behaviour did not."
        )


class AlarmWatch:
    """Follows the log of one trainer, warns once for each kind, and keeps a row in `alarms.jsonl`.

    A resumed run is followed from its beginning: the trainer's history is read, without warning anew.

    Args:
        limits: From where on something has fallen or stayed.
    """

    def __init__(self, limits: AlarmLimits) -> None:
        self.limits = limits
        self.listeners: list[Callable[[Alarm], None]] = []
        """Called on every process with each alarm, once."""
        self._alarm = GamingAlarm(limits)
        self._state: Any = None
        self._num_seen = 0

    def needs_first(self, trainer: Any) -> bool:
        """Whether this run's first values are still unknown."""
        self._follow(trainer)
        return not self._alarm.first and trainer.state.global_step <= 1

    def begin(self, trainer: Any, values: Mapping[str, float]) -> None:
        """Set the first values of this run: what its first step measured, or a checkpoint tells."""
        self._follow(trainer)
        self._alarm.begin(values)

    @property
    def first(self) -> dict[str, float]:
        """The first values, for a checkpoint."""
        return self._alarm.first

    def see(self, logs: dict[str, float], trainer: Any) -> None:
        """Take in what was logged since, and an event that is about to be: with a training loss it gains `sae/alarm`.

        That is left out while there is nothing that could stay. Every process sees the same, and one speaks.
        """
        self._follow(trainer)
        state, history = trainer.state, trainer.state.log_history
        found = []
        for entry in history[self._num_seen :]:
            raised = self._alarm.see(int(entry.get("step", state.global_step)), _held_out(entry))
            # What was there before this process began was told then.
            found += raised if self._num_seen else []
        # The event itself becomes an entry as well.
        self._num_seen = len(history) + 1
        found += self._alarm.see(state.global_step, _held_out(logs))
        if self._alarm.watches and "loss" in logs:
            logs[KEY] = float(self._alarm.is_on)
        for alarm in found:
            self._tell(alarm, trainer)

    def _follow(self, trainer: Any) -> None:
        """Begin anew with each training: the trainer has another state then."""
        if self._state is not trainer.state:
            self._state, self._alarm, self._num_seen = trainer.state, GamingAlarm(self.limits), 0

    def _tell(self, alarm: Alarm, trainer: Any) -> None:
        for listener in self.listeners:
            listener(alarm)
        if not trainer.is_world_process_zero():
            return
        for item in trainer.callback_handler.callbacks:
            if isinstance(item, RunRecorder):
                row = {"kind": alarm.kind, "message": alarm.message, "shares": alarm.shares}
                item.record.add("alarms", alarm.step, row)
        if "wandb" in getattr(trainer.args, "report_to", ()):
            dashboard_wandb.alert("SAE features are silent, the behaviour may not be", alarm.message)
        warnings.warn(alarm.message, QScopeWarning, stacklevel=4)


def _held_out(logs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the rules among a training event's own metrics: those are rewards, so they are trained on."""
    return {name: value for name, value in logs.items() if "loss" not in logs or not name.startswith(RULES)}
