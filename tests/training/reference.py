"""Gradients computed with autograd alone: no Trainer, no callback, none of the package's training code.

Everything here is written out a second time on purpose, with Python loops where the package uses masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Batch = dict[str, Any]


@dataclass
class ReferencePenalty:
    """SASFT's hinge, or the activation after TopK, on features given as `(layer, index, weight, threshold)`."""

    saes: dict[int, dict[str, torch.Tensor]]
    features: Sequence[tuple[int, int, float, float]]
    kind: str = "preact_hinge"
    k: int = 8

    def per_token(self, residuals: dict[int, torch.Tensor]) -> torch.Tensor:
        total: torch.Tensor | float = 0.0
        for layer, index, weight, threshold in self.features:
            sae, x = self.saes[layer], residuals[layer].float()
            f = (x * sae["W_enc"][index]).sum(-1) + sae["b_enc"][index]
            if self.kind == "preact_hinge":
                total = total + weight * torch.clamp(f - threshold, min=0)
            else:
                every = x @ sae["W_enc"].T + sae["b_enc"]
                kth = every.sort(dim=-1, descending=True).values[..., self.k - 1]
                total = total + weight * torch.clamp(f, min=0) * (f >= kth - 1e-7)
        assert isinstance(total, torch.Tensor)
        return total


def run(model: Any, batch: Batch, layers: Sequence[int]) -> tuple[Any, dict[int, torch.Tensor]]:
    """Plain forward with plain hooks; returns the model's output and the output of each chosen layer."""
    decoder = model.get_decoder()
    found = decoder.layers if hasattr(decoder, "layers") else decoder.h
    residuals: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            residuals[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [found[layer].register_forward_hook(keep(layer)) for layer in layers]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if batch.get(k) is not None}
    try:
        output = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return output, residuals


def penalised_positions(batch: Batch, trained: torch.Tensor, *, shift: bool = True, skip_first: bool = True) -> list:
    """`(row, position)` of every penalised token, by loops: the position before each trained token."""
    found = []
    rows, length = trained.shape
    for row in range(rows):
        seen_token = False
        for position in range(length):
            if batch.get("attention_mask") is not None and not batch["attention_mask"][row, position]:
                continue
            is_first = not seen_token
            seen_token = True
            if batch.get("position_ids") is not None:
                is_first = int(batch["position_ids"][row, position]) == 0
            target = position + 1 if shift else position
            if target < length and bool(trained[row, target]) and not (skip_first and is_first):
                found.append((row, position))
    return found


def penalty_sum(per_token: torch.Tensor, positions: list) -> torch.Tensor:
    return (
        torch.stack([per_token[row, position] for row, position in positions]).sum()
        if positions
        else 0 * per_token.sum()
    )


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def run_with_router(model: Any, batch: Batch, layers: Sequence[int]) -> tuple[Any, dict[int, torch.Tensor], list]:
    """As `run`, with what every router of a mixture of experts gave: `(tokens of the batch, experts)` each."""
    scores: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        scores.append(output[0] if isinstance(output, tuple) else output)

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        output, residuals = run(model, batch, layers)
    finally:
        for handle in handles:
            handle.remove()
    return output, residuals, scores


def router_loss(routers: Sequence[torch.Tensor], real: Sequence[bool], k: int) -> torch.Tensor:
    """Load balancing of Switch Transformer, equations 4-6, over the real tokens of all layers, by loops.

    The number of experts times the sum over experts of (share of tokens sent there) * (mean probability).
    """
    num_experts = routers[0].shape[-1]
    sent, probabilities = torch.zeros(num_experts), []
    for scores in routers:
        for token, is_real in enumerate(real):
            if is_real:
                probability = scores[token].float().softmax(-1)
                probabilities.append(probability)
                for expert in probability.sort(descending=True).indices[:k].tolist():
                    sent[expert] += 1
    return num_experts * (sent / len(probabilities) * torch.stack(probabilities).mean(0)).sum()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad.detach().clone()
        for (name, p), grad in zip(named.items(), grads, strict=True)
    }
