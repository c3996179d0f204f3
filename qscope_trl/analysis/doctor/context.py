"""The same content tokens with and without what usually surrounds them: a BOS token, the chat template.

Token ids alone are made here, with the positions at which both versions of a text hold the same content; `compare`
runs both through the model and sets features against each other, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from qscope_trl.analysis.doctor.fit import Run, Survey
from qscope_trl.analysis.doctor.reading import read
from qscope_trl.analysis.doctor.result import ContextFit
from qscope_trl.monitor.fit_sums import FitSums, codes, jaccard
from qscope_trl.ops.reference import TopKActs
from qscope_trl.sae.topk_sae import TopKSAE


class Pairing(NamedTuple):
    """Two versions of some texts, and where both hold the same token."""

    plain: list[list[int]]
    """Token ids as they are."""

    plain_keep: list[list[int]]
    """Positions in `plain`, ascending."""

    other: list[list[int]]
    """Token ids in the other context."""

    other_keep: list[list[int]]
    """Positions in `other` of the same tokens, as many."""


def has_bos(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> bool | None:
    """Whether texts begin with the tokenizer's BOS token; None if it has none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return None if bos is None else all(row[0] == bos for row in token_ids if row)


def with_bos(token_ids: Sequence[Sequence[int]], bos: int, *, is_there: bool, max_length: int) -> Pairing:
    """Texts without BOS, and the same with it; whichever has it already is cut back.

    The first content token is compared nowhere: without BOS it is at position 0.
    """
    bare = [list(row[1:] if is_there else row)[: max_length - 1] for row in token_ids]
    return Pairing(
        bare,
        [list(range(1, len(row))) for row in bare],
        [[bos, *row] for row in bare],
        [list(range(2, len(row) + 1)) for row in bare],
    )


def in_template(tokenizer: Any, texts: Sequence[str], max_length: int) -> Pairing | None:
    """Texts plain, and as a user's message in the tokenizer's chat template.

    Tokens are matched by their place in the text and their id; what a template strips or a tokenizer merges with its
    surroundings is left out, and so is position 0 of either version.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        texts: The texts.
        max_length: Tokens kept of each version.

    Returns:
        None if the tokenizer cannot tell where in a text a token is.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    found = Pairing([], [], [], [])
    for text in texts:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        start = rendered.find(text.strip())
        if start < 0:
            continue
        shift = start - text.find(text.strip())
        plain = tokenizer(text, return_offsets_mapping=True, verbose=False)
        other = tokenizer(rendered, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        ids, other_ids = plain["input_ids"][:max_length], other["input_ids"][:max_length]
        at = {
            (begin - shift, end - shift, token): place
            for place, ((begin, end), token) in enumerate(zip(other["offset_mapping"], other_ids, strict=False))
            if end > begin and place > 0
        }
        keys = [(begin, end, token) for (begin, end), token in zip(plain["offset_mapping"], ids, strict=False)]
        # Bytes of one character share its place: such a key says nothing about which is which.
        shared = [place for place, key in enumerate(keys) if place > 0 and key in at and keys.count(key) == 1]
        found.plain.append(ids)
        found.plain_keep.append(shared)
        found.other.append(other_ids)
        found.other_keep.append([at[keys[place]] for place in shared])
    return found


def compare(
    model: nn.Module, saes: Mapping[int, TopKSAE], pairing: Pairing, run: Run, survey: Survey, what: str
) -> list[ContextFit]:
    """Features of the same tokens in both contexts, per layer.

    Args:
        model: The model.
        saes: SAEs by layer, with decoders.
        pairing: The texts.
        run: Settings.
        survey: Norms, to leave out outliers of either version.
        what: Label of the progress bar.

    Returns:
        One result per layer, ascending; empty if no token is in both.
    """
    if not any(pairing.plain_keep):
        return []
    sums = {layer: (FitSums(sae), FitSums(sae)) for layer, sae in saes.items()}
    same, not_finite = dict.fromkeys(saes, 0.0), dict.fromkeys(saes, 0)
    order = sorted(range(len(pairing.other)), key=lambda i: (-len(pairing.other[i]), i))
    readings = (
        read(
            model,
            ids,
            tuple(saes),
            keep=keep,
            order=order,
            batch_size=run.batch_size,
            show_progress=run.show_progress and is_plain,
            description=what,
        )
        for ids, keep, is_plain in (
            (pairing.plain, pairing.plain_keep, True),
            (pairing.other, pairing.other_keep, False),
        )
    )
    for plain, other in zip(*readings, strict=True):
        for layer, sae in saes.items():
            pair = [states.at[layer].to(sae.W_enc.device).float() for states in (plain, other)]
            not_finite[layer] += int((~torch.stack([x_ND.isfinite().all(1) for x_ND in pair]).all(0)).sum())
            near = torch.stack([x_ND.norm(dim=1) <= survey.limit(layer) for x_ND in pair]).all(0)
            if not bool(near.any()):
                continue
            pair = [x_ND[near] for x_ND in pair]
            acts: list[TopKActs] = []
            for side, x_ND in zip(sums[layer], pair, strict=True):
                acts.append(codes(sae, x_ND))
                side.update(x_ND, acts[-1], sae.decode(acts[-1]))
            same[layer] += float(jaccard(*acts).sum())
    return [
        ContextFit(
            layer=layer,
            num_tokens=before.num_tokens,
            fvu_plain=before.fvu(),
            fvu=after.fvu(),
            l0_plain=before.l0,
            l0=after.l0,
            jaccard=same[layer] / max(1, before.num_tokens),
            not_finite=not_finite[layer],
        )
        for layer, (before, after) in sorted(sums.items())
    ]
