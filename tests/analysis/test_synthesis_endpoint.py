"""The endpoint's client against a server that fails in every way a server can."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from qscope_trl.analysis.synthesis.endpoint import EndpointGenerator, read_key
from qscope_trl.analysis.synthesis.generators import Outcome, Request
from qscope_trl.analysis.synthesis.journal import Journal
from qscope_trl.analysis.synthesis.limits import Budget
from qscope_trl.errors import ConfigError, EndpointError
from tests.analysis.stub_server import Reply, Stub, asked, serving

KEY = "sk-very-secret-0123456789"


class Client:
    """A generator on a server, with what it waited and what it wrote."""

    def __init__(self, stub: Stub, folder: Path, *, max_requests: int = 100, **settings: Any) -> None:
        self.path = folder / "journal.jsonl"
        self.journal = Journal(self.path, {})
        self.budget = Budget(max_requests, settings.pop("max_tokens", None))
        self.waited: list[float] = []
        self.generator = EndpointGenerator(
            settings.pop("url", stub.url),
            "served",
            journal=self.journal,
            budget=self.budget,
            concurrency=settings.pop("concurrency", 1),
            sleep=self.waited.append,
            **{"timeout": 60.0, **settings},
        )

    def ask(self, count: int = 1, **changes: Any) -> list[Outcome]:
        outcomes = []
        for i in range(count):
            assert self.budget.take(50)
            self.generator.submit(request(f"L1F2/response {i}", **changes))
        while len(outcomes) < count:
            outcomes += self.generator.collect()
        return outcomes

    def records(self, kind: str) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["record"] == kind]

    def close(self) -> None:
        self.generator.close()
        self.journal.close()


def request(key: str, *, beginning: str | None = None) -> Request:
    messages = ({"role": "user", "content": f"ask {key}"},) if beginning is None else None
    return Request(key, "response", messages, beginning, 10, 11, 50)


Make = Callable[..., tuple[Client, Stub]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    open_: list[Any] = []

    def made(answer: Callable[[dict[str, Any], int], Reply], **settings: Any) -> tuple[Client, Stub]:
        server = serving(answer)
        stub = server.__enter__()
        client = Client(stub, tmp_path / str(len(open_)), **settings)
        open_.append((client, server))
        return client, stub

    yield made
    for client, server in open_:
        client.close()
        server.__exit__(None, None, None)


def in_turn(*replies: Reply) -> Callable[[dict[str, Any], int], Reply]:
    """These replies one after the other, then answers."""
    return lambda body, number: replies[number] if number < len(replies) else Reply()


def test_requests_say_what_is_wanted_and_answers_are_recorded(make: Make) -> None:
    client, stub = make(
        lambda body, number: Reply(f"answer to {asked(body)}"),
        api_key=KEY,
        temperature=0.7,
        top_p=0.9,
        body={"top_k": 20, "seed": None},
    )
    (outcome,) = client.ask()
    (body,) = stub.bodies
    assert body == {
        "model": "served",
        "messages": [{"role": "user", "content": "ask L1F2/response 0"}],
        "max_tokens": 10,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
    }
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.keys == [f"Bearer {KEY}"]
    assert outcome.answer is not None
    assert outcome.answer.text == "answer to ask L1F2/response 0"
    assert (outcome.answer.prompt_tokens, outcome.answer.completion_tokens) == (7, 5)
    assert client.journal.answers == {"L1F2/response 0": outcome.answer}
    assert client.budget.num_tokens == 12
    assert [len(client.records(kind)) for kind in ("ask", "answer")] == [1, 1]


def test_beginnings_go_to_the_completions_endpoint(make: Make) -> None:
    client, stub = make(lambda body, number: Reply(" and on"))
    (outcome,) = client.ask(beginning="It went on")
    assert stub.paths == ["/v1/completions"]
    assert stub.bodies[0]["prompt"] == "It went on"
    assert stub.bodies[0]["seed"] == 11
    assert outcome.answer is not None
    assert outcome.answer.text == " and on"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_failures_for_the_moment_are_tried_again_after_growing_waits(make: Make, status: int) -> None:
    client, stub = make(in_turn(*[Reply(status=status)] * 3))
    (outcome,) = client.ask()
    assert outcome.answer is not None
    assert outcome.answer.text == "w3 w4"
    assert len(stub.bodies) == 4
    assert len(client.waited) == 3
    for waited, longest in zip(client.waited, (1, 2, 4), strict=True):
        assert longest / 2 <= waited <= longest
    assert client.budget.num_requests == client.journal.num_requests == 4
    assert client.journal.num_retries == 3
    # A refusal costs no tokens.
    assert client.budget.num_tokens == client.journal.num_tokens == 12


def test_the_endpoints_own_waiting_time_is_kept(make: Make) -> None:
    client, _ = make(in_turn(Reply(status=429, headers={"Retry-After": "37"})))
    # The pause is kept by the pace of all threads, which asks the clock: no time passes here.
    client.generator._limiter._clock = lambda: 0.0
    client.generator._limiter._next = client.generator._limiter._paused_until = 0.0
    client.ask()
    assert client.waited == [37.0]


def test_a_server_that_asks_for_hours_ends_the_run(make: Make) -> None:
    client, stub = make(in_turn(Reply(status=429, headers={"Retry-After": "7200"})))
    with pytest.raises(EndpointError, match=r"asks to wait 7200 seconds \(status 429\).*go on then with `--resume`"):
        client.ask()
    assert len(stub.bodies) == 1


def test_no_answer_in_time_is_tried_again_and_counted_as_paid(make: Make) -> None:
    client, stub = make(in_turn(Reply(delay=2.5)), timeout=2.0)
    (outcome,) = client.ask()
    assert outcome.answer is not None
    assert len(stub.bodies) == 2
    assert client.records("attempt")[0]["error"] == "no answer within 2 seconds"
    assert client.budget.num_tokens == client.journal.num_tokens == 50 + 12


def test_a_server_that_is_not_there_ends_the_run_after_the_tries(make: Make) -> None:
    client, stub = make(in_turn(), url="http://127.0.0.1:9/v1", max_retries=2)
    with pytest.raises(EndpointError, match=r"failed 3 times in succession, .* the connection failed .*`--resume`"):
        client.ask()
    assert not stub.bodies
    assert client.budget.num_tokens == client.journal.num_tokens == 0
    assert client.journal.num_requests == 3


@pytest.mark.parametrize(
    "raw",
    ["not json", "{}", '{"choices": []}', '{"choices": [{"message": null}]}', "[1]", '{"choices": [{}]}'],
)
def test_malformed_answers_are_tried_again_then_recorded(make: Make, raw: str) -> None:
    client, stub = make(lambda body, number: Reply(raw=raw) if "response 0" in asked(body) else Reply(), max_retries=2)
    first, second = client.ask(2)
    assert first.answer is not None
    assert second.answer is not None
    assert (first.answer.failure, first.answer.text) == ("malformed", "")
    assert second.answer.text == "w3 w4"
    assert len(stub.bodies) == 4
    assert client.journal.answers["L1F2/response 0"] == first.answer
    # What they cost is not known: all that they may.
    assert client.budget.num_tokens == client.journal.num_tokens == 3 * 50 + 12


def test_answers_without_text_or_counts_are_taken_as_they_are(make: Make) -> None:
    client, _ = make(in_turn(Reply(None), Reply(" "), Reply("w5", usage=None), Reply("<think>w9</think>w6")))
    answers = [outcome.answer for outcome in client.ask(4)]
    assert [answer.failure for answer in answers if answer] == ["empty", "empty", "", ""]
    assert [answer.text for answer in answers if answer] == ["", " ", "w5", "w6"]
    assert client.budget.num_tokens == 12 + 12 + 50 + 12


def test_requests_that_the_context_cannot_hold_are_passed_over(make: Make) -> None:
    error = {"message": "This model's maximum context length is 9 tokens.", "code": "context_length_exceeded"}
    client, stub = make(in_turn(Reply(status=400, error=error)))
    first, second = client.ask(2)
    assert first.answer is not None
    assert first.answer.failure == "too long"
    assert second.answer is not None
    assert len(stub.bodies) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=401), r"refuses requests without a key \(status 401\).*`--api-key-env`"),
        (Reply(status=404), r"does not know the model 'served', .*It serves served\. The URL usually ends in /v1"),
        (
            Reply(status=400, error={"message": "Unknown field `seed`"}),
            r"refuses a request \(status 400\): Unknown field `seed`\. `--extra-body` changes",
        ),
        (
            Reply(status=429, error={"message": "Pay.", "code": "insufficient_quota"}),
            r"the quota of this key is used up: Pay\.",
        ),
    ],
)
def test_refusals_end_the_run_at_once(make: Make, reply: Reply, message: str) -> None:
    client, stub = make(lambda body, number: reply)
    with pytest.raises(EndpointError, match=message):
        client.ask(3)
    client.close()
    assert len(stub.bodies) == 1
    # What was not sent is not charged.
    assert client.budget.num_requests == client.journal.num_requests == 1


def test_whatever_else_the_package_raises_ends_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client, stub = make(in_turn(), api_key=KEY)

    def broken(**_: Any) -> None:
        raise openai.OpenAIError(f"cannot sign with {KEY}")

    monkeypatch.setattr(client.generator._client.chat.completions.with_raw_response, "create", broken)
    with pytest.raises(EndpointError, match=r"The request to http://.*/v1 failed: cannot sign with \*\*\*\."):
        client.ask()
    assert not stub.bodies


@pytest.mark.parametrize("status", [401, 500, 200])
def test_the_key_is_in_no_file_and_no_message(make: Make, status: int) -> None:
    error = {"message": f"The key {KEY} is bad"}
    client, stub = make(
        lambda body, number: Reply(f"you sent {KEY}", status=status, error=error),
        api_key=KEY,
        api_key_env="MY_KEY",
        max_retries=1,
    )
    shown = ""
    try:
        client.ask()
    except EndpointError as err:
        shown = str(err)
        assert "***" in shown
    assert stub.keys[0] == f"Bearer {KEY}"
    assert KEY not in shown
    assert "***" in client.path.read_text() + shown
    assert KEY not in client.path.read_text()
    if status == 401:
        assert "refuses the key in `MY_KEY`" in shown


def test_the_budget_bounds_retries_too(make: Make) -> None:
    client, stub = make(lambda body, number: Reply(status=500), max_requests=3)
    (outcome,) = client.ask()
    assert outcome.answer is None
    assert len(stub.bodies) == client.journal.num_requests == 3
    assert client.budget.num_tokens == 0


def test_requests_are_in_flight_together_up_to_the_bound(make: Make) -> None:
    client, stub = make(lambda body, number: Reply(f"{number}", delay=0.05), concurrency=3)
    outcomes = client.ask(9)
    assert {outcome.request.key for outcome in outcomes} == {f"L1F2/response {i}" for i in range(9)}
    assert 1 < stub.most_at_once <= 3
    assert client.journal.num_requests == 9


def test_the_pace_is_kept(make: Make) -> None:
    client, _ = make(in_turn(), requests_per_minute=60.0)
    client.generator._limiter._clock = lambda: 0.0
    client.generator._limiter._next = client.generator._limiter._paused_until = 0.0
    client.ask(4)
    assert client.waited == [1.0, 2.0, 3.0]


def test_closing_waits_for_what_is_sent_and_sends_no_more(make: Make) -> None:
    client, stub = make(lambda body, number: Reply("late", delay=0.25), concurrency=2)
    for i in range(8):
        assert client.budget.take(50)
        client.generator.submit(request(f"L1F2/response {i}"))
    client.generator.collect()
    client.generator.close()
    assert 2 <= len(stub.bodies) < 8
    assert len(client.journal.answers) == client.journal.num_requests == len(stub.bodies)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_key(None) is None
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert read_key("MY_KEY") == KEY
    monkeypatch.setenv("MY_KEY", "")
    with pytest.raises(ConfigError, match="environment variable `MY_KEY`, which `--api-key-env` names, is not set"):
        read_key("MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-\u00e9")
    with pytest.raises(ConfigError, match="`MY_KEY` holds characters that no key has"):
        read_key("MY_KEY")


def test_an_endpoint_needs_the_package(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"needs the package openai.*pip install 'qscope-trl\[endpoint\]'"):
        EndpointGenerator("http://localhost/v1", "m", journal=None, budget=Budget(1))  # type: ignore[arg-type]
