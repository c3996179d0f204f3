"""The texts in which a feature is most active, token by token: what a person reads to see what it stands for.

Left out: texts drawn from the whole range of activations. The highest ones show a feature at its clearest, which
flatters it; so the highest of the other groups stand beside them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import residual_batches
from qscope_trl.analysis.discovery import Discovery
from qscope_trl.features import FeatureId
from qscope_trl.monitor.html import token_texts

_BEFORE, _AFTER = 40, 24
"""Tokens shown before and after the one with the largest activation."""


class Example(NamedTuple):
    """A piece of a text around the token at which a feature is most active."""

    group: str
    is_heldout: bool
    tokens: list[str]
    """Text of each token, as `monitor.html.token_texts` gives it."""

    acts: list[float | None]
    """Activation at each token; None where it is masked."""

    act_max: float
    """The largest one of the whole text."""

    is_cut: tuple[bool, bool]
    """Whether there is more text before, and after."""


def top_examples(
    discovery: Discovery, model: nn.Module, tokenizer: Any, *, count: int = 5, show_progress: bool = True
) -> dict[FeatureId, list[Example]]:
    """The texts with the largest activations of each chosen feature: of the target group, then of the others.

    Texts that occur twice are shown once; there are fewer where a feature fires in fewer. Only the texts that are
    shown run through the model again.

    Args:
        discovery: What `discover` gave.
        model: The model it was given, on its device.
        tokenizer: Its tokenizer.
        count: Texts of the target group for each feature, and as many of the others together.
        show_progress: Whether to show a progress bar on stderr.
    """
    names = list(discovery.groups)
    wanted: dict[FeatureId, list[tuple[str, int]]] = {}
    for feature in discovery.found.ids:
        wanted[feature] = [
            *_highest(discovery, feature, names[:1], count),
            *_highest(discovery, feature, names[1:], count),
        ]
    keys = sorted({key for chosen in wanted.values() for key in chosen})
    acts = _token_acts(discovery, model, keys, wanted, show_progress)
    return {
        feature: [_example(discovery, tokenizer, key, acts[feature, key]) for key in chosen]
        for feature, chosen in wanted.items()
    }


def _highest(discovery: Discovery, feature: FeatureId, names: list[str], count: int) -> list[tuple[str, int]]:
    """Group and number of the texts with the largest activations, best first."""
    found: list[tuple[float, str, int]] = []
    for name in names:
        figures = discovery.figures[feature.layer][name]
        column_X = figures.act_max_XS[:, int(figures.column_F[feature.index])]
        ordered = column_X.sort(descending=True, stable=True)
        found += [
            (value, name, text) for value, text in zip(*(part.tolist() for part in ordered), strict=True) if value
        ]
    result: list[tuple[str, int]] = []
    seen: set[tuple[int, ...]] = set()
    for _, name, text in sorted(found, key=lambda item: -item[0]):
        ids = tuple(discovery.groups[name].token_ids[text])
        if ids not in seen:
            seen.add(ids)
            result.append((name, text))
        if len(result) == count:
            break
    return result


def _token_acts(
    discovery: Discovery,
    model: nn.Module,
    keys: list[tuple[str, int]],
    wanted: dict[FeatureId, list[tuple[str, int]]],
    show_progress: bool,
) -> dict[tuple[FeatureId, tuple[str, int]], list[float | None]]:
    """Activations along each text, position 0 included and masked, of the features that want it."""
    search, layers = discovery.settings, discovery.found.layers
    token_ids = [discovery.groups[name].token_ids[text] for name, text in keys]
    users = {key: [feature for feature, chosen in wanted.items() if key in chosen] for key in keys}
    result: dict[tuple[FeatureId, tuple[str, int]], list[float | None]] = {}
    batches = residual_batches(
        model,
        token_ids,
        layers,
        batch_size=search.batch_size,
        positions=search.positions,
        show_progress=show_progress,
        description="examples",
    )
    for batch in batches:
        text_N = batch.text_index
        for layer in layers:
            x_ND = batch.residuals[layer].to(discovery.encoders[layer].W_enc.device)
            masked_N = torch.zeros(len(text_N), dtype=torch.bool)
            if discovery.limits is not None:
                masked_N = ~discovery.limits.within(layer, x_ND).cpu()
            columns = _columns(discovery, layer, x_ND)
            for text in torch.unique(text_N).tolist():
                here = (text_N == text).nonzero()[:, 0]
                for feature in users[keys[text]]:
                    if feature.layer == layer:
                        values = [
                            None if out else act
                            for act, out in zip(
                                columns[feature.index][here].tolist(), masked_N[here].tolist(), strict=True
                            )
                        ]
                        # What was not read comes first: position 0, or with `last` all but one.
                        before: list[float | None] = [None] * (len(token_ids[text]) - len(values))
                        result[feature, keys[text]] = before + values
    return result


def _columns(discovery: Discovery, layer: int, x_ND: Tensor) -> dict[int, Tensor]:
    """Activation of each chosen feature of a layer at every token, on the CPU."""
    columns = {f.index: torch.zeros(x_ND.shape[0], dtype=torch.float64) for f in discovery.found.for_layer(layer)}
    for active in active_features(discovery.encoders[layer], x_ND):
        for index, column in columns.items():
            here = active.feature == index
            column[active.token[here].cpu()] = active.value[here].cpu()
    return columns


def _example(discovery: Discovery, tokenizer: Any, key: tuple[str, int], acts: list[float | None]) -> Example:
    group = discovery.groups[key[0]]
    ids = group.token_ids[key[1]]
    place = max(range(len(ids)), key=lambda i: acts[i] or 0.0)
    begin, end = max(0, place - _BEFORE), min(len(ids), place + _AFTER + 1)
    return Example(
        group=key[0],
        is_heldout=group.heldout[key[1]],
        tokens=token_texts(tokenizer, ids[begin:end]),
        acts=acts[begin:end],
        act_max=float(acts[place] or 0.0),
        is_cut=(begin > 0, end < len(ids)),
    )
