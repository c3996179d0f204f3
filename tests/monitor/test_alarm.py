"""The alarm against courses made by hand, whose answer is known, and against noise, in which there is nothing."""

from __future__ import annotations

import random

import pytest

from qscope_trl.errors import ConfigError
from qscope_trl.monitor.alarm import MONITORS, PENALISED, TEXT, Alarm, AlarmLimits, GamingAlarm

FALLS = [10.0, 9.0, 4.0, 2.0, 1.0, 0.5, 0.3, 0.2]
STAYS = [5.0, 5.5, 4.8, 4.9, 5.2, 4.7, 4.8, 5.1]
RULE = "sae/rule/toxic"


def follow(limits: AlarmLimits | None = None, **courses: list[float]) -> tuple[list[Alarm], list[bool], GamingAlarm]:
    """The alarms, and whether each event showed what an alarm is for; one event a step, from 1."""
    names = {"penalised": PENALISED, "monitors": MONITORS, "text": TEXT, "rule": RULE}
    alarm = GamingAlarm(limits or AlarmLimits())
    found, on = [], []
    for n in range(max(map(len, courses.values()))):
        found += alarm.see(n + 1, {names[key]: course[n] for key, course in courses.items() if n < len(course)})
        on.append(alarm.is_on)
    return found, on, alarm


def test_features_that_fall_while_the_monitors_stay_raise_one_alarm() -> None:
    found, on, _ = follow(penalised=FALLS, monitors=STAYS)
    # Three events below half: 4.0, 2.0 and 1.0. The median of the monitors is then 4.9.
    assert [(alarm.kind, alarm.step) for alarm in found] == [("monitors", 5)]
    assert on == [False, False, False, False, True, True, True, True]
    assert found[0].shares == {PENALISED: pytest.approx(0.2), MONITORS: pytest.approx(0.98)}


def test_the_message_says_what_fell_what_stayed_and_what_to_do() -> None:
    found, _, _ = follow(penalised=FALLS, monitors=STAYS)
    wanted = (
        "At step 5 the penalised features are at 20 % of their first value, the held-out monitors at 98 % of theirs"
    )
    assert found[0].message.startswith(wanted)
    assert "Judge by generated text or `qscope audit`" in found[0].message
    found, _, _ = follow(penalised=FALLS, text=[0.30] * 8)
    assert "`sae/text/rate` at 30 % after 30 %." in found[0].message


@pytest.mark.parametrize(
    ("penalised", "monitors"),
    [
        (FALLS, [5.0, 4.5, 2.0, 1.0, 0.5, 0.2, 0.2, 0.1]),
        (FALLS, [5.0, 4.5, 3.9, 3.8, 3.9, 3.7, 3.9, 3.8]),
        (STAYS, STAYS),
        ([10.0, 9.0, 6.0, 5.5, 5.2, 5.1, 5.3, 5.6], STAYS),
        ([10.0, 9.0, 0.1, 9.0, 9.5, 0.2, 9.0, 8.8], STAYS),
        ([10.0, 0.1, 0.1, 9.0, 0.1, 0.1, 9.0, 0.1], STAYS),
        (FALLS, [5.0, 1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0]),
        ([0.0] * 8, STAYS),
        (FALLS, [0.0] * 8),
        (FALLS[2:4], STAYS),
    ],
    ids=[
        "the monitors fall too", "the monitors fall by a quarter", "nothing falls", "the features fall by less",
        "single low events", "two low events in a row", "single high monitors", "silent features", "silent monitors",
        "too few events",
    ],
)  # fmt: skip
def test_no_alarm_where(penalised: list[float], monitors: list[float]) -> None:
    found, on, _ = follow(penalised=penalised, monitors=monitors)
    assert found == []
    assert not any(on)


def test_a_text_rate_that_stays_raises_an_alarm_of_its_own() -> None:
    found, _, _ = follow(penalised=FALLS, monitors=STAYS, text=[0.30, 0.31, 0.28, 0.29, 0.30, 0.27, 0.33, 0.30])
    # Values before the fall do not count: 0.30, 0.27 and 0.33 are the first three after it.
    assert [(alarm.kind, alarm.step) for alarm in found] == [("monitors", 5), ("text", 7)]


def test_an_alarm_of_monitors_tells_what_the_text_showed() -> None:
    limits = AlarmLimits(patience=1)
    found, _, _ = follow(limits, penalised=[10.0, 1.0], monitors=[5.0, 5.0], text=[0.3, 0.1])
    assert "the held-out monitors at 100 % of theirs (`sae/text/rate`: 10 % after 30 %)" in found[0].message


@pytest.mark.parametrize(
    "rates",
    [[0.30, 0.2, 0.1, 0.05, 0.06, 0.1, 0.02, 0.05], [0.05] * 8, [0.30, 0.30, 0.30, 0.30, 0.05, 0.05, 0.30, 0.05]],
    ids=["it falls", "there was too little", "single high values"],
)
def test_no_alarm_of_the_text_where(rates: list[float]) -> None:
    assert follow(penalised=FALLS, text=rates)[0] == []


