"""One model on the texts of both groups: chosen features, newly found ones, and mean residuals for probes.

Two passes. The first sums up every feature on the texts to learn from, as `qscope find` does; the second takes
per-text figures of chosen and found features, and mean residuals. Left out: permutation tests of the search, which
`qscope find` has.

Shape legend: `X` texts of both groups, the positive first; `S` features, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.activations.encode import Positions, residual_batches
from qscope_trl.activations.sampling import Generation
from qscope_trl.analysis.audit.estimates import Activity
from qscope_trl.analysis.doctor.reading import read
from qscope_trl.analysis.evidence import GroupSums, TextFigures, collect, scores
from qscope_trl.analysis.outliers import NormLimits
from qscope_trl.analysis.probes import ResidualMeans
from qscope_trl.analysis.texts import TextGroup
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.layers import d_model
from qscope_trl.sae.topk_sae import TopKSAE

POSITIVE, NEGATIVE = "positive", "negative"

CANDIDATES = 10
"""Features a layer that the search takes on to the second pass."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What both models are measured with.

    Args:
        groups: Texts of the two groups, parted into those to learn from and those held out.
        encoders: SAEs by layer.
        features: Features that were trained on.
        monitors: Features that were not, if any.
        probe_layers: Layers whose residuals probes read.
        limits: Which tokens count, by the base model's norms of all layers that are read.
        positions: Tokens to look at.
        batch_size: Texts in one forward.
        show_progress: Whether to show progress bars on stderr.
    """

    groups: Mapping[str, TextGroup]
    encoders: Mapping[int, TopKSAE]
    features: FeatureSet
    monitors: FeatureSet | None
    probe_layers: tuple[int, ...]
    limits: NormLimits | None
    positions: Positions
    batch_size: int
    show_progress: bool
    group_X: Tensor = field(init=False)
    """0 for a positive text, 1 for a negative one, int64."""

    heldout_X: Tensor = field(init=False)
    """Whether a text is held out."""

    def __post_init__(self) -> None:
        parts = [self.groups[name] for name in (POSITIVE, NEGATIVE)]
        sizes = [len(part.token_ids) for part in parts]
        object.__setattr__(self, "group_X", torch.arange(2).repeat_interleave(torch.tensor(sizes)))
        object.__setattr__(self, "heldout_X", torch.tensor([out for part in parts for out in part.heldout]))

    def chosen(self, layer: int) -> list[int]:
        """Features of a layer that are named: trained on or held out."""
        sets = [self.features] if self.monitors is None else [self.features, self.monitors]
        return list(dict.fromkeys(feature.index for one in sets for feature in one.for_layer(layer)))


class FeatureTexts(NamedTuple):
    """What one feature comes to in each text; on the CPU."""

    sum_X: Tensor
    max_X: Tensor
    fired_X: Tensor
    """Tokens at which it is active."""

    tokens_X: Tensor


class Measured(NamedTuple):
    """What one model shows on the texts."""

    figures: dict[int, list[TextFigures]]
    """Per layer, of the positive and of the negative texts."""

    found: dict[int, list[int]]
    """Per layer, features that are more active on positive texts, the best first; none that was trained on."""

    means: dict[int, Tensor]
    """Per probe layer, the mean residual of each text `(X, D)`."""

    def feature(self, layer: int, index: int) -> FeatureTexts:
        """One of the features that were measured."""
        parts = self.figures[layer]
        column = int(parts[0].column_F[index])
        return FeatureTexts(
            torch.cat([part.act_sum_XS[:, column].cpu() for part in parts]),
            torch.cat([part.act_max_XS[:, column].cpu() for part in parts]),
            torch.cat([part.fired_XS[:, column].cpu() for part in parts]),
            torch.cat([part.tokens_X.cpu() for part in parts]),
        )

    def score(self, features: FeatureSet) -> Activity:
        """The set as one detector: the weighted sum of its features' activations, summed over tokens."""
        columns = [(feature.weight, self.feature(feature.layer, feature.index)) for feature in features.features]
        return Activity(torch.stack([weight * one.sum_X for weight, one in columns]).sum(0), columns[0][1].tokens_X)


