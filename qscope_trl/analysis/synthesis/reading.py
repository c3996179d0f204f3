"""What chosen features do in texts: the largest activation in a part of each, and where.

Verification reads responses with it, and the search for top examples whole texts. A text is prompt and response, and
only tokens of the response count, so a prompt that fires a feature by itself proves nothing.

Shape legend: `T` texts, `S` chosen features, `N` tokens of a batch, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import ResidualBatch, residual_batches
from qscope_trl.features import FeatureId
from qscope_trl.sae.topk_sae import TopKSAE


class Readable(NamedTuple):
    """A text as the model reads it, and the tokens that count."""

    token_ids: list[int]
    """Ids of the whole text, at most `max_length`."""

    start: int
    """First token that counts."""

    stop: int
    """End of the tokens that count, not included; at or below `start` if none is left."""


class Readings(NamedTuple):
    """Activations of chosen features in texts."""

    largest: Tensor
    """Largest activation over the tokens that count, fp64; 0 if silent. Shape `(T, S)`."""

    place: Tensor
    """Token with it, the first of equal ones, int64; -1 if silent. Shape `(T, S)`."""


def readable(tokenizer: Any, prefix: str, text: str, *, max_length: int, special_tokens: bool = True) -> Readable:
    """Tokenise a prefix and what follows it, as one text.

    A token counts if it covers at least one character after the prefix. A tokenizer that cannot say which characters a
    token covers (a slow one) is given both parts one after the other.

    Args:
        tokenizer: A transformers tokenizer.
        prefix: What does not count; may be empty.
        text: What follows it.
        max_length: Tokens kept, the first ones.
        special_tokens: Whether the tokenizer adds its own, such as BOS.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            prefix + text, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False
        )
        after = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prefix)]
        start, stop = (after[0], after[-1] + 1) if after else (len(encoded["input_ids"]),) * 2
        ids = encoded["input_ids"]
    else:
        before = tokenizer(prefix, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        ids = before + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start, stop = len(before), len(ids)
    return Readable(ids[:max_length], start, min(stop, max_length))


class FeatureReader:
    """Reads chosen features; position 0 never counts.

    Args:
        saes: One SAE a layer, on their layers' devices.
        features: The features, each of a layer in `saes`.
    """

    def __init__(self, saes: Mapping[int, TopKSAE], features: Sequence[FeatureId]) -> None:
        self.features = tuple(features)
        self._saes = {layer: saes[layer] for layer in sorted({feature.layer for feature in features})}
        self._slots: dict[int, Tensor] = {}
        for layer, sae in self._saes.items():
            slots = torch.full((sae.d_sae,), -1, dtype=torch.long)
            for place, feature in enumerate(self.features):
                if feature.layer == layer:
                    slots[feature.index] = place
            self._slots[layer] = slots.to(sae.W_enc.device)

    def read(
        self, model: nn.Module, texts: Sequence[Readable], *, batch_size: int = 8, show_progress: bool = False
    ) -> Readings:
        """Run texts through the model and read the features at the tokens that count.

        Args:
            model: The model, on its device.
            texts: The texts; one without a token that counts reads as silent.
            batch_size: Texts in one forward.
            show_progress: Whether to show a progress bar on stderr.

        Raises:
            DataError: If a residual is not finite.
        """
        num = len(self.features)
        readings = Readings(
            torch.zeros(len(texts), num, dtype=torch.float64), torch.full((len(texts), num), -1, dtype=torch.long)
        )
        places = [i for i, text in enumerate(texts) if text.stop > max(text.start, 1)]
        if not places or not num:
            return readings
        batches = residual_batches(
            model,
            [texts[i].token_ids[: texts[i].stop] for i in places],
            tuple(self._saes),
            batch_size=batch_size,
            show_progress=show_progress,
            description="verifying",
        )
        starts = torch.tensor([texts[i].start for i in places])
        for batch in batches:
            rows, largest, place = self.batch(batch, starts)
            at = torch.tensor(places)[rows]
            readings.largest[at], readings.place[at] = largest, place
        return readings

    def batch(self, batch: ResidualBatch, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Read one batch of residuals, of all positions but the first.

        Args:
            batch: Residuals, as `residual_batches` yields them.
            starts: First token that counts of every text, int64; by default all count.

        Returns:
            The batch's texts (places in the list of texts), and for each and each feature the largest activation and
            its token, as in `Readings`, on the CPU.
        """
        texts, text_N = torch.unique(batch.text_index, return_inverse=True)
        # The rows of a text lie together and are its tokens from 1 on.
        first = torch.full_like(texts, text_N.numel()).scatter_reduce(0, text_N, torch.arange(text_N.numel()), "amin")
        place_N = torch.arange(text_N.numel()) - first[text_N] + 1
        counts_N = torch.ones_like(place_N, dtype=torch.bool)
        if starts is not None:
            counts_N = place_N >= starts[batch.text_index]
        num = len(self.features)
        largest = torch.zeros(texts.numel() * num, dtype=torch.float64)
        place = torch.full_like(largest, -1, dtype=torch.long)
        kept = counts_N.nonzero().flatten()
        for layer, sae in self._saes.items():
            x_ND = batch.residuals[layer]
            x_ND = x_ND[kept.to(x_ND.device)].to(sae.W_enc.device)
            for part in active_features(sae, x_ND):
                slot = self._slots[layer][part.feature]
                wanted = slot >= 0
                rows = kept[part.token[wanted].cpu()]
                cell = text_N[rows] * num + slot[wanted].cpu()
                value = part.value[wanted].cpu()
                before = largest.clone()
                largest = largest.scatter_reduce(0, cell, value, "amax")
                # Chunks come in the order of tokens, so an equal value in a later one does not move the place.
                at_peak = (value == largest[cell]) & (value > before[cell])
                token = place_N[rows[at_peak]]
                cells = cell[at_peak]
                place[cells] = torch.iinfo(torch.long).max
                place = place.scatter_reduce(0, cells, token, "amin")
        return texts, largest.view(-1, num), place.view(-1, num)
