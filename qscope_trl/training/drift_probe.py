"""Running fixed tokens through a trainer's model between its steps: residuals of some layers, and logits as they come.

Where the weights are spread over processes (FSDP, ZeRO-3, tensor parallelism) every process runs the probe, since each
holds a part of every layer; else the main process alone does. Left out: what is made of it; that is `drift`.

Shape legend: `B` texts of a batch, `T` positions, `N` tokens after position 0, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.activations.encode import tokenize
from qscope_trl.hooks.layers import find_decoder
from qscope_trl.hooks.residual import ResidualHook

SeeLogits = Callable[[slice, Tensor], None]
"""Called with the rows of the probe that a batch holds, and their logits `(n, V)`."""


def choose_tokens(tokenizer: Any, texts: Sequence[str], max_length: int, max_tokens: int) -> list[list[int]]:
    """Token ids of the first texts that have `max_tokens` tokens after position 0 together; the last may be cut."""
    rows, left = [], max_tokens
    # Each text that counts has a token at least.
    for ids in tokenize(tokenizer, [text for text in texts if text.strip()][:max_tokens], max_length=max_length):
        kept = ids[: left + 1]
        if left and len(kept) > 1:
            rows.append(kept)
            left -= len(kept) - 1
    return rows


def is_spread(trainer: Any) -> bool:
    """Whether no process holds the whole model."""
    if getattr(trainer, "is_fsdp_enabled", False) or _is_zero3(trainer):
        return True
    return any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())


def has_logits(trainer: Any) -> bool:
    """Whether logits can be read.

    Under ZeRO-3 the head is left alone: TRL trains through its weight, which DeepSpeed frees after any forward of it.
    """
    return not _is_zero3(trainer) and trainer.model.get_output_embeddings() is not None


@torch.no_grad()
def run_probe(
    trainer: Any,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int,
    keeps: bool,
    see_logits: SeeLogits | None,
) -> dict[int, Tensor]:
    """Run texts through the trainer's model, in evaluation mode and as they train: precision, wrappers, adapters.

    Gradients, random states and the mode of every module are as before afterwards, also after an exception.

    Args:
        trainer: The trainer; every process of one whose model `is_spread` must call this.
        token_ids: Token ids per text.
        layers: Layers to read, from 0.
        batch_size: Texts in one forward.
        keeps: Whether this process wants what is read.
        see_logits: What logits are handed to; None if they are not read.

    Returns:
        By layer the residuals of all tokens after position 0, text by text, on the host, in the model's dtype; empty
        without `keeps`. Shape `(N, D)`.
    """
    model = trainer.model
    run = find_decoder(model) if _is_zero3(trainer) else model
    device = _input_device(trainer)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    start = 0
    with evaluating(model), torch.compiler.set_stance("force_eager"), ResidualHook(model, layers) as hook:
        for first in range(0, len(token_ids), batch_size):
            ids_BT, attended_BT = _padded(token_ids[first : first + batch_size])
            with hook.listen() as captures:
                output = run(
                    input_ids=ids_BT.to(device),
                    attention_mask=attended_BT.to(device=device, dtype=torch.long),
                    use_cache=False,
                )
            if not keeps:
                continue
            kept_BT = attended_BT.clone()
            kept_BT[:, 0] = False
            for layer, x_BTD in captures[-1].residuals.items():
                parts[layer].append(x_BTD[kept_BT.to(x_BTD.device)].cpu())
            rows = slice(start, start + int(kept_BT.sum()))
            start = rows.stop
            if see_logits is not None:
                see_logits(rows, output.logits[kept_BT.to(output.logits.device)])
    return {layer: torch.cat(part) for layer, part in parts.items()} if keeps else {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in, and not all in that of the whole."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _padded(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and which of them are text; padding is on the right, where nothing that is read sees it."""
    width = max(len(row) for row in token_ids)
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in token_ids])
    lengths = torch.tensor([len(row) for row in token_ids])
    return ids_BT, torch.arange(width) < lengths[:, None]


def _input_device(trainer: Any) -> torch.device:
    # With `device_map` the embeddings may be elsewhere; spread or offloaded weights may rest on the host.
    places = getattr(trainer.model, "hf_device_map", None)
    if places and len(set(places.values())) > 1:
        first: torch.device = next(p.device for p in trainer.model.get_input_embeddings().parameters())
        return first
    device: torch.device = trainer.accelerator.device
    return device


def _is_zero3(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
