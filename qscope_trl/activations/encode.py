"""A model and texts in, residuals out: batch by batch, without padding and without the first position.

Residuals are handed on as they come and never kept, so memory is that of one batch, whatever the amount of text.
Left out: storing activations on disk, several processes, and texts with images.

Shape legend: `N` kept tokens of a batch, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qscope_trl.errors import ConfigError, DataError
from qscope_trl.hooks.layers import find_decoder, find_layers
from qscope_trl.hooks.residual import ResidualHook

Positions = Literal["all", "last"]

# Texts tokenised in one call: enough to use the tokenizer's threads, few enough to stay small.
_TOKENIZE_AT_ONCE = 1000


class ResidualBatch(NamedTuple):
    """Residuals of the kept tokens of a few texts; all kept tokens of a text are in one batch."""

    residuals: dict[int, Tensor]
    """Output of each layer at the kept tokens, in the model's dtype. Shape `(N, D)`."""

    text_index: Tensor
    """Which text a token belongs to: its place in the list of texts, int64. Shape `(N,)`."""


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, max_length: int = 512, positions: Positions = "all"
) -> list[list[int]]:
    """Token ids of each text, with the special tokens the tokenizer adds by itself.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts.
        max_length: Tokens kept of each text, at least 2. With `positions="last"` these are the last ones (and the
            BOS token, if the tokenizer adds one), else the first.
        positions: Which tokens will be looked at; see `residual_batches`.

    Returns:
        One list of ids per text, in order; empty texts give empty lists.
    """
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TOKENIZE_AT_ONCE):
        block = list(texts[start : start + _TOKENIZE_AT_ONCE])
        ids.extend(tokenizer(block, add_special_tokens=True, verbose=False)["input_ids"])
    if positions == "all":
        return [row[:max_length] for row in ids]
    bos = getattr(tokenizer, "bos_token_id", None)
    return [_keep_end(row, max_length, bos) for row in ids]


def _keep_end(row: list[int], max_length: int, bos: int | None) -> list[int]:
    if len(row) <= max_length:
        return row
    if bos is not None and row[0] == bos:
        return [bos, *row[-(max_length - 1) :]]
    return row[-max_length:]


def num_kept(length: int, *, positions: Positions = "all", skip_first: bool = True) -> int:
    """How many tokens of a text of `length` tokens `residual_batches` hands on."""
    rest = max(0, length - 1) if skip_first else length
    return min(rest, 1) if positions == "last" else rest


@torch.no_grad()
def residual_batches(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    positions: Positions = "all",
    skip_first: bool = True,
    show_progress: bool = True,
    description: str = "encoding",
) -> Iterator[ResidualBatch]:
    """Run the decoder over texts and hand on the residuals of chosen layers.

    Texts are sorted by length (longest first, so that memory runs out at once or never), padded on the right, and run
    without the language-model head. The model is put in evaluation mode meanwhile. Results do not depend on
    `batch_size` or on the order of the texts beyond rounding.

    Args:
        model: A transformers model, wrapped or not, on its device.
        token_ids: Token ids per text, as `tokenize` gives them.
        layers: Layers to read, from 0.
        batch_size: Texts in one forward.
        positions: `all` kept tokens, or the `last` of each text.
        skip_first: Leave out position 0 of each text, an attention sink outside the SAEs' training data.
        show_progress: Whether to show a progress bar on stderr.
        description: Label of that bar.

    Yields:
        One `ResidualBatch` per forward.

    Raises:
        ConfigError: If `batch_size` or `positions` does not fit.
        DataError: If no token is left, or a residual is not finite.
        ModelStructureError: If a layer does not exist.
    """
    if batch_size < 1 or positions not in ("all", "last"):
        raise ConfigError(
            f"`batch_size` is {batch_size} and `positions` is {positions!r}; give 1 or more, and `all` or `last`."
        )
    lengths = [num_kept(len(row), positions=positions, skip_first=skip_first) for row in token_ids]
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-len(token_ids[i]), i))
    if not order:
        raise DataError(
            f"No token is left to encode: none of the {len(token_ids)} texts has a token after position 0, which is "
            f"left out. Give longer texts."
        )
    decoder = find_decoder(model)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(order), desc=description, unit="text", disable=not show_progress, leave=False)
    try:
        with bar, ResidualHook(model, layers) as hook:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                yield _one_batch(model, decoder, hook, token_ids, chosen, positions, skip_first)
                bar.update(len(chosen))
    finally:
        model.train(was_training)


def _one_batch(
    model: nn.Module,
    decoder: nn.Module,
    hook: ResidualHook,
    token_ids: Sequence[Sequence[int]],
    chosen: Sequence[int],
    positions: Positions,
    skip_first: bool,
) -> ResidualBatch:
    device = _input_device(model)
    lengths = [len(token_ids[i]) for i in chosen]
    width = max(lengths)
    # Any id does for padding: it is masked, and lies to the right of every token that is read.
    input_ids = torch.tensor([[*token_ids[i], *[0] * (width - n)] for i, n in zip(chosen, lengths, strict=True)])
    column = torch.arange(width)
    length_B1 = torch.tensor(lengths)[:, None]
    attended_BT = column < length_B1
    kept_BT = attended_BT if positions == "all" else column == length_B1 - 1
    if skip_first:
        kept_BT = kept_BT & (column > 0)
    with hook.listen() as captures:
        mask_BT = attended_BT.to(device=device, dtype=torch.long)
        decoder(input_ids=input_ids.to(device), attention_mask=mask_BT, use_cache=False)
    residuals = {}
    for layer, x_BTD in captures[-1].residuals.items():
        x_ND = x_BTD[kept_BT.to(x_BTD.device)]
        if not bool(torch.isfinite(x_ND).all()):
            raise DataError(
                f"The residuals of layer {layer} are not finite, so no mean over them has a meaning. Choose another "
                f"`dtype` (bfloat16 or float32); float16 overflows in many models."
            )
        residuals[layer] = x_ND
    rows = torch.tensor(chosen)[:, None].expand(-1, width)
    return ResidualBatch(residuals, rows[kept_BT])


def _input_device(model: nn.Module) -> torch.device:
    for layer in (find_decoder(model), *find_layers(model)):
        for parameter in layer.parameters():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")
