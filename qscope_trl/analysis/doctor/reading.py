"""Token ids in, the residual stream out at every place an SAE could have been trained on.

Places are numbered as the layers whose output they are: -1 is what enters layer 0 (the embeddings), and the number of
layers stands for what leaves the final norm. In transformers' `hidden_states` place p is entry p + 1, except that the
last entry is the place after the norm. `activations.encode` reads layers alone and refuses residuals that are not
finite; here they are handed on, because they are a finding.

Shape legend: `N` kept tokens of a batch, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qscope_trl.hooks.layers import find_decoder, find_layers
from qscope_trl.hooks.residual import ResidualHook

EMBEDDINGS = -1
"""Place before layer 0."""


class States(NamedTuple):
    """The residual stream at the kept tokens of a few texts, text by text and in order."""

    at: dict[int, Tensor]
    """By place, in the model's dtype, on the device of the layer. Shape `(N, D)`."""

    text_index: Tensor
    """Which text a token belongs to: its place in the list of texts, int64. Shape `(N,)`."""

    position: Tensor
    """Its position in the text, from 0, int64. Shape `(N,)`."""


def place_name(place: int, num_layers: int) -> str:
    """How messages call a place."""
    if place == EMBEDDINGS:
        return "the embeddings"
    return "the final norm" if place == num_layers else f"layer {place}"


def longest_first(token_ids: Sequence[Sequence[int]]) -> list[int]:
    """The order in which texts are run: little padding, and memory runs out at once or never."""
    return sorted(range(len(token_ids)), key=lambda i: (-len(token_ids[i]), i))


@torch.no_grad()
def read(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    places: Sequence[int],
    *,
    keep: Sequence[Sequence[int]] | None = None,
    order: Sequence[int] | None = None,
    batch_size: int = 8,
    show_progress: bool = True,
    description: str = "reading",
) -> Iterator[States]:
    """Run the decoder over texts and hand on the residual stream at some places, batch by batch.

    Args:
        model: A transformers model, wrapped or not, on its device; put in evaluation mode meanwhile.
        token_ids: Token ids per text.
        places: Places to read, -1 to the number of layers.
        keep: Positions to hand on of each text, ascending; by default all. Texts without any are not run.
        order: Order of the texts; by default the longest first. Two readings in the same order that keep as many
            tokens of each text hand on rows that belong together, batch by batch.
        batch_size: Texts in one forward.
        show_progress: Whether to show a progress bar on stderr.
        description: Label of that bar.

    Yields:
        One `States` per forward.

    Raises:
        ModelStructureError: If a place does not exist in the model.
    """
    decoder, layers = find_decoder(model), find_layers(model)
    keep = [range(len(row)) for row in token_ids] if keep is None else keep
    todo = [i for i in (longest_first(token_ids) if order is None else order) if len(keep[i])]
    inner = [place for place in places if place not in (EMBEDDINGS, len(layers))]
    weights = (p.device for module in (decoder, *layers) for p in module.parameters())
    device = next((d for d in weights if d.type != "meta"), torch.device("cpu"))
    entering: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    was_training = model.training
    model.eval()
    bar = tqdm(total=len(todo), desc=description, unit="text", disable=not show_progress, leave=False)
    try:
        with bar, ExitStack() as stack:
            hook = stack.enter_context(ResidualHook(model, inner))
            if EMBEDDINGS in places:
                stack.enter_context(layers[0].register_forward_pre_hook(enter, with_kwargs=True))
            for start in range(0, len(todo), batch_size):
                chosen = todo[start : start + batch_size]
                ids_BT, attended_BT, kept_BT = _padded(token_ids, keep, chosen)
                with hook.listen() as captures:
                    mask_BT = attended_BT.to(device=device, dtype=torch.long)
                    output = decoder(input_ids=ids_BT.to(device), attention_mask=mask_BT, use_cache=False)
                seen = dict(captures[-1].residuals)
                if entering:
                    seen[EMBEDDINGS] = entering.pop()
                if len(layers) in places:
                    seen[len(layers)] = output[0]
                at = {place: seen[place][kept_BT.to(seen[place].device)] for place in places}
                text, position = kept_BT.nonzero(as_tuple=True)
                yield States(at, torch.tensor(chosen)[text], position)
                bar.update(len(chosen))
    finally:
        model.train(was_training)


def _padded(
    token_ids: Sequence[Sequence[int]], keep: Sequence[Sequence[int]], chosen: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which of them are text, and which are kept: padding is on the right, where nothing that is read sees it."""
    lengths = [len(token_ids[i]) for i in chosen]
    width = max(lengths)
    ids_BT = torch.tensor([[*token_ids[i], *[0] * (width - n)] for i, n in zip(chosen, lengths, strict=True)])
    kept_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, i in enumerate(chosen):
        kept_BT[row, list(keep[i])] = True
    return ids_BT, torch.arange(width) < torch.tensor(lengths)[:, None], kept_BT