def test_a_rate_that_begins_after_the_fall_has_nothing_to_be_compared_with() -> None:
    alarm = GamingAlarm(AlarmLimits(patience=1))
    for step, value in enumerate(FALLS):
        alarm.see(step, {PENALISED: value})
    assert [alarm.see(9 + n, {TEXT: 0.4}) for n in range(3)] == [[], [], []]


def test_a_rate_that_begins_at_0_decides_nothing_whatever_comes_after() -> None:
    """As one that begins below `min_rate`; its first value is not one from after the fall."""
    for zeros in (1, 4):
        assert follow(penalised=FALLS, text=[0.0] * zeros + [0.4] * (8 - zeros))[0] == []


NAN = float("nan")


@pytest.mark.parametrize(
    ("penalised", "monitors"),
    [
        ([10.0, 9.0, 0.1, NAN, 0.1, 9.0, 9.0, 9.0], STAYS),
        ([10.0, 9.0, 0.1, 0.1, NAN, 0.1, NAN, NAN], STAYS),
        (FALLS, [5.0, 5.0, 5.0, 0.1, 0.1, NAN, 5.0, 5.0]),
        ([NAN] * 8, STAYS),
    ],
    ids=["one between low events", "more and more", "of the monitors", "nothing else"],
)
def test_what_is_not_a_number_has_neither_fallen_nor_stayed(penalised: list[float], monitors: list[float]) -> None:
    found, on, _ = follow(penalised=penalised, monitors=monitors)
    assert found == []
    assert not any(on)


def test_a_first_value_that_is_not_a_number_is_none() -> None:
    _, on, alarm = follow(AlarmLimits(patience=1), penalised=[NAN, 10.0, 1.0], text=[NAN, 0.3, 0.3])
    assert alarm.first == {PENALISED: 10.0}
    assert on == [False, False, True]


def test_each_rule_raises_its_own_alarm() -> None:
    alarm = GamingAlarm(AlarmLimits(patience=1))
    alarm.see(0, {PENALISED: 10.0, "sae/rule/a": 0.5, "sae/rule/b": 0.5})
    found = alarm.see(1, {PENALISED: 1.0, "sae/rule/a": 0.5, "sae/rule/b": 0.5})
    assert [one.kind for one in found] == ["rule", "rule"]
    assert ["`sae/rule/a`" in one.message for one in found] == [True, False]


def test_first_values_can_be_those_of_the_first_step() -> None:
    alarm = GamingAlarm(AlarmLimits(patience=1))
    alarm.begin({PENALISED: 10.0, MONITORS: 5.0})
    assert alarm.first == {PENALISED: 10.0, MONITORS: 5.0}
    # The first log event alone, long after the fall, would show nothing.
    assert [one.kind for one in alarm.see(100, {PENALISED: 0.1, MONITORS: 5.0})] == ["monitors"]
    assert follow(AlarmLimits(patience=1), penalised=[0.1], monitors=[5.0])[0] == []


def test_the_alarm_goes_off_when_the_features_come_back() -> None:
    _, on, _ = follow(penalised=[*FALLS, 9.0, 9.0, 9.0], monitors=[*STAYS, 5.0, 5.0, 5.0])
    assert on[7] is True
    assert on[-1] is False


@pytest.mark.parametrize(("spread", "most"), [(0.1, 0.0), (0.2, 0.02)])
def test_noise_around_a_constant_rarely_raises_an_alarm(spread: float, most: float) -> None:
    assert false_alarms(spread) <= most


def test_noise_that_halves_values_by_itself_raises_alarms() -> None:
    # So the two above could have failed: at a scatter of 0.5, half is 1.4 standard deviations away.
    assert false_alarms(0.5) > 0.1


def false_alarms(spread: float) -> float:
    """Share of 200 runs of 100 events with an alarm; every value is off by a factor, log-normal, from a constant."""
    generator = random.Random(0)

    def course(level: float) -> list[float]:
        return [level * generator.lognormvariate(0.0, spread) for _ in range(100)]

    return sum(bool(follow(penalised=course(10.0), monitors=course(5.0))[0]) for _ in range(200)) / 200


def test_nothing_that_could_stay_is_nothing_to_watch() -> None:
    assert not follow(penalised=FALLS)[2].watches
    assert follow(penalised=FALLS, monitors=STAYS)[2].watches
    assert follow(penalised=FALLS, text=[0.3])[2].watches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fallen": 0.0}, "`fallen` of `AlarmLimits` is 0.0; it is a share above 0"),
        ({"stayed": 1.5}, "`stayed` of `AlarmLimits` is 1.5"),
        ({"min_rate": float("nan")}, "`min_rate` of `AlarmLimits` is nan"),
        ({"fallen": 0.9}, "`fallen` is 0.9 and `stayed` is 0.8: one value could have done both"),
        ({"patience": 0}, "`patience` of `AlarmLimits` is 0; it is a number of log events from 1"),
    ],
)
def test_limits_that_do_not_fit_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlarmLimits(**settings)
