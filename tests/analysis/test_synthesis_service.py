"""`qscope synthesize` as a whole, through an endpoint: a server in this process that answers, fails and is silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.analysis.synthesis.report import format_result
from qscope_trl.analysis.synthesis.run import run
from qscope_trl.config.synthesize import SynthesizeConfig
from qscope_trl.errors import ConfigError, EndpointError
from tests.analysis.stub_server import Reply, asked, serving
from tests.analysis.synthesis_world import (
    MIN_ACTIVATION,
    World,
    asked_twice,
    fired,
    make_world,
    records,
    same,
    texts,
)
from tests.tiny import tiny_tokenizer

KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def words(text: str, count: int) -> str:
    """Words that follow from a text."""
    seed = int.from_bytes(text.encode()[-6:], "big") % 2**31
    return texts(1, seed, count)[0]


def helpful(body: dict[str, Any], number: int) -> Reply:
    """Eight prompts, or a response, that follow from what is asked."""
    text = asked(body)
    if "different requests" in text:
        return Reply("\n".join(f"{i + 1}. {words(f'{text}{i}', 4)}" for i in range(8)))
    return Reply(words(text, 20))


def endpoint(world: World, output: Path, url: str, **changes: Any) -> SynthesizeConfig:
    return world.config(
        output, generator="endpoint", base_url=url, generator_model="served", api_key_env="MY_KEY", **changes
    )


@pytest.fixture(autouse=True)
def key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)


def test_prompts_and_responses_flow_through_an_endpoint(world: World, tmp_path: Path) -> None:
    with serving(helpful) as stub:
        result = run(endpoint(world, tmp_path / "out", stub.url), show_progress=False)
    assert set(stub.keys) == {f"Bearer {KEY}"}
    assert {body["model"] for body in stub.bodies} == {"served"}
    requests = [asked(body) for body in stub.bodies]
    for one in world.missing:
        assert any(f"what {one} stands for" in text for text in requests)
    assert len(stub.bodies) == result.spent["requests"]
    fires = fired(world, result.rows, "\n\n")
    names = [str(one) for one in world.targets]
    for row, found in zip(result.rows, fires, strict=True):
        assert found[names.index(row["feature"])]
        assert row["response"] == words(row["prompt"], 20)
        assert row["prompt"] in requests
        assert (row["mode"], row["template"], row["generator"]) == ("instruct", "built-in", "served")
    assert any(one.outcomes.get("silent") for one in result.filled)
    assert result.after.value > result.before.value
    assert result.num_plain == 4
    for file in (tmp_path / "out").iterdir():
        assert KEY.encode() not in file.read_bytes()


def test_an_endpoint_that_fails_on_the_way_is_gone_on_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(helpful) as stub:
        whole = run(endpoint(world, tmp_path / "whole", stub.url), show_progress=False)

    def failing(body: dict[str, Any], number: int) -> Reply:
        return Reply(status=401) if number >= 9 else helpful(body, number)

    with serving(failing) as stub, pytest.raises(EndpointError, match=r"refuses the key in `MY_KEY` \(status 401\)"):
        run(endpoint(world, tmp_path / "out", stub.url), show_progress=False)
    answered = {one["key"] for one in records(tmp_path / "out") if one["record"] == "answer"}
    assert len(answered) == 9
    # Another server under another URL, another key and another number of requests at a time.
    monkeypatch.setenv("MY_KEY", "another-secret-key")
    with serving(helpful) as stub:
        resumed = run(endpoint(world, tmp_path / "out", stub.url, resume=True, concurrency=2), show_progress=False)
    same(resumed, whole)
    assert len(stub.bodies) == whole.spent["requests"] - 9
    asked_twice(tmp_path / "out")


def test_failures_and_malformed_answers_are_not_fatal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qscope_trl.analysis.synthesis.endpoint.backoff", lambda *_: 0.0)

    def shaky(body: dict[str, Any], number: int) -> Reply:
        text = asked(body)
        if "different requests" not in text and text.startswith(("w1", "w2", "w3")):
            return Reply(raw="<html>oops")
        return helpful(body, number) if number % 3 else Reply(status=500 if number % 2 else 429)

    with serving(shaky) as stub:
        config = endpoint(world, tmp_path / "out", stub.url, max_retries=1, attempts=8, concurrency=1)
        result = run(config, show_progress=False)
    assert result.is_finished
    assert sum(one.outcomes.get("malformed", 0) for one in result.filled) > 0
    assert result.rows
    assert result.spent["failed"] > 0
    assert "malformed" in format_result(result)
    failures = {one["failure"] for one in records(tmp_path / "out") if one["record"] == "answer"}
    assert {"", "malformed"} <= failures


def test_a_server_that_never_says_anything_is_given_up(world: World, tmp_path: Path) -> None:
    def mute(body: dict[str, Any], number: int) -> Reply:
        return helpful(body, number) if "different requests" in asked(body) else Reply("<think>on and on")

    with serving(mute) as stub, pytest.raises(EndpointError, match=r"The last 2\d answers held no text"):
        run(endpoint(world, tmp_path / "out", stub.url, attempts=16), show_progress=False)
    assert len(stub.bodies) < 40


def test_a_key_in_another_setting_is_refused(world: World, tmp_path: Path) -> None:
    body = json.dumps({"token": KEY})
    with pytest.raises(ConfigError, match="The key in `MY_KEY` is also in another setting"):
        run(endpoint(world, tmp_path / "out", "http://localhost:1/v1", extra_body=body), show_progress=False)
    assert not (tmp_path / "out").exists()


def test_responses_are_read_in_the_chat_template(world: World, tmp_path: Path) -> None:
    with serving(helpful) as stub:
        result = run(endpoint(world, tmp_path / "out", stub.url, encode_as="chat"), show_progress=False)
    assert result.rows
    for row in result.rows:
        # The test's template: the message, w2, and then the response.
        text = f"{row['prompt']} w2 {row['response']}"
        found = world.largest([text], len(row["prompt"].split()) + 1)[0] > MIN_ACTIVATION
        assert row["fires"] == [str(one) for one, does in zip(world.targets, found, strict=True) if does]


def test_only_a_model_with_a_chat_template_reads_chats(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    world.model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    flags: dict[str, Any] = {"model": str(folder), "mode": "instruct"}
    with pytest.raises(ConfigError, match=r"The tokenizer of '.*plain' has no chat template"):
        run(world.config(tmp_path / "out", **flags), show_progress=False)
    endpoint_flags = {**flags, "encode_as": "chat"}
    with pytest.raises(ConfigError, match=r"The tokenizer of '.*plain' has no chat template"):
        run(endpoint(world, tmp_path / "out", "http://localhost:1/v1", **endpoint_flags), show_progress=False)
    assert not (tmp_path / "out").exists()
