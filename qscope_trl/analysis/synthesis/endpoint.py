"""A language model behind any OpenAI-compatible endpoint, through the `openai` package.

Its own retries are off: each attempt here counts in the budget, keeps the rate and is in the journal. The key is read
from an environment variable, sent to the endpoint, and nowhere else; it is struck out of every message. Left out:
streaming, tools and batch interfaces.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeGuard

from qscope_trl.analysis.synthesis.generators import Outcome, Request
from qscope_trl.analysis.synthesis.journal import Answer, Journal
from qscope_trl.analysis.synthesis.limits import Budget, RateLimiter, backoff, retry_after_seconds
from qscope_trl.analysis.synthesis.prompts import visible
from qscope_trl.errors import ConfigError, EndpointError

# An endpoint that asks for more patience than this is left alone: the run can be resumed later.
_LONGEST_WAIT = 600.0
_FOR_THE_MOMENT = (408, 409, 425, 429)
_SHOWN = 300
_SHORTEST_SECRET = 8


class EndpointGenerator:
    """Sends requests to an endpoint, a few at a time, from threads.

    Args:
        base_url: Its URL, up to and with `/v1`.
        model: What it calls the model.
        journal: Where requests and answers are recorded, by the thread that sends them.
        budget: What requests are taken from, each attempt anew.
        api_key: Key, or `None`.
        api_key_env: Where it came from, for messages.
        concurrency: Requests in flight.
        timeout: Seconds for an answer.
        max_retries: Attempts after the first of a request that failed for the moment.
        temperature: Sampling temperature.
        top_p: Probability mass to sample from.
        body: More fields of each request; `None` leaves a field out.
        requests_per_minute: Their pace; no bound if `None`.
        sleep: Waits that many seconds; by default until then or until `close`.

    Raises:
        ConfigError: If `openai` is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        journal: Journal,
        budget: Budget,
        api_key: str | None = None,
        api_key_env: str | None = None,
        concurrency: int = 4,
        timeout: float = 120.0,
        max_retries: int = 5,
        temperature: float = 1.0,
        top_p: float = 1.0,
        body: Mapping[str, Any] | None = None,
        requests_per_minute: float | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as err:
            raise ConfigError(
                "An endpoint needs the package openai, which is not installed: `pip install 'qscope-trl[endpoint]'`."
            ) from err
        self.name = model
        self.slots = concurrency
        self._openai: Any = openai
        self._client: Any = openai.OpenAI(
            # The package insists on a key; servers without one take any.
            api_key=api_key or "none",
            base_url=base_url,
            timeout=timeout,
            max_retries=0,
        )
        self._base_url, self._api_key, self._api_key_env = base_url, api_key, api_key_env
        self._timeout, self._max_retries = timeout, max_retries
        self._sampling = {"temperature": temperature, "top_p": top_p}
        self._body = dict(body or {})
        self._journal, self._budget = journal, budget
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._limiter = RateLimiter(requests_per_minute, sleep=self._sleep)
        self._rng = random.Random(0)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="endpoint")
        self._futures: set[Future[Outcome]] = set()

    def submit(self, request: Request) -> None:
        """See `Generator.submit`."""
        self._futures.add(self._pool.submit(self._answer, request))

    def collect(self) -> list[Outcome]:
        """See `Generator.collect`.

        Raises:
            EndpointError: If the endpoint cannot be reached, refuses, or keeps failing.
        """
        done, self._futures = wait(self._futures, return_when=FIRST_COMPLETED)
        return [future.result() for future in done]

    def close(self) -> None:
        """See `Generator.close`."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    def _answer(self, request: Request) -> Outcome:
        """Send a request until it is answered; runs in a thread of the pool."""
        attempt = 0
        while True:
            self._limiter.wait()
            if self._stop.is_set():
                self._budget.give_back(request.may_use)
                return Outcome(request, None)
            self._journal.ask([(request.key, request.may_use)])
            try:
                answer = self._send(request)
            except _ForTheMomentError as err:
                self._fail(request, err.what, err.tokens)
                attempt += 1
                if attempt > self._max_retries:
                    if err.is_malformed:
                        answer = Answer("", failure="malformed")
                        self._journal.answer({request.key: answer})
                        return Outcome(request, answer)
                    self._give_up(err, attempt)
                if not self._budget.take(request.may_use):
                    return Outcome(request, None)
                delay = backoff(attempt, err.retry_after, self._rng)
                if err.retry_after is not None:
                    self._limiter.pause(delay)
                else:
                    self._sleep(delay)
                continue
            except EndpointError as err:
                self._fail(request, str(err), 0)
                # Nothing else is sent: whatever is wrong with this one is wrong with the others.
                self._stop.set()
                raise
            self._journal.answer({request.key: answer})
            self._budget.settle(request.may_use, answer.prompt_tokens + answer.completion_tokens)
            return Outcome(request, answer)

    def _fail(self, request: Request, what: str, tokens: int | None) -> None:
        tokens = request.may_use if tokens is None else tokens
        self._journal.attempt_failed(request.key, what, tokens)
        self._budget.settle(request.may_use, tokens)

    def _send(self, request: Request) -> Answer:
        """One attempt.

        Raises:
            _ForTheMomentError: If another attempt may succeed.
            EndpointError: If none will.
        """
        openai = self._openai
        fields: dict[str, Any] = {**self._sampling, "max_tokens": request.max_new_tokens, "seed": request.seed}
        extra = {}
        for name, value in self._body.items():
            fields.pop(name, None)
            if value is not None:
                extra[name] = value
        try:
            if request.messages is not None:
                create = self._client.chat.completions.with_raw_response.create
                fields["messages"] = list(request.messages)
            else:
                create = self._client.completions.with_raw_response.create
                fields["prompt"] = request.beginning
            response = create(model=self.name, extra_body=extra or None, **fields)
        except openai.APITimeoutError as err:
            connected = type(err.__cause__).__name__ != "ConnectTimeout"
            what = f"no answer within {self._timeout:g} seconds"
            raise _ForTheMomentError(what, tokens=None if connected else 0) from err
        except openai.APIConnectionError as err:
            cause = err.__cause__ or err
            reached = type(cause).__name__ != "ConnectError"
            raise _ForTheMomentError(
                f"the connection failed ({self._clean(cause)})", tokens=None if reached else 0
            ) from err
        except openai.APIStatusError as err:
            return self._refused(err)
        except openai.OpenAIError as err:
            raise EndpointError(f"The request to {self._base_url} failed: {self._clean(err)}") from None
        return self._read(response.http_response.text, request)

    def _read(self, body: str, request: Request) -> Answer:
        """The answer in a response's body, whatever that holds."""
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            text = choice["message"]["content"] if request.messages is not None else choice["text"]
        except (ValueError, KeyError, IndexError, TypeError) as err:
            raise _ForTheMomentError(
                f"a malformed answer ({self._clean(body)})", tokens=None, is_malformed=True
            ) from err
        usage = data.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        used: list[Any] = [counts.get("prompt_tokens"), counts.get("completion_tokens")]
        if not all(type(count) is int and count >= 0 for count in used):
            # An endpoint that does not say what it used is taken to have used all it may.
            used = [request.may_use - request.max_new_tokens, request.max_new_tokens]
        shown = self._without_key(visible(text)) if isinstance(text, str) else ""
        return Answer(shown, "" if shown.strip() else "empty", int(used[0]), int(used[1]))

    def _refused(self, err: Any) -> Answer:
        """What a status other than success means."""
        said = err.body.get("message") if isinstance(err.body, dict) else None
        status, message = err.status_code, self._clean(said if isinstance(said, str) and said.strip() else err.message)
        if status == 429 and "insufficient_quota" in (err.code, err.type):
            raise EndpointError(f"The endpoint says that the quota of this key is used up: {message}") from None
        if status in _FOR_THE_MOMENT or status >= 500:
            wait_for = retry_after_seconds(err.response.headers.get("retry-after"))
            if wait_for is not None and wait_for > _LONGEST_WAIT:
                raise EndpointError(
                    f"The endpoint asks to wait {wait_for:.0f} seconds (status {status}). Every answer is in the "
                    f"journal: go on then with `--resume`."
                ) from None
            raise _ForTheMomentError(f"status {status} ({message})", retry_after=wait_for) from None
        if status in (401, 403):
            key = f"the key in `{self._api_key_env}`" if self._api_key else "requests without a key"
            raise EndpointError(
                f"The endpoint at {self._base_url} refuses {key} (status {status}): {message} Name the environment "
                f"variable with the right one by `--api-key-env`."
            ) from None
        if status == 404:
            raise EndpointError(
                f"The endpoint at {self._base_url} does not know the model '{self.name}', or the URL is not right "
                f"(status 404): {message}{self._served()} The URL usually ends in /v1."
            ) from None
        lowered = message.lower()
        if status in (400, 413, 422) and (
            err.code == "context_length_exceeded" or ("context" in lowered and "length" in lowered)
        ):
            return Answer("", failure="too long")
        raise EndpointError(
            f"The endpoint at {self._base_url} refuses a request (status {status}): {message} `--extra-body` changes "
            f"fields or leaves them out."
        ) from None

    def _give_up(self, err: _ForTheMomentError, attempts: int) -> NoReturn:
        self._stop.set()
        raise EndpointError(
            f"The endpoint at {self._base_url} failed {attempts} times in succession, the last time with: {err.what}. "
            f"Every answer so far is in the journal: go on with `--resume` when it works again."
        ) from err

    def _served(self) -> str:
        """The models that the endpoint lists, if it lists them."""
        try:
            data = json.loads(self._client.models.with_raw_response.list().http_response.text)
            names = [str(model["id"]) for model in data["data"]]
        except (self._openai.OpenAIError, ValueError, KeyError, TypeError):
            return ""
        return f" It serves {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}." if names else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if is_secret(self._api_key) else text

    def _clean(self, what: object) -> str:
        """A text of the endpoint's for a message: one line, short, without the key."""
        text = " ".join(self._without_key(str(what)).split())
        text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        return text if not text or text.endswith((".", "!", "?")) else f"{text}."


class _ForTheMomentError(Exception):
    """An attempt failed in a way that another may not.

    Args:
        what: What happened.
        retry_after: Seconds that the endpoint asks to wait.
        tokens: Tokens it may have cost; all that it may use if `None`.
        is_malformed: Whether an answer came, but none that can be read.
    """

    def __init__(
        self, what: str, *, retry_after: float | None = None, tokens: int | None = 0, is_malformed: bool = False
    ) -> None:
        super().__init__(what)
        self.is_malformed = is_malformed
        self.what = what
        self.retry_after = retry_after
        self.tokens = tokens


def is_secret(key: str | None) -> TypeGuard[str]:
    """Whether a key is to be kept from files and messages; local servers take any short word, such as `EMPTY`."""
    return key is not None and len(key) >= _SHORTEST_SECRET


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; `None` if none is named.

    Raises:
        ConfigError: If the variable is not set or empty, or holds line breaks or other characters no header can have.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"The environment variable `{variable}`, which `--api-key-env` names, is not set. Set it, or leave the "
            f"flag out for an endpoint without a key."
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"The environment variable `{variable}` holds characters that no key has.")
    return key
