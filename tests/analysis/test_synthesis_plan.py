"""What is asked next, and a local model that answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qscope_trl.analysis.synthesis.generators import LocalGenerator, Request, require_chat_template, seed_of
from qscope_trl.analysis.synthesis.journal import Answer, Journal, Verdict
from qscope_trl.analysis.synthesis.limits import Budget
from qscope_trl.analysis.synthesis.plan import PLAIN, Recipe, Scheduler, Target
from qscope_trl.analysis.synthesis.prompts import Template
from qscope_trl.config.synthesize import SynthesizeConfig
from qscope_trl.errors import ConfigError
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer


def recipe(**changes: Any) -> Recipe:
    settings = {"prompts_per_request": 4, "max_new_tokens": 10, "max_prompt_tokens": 50, **changes}
    config = SynthesizeConfig(model="m", saes="s", features="f", output="o", data="d", **settings)
    return Recipe(config, Template(), lambda text: len(text.split()))


def play(
    target: Target, fires: Callable[[int], bool], rng: random.Random, *, answer: Callable[[Request], Answer]
) -> tuple[list[str], int]:
    """Ask until nothing is left, answers in a random order; the keys asked for, and the most responses at a time."""
    scheduler = Scheduler({target.name: target})
    under_way: list[Request] = []
    keys: list[str] = []
    most = 0
    while True:
        while len(under_way) < 5 and (request := scheduler.next_request()):
            under_way.append(request)
            keys.append(request.key)
        most = max(most, sum(request.kind == "response" for request in under_way) + len(target.accepted))
        if not under_way:
            return keys, most
        request = under_way.pop(rng.randrange(len(under_way)))
        candidate = target.take_answer(request, answer(request))
        if candidate is not None:
            index = int(candidate.key.rsplit(" ", 1)[1])
            target.take_verdict(candidate, Verdict(float(fires(index)), {}, None, 9), 0.0)


def replied(request: Request) -> Answer:
    if request.kind == "prompts":
        return Answer("\n".join(f"{request.key} {i}" for i in range(4)))
    return Answer(f"{request.kind} to {request.key}")


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("given", [(), ("one", "two", "three")])
def test_what_is_tried_does_not_depend_on_the_order_of_answers(given: tuple[str, ...], rewrite: bool) -> None:
    seen = set()
    for seed in range(20):
        target = Target(
            "L1F2",
            recipe(mode="instruct", rewrite=rewrite),
            accept=3,
            attempts=12,
            description="dates",
            prompts=given,
        )
        keys, most = play(target, lambda index: index % 3 == 2, random.Random(seed), answer=replied)
        seen.add((tuple(sorted(keys)), tuple(sorted(target.accepted))))
        # Never more under way than could be accepted.
        assert most <= 3
    ((keys, accepted),) = seen
    assert accepted == (2, 5, 8)
    assert sum("response" in key for key in keys) == 9
    assert sum("rewrite" in key for key in keys) == (9 if rewrite else 0)
    assert sum("prompts" in key for key in keys) == (0 if given else 3)
    assert len(set(keys)) == len(keys)


def test_attempts_bound_what_is_tried() -> None:
    target = Target("L1F2", recipe(mode="instruct"), accept=3, attempts=7, description="dates")
    keys, _ = play(target, lambda index: False, random.Random(0), answer=replied)
    assert sum("response" in key for key in keys) == 7
    assert target.count("silent") == 7
    assert target.is_done


def test_prompts_are_asked_for_twice_as_often_as_needed_and_no_more() -> None:
    target = Target("L1F2", recipe(mode="instruct"), accept=3, attempts=8, description="dates")
    keys, _ = play(target, lambda index: True, random.Random(0), answer=lambda request: Answer("", "malformed"))
    assert keys == [f"L1F2/prompts {i}" for i in range(4)]
    assert target.is_done


def test_outcomes_say_why_a_candidate_is_not_accepted() -> None:
    target = Target(
        "L1F2",
        recipe(mode="instruct"),
        accept=9,
        attempts=5,
        prompts=["one"],
        copies=["so it was on monday"],
    )
    answers = ["", "On  Monday", "new", "NEW", "quiet"]
    for text in answers:
        request = target.next_request()
        assert request is not None
        candidate = target.take_answer(request, Answer(text, "" if text else "empty"))
        if candidate is not None:
            activation = 0.0 if text == "quiet" else 2.0
            target.take_verdict(candidate, Verdict(activation, {}, None, 3), 1.0)
    assert target.outcomes == {0: "empty", 1: "copy", 2: "accepted", 3: "duplicate", 4: "silent"}
    assert target.next_request() is None
    late = Target("L1F3", recipe(mode="instruct"), accept=1, attempts=1, prompts=["one"])
    request = late.next_request()
    assert request is not None
    candidate = late.take_answer(request, Answer("text"))
    assert candidate is not None
    late.take_verdict(candidate, Verdict(5.0, {}, None, 0), 1.0)
    assert late.outcomes == {0: "too long"}


def test_plain_generations_are_read_and_never_accepted() -> None:
    plain = Target(PLAIN, recipe(mode="instruct"), accept=3, attempts=3)
    keys, _ = play(plain, lambda index: True, random.Random(0), answer=replied)
    assert plain.count("read") == 3
    assert not plain.accepted
    assert keys[0] == "plain/prompts 0"


def test_requests_state_what_they_may_use_and_have_seeds_of_their_own() -> None:
    going_on = recipe().request("L1F2/response 0", "response", prompt="three words here")
    assert (going_on.beginning, going_on.messages) == ("three words here", None)
    assert going_on.may_use == 3 + 10
    asked = recipe(mode="instruct").request("L1F2/prompts 0", "prompts", description="x", examples="", count=4)
    assert asked.max_new_tokens == 50
    assert asked.may_use >= 50 + len(str(asked.messages[0]["content"]).split()) if asked.messages else False
    seeds = {seed_of(seed, key) for seed in range(10) for key in ("a", "b")}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_targets_take_turns() -> None:
    targets = {
        name: Target(name, recipe(), accept=2, attempts=2, prompts=["w2"]) for name in ("plain", "L1F2", "L1F3")
    }
    scheduler = Scheduler(targets)
    keys = [request.key for request in iter(scheduler.next_request, None)]
    assert [key.split("/")[0] for key in keys] == ["plain", "L1F2", "L1F3"] * 2
    assert scheduler.of("L1F3/response 1") is targets["L1F3"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def make(model: Any, tmp_path: Path) -> Iterator[Callable[..., LocalGenerator]]:
    journals: list[Journal] = []

    def made(**settings: Any) -> LocalGenerator:
        journals.append(Journal(tmp_path / f"{len(journals)}.jsonl", {}))
        return LocalGenerator(
            model, tiny_tokenizer(), name="tiny", journal=journals[-1], budget=Budget(10_000), **settings
        )

    yield made
    for journal in journals:
        journal.close()


def ask(writer: LocalGenerator, beginnings: list[str], *, tokens: int = 8, seed: int = 0) -> list[Answer]:
    for i, text in enumerate(beginnings):
        writer.submit(Request(f"k{i}", "response", None, text, tokens, seed_of(seed, f"k{i}"), 50))
    answers = [outcome.answer for outcome in writer.collect()]
    assert all(answer is not None for answer in answers)
    return [answer for answer in answers if answer is not None]


def test_temperature_0_takes_the_likeliest_token(model: Any, make: Callable[..., LocalGenerator]) -> None:
    texts = ["w3 w4 w5", "w9", "w7 w8"]
    answers = ask(make(temperature=0.0), texts)
    for text, answer in zip(texts, answers, strict=True):
        ids = list(tiny_tokenizer()(text)["input_ids"])
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 8 and ids[-1] != 1:
                ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        new = [token for token in ids[start:] if token != 1]
        # The space between beginning and continuation is part of the continuation.
        assert answer.text == "".join(f" {tiny_tokenizer().decode([token])}" for token in new if token > 1)
        assert (answer.prompt_tokens, answer.completion_tokens) == (start, len(new))


def test_samples_do_not_depend_on_the_batch(model: Any, make: Callable[..., LocalGenerator]) -> None:
    texts = [f"w{i} w{i + 1}" for i in range(2, 8)]
    model.train()
    together = ask(make(), texts)
    writer = make()
    for i, text in enumerate(texts):
        writer.submit(Request(f"k{i}", "response", None, text, 8, seed_of(0, f"k{i}"), 50))
        (outcome,) = writer.collect()
        assert outcome.answer == together[i]
    assert ask(make(), texts, seed=1) != together
    assert model.training


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.6)])
def test_samples_follow_the_models_distribution(
    model: Any, make: Callable[..., LocalGenerator], temperature: float, top_p: float
) -> None:
    writer = make(temperature=temperature, top_p=top_p)
    count = 4000
    answers = ask(writer, ["w3 w4"] * count, tokens=1)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tiny_tokenizer()("w3 w4")["input_ids"]])).logits[0, -1].double()
    probability = (logits / temperature).softmax(0)
    order = probability.argsort(descending=True)
    kept = order[: int((probability[order].cumsum(0) < top_p).sum()) + 1]
    wanted = torch.zeros(VOCAB, dtype=torch.float64)
    wanted[kept] = probability[kept] / probability[kept].sum()
    drawn = torch.zeros(VOCAB, dtype=torch.float64)
    for answer in answers:
        drawn[int(answer.text.strip()[1:]) if answer.text.strip() else 0] += 1
    # Pad and end of text both leave no text.
    wanted[0], wanted[1] = wanted[0] + wanted[1], 0.0
    assert drawn[wanted == 0].sum() == 0
    expected = count * wanted[wanted > 0]
    chi2 = float(((drawn[wanted > 0] - expected) ** 2 / expected).sum())
    # Mean n - 1 and variance 2 (n - 1): 5 standard deviations.
    n = expected.numel()
    assert chi2 < n - 1 + 5 * (2 * (n - 1)) ** 0.5


def test_what_does_not_fit_the_context_is_not_asked(make: Callable[..., LocalGenerator]) -> None:
    writer = make()
    long, short = ask(writer, ["w3 " * 250, "w3"], tokens=8)
    assert (long.failure, long.text, long.completion_tokens) == ("too long", "", 0)
    assert not short.failure
    assert writer._budget.num_tokens == short.prompt_tokens + short.completion_tokens - 100


def test_only_a_model_with_a_chat_template_is_instructed(make: Callable[..., LocalGenerator]) -> None:
    with pytest.raises(ConfigError, match=r"The tokenizer of 'tiny' has no chat template, .*`--mode continue`"):
        require_chat_template(tiny_tokenizer(), "tiny")
    writer = make()
    writer._tokenizer.chat_template = "w3 {{ messages[0]['content'] }} w5"
    request = Request("k", "response", ({"role": "user", "content": "w4"},), None, 2, 0, 50)
    assert writer._ids(request) == [3, 4, 5]
    assert writer._ids(request._replace(messages=None, beginning="")) == [1]
