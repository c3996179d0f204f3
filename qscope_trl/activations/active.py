"""The active features of tokens, and what they come to in a document.

No tensor of all tokens by all features exists: what is kept is one entry per token and active feature, then one per
document and feature that fires in it.

Shape legend: `N` tokens of a batch, `D` d_model, `F` d_sae, `M` entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.activations.encode import residual_batches
from qscope_trl.ops.reference import token_chunks
from qscope_trl.sae.topk_sae import TopKSAE

AGGREGATIONS = ("max", "mean", "last", "rate")
"""What the activations of a feature over a document's tokens are summed up to."""


class Active(NamedTuple):
    """The active features of some tokens, one entry per token and feature that fires."""

    token: Tensor
    """Row in the batch, int64."""

    feature: Tensor
    """Feature index, int64."""

    value: Tensor
    """Activation, positive, fp64."""


def active_features(sae: TopKSAE, x_ND: Tensor) -> Iterator[Active]:
    """Activations after TopK and ReLU (or the SAE's own function), zeros left out; dense kinds chunk by chunk."""
    if sae.activation == "topk":
        acts, indices = sae.encode(x_ND)
        token, slot = (acts > 0).nonzero(as_tuple=True)
        yield Active(token, indices[token, slot], acts[token, slot].double())
        return
    for rows in token_chunks(x_ND.shape[0], sae.d_sae):
        acts_NF = sae.feature_acts(x_ND[rows])
        token, feature = (acts_NF > 0).nonzero(as_tuple=True)
        yield Active(token + rows.start, feature, acts_NF[token, feature].double())


def token_features(sae: TopKSAE, x_ND: Tensor) -> Active:
    """What `active_features` gives, in one piece: tokens ascending, features ascending within a token."""
    if sae.activation != "topk":
        parts = list(active_features(sae, x_ND))
        return Active(*(torch.cat(column) for column in zip(*parts, strict=True)))
    acts, indices = sae.encode(x_ND)
    indices, order = indices.sort(dim=-1)
    acts = acts.gather(-1, order)
    token, slot = (acts > 0).nonzero(as_tuple=True)
    return Active(token, indices[token, slot], acts[token, slot].double())


class DocumentFeatures(NamedTuple):
    """One layer's features over documents: an entry per document and feature that fires in it, in that order."""

    document: Tensor
    """Which document, int64, ascending. Shape `(M,)`."""

    feature: Tensor
    """Which feature, int64, ascending within a document. Shape `(M,)`."""

    max: Tensor
    """Largest activation over the document's kept tokens, fp32, positive. Shape `(M,)`."""

    mean: Tensor
    """Mean activation over them, silent tokens included, fp32. Shape `(M,)`."""

    last: Tensor
    """Activation at the last of them, fp32; 0 if silent there. Shape `(M,)`."""

    rate: Tensor
    """Share of them at which the feature fires, fp32, from 0 to 1. Shape `(M,)`."""


class DocumentBatch(NamedTuple):
    """Some documents with their features."""

    documents: Tensor
    """Their places in the list of texts, int64, ascending. Documents without a kept token are in no batch."""

    num_tokens: Tensor
    """Kept tokens of each, int64."""

    layers: dict[int, DocumentFeatures]
    """Per layer; `document` holds places in the list of texts."""


def document_features(sae: TopKSAE, x_ND: Tensor, text_index_N: Tensor) -> DocumentFeatures:
    """Sum up one layer's active features by document.

    Args:
        sae: The layer's SAE.
        x_ND: Residuals of the kept tokens, those of a document together and in order.
        text_index_N: Which document a token belongs to.

    Returns:
        Entries on the residuals' device; sums are taken in fp64.
    """
    device = x_ND.device
    text_index_N = text_index_N.to(device)
    documents, place_N, count = torch.unique(text_index_N, return_inverse=True, return_counts=True)
    is_last_N = torch.ones(x_ND.shape[0], dtype=torch.bool, device=device)
    is_last_N[:-1] = text_index_N[1:] != text_index_N[:-1]
    parts = list(active_features(sae, x_ND))
    token = torch.cat([part.token for part in parts])
    value = torch.cat([part.value for part in parts])
    key = place_N[token] * sae.d_sae + torch.cat([part.feature for part in parts])
    entry, place = torch.unique(key, return_inverse=True)
    document = entry // sae.d_sae
    tokens = count[document].double()
    zeros = torch.zeros(entry.numel(), dtype=torch.float64, device=device)
    total = zeros.index_add(0, place, value)
    fired = zeros.index_add(0, place, torch.ones_like(value))
    largest = zeros.scatter_reduce(0, place, value, "amax")
    at_end = is_last_N[token]
    last = zeros.index_add(0, place[at_end], value[at_end])
    return DocumentFeatures(
        documents[document],
        entry % sae.d_sae,
        largest.float(),
        (total / tokens).float(),
        last.float(),
        (fired / tokens).float(),
    )


def document_batches(
    model: nn.Module,
    saes: Mapping[int, TopKSAE],
    token_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    skip_first: bool = True,
    show_progress: bool = True,
    description: str = "encoding",
) -> Iterator[DocumentBatch]:
    """Run texts through a model and its SAEs and sum features up by document, batch by batch.

    Args:
        model: A transformers model, wrapped or not, on its device.
        saes: One SAE a layer.
        token_ids: Token ids per text, as `encode.tokenize` gives them.
        batch_size: Texts in one forward.
        skip_first: Leave out position 0 of each text, an attention sink outside the SAEs' training data.
        show_progress: Whether to show a progress bar on stderr.
        description: Label of that bar.

    Yields:
        One `DocumentBatch` per forward, on the CPU. Texts come sorted by length, not in their order.

    Raises:
        DataError: If no token is left, or a residual is not finite.
    """
    batches = residual_batches(
        model,
        token_ids,
        tuple(saes),
        batch_size=batch_size,
        skip_first=skip_first,
        show_progress=show_progress,
        description=description,
    )
    for batch in batches:
        documents, num_tokens = torch.unique(batch.text_index, return_counts=True)
        layers = {}
        for layer, sae in saes.items():
            x_ND = batch.residuals[layer].to(sae.W_enc.device)
            found = document_features(sae, x_ND, batch.text_index)
            layers[layer] = DocumentFeatures(*(column.cpu() for column in found))
        yield DocumentBatch(documents.cpu(), num_tokens.cpu(), layers)