def measure(model: nn.Module, material: Material, what: str) -> Measured:
    """Run the texts through a model, twice.

    Args:
        model: The model, on its device.
        material: Texts, SAEs and features.
        what: Name of the model, for progress bars.

    Raises:
        DataError: If a residual is not finite.
    """
    found = _search(model, material, what)
    layers = tuple(sorted({*material.encoders, *material.probe_layers}))
    figures: dict[int, list[TextFigures]] = {layer: [] for layer in material.encoders}
    means: dict[int, list[Tensor]] = {layer: [] for layer in material.probe_layers}
    for name in (POSITIVE, NEGATIVE):
        ids = material.groups[name].token_ids
        features = {
            layer: TextFigures(
                sae,
                torch.tensor(sorted({*material.chosen(layer), *found[layer]}), device=sae.W_enc.device),
                len(ids),
            )
            for layer, sae in material.encoders.items()
        }
        probed = {layer: ResidualMeans(len(ids), d_model(model)) for layer in material.probe_layers}
        batches = _batches(model, material, ids, layers, f"{what}: `{name}`")
        collect(batches, features, probed, limits=material.limits)
        for layer, one in features.items():
            figures[layer].append(one)
        for layer, mean in probed.items():
            means[layer].append(mean.means)
    return Measured(figures, found, {layer: torch.cat(parts) for layer, parts in means.items()})


def _search(model: nn.Module, material: Material, what: str) -> dict[int, list[int]]:
    """Features of each layer by mean difference, best first, on the texts that are not held out."""
    layers = tuple(material.encoders)
    sums: dict[str, dict[int, GroupSums]] = {}
    for name in (POSITIVE, NEGATIVE):
        sums[name] = {layer: GroupSums(sae) for layer, sae in material.encoders.items()}
        ids = material.groups[name].kept()
        collect(_batches(model, material, ids, layers, f"{what}: search"), sums[name], limits=material.limits)
    found: dict[int, list[int]] = {}
    for layer in layers:
        both = {name: sums[name][layer] for name in sums}
        if not all(one.num_tokens for one in both.values()):
            found[layer] = []
            continue
        score_F = scores(both, POSITIVE)["mean_difference"].cpu()
        trained = [feature.index for feature in material.features.for_layer(layer)]
        score_F[trained] = -torch.inf
        best = score_F.topk(min(CANDIDATES, score_F.numel()))
        found[layer] = best.indices[best.values > 0].tolist()
    return found


def _batches(model: nn.Module, material: Material, ids: list[list[int]], layers: Sequence[int], what: str) -> Any:
    return residual_batches(
        model,
        ids,
        layers,
        batch_size=material.batch_size,
        positions=material.positions,
        show_progress=material.show_progress,
        description=what,
    )


def read_generated(
    model: nn.Module, generations: Sequence[Generation], features: FeatureSet, material: Material, what: str
) -> Activity:
    """The set's score over the tokens that the model itself wrote, prompts read but not counted.

    Args:
        model: The model that wrote them.
        generations: What it wrote.
        features: The set.
        material: SAEs and batch size.
        what: Label of the progress bar.
    """
    rows = [[*one.prompt_ids, *one.ids] for one in generations]
    keep = [range(max(1, len(one.prompt_ids)), len(row)) for one, row in zip(generations, rows, strict=True)]
    figures = {
        layer: TextFigures(
            material.encoders[layer],
            torch.tensor([feature.index for feature in features.for_layer(layer)]).to(
                material.encoders[layer].W_enc.device
            ),
            len(rows),
        )
        for layer in features.layers
    }
    for states in read(
        model,
        rows,
        features.layers,
        keep=keep,
        batch_size=material.batch_size,
        show_progress=material.show_progress,
        description=what,
    ):
        for layer, one in figures.items():
            one.update(states.at[layer], states.text_index)
    total_X = torch.zeros(len(rows), dtype=torch.float64)
    for layer, one in figures.items():
        weights = torch.tensor([feature.weight for feature in features.for_layer(layer)], dtype=torch.float64)
        total_X += one.act_sum_XS.cpu() @ weights
    return Activity(total_X, next(iter(figures.values())).tokens_X.cpu())
