"""Budget, pace, waiting before another try, and the journal that they are restored from."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.analysis.synthesis.journal import Answer, Journal, Verdict
from qscope_trl.analysis.synthesis.limits import Budget, RateLimiter, backoff, retry_after_seconds
from qscope_trl.errors import ConfigError, DataError


def test_the_budget_holds_under_threads() -> None:
    budget = Budget(1000, max_tokens=4000)
    taken = []

    def spend() -> None:
        mine = 0
        while budget.take(10):
            budget.settle(10, 6)
            mine += 1
        taken.append(mine)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Up to 4 threads hold 10 tokens each at the end; each that is over used 6.
    assert sum(taken) == budget.num_requests
    assert budget.num_tokens == 6 * sum(taken)
    assert 4000 - 4 * 10 < budget.num_tokens <= 4000


def test_requests_and_tokens_bound_each_by_itself() -> None:
    budget = Budget(3, max_tokens=100, num_requests=1, num_tokens=20)
    assert not budget.take(81)
    assert budget.take(80)
    assert not budget.take(1)
    budget.settle(80, 30)
    assert budget.take(50)
    assert not budget.take(0)
    budget.give_back(50)
    assert (budget.num_requests, budget.num_tokens) == (2, 50)
    assert budget.take(0)


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_requests_start_at_an_even_pace() -> None:
    clock = Clock()
    limiter = RateLimiter(120, clock=clock, sleep=clock.sleep)
    starts = []
    for _ in range(4):
        limiter.wait()
        starts.append(clock.now)
    assert starts == [100.0, 100.5, 101.0, 101.5]
    clock.now += 10
    limiter.wait()
    limiter.wait()
    # Time in which nothing was asked is not made up for.
    assert clock.now == 112.0


def test_no_request_starts_in_a_pause() -> None:
    clock = Clock()
    limiter = RateLimiter(None, clock=clock, sleep=clock.sleep)
    limiter.wait()
    assert clock.now == 100.0
    limiter.pause(7)
    limiter.pause(3)
    limiter.wait()
    assert clock.now == 107.0


def test_a_pause_voids_a_turn_that_was_given_out() -> None:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now < 101:
            limiter.pause(5)

    limiter = RateLimiter(120, clock=clock, sleep=sleep)
    limiter.wait()
    limiter.wait()
    assert clock.now >= 105.5


def test_waiting_doubles_up_to_its_bound_and_heeds_the_endpoint() -> None:
    rng = random.Random(0)
    for attempt, longest in ((1, 1), (2, 2), (3, 4), (7, 60), (5000, 60)):
        drawn = [backoff(attempt, None, rng) for _ in range(200)]
        assert longest / 2 <= min(drawn) < 0.6 * longest
        assert 0.9 * longest < max(drawn) <= longest
    assert backoff(3, 17.0, rng) == 17.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-4", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Wed, 01 Jan 2025 00:00:30 GMT", 30.0),
        ("Tue, 31 Dec 2024 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, datetime(2025, 1, 1, tzinfo=timezone.utc)) == seconds


SETTINGS: dict[str, Any] = {"model": "demo", "seed": 0, "layers": (1, 2)}
SPENT = Answer("text", "", 7, 5)


def filled_journal(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    journal.fact("start", {"counts": {"L1F2": 0}})
    journal.ask([("a", 40), ("b", 50), ("c", 60)])
    journal.attempt_failed("b", "status 500", 0)
    journal.ask([("b", 50)])
    journal.answer({"a": SPENT})
    journal.verdict({"a": Verdict(1.5, {"L1F2": 1.5}, None, 5)})
    journal.close()


def test_a_journal_gives_back_what_was_written_and_counts_what_may_have_been_paid(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    filled_journal(path)
    journal = Journal(path, SETTINGS)
    assert journal.answers == {"a": SPENT}
    assert journal.verdicts == {"a": Verdict(1.5, {"L1F2": 1.5}, None, 5)}
    assert journal.facts == {"start": {"counts": {"L1F2": 0}}}
    # `b` and `c` were sent and have no answer: all that they may use.
    assert (journal.num_requests, journal.num_retries, journal.num_tokens) == (4, 1, 12 + 50 + 60)
    journal.close()


def test_a_journal_cut_anywhere_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    filled_journal(whole)
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    path = tmp_path / "cut.jsonl"
    for cut in [*range(0, len(content), 7), *(end - 1 for end in ends), *ends]:
        path.write_bytes(content[:cut])
        journal = Journal(path, SETTINGS)
        journal.ask([("d", 1)])
        journal.close()
        kept = max((end for end in ends if end <= cut), default=0)
        lines = path.read_bytes()
        assert lines.startswith(content[:kept])
        assert [json.loads(line)["record"] for line in lines[kept:].splitlines()] == ["start"] * (kept == 0) + ["ask"]


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    filled_journal(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{torn\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"Line 3 of the journal .* is damaged: .*start anew with another `--output`"):
        Journal(path, SETTINGS)
    path.write_bytes(b"".join([*lines[:2], b'{"record": "dream"}\n', *lines[3:]]))
    with pytest.raises(DataError, match="it holds a record of the unknown kind 'dream'"):
        Journal(path, SETTINGS)
    path.write_bytes(b'{"record": "start", "version": 99}\n')
    with pytest.raises(DataError, match="is not a journal of this version of qscope_trl"):
        Journal(path, SETTINGS)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    filled_journal(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"started with `seed` = 0, and now it is 1\. Its answers belong"):
        Journal(path, {**SETTINGS, "seed": 1})
    with pytest.raises(ConfigError, match=r"`model` = 'demo', and now it is 'x'; `top_p` too\. Its answers"):
        Journal(path, {**SETTINGS, "model": "x", "top_p": 0.5})
    assert path.read_bytes() == before


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS)
    code = (
        "import sys, pathlib\nfrom qscope_trl.analysis.synthesis.journal import Journal\n"
        "Journal(pathlib.Path(sys.argv[1]), {})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"Another process works on '{tmp_path}'" in done.stderr
    journal.close()
    Journal(path, SETTINGS).close()


def test_a_line_that_cannot_be_written_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.ask([("a", 1)])
    assert path.read_bytes() == before
    assert journal.num_requests == 0
    journal.ask([("b", 2)])
    journal.close()
    assert path.read_bytes().count(b"\n") == 2


def test_nothing_is_asked_after_a_line_that_could_not_be_taken_back(tmp_path: Path) -> None:
    class Gone:
        def write(self, _: bytes) -> int:
            raise OSError("The disk is gone")

        truncate = write

    journal = Journal(tmp_path / "journal.jsonl", SETTINGS)
    file, journal._file = journal._file, Gone()  # type: ignore[assignment]
    with pytest.raises(OSError, match="The disk is gone"):
        journal.ask([("a", 1)])
    journal._file = file
    with pytest.raises(DataError, match="could not be written before, so nothing more is asked"):
        journal.ask([("b", 1)])
    journal.close()
