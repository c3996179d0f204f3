"""What keeps requests within bounds: a budget, a rate, and how long to wait before trying again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime


class Budget:
    """Requests and tokens that may still be spent; several threads may take from it.

    Before a request is sent, what it may use at most is taken; when it is answered, what it did not use is given back.
    So the bounds hold at every moment, as far as the generator keeps its own limit of tokens.

    Args:
        max_requests: Requests in all.
        max_tokens: Tokens in all; no bound if `None`.
        num_requests: Requests spent before.
        num_tokens: Tokens spent before.
    """

    def __init__(
        self, max_requests: int, max_tokens: int | None = None, *, num_requests: int = 0, num_tokens: int = 0
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = num_requests
        self.num_tokens = num_tokens
        self._lock = threading.Lock()

    def take(self, may_use: int) -> bool:
        """Take one request and the tokens it may use; false, and nothing taken, if that is more than is left."""
        with self._lock:
            if self.num_requests >= self.max_requests:
                return False
            if self.max_tokens is not None and self.num_tokens + may_use > self.max_tokens:
                return False
            self.num_requests += 1
            self.num_tokens += may_use
            return True

    def settle(self, may_use: int, used: int) -> None:
        """A request is over: it used this many of the tokens that were taken."""
        with self._lock:
            self.num_tokens += used - may_use

    def give_back(self, may_use: int) -> None:
        """A request that was taken for is not sent."""
        with self._lock:
            self.num_requests -= 1
            self.num_tokens -= may_use


class RateLimiter:
    """Lets requests start at an even pace, from any number of threads.

    Args:
        per_minute: Requests in a minute; no bound if `None`.
        clock: Seconds that only grow.
        sleep: Waits that many seconds.
    """

    def __init__(
        self,
        per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._interval = 0.0 if per_minute is None else 60 / per_minute
        self._clock = clock
        self._sleep = sleep
        self._next = self._paused_until = clock()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for this thread's turn. Turns are at least the interval apart, and none falls in a pause."""
        while True:
            with self._lock:
                turn = max(self._next, self._paused_until, self._clock())
                self._next = turn + self._interval
            left = turn - self._clock()
            if left > 0:
                self._sleep(left)
            # A pause may have been asked for meanwhile: then this turn is void.
            if turn >= self._paused_until:
                return

    def pause(self, seconds: float) -> None:
        """Give out no turn for so long: the endpoint asked for it."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)


def backoff(attempt: int, retry_after: float | None, rng: random.Random, *, longest: float = 60.0) -> float:
    """Seconds to wait before trying again.

    What the endpoint asks for, if it does; else 1, 2, 4, ... seconds up to `longest`, shortened at random by up to a
    half so that threads do not come back all at once.

    Args:
        attempt: Attempts that failed, from 1.
        retry_after: Seconds that the endpoint asks for.
        rng: Draws the shortening.
        longest: Bound of the waiting that is not asked for.
    """
    if retry_after is not None:
        return retry_after
    return min(longest, 2.0 ** min(attempt - 1, 16)) * rng.uniform(0.5, 1.0)


def retry_after_seconds(value: str | None, now: datetime | None = None) -> float | None:
    """The seconds that a `Retry-After` header asks for: a number, or a date; `None` if it is neither or missing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, TypeError):
            return None
        date = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
        seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
    # Also turns away NaN.
    return max(0.0, seconds) if seconds < float("inf") else None
