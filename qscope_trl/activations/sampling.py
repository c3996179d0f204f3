"""Generating from prompts, and the perplexity of what was generated. Left out: steering, a block around these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from qscope_trl.activations.encode import tokenize

_LOGITS_AT_ONCE = 2**25
_SEED_STEP = 0x9E3779B1
"""Between the seeds of batches: large and odd, so that seeds next to each other share no batch's numbers."""


class Generation(NamedTuple):
    """One continuation."""

    prompt_ids: list[int]
    """Tokens of the prompt that the model was given."""

    ids: list[int]
    """Tokens it went on with, up to and with the end-of-text token, if there is one."""

    text: str
    """Their text, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to generate: the settings of `qscope steer`, `qscope audit` and the dashboard."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_length: int = 512
    batch_size: int = 8
    show_progress: bool = False

    @classmethod
    def of(cls, config: Any, *, show_progress: bool) -> Sampling:
        """What a command's settings say; their names are those of the fields."""
        given = {item.name: getattr(config, item.name) for item in fields(cls) if item.name != "show_progress"}
        return cls(show_progress=show_progress, **given)


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], settings: Sampling) -> list[Generation]:
    """One continuation of each prompt, in their order; see `generate_from_ids`.

    Args:
        model: A transformers model on its device.
        tokenizer: Its tokenizer.
        prompts: The prompts; of each, the last `max_length` tokens count.
        settings: How to sample.
    """
    ids = tokenize(tokenizer, prompts, max_length=settings.max_length, positions="last")
    return generate_from_ids(model, tokenizer, ids, settings)


@torch.no_grad()
def generate_from_ids(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: Sampling
) -> list[Generation]:
    """One continuation of each prompt, in their order; the same seed draws the same random numbers.

    Prompts of like length share a batch. Each batch is seeded by itself, so that one that ends early does not change
    the next one's numbers. The random state outside is left as it was.

    Args:
        model: A transformers model on its device.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt; an empty one begins with the tokenizer's first token.
        settings: How to sample.
    """
    ids = [list(row) for row in prompts]
    for place, row in enumerate(ids):
        if not row:
            ids[place] = [_first_token(tokenizer)]
    order = sorted(range(len(ids)), key=lambda n: (-len(ids[n]), n))
    ends = _end_tokens(model, tokenizer)
    found: dict[int, Generation] = {}
    device = model.get_input_embeddings().weight.device
    bar = tqdm(total=len(order), desc="generating", unit="text", disable=not settings.show_progress, leave=False)
    with bar, _evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for start in range(0, len(order), settings.batch_size):
            torch.manual_seed((settings.seed + start // settings.batch_size * _SEED_STEP) % 2**63)
            places = order[start : start + settings.batch_size]
            width = max(len(ids[n]) for n in places)
            # Any id does for padding on the left: it is masked.
            input_ids = torch.tensor([[0] * (width - len(ids[n])) + ids[n] for n in places])
            mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in places])
            sampled = settings.temperature > 0
            chosen = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if sampled else {}
            out = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=settings.max_new_tokens,
                do_sample=sampled,
                pad_token_id=ends[0] if ends else 0,
                **chosen,
            )
            for n, row in zip(places, out[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
                kept = row[: end + 1]
                found[n] = Generation(ids[n], kept, tokenizer.decode(kept, skip_special_tokens=True))
            bar.update(len(places))
    return [found[n] for n in range(len(ids))]


@torch.no_grad()
def perplexity(model: Any, generations: Sequence[Generation], batch_size: int = 8) -> float:
    """Of the generated tokens given what is before them, under the model as it is; prompts do not count.

    `exp` of the mean negative log-likelihood over all tokens of all generations.
    """
    total, count = 0.0, 0
    order = sorted(generations, key=lambda g: -len(g.prompt_ids) - len(g.ids))
    device = model.get_input_embeddings().weight.device
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(g.prompt_ids) + len(g.ids) for g in batch)
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask, wanted = torch.zeros_like(input_ids), torch.zeros(len(batch), width, dtype=torch.bool)
            for row, one in enumerate(batch):
                first, end = len(one.prompt_ids), len(one.prompt_ids) + len(one.ids)
                input_ids[row, :end] = torch.tensor([*one.prompt_ids, *one.ids])
                mask[row, :end], wanted[row, first:end] = 1, True
            logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            chosen = logits[:, :-1][wanted[:, 1:].to(logits.device)]
            target = input_ids[wanted].to(logits.device)
            rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
            for first in range(0, len(target), rows):
                part, tokens = chosen[first : first + rows].float(), target[first : first + rows]
                total += float(nn.functional.cross_entropy(part, tokens, reduction="sum"))
            count += target.numel()
    return math.exp(min(total / count, 700.0))


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [int(found)]


def _first_token(tokenizer: Any) -> int:
    """What an empty prompt begins with."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
