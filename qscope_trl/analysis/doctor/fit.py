"""Each layer's SAE against the model: a survey of norms, then sums over all tokens and other readings of a sample.

SAEs are in memory a few at a time, residuals a batch at a time; only those of the sample are kept while its layers are
looked at.

Shape legend: `N` tokens of a batch, `P` tokens of the sample, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.analysis.doctor import alternatives as other
from qscope_trl.analysis.doctor.chosen import Watch, watched
from qscope_trl.analysis.doctor.reading import States, longest_first, read
from qscope_trl.analysis.doctor.result import FeatureFiring, FirstPosition, LayerFit
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.fit_sums import MAX_NORM_RATIO, FitSums, codes
from qscope_trl.ops.reference import TopKActs
from qscope_trl.sae.topk_sae import TopKSAE


@dataclass(frozen=True, kw_only=True)
class Run:
    """How texts are run through models.

    Args:
        token_ids: Token ids per text.
        batch_size: Texts in one forward.
        probe_tokens: Tokens of the sample, about.
        scan: Layers to either side of its own that an SAE is tried on.
        seed: Decides the noise of `alternatives.chance`.
        show_progress: Whether to show progress bars on stderr.
    """

    token_ids: Sequence[Sequence[int]]
    batch_size: int = 8
    probe_tokens: int = 2048
    scan: int = 1
    seed: int = 0
    show_progress: bool = True
    probe_texts: frozenset[int] = field(init=False)
    """Texts of the sample: every nth of those that have a token after position 0, so that they hold enough."""

    def __post_init__(self) -> None:
        usable = [i for i, row in enumerate(self.token_ids) if len(row) > 1]
        total = sum(len(self.token_ids[i]) - 1 for i in usable)
        object.__setattr__(self, "probe_texts", frozenset(usable[:: max(1, total // self.probe_tokens)]))


class Survey(NamedTuple):
    """The residual stream itself, place by place."""

    norm: dict[int, float]
    """Median norm at positions after 0."""

    first_norm: dict[int, float]
    """Median norm at position 0."""

    outliers: dict[int, list[tuple[int, int]]]
    """Tokens after position 0 whose norm exceeds `MAX_NORM_RATIO` medians: text and position."""

    not_finite: dict[int, int]
    """Tokens whose residual holds NaN or inf; only places that have any."""

    def limit(self, place: int) -> float:
        """Norm above which a token counts as an outlier."""
        return MAX_NORM_RATIO * self.norm[place]


def survey(model: nn.Module, run: Run, places: Sequence[int]) -> Survey:
    """Norms at every place, and what is not finite; stores one number per token and place."""
    norms: dict[int, list[Tensor]] = {place: [] for place in places}
    text, position = [], []
    for states in _read(model, run, places, "norms"):
        text.append(states.text_index)
        position.append(states.position)
        for place, x_ND in states.at.items():
            norms[place].append(x_ND.float().norm(dim=1).masked_fill(~x_ND.isfinite().all(1), torch.nan).cpu())
    text_N, position_N = torch.cat(text), torch.cat(position)
    result = Survey({}, {}, {}, {})
    for place in places:
        norm_N = torch.cat(norms[place])
        later = position_N > 0
        result.norm[place] = float(norm_N[later].nanmedian())
        result.first_norm[place] = float(norm_N[~later].nanmedian())
        far = (norm_N > result.limit(place)) & later
        result.outliers[place] = list(zip(text_N[far].tolist(), position_N[far].tolist(), strict=True))
        if bool(norm_N.isnan().any()):
            result.not_finite[place] = int(norm_N.isnan().sum())
    return result


def places_of(layers: Sequence[int], num_layers: int, scan: int) -> list[int]:
    """Layers and the places to either side of them, ascending; see `reading`."""
    reach = range(-scan, scan + 1)
    return sorted({layer + step for layer in layers for step in reach if -1 <= layer + step <= num_layers})


class LayerSums:
    """What one layer's SAE comes to while texts run through the model.

    Args:
        sae: The SAE, with its decoder.
        limit: Norm above which a token is an outlier.
        watch: Chosen features to watch, if any.
    """

    def __init__(self, sae: TopKSAE, limit: float, watch: Watch | None = None) -> None:
        self.sae = sae
        self.limit = limit
        self.watch = watch
        self.usual, self.outliers, self.first = FitSums(sae), FitSums(sae), FitSums(sae)

    def update(self, x_ND: Tensor, text_index_N: Tensor, position_N: Tensor) -> None:
        """Add a batch."""
        x_ND = x_ND.to(self.sae.W_enc.device).float()
        acts = codes(self.sae, x_ND)
        x_hat_ND = self.sae.decode(acts)
        later = (position_N > 0).to(x_ND.device)
        near = x_ND.norm(dim=1) <= self.limit
        for sums, mask in ((self.usual, later & near), (self.outliers, later & ~near), (self.first, ~later)):
            if bool(mask.any()):
                chosen = TopKActs(*(part[mask] for part in acts))
                sums.update(x_ND[mask], chosen, x_hat_ND[mask])
                if self.watch is not None and sums is self.usual:
                    self.watch.update(chosen, text_index_N[mask.to(text_index_N.device)])


def fit(
    model: nn.Module,
    saes: Mapping[int, TopKSAE],
    run: Run,
    survey: Survey,
    num_layers: int,
    features: FeatureSet | None = None,
) -> tuple[list[LayerFit], list[FeatureFiring]]:
    """Measure some layers in one pass over the texts.

    Args:
        model: The model.
        saes: SAEs by layer, with decoders.
        run: Texts and settings.
        survey: Norms of all places that are read here.
        num_layers: Layers of the model.
        features: Chosen features to watch.

    Returns:
        One result per layer, ascending, and how the chosen features fire.
    """
    places = places_of(tuple(saes), num_layers, run.scan)
    num_texts = len(run.token_ids)
    sums = {
        layer: LayerSums(sae, survey.limit(layer), watched(features, layer, sae, num_texts))
        for layer, sae in saes.items()
    }
    sample: dict[int, list[Tensor]] = {place: [] for place in places}
    for states in _read(model, run, places, f"layers {min(saes)}-{max(saes)}"):
        for layer, one in sums.items():
            one.update(states.at[layer], states.text_index, states.position)
        is_probe = torch.tensor([i in run.probe_texts for i in states.text_index.tolist()]) & (states.position > 0)
        for place in places:
            x_ND = states.at[place][is_probe.to(states.at[place].device)].float()
            sample[place].append(x_ND[x_ND.norm(dim=1) <= survey.limit(place)])
    found, firing = [], []
    for layer, one in sorted(sums.items()):
        mine = places_of((layer,), num_layers, run.scan)
        probes = {place: torch.cat(sample[place]).to(one.sae.W_enc.device) for place in mine}
        found.append(_layer_fit(layer, one, probes, survey, run.seed))
        if one.watch is not None:
            firing.extend(one.watch.firing())
    return found, firing


def _read(model: nn.Module, run: Run, places: Sequence[int], what: str) -> Iterator[States]:
    return read(
        model,
        run.token_ids,
        places,
        order=[i for i in longest_first(run.token_ids) if len(run.token_ids[i]) > 1],
        batch_size=run.batch_size,
        show_progress=run.show_progress,
        description=what,
    )


def _layer_fit(layer: int, sums: LayerSums, probes: Mapping[int, Tensor], survey: Survey, seed: int) -> LayerFit:
    sae, usual, first = sums.sae, sums.usual, sums.first
    x_PD = probes[layer]
    readings, scale = other.alternatives(sae, x_PD)
    aligned, reshaped = other.alignment(sae)
    return LayerFit(
        layer=layer,
        d_sae=sae.d_sae,
        k=sae.k,
        num_tokens=usual.num_tokens,
        fvu=usual.fvu(),
        chance=other.chance(sae, x_PD, seed),
        cosine=usual.cosine,
        l0=usual.l0,
        short_share=usual.short_share,
        silent_share=usual.silent_share,
        norm=survey.norm[layer],
        norm_ratio=usual.norm_ratio,
        outlier_share=sums.outliers.num_tokens / (usual.num_tokens + sums.outliers.num_tokens),
        fvu_with_outliers=usual.merged(sums.outliers).fvu(),
        first=FirstPosition(
            num_tokens=first.num_tokens,
            fvu=first.fvu(usual.mean_D),
            cosine=first.cosine,
            l0=first.l0,
            norm_ratio=survey.first_norm[layer] / survey.norm[layer],
        ),
        places={place: other.read_as(sae, x) for place, x in probes.items()},
        readings=readings,
        scale=scale,
        roundings={name: rounding._asdict() for name, rounding in other.roundings(sae, x_PD).items()},
        chance_jaccard=other.chance_jaccard(sae, x_PD),
        alignment=aligned,
        alignment_reshaped=reshaped,
    )
