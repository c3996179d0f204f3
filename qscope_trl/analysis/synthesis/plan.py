"""What is asked next: for each target prompts, then responses, until enough are accepted or enough were tried.

A target hands out requests and takes answers and verdicts; it does not know whether these are new or from the journal,
so a resumed run goes the same way as one that was never stopped. A target never has more candidates under way than it
could still accept, so nothing is asked for in vain, and which candidates are tried does not depend on the order in
which answers come.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qscope_trl.analysis.synthesis.generators import Kind, Request, seed_of
from qscope_trl.analysis.synthesis.journal import Answer, Verdict
from qscope_trl.analysis.synthesis.prompts import Template, normalised, parse_prompts
from qscope_trl.config.synthesize import SynthesizeConfig

PLAIN = "plain"
"""Name of what is generated without a target."""

# Tokens that a chat template adds around a message, generously.
_CHAT_TOKENS = 32


class Candidate(NamedTuple):
    """A response that is to be verified."""

    key: str
    """Key of its request."""

    target: str
    """Name of its target."""

    prompt: str
    """What it responds to, or goes on from."""

    response: str
    """The response."""


@dataclass(frozen=True)
class Recipe:
    """How requests are made.

    Args:
        config: The settings.
        template: What is asked in the mode `instruct`.
        num_tokens: Counts the tokens of a text, for the budget.
    """

    config: SynthesizeConfig
    template: Template
    num_tokens: Callable[[str], int]

    @property
    def is_instruct(self) -> bool:
        """Whether the generator is asked by chat messages."""
        return self.config.writing_mode == "instruct"

    def request(self, key: str, part: str, **values: object) -> Request:
        """The request for one part of the template; in the mode `continue`, `prompt` is gone on from."""
        config = self.config
        is_response = part == "response"
        max_new_tokens = config.max_new_tokens if is_response else config.max_prompt_tokens
        kind: Kind = "response" if is_response else "rewrite" if part == "rewrite" else "prompts"
        seed = seed_of(config.seed, key)
        if not self.is_instruct:
            text = str(values["prompt"])
            may_use = max(1, self.num_tokens(text)) + max_new_tokens
            return Request(key, "response", None, text, max_new_tokens, seed, may_use)
        messages = self.template.messages(part, **values)
        size = sum(self.num_tokens(message["content"]) + _CHAT_TOKENS for message in messages)
        return Request(key, kind, messages, None, max_new_tokens, seed, size + max_new_tokens)


@dataclass
class Target:
    """One feature to generate for, or the plain generations.

    Args:
        name: Its name, which begins the keys of its requests.
        recipe: How requests are made.
        accept: Texts to accept.
        attempts: Candidates to try.
        description: What is asked for.
        examples: The block of examples.
        prompts: Prompts or beginnings that are given, used in turn; if none, prompts are asked for.
        copies: Normalised texts that a candidate must not be a part of, such as the examples.
    """

    name: str
    recipe: Recipe
    accept: int
    attempts: int
    description: str = ""
    examples: str = ""
    prompts: Sequence[str] = ()
    copies: Sequence[str] = ()
    asked: list[str] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)
    accepted: dict[int, Candidate] = field(default_factory=dict)
    _texts: set[str] = field(default_factory=set)
    _stages: dict[int, str] = field(default_factory=dict)
    _rewritten: dict[int, str] = field(default_factory=dict)
    _batches: int = 0
    _waits_for_prompts: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be asked and nothing is under way."""
        return not self._stages and not self._waits_for_prompts and not self._wants_candidate()

    def count(self, outcome: str) -> int:
        """Candidates with an outcome."""
        return sum(1 for found in self.outcomes.values() if found == outcome)

    def next_request(self) -> Request | None:
        """A request that can be made now; `None` if there is none, or answers have to come first."""
        for index, stage in self._stages.items():
            if stage == "ready":
                return self._respond(index)
        if not self._wants_candidate():
            return None
        index = len(self._stages) + len(self.outcomes)
        if self.prompts or index < len(self.asked):
            return self._rewrite(index) if self.recipe.config.rewrite else self._respond(index)
        if self._waits_for_prompts or self._batches >= self._max_batches:
            return None
        self._waits_for_prompts = True
        self._batches += 1
        count = self.recipe.config.prompts_per_request
        key = f"{self.name}/prompts {self._batches - 1}"
        if self.name == PLAIN:
            return self.recipe.request(key, "plain", count=count)
        return self.recipe.request(key, "prompts", description=self.description, examples=self.examples, count=count)

    def take_answer(self, request: Request, answer: Answer) -> Candidate | None:
        """Take the answer to one of this target's requests; a candidate if it is a response to verify."""
        if request.kind == "prompts":
            self._waits_for_prompts = False
            new = parse_prompts(answer.text, self.recipe.config.prompts_per_request)
            self.asked.extend(prompt for prompt in new if prompt not in self.asked)
            return None
        index = int(request.key.rsplit(" ", 1)[1])
        if answer.failure:
            self._end(index, answer.failure)
            return None
        if request.kind == "rewrite":
            self._rewritten[index] = answer.text.strip()
            self._stages[index] = "ready"
            return None
        prompt = self._prompt(index)
        if self.name != PLAIN and self._is_copy(prompt, answer.text):
            self._end(index, "copy")
            return None
        return Candidate(request.key, self.name, prompt, answer.text)

    def take_verdict(self, candidate: Candidate, verdict: Verdict, min_activation: float) -> None:
        """Take what encoding a candidate showed."""
        index = int(candidate.key.rsplit(" ", 1)[1])
        if verdict.tokens == 0:
            self._end(index, "too long")
        elif self.name == PLAIN:
            self._end(index, "read")
        elif not verdict.activation > min_activation:
            self._end(index, "silent")
        elif (text := normalised(candidate.prompt + candidate.response)) in self._texts:
            self._end(index, "duplicate")
        else:
            self._texts.add(text)
            self.accepted[index] = candidate
            self._end(index, "accepted")

    @property
    def _max_batches(self) -> int:
        # Answers may hold fewer prompts than asked for, or the same again; twice as many are asked for, and no more.
        return 2 * math.ceil(self.attempts / self.recipe.config.prompts_per_request)

    def _wants_candidate(self) -> bool:
        started = len(self._stages) + len(self.outcomes)
        if len(self.accepted) + len(self._stages) >= self.accept or started >= self.attempts:
            return False
        return bool(self.prompts) or started < len(self.asked) or self._batches < self._max_batches

    def _prompt(self, index: int) -> str:
        if index in self._rewritten:
            return self._rewritten[index]
        return self.prompts[index % len(self.prompts)] if self.prompts else self.asked[index]

    def _rewrite(self, index: int) -> Request:
        self._stages[index] = "waits"
        return self.recipe.request(
            f"{self.name}/rewrite {index}", "rewrite", prompt=self._prompt(index), description=self.description
        )

    def _respond(self, index: int) -> Request:
        self._stages[index] = "waits"
        return self.recipe.request(
            f"{self.name}/response {index}",
            "response",
            prompt=self._prompt(index),
            description=self.description,
            examples=self.examples,
        )

    def _is_copy(self, prompt: str, response: str) -> bool:
        text = normalised(response if self.recipe.is_instruct else prompt + response)
        return any(text in copy for copy in self.copies)

    def _end(self, index: int, outcome: str) -> None:
        self._stages.pop(index, None)
        self.outcomes[index] = outcome


class Scheduler:
    """Hands out the requests of all targets, in turn.

    Args:
        targets: By name; those named first are asked for first, then in turn.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = dict(targets)
        self._turn = deque(self.targets)

    def next_request(self) -> Request | None:
        """The next request that can be made now, of the target whose turn it is."""
        for _ in range(len(self._turn)):
            target = self.targets[self._turn.popleft()]
            request = target.next_request()
            if not target.is_done:
                self._turn.append(target.name)
            if request is not None:
                return request
        return None

    def of(self, key: str) -> Target:
        """The target of a key."""
        return self.targets[key.split("/", 1)[0]]
