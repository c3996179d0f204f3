"""What writes texts: the interface, and a local transformers model. An endpoint is in `endpoint.py`.

Left out: engines such as vLLM in this process; start their server and use the endpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qscope_trl.analysis.synthesis.journal import Answer, Journal
from qscope_trl.analysis.synthesis.limits import Budget
from qscope_trl.analysis.synthesis.prompts import visible
from qscope_trl.errors import ConfigError

Kind = Literal["prompts", "rewrite", "response"]


class Request(NamedTuple):
    """Something to ask a generator for. Either `messages` or `beginning` is given."""

    key: str
    """Names it in the journal; the same request has the same key in every run."""

    kind: Kind
    """What is asked for."""

    messages: tuple[dict[str, str], ...] | None
    """Chat messages."""

    beginning: str | None
    """Text to go on from."""

    max_new_tokens: int
    """Tokens of the answer at most."""

    seed: int
    """Seed of the sample, from 0 to below 2^31."""

    may_use: int
    """Tokens of request and answer at most, by estimate; taken from the budget."""


class Outcome(NamedTuple):
    """How a request ended."""

    request: Request
    """The request."""

    answer: Answer | None
    """The answer, which is in the journal already; `None` if the request was given up for want of budget."""


class Generator(Protocol):
    """Takes requests, gives outcomes in any order. Records what it asks and what comes back before handing it on."""

    name: str
    """What it is called in the output."""

    slots: int
    """Requests to have under way at a time."""

    def submit(self, request: Request) -> None:
        """Take a request on, for which the budget was taken."""

    def collect(self) -> list[Outcome]:
        """Wait for at least one outcome of the requests under way; raises what ends the run."""

    def close(self) -> None:
        """Wait for what is sent, so that its answer is recorded; send no more."""


def seed_of(seed: int, key: str) -> int:
    """The seed of one request: a hash of the run's seed and the request's key."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:4], "big") >> 1


class LocalGenerator:
    """A transformers model in this process, asked in batches.

    Each request draws from its own random numbers, so its sample does not depend on what else is in the batch, beyond
    rounding.

    Args:
        model: A causal language model on its device.
        tokenizer: Its tokenizer.
        name: What it is called in the output.
        journal: Where requests and answers are recorded.
        budget: What requests are taken from.
        batch_size: Requests in one batch.
        temperature: 0 takes the likeliest token.
        top_p: Probability mass to sample from.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        journal: Journal,
        budget: Budget,
        batch_size: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        self.name = name
        self.slots = batch_size
        self._model, self._tokenizer = model, tokenizer
        self._journal, self._budget = journal, budget
        self._temperature, self._top_p = temperature, top_p
        self._pending: list[Request] = []
        config = model.config.get_text_config()
        self._context: int | None = getattr(config, "max_position_embeddings", None)

    def submit(self, request: Request) -> None:
        """See `Generator.submit`."""
        self._pending.append(request)

    def close(self) -> None:
        """See `Generator.close`; nothing is under way between calls."""

    def collect(self) -> list[Outcome]:
        """See `Generator.collect`: the whole batch at once."""
        requests, self._pending = self._pending, []
        self._journal.ask([(request.key, request.may_use) for request in requests])
        ids = [self._ids(request) for request in requests]
        fits = [
            i for i, request in enumerate(requests) if len(ids[i]) + request.max_new_tokens <= (self._context or 2**62)
        ]
        answers = [Answer("", failure="too long") for _ in requests]
        if fits:
            for i, new in zip(fits, self._generate([requests[i] for i in fits], [ids[i] for i in fits]), strict=True):
                text = visible(self._text(requests[i], ids[i], new))
                answers[i] = Answer(text, "" if text.strip() else "empty", len(ids[i]), len(new))
        self._journal.answer({request.key: answer for request, answer in zip(requests, answers, strict=True)})
        for request, answer in zip(requests, answers, strict=True):
            self._budget.settle(request.may_use, answer.prompt_tokens + answer.completion_tokens)
        return [Outcome(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _ids(self, request: Request) -> list[int]:
        if request.messages is not None:
            text = self._tokenizer.apply_chat_template(
                list(request.messages), tokenize=False, add_generation_prompt=True
            )
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = self._tokenizer(request.beginning, add_special_tokens=True, verbose=False)["input_ids"]
            # Some tokenizers close every text; what is to go on is open.
            if ids and ids[-1] == self._tokenizer.eos_token_id and len(ids) > 1:
                ids = ids[:-1]
        if ids:
            return list(ids)
        start = self._tokenizer.bos_token_id
        return [self._tokenizer.eos_token_id if start is None else start]

    def _text(self, request: Request, ids: list[int], new: list[int]) -> str:
        if request.messages is None:
            # Some tokenizers drop the space before the first token that they decode.
            before = self._tokenizer.decode(ids, skip_special_tokens=True)
            whole = self._tokenizer.decode([*ids, *new], skip_special_tokens=True)
            if whole.startswith(before):
                return str(whole[len(before) :])
        return str(self._tokenizer.decode(new, skip_special_tokens=True))

    @torch.no_grad()
    def _generate(self, requests: Sequence[Request], ids: Sequence[list[int]]) -> list[list[int]]:
        """New token ids of each request, up to the end of the text or its limit."""
        from transformers import GenerationConfig, LogitsProcessorList

        model: Any = self._model
        ends = model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        stops = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = next((n for n in (self._tokenizer.pad_token_id, *stops) if n is not None), 0)
        width = max(len(row) for row in ids)
        device = model.get_input_embeddings().weight.device
        settings = GenerationConfig(
            max_new_tokens=max(request.max_new_tokens for request in requests),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=stops or None,
        )
        processors: list[Any] = []
        if self._temperature > 0:
            processors.append(_sampler(requests, self._temperature, self._top_p))
        was_training = model.training
        model.eval()
        try:
            output = model.generate(
                input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device),
                attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device),
                generation_config=settings,
                logits_processor=LogitsProcessorList(processors),
            )
        finally:
            model.train(was_training)
        rows = output[:, width:].tolist()
        return [_until(row[: request.max_new_tokens], stops) for row, request in zip(rows, requests, strict=True)]


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in stops), row)


def _sampler(requests: Sequence[Request], temperature: float, top_p: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that makes greedy decoding sample: the largest of `logits / T` plus Gumbel noise.

    The argmax of logits with independent Gumbel noise is distributed as their softmax, and the noise can come from one
    generator per row, which `do_sample` cannot have.
    """
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def process(_: Tensor, logits_BV: Tensor) -> Tensor:
        scores = logits_BV.float() / temperature
        if top_p < 1:
            ordered = scores.sort(dim=-1, descending=True)
            probability = ordered.values.softmax(-1)
            out = probability.cumsum(-1) - probability >= top_p
            scores = scores.masked_fill(out.scatter(-1, ordered.indices, out), -torch.inf)
        width = scores.shape[-1]
        noise = torch.stack([torch.empty(width).exponential_(generator=generator) for generator in generators])
        return scores - noise.log().to(scores.device)

    return process


def require_chat_template(tokenizer: Any, name: str) -> None:
    """Raise `ConfigError` if a model cannot be given chat messages."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"The tokenizer of '{name}' has no chat template, so the model cannot be instructed. Use an instruct "
            f"model, or `--mode continue` with beginnings."
        )
