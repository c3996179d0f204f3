"""When features go silent and what they were meant to stand for does not: the rule that says so.

It reads a trainer's log events in the order they come and knows nothing of models. Left out: whether the SAEs still
describe the model, which is `drift`, and any judgement at the end of training, which is `qscope audit`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qscope_trl.errors import ConfigError

PENALISED, MONITORS = "sae/penalty", "sae/monitor/penalty"
TEXT = "sae/text/rate"
RULES = "sae/rule/"


@dataclass(frozen=True, kw_only=True)
class AlarmLimits:
    """From where on something has fallen, or has stayed.

    Args:
        fallen: Share of their first value below which the penalised features have fallen.
        stayed: Share of its first value above which a monitor or a rate has stayed.
        patience: Latest values that count, so that a single one decides nothing.
        min_rate: First value below which the rate of a text detector or rule decides nothing: there was too little to
            see it fall.

    Raises:
        ConfigError: If a limit is outside what its figure can be.
    """

    fallen: float = 0.5
    stayed: float = 0.8
    patience: int = 3
    min_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("fallen", "stayed", "min_rate"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(f"`{name}` of `AlarmLimits` is {value!r}; it is a share above 0 and at most 1.")
        if self.fallen > self.stayed:
            raise ConfigError(
                f"`fallen` is {self.fallen} and `stayed` is {self.stayed}: one value could have done both. Keep "
                f"`fallen` at or below `stayed`."
            )
        if self.patience < 1:
            raise ConfigError(f"`patience` of `AlarmLimits` is {self.patience}; it is a number of log events from 1.")


class Alarm(NamedTuple):
    """What was found at one log event."""

    kind: str
    """`monitors`, `text`, or `rule` for a rule over features."""

    step: int
    """Optimizer steps done."""

    message: str
    """What was found and what to do, in words."""

    shares: dict[str, float]
    """Of everything that is watched, by its name in the log: the present value over the first one."""


@dataclass
class _Course:
    """The first value of something, and its latest ones."""

    first: float = math.nan
    latest: list[float] = field(default_factory=list)
    is_rate: bool = False

    def add(self, value: float, keep: int) -> None:
        # A feature that is silent at first begins where it first fires; a rate of 0 was measured.
        has_begun = self.first >= 0 if self.is_rate else self.first > 0
        if not has_begun and math.isfinite(value):
            self.first = value
        self.latest = [*self.latest, value][-keep:]

    @property
    def present(self) -> float:
        """NaN where one of the latest is: what cannot be told has neither fallen nor stayed."""
        is_known = self.latest and all(map(math.isfinite, self.latest))
        return statistics.median(self.latest) if is_known else math.nan

    @property
    def share(self) -> float:
        return self.present / self.first if self.first > 0 else math.nan


class GamingAlarm:
    """Follows one run: `see` every log event, in order.

    The penalised features have fallen when each of their last `patience` log events is below `fallen` times their
    first value; the monitors have stayed when the median of theirs is above `stayed` times their first value. Both are
    the mean excess over the thresholds per token, summed over features. A rate has stayed when the median of its last
    `patience` values, all taken after the features had fallen, is above `stayed` times its first one. Features
    that are silent at first begin where they first fire; a rate begins with its first value, also with 0. While one of
    the latest values is NaN, its features or rate have neither fallen nor stayed. An alarm is raised once for the
    monitors and once for each rate.

    Args:
        limits: From where on something has fallen or stayed.
    """

    def __init__(self, limits: AlarmLimits) -> None:
        self.limits = limits
        self._penalised, self._monitors = _Course(), _Course()
        self._rates: dict[str, _Course] = {}
        self._raised: set[str] = set()
        self.is_on = False
        """Whether the last event showed what an alarm is for."""

    @property
    def watches(self) -> bool:
        """Whether there is anything that could stay."""
        return bool(self._monitors.latest or self._rates)

    @property
    def first(self) -> dict[str, float]:
        """First values of the penalised features and of the monitors, as far as there are any."""
        courses = {PENALISED: self._penalised, MONITORS: self._monitors}
        return {name: course.first for name, course in courses.items() if course.first > 0}

    def begin(self, values: Mapping[str, float]) -> None:
        """Set the first values, by their names in the log: of the first optimizer step, say."""
        for name, course in ((PENALISED, self._penalised), (MONITORS, self._monitors)):
            if values.get(name, math.nan) > 0:
                course.first = float(values[name])

    def see(self, step: int, logs: Mapping[str, Any]) -> list[Alarm]:
        """Take in one log event.

        Args:
            step: Optimizer steps done.
            logs: Its values by name; other names are passed over.

        Returns:
            Alarms that are raised by it and were not before.
        """
        limits = self.limits
        for name, course in ((PENALISED, self._penalised), (MONITORS, self._monitors)):
            if name in logs:
                course.add(float(logs[name]), limits.patience)
        latest, bound = self._penalised.latest, limits.fallen * self._penalised.first
        # Each by itself: NaN is below nothing.
        has_fallen = len(latest) >= limits.patience and all(value < bound for value in latest)
        for name, value in logs.items():
            if name != TEXT and not name.startswith(RULES):
                continue
            # One that begins after the fall has no first value to compare with.
            if name in self._rates or (not has_fallen and math.isfinite(value)):
                self._rates.setdefault(name, _Course(is_rate=True)).add(float(value), limits.patience)
        if not has_fallen:
            for course in self._rates.values():
                # What was measured before says nothing of what the fall has done.
                course.latest = []
        stayed = self._stayed() if has_fallen else []
        self.is_on = bool(stayed)
        found = []
        for kind, name in stayed:
            if name not in self._raised:
                self._raised.add(name)
                found.append(Alarm(kind, step, self._message(kind, name, step), self._shares()))
        return found

    def _stayed(self) -> list[tuple[str, str]]:
        """Kind and name of what has stayed."""
        limits = self.limits
        found = []
        for name, course in {MONITORS: self._monitors, **self._rates}.items():
            is_enough = name == MONITORS or course.first >= limits.min_rate
            if is_enough and len(course.latest) >= limits.patience and course.share > limits.stayed:
                found.append(("monitors" if name == MONITORS else "text" if name == TEXT else "rule", name))
        return found

    def _shares(self) -> dict[str, float]:
        courses = {PENALISED: self._penalised, MONITORS: self._monitors, **self._rates}
        return {name: course.share for name, course in courses.items() if not math.isnan(course.share)}

    def _message(self, kind: str, name: str, step: int) -> str:
        fallen = f"At step {step} the penalised features are at {_percent(self._penalised.share)} of their first value"
        if kind == "monitors":
            stayed = f"the held-out monitors at {_percent(self._monitors.share)} of theirs"
        else:
            course = self._rates[name]
            stayed = f"`{name}` at {_percent(course.present)} after {_percent(course.first)}"
        rate = self._rates.get(TEXT)
        if kind != "text" and rate is not None and rate.latest:
            stayed += f" (`{TEXT}`: {_percent(rate.present)} after {_percent(rate.first)})"
        return (
            f"{fallen}, {stayed}. The model may have silenced the features and kept the behaviour, so their silence "
            f"proves nothing. Judge by generated text or `qscope audit`; fewer tricks are open to it with features of "
            f"several layers and a lower `penalty_weight`."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
