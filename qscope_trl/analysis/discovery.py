"""Finding features by contrast: texts that show a behaviour against texts that do not.

Two passes over the texts. The first, on the texts not held out, sums up every feature of every layer and ranks them;
the second measures the chosen ones text by text, on the texts they were chosen on and, apart from these, on the ones
held out. Left out: feature descriptions, causal tests, and correction for having searched many features (which is
what the held-out figures are for).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl._version import __version__
from qscope_trl.activations.encode import Positions, ResidualBatch, residual_batches
from qscope_trl.activations.opening import load_encoders
from qscope_trl.analysis.evidence import GroupSums, Pooled, TextFigures, collect, contrast, pool, scores
from qscope_trl.analysis.texts import TextGroup, prepare_group
from qscope_trl.config.find import RANK_BY, SELECT
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.hooks.layers import find_layers
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE

# AUROC is too dear for every feature, so `rank_by="auroc"` ranks this many times `top` features that lead by
# mean difference, and as many that lead by delta.
_SHORTLIST = 10


def find_features(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    groups: Mapping[str, Sequence[str]],
    *,
    target: str,
    layers: Sequence[int] | None = None,
    top: int = 10,
    select: str = "layer",
    rank_by: str = "mean_difference",
    positions: Positions = "all",
    max_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    holdout: float = 0.2,
    seed: int = 0,
    model_name: str | None = None,
    show_progress: bool = True,
) -> FeatureSet:
    """Choose the features that set a group of texts apart from the other groups.

    Position 0 of every text is left out. Only features whose score favours the target are chosen, so there may be
    fewer than asked for. Which texts are held out depends on their content and `seed` alone, and equal texts are held
    out together. The whole encoder of each layer is in memory: `d_sae * d_model * 4` bytes per layer.

    Args:
        model: The model before fine-tuning, on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs.
        groups: Texts per group; two groups or more.
        target: Group the features should stand for.
        layers: Layers to search; by default all of `saes`.
        top: Features to choose.
        select: `layer`: `top` features in each layer; `overall`: in all layers together. Scores by mean activation
            favour layers with large residuals, so use `delta` or `auroc` with `overall`.
        rank_by: `mean_difference`, `delta`, `monolinguality` (see `evidence.scores`) or `auroc`.
        positions: `all` tokens, or the `last` of each text: for texts that end just before a decision.
        max_length: Tokens kept of each text.
        max_tokens: Stop taking texts of a group at this many tokens; by default take all.
        batch_size: Texts in one forward.
        holdout: Share of each group's texts that takes no part in the choice, from 0 to below 1.
        seed: Decides which texts are held out, and which are taken under `max_tokens`.
        model_name: Name of the model for the record.
        show_progress: Whether to show progress bars on stderr.

    Returns:
        A set whose features have weight 1, `threshold` = mean pre-activation over all tokens of the other groups, and
        `group_thresholds` = that over each group. Evidence named `heldout_...` comes from the texts held out, the rest
        from the others. Features are ordered by layer, or with `overall` by score.

    Raises:
        ConfigError: If a setting does not fit.
        DataError: If a group has no usable text, or no feature favours the target.
        ModelStructureError: If a layer does not exist in the model.
        CheckpointError: If a layer has no SAE.

    References:
        SASFT, arXiv:2507.14894, for the choice by mean activation and the thresholds; Qwen-Scope, arXiv:2605.11887,
        section 5, for firing rates.
    """
    _check(groups, target, rank_by, select, top, holdout)
    layers = tuple(sorted(set(saes.layers if layers is None else layers)))
    loaded = load_encoders(model, saes, layers)
    prepared = {
        name: prepare_group(
            name,
            texts,
            tokenizer,
            positions=positions,
            max_length=max_length,
            max_tokens=max_tokens,
            holdout=holdout,
            seed=seed,
        )
        for name, texts in groups.items()
    }

    def encode(name: str, token_ids: list[list[int]], what: str) -> Iterator[ResidualBatch]:
        return residual_batches(
            model,
            token_ids,
            layers,
            batch_size=batch_size,
            positions=positions,
            show_progress=show_progress,
            description=f"{what} `{name}`",
        )

    sums: dict[int, dict[str, GroupSums]] = {layer: {} for layer in layers}
    for name, group in prepared.items():
        sinks = {layer: GroupSums(sae) for layer, sae in loaded.items()}
        collect(encode(name, group.kept(), "searching"), sinks)
        for layer, sink in sinks.items():
            sums[layer][name] = sink

    ranking = {layer: scores(sums[layer], target) for layer in layers}
    candidates = {layer: _candidates(ranking[layer], rank_by, top) for layer in layers}
    if rank_by != "auroc" and select == "overall":
        best = sorted(
            ((float(ranking[n][rank_by][i]), n, int(i)) for n in layers for i in candidates[n]), key=lambda c: -c[0]
        )[:top]
        candidates = {
            n: torch.tensor([i for _, m, i in best if m == n], device=candidates[n].device, dtype=torch.long)
            for n in layers
        }
    candidates = {layer: indices for layer, indices in candidates.items() if indices.numel()}
    if not candidates:
        raise DataError(
            f"No feature of layers {', '.join(map(str, layers))} has a positive `{rank_by}` for `{target}`. Search "
            f"other layers, or give more or clearer texts."
        )

    figures: dict[int, dict[str, TextFigures]] = {layer: {} for layer in candidates}
    for name, group in prepared.items():
        sinks_ = {n: TextFigures(loaded[n], indices, len(group.token_ids)) for n, indices in candidates.items()}
        collect(encode(name, group.token_ids, "measuring"), sinks_)
        for layer, figure in sinks_.items():
            figures[layer][name] = figure

    found: list[tuple[float, Feature]] = []
    for layer in candidates:
        found.extend(_describe(layer, sums[layer], ranking[layer], figures[layer], prepared, target, rank_by))
    chosen = _choose(found, top, select, rank_by, target)
    return make_set(
        chosen,
        model,
        saes,
        loaded,
        model_name=model_name,
        target_group=target,
        origin={
            "made_by": f"qscope_trl {__version__}, find_features",
            "layers": list(layers),
            "settings": {
                "top": top,
                "select": select,
                "rank_by": rank_by,
                "positions": positions,
                "max_length": max_length,
                "holdout": holdout,
                "seed": seed,
            },
            "texts": {name: group.heldout.count(False) for name, group in prepared.items()},
            "tokens": {name: sums[layers[0]][name].num_tokens for name in prepared},
            "heldout_texts": {name: group.heldout.count(True) for name, group in prepared.items()},
        },
    )


def _check(
    groups: Mapping[str, Sequence[str]], target: str, rank_by: str, select: str, top: int, holdout: float
) -> None:
    for name, value, allowed in (("rank_by", rank_by, RANK_BY), ("select", select, SELECT)):
        if value not in allowed:
            raise ConfigError(f"`{name}` is {value!r}; choose one of {', '.join(allowed)}.")
    if top < 1 or not 0 <= holdout < 1:
        raise ConfigError(f"`top` is {top} and `holdout` is {holdout}; give 1 or more, and a share from 0 to below 1.")
    if target not in groups or len(groups) < 2:
        raise ConfigError(
            f"The target group `{target}` and at least one other are needed; got "
            f"{', '.join(f'`{name}`' for name in groups) or 'no group'}."
        )


def make_set(
    chosen: Sequence[Feature],
    model: nn.Module,
    saes: SAESuite,
    loaded: Mapping[int, TopKSAE],
    *,
    model_name: str | None,
    target_group: str | None,
    origin: dict[str, Any],
) -> FeatureSet:
    """Chosen features with everything that later tells whether they fit a model and its SAEs."""
    sae = next(iter(loaded.values()))
    return FeatureSet(
        features=tuple(chosen),
        model=model_name,
        sae=saes.source,
        sae_revision=saes.revision,
        sae_fingerprints={layer: saes.fingerprint(layer) for layer in sorted({f.layer for f in chosen})},
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        num_layers=len(find_layers(model)),
        target_group=target_group,
        origin=origin,
    )


def _candidates(ranking: Mapping[str, Tensor], rank_by: str, top: int) -> Tensor:
    """Indices of the leading features with a positive score, best first."""
    if rank_by != "auroc":
        return _leading(ranking[rank_by], top)
    lists = [_leading(ranking[name], _SHORTLIST * top) for name in ("mean_difference", "delta")]
    either: Tensor = torch.unique(torch.cat(lists))
    return either


def _leading(score: Tensor, count: int) -> Tensor:
    ordered = score.sort(descending=True, stable=True)
    best: Tensor = ordered.indices[:count][ordered.values[:count] > 0]
    return best


def _describe(
    layer: int,
    sums: Mapping[str, GroupSums],
    ranking: Mapping[str, Tensor],
    figures: Mapping[str, TextFigures],
    groups: Mapping[str, TextGroup],
    target: str,
    rank_by: str,
) -> list[tuple[float, Feature]]:
    """Score and record of every candidate of a layer."""
    names = [target, *(name for name in groups if name != target)]
    indices = figures[target].indices
    mine, others = pool([sums[target]]), pool([sums[name] for name in names[1:]])
    heldout = [torch.tensor(groups[name].heldout) for name in names]
    parts = [figures[name] for name in names]
    inside = contrast(parts[0], parts[1:], [~mask for mask in heldout])
    outside = contrast(parts[0], parts[1:], heldout) if all(bool(mask.any()) for mask in heldout) else None
    thresholds = {name: sums[name].mean_pre_act(indices) for name in names}
    tokens = {name: sums[name].num_tokens for name in names[1:]}
    pooled_S = torch.stack([thresholds[name] * n for name, n in tokens.items()]).sum(0) / sum(tokens.values())
    result = []
    for s, index in enumerate(indices.tolist()):
        evidence = {
            **_rates(mine, index, ""),
            **_rates(others, index, "_others"),
            **{name: float(score[index]) for name, score in ranking.items()},
            "auroc": inside[s]["auroc"],
            "auroc_pre_act": inside[s]["auroc_pre_act"],
        }
        if outside is not None:
            evidence.update({f"heldout_{name}": value for name, value in outside[s].items()})
        feature = Feature(
            layer=layer,
            index=index,
            threshold=float(pooled_S[s]),
            group_thresholds={name: float(thresholds[name][s]) for name in names},
            evidence=evidence,
        )
        result.append((evidence[rank_by], feature))
    return result


def _rates(pooled: Pooled, index: int, suffix: str) -> dict[str, float]:
    return {f"{name}{suffix}": float(value[index]) for name, value in pooled._asdict().items()}


def _choose(found: list[tuple[float, Feature]], top: int, select: str, rank_by: str, target: str) -> list[Feature]:
    least = 0.5 if rank_by == "auroc" else 0.0
    ranked = sorted((item for item in found if item[0] > least), key=lambda item: (-item[0], item[1].id))
    if select == "overall":
        chosen = [feature for _, feature in ranked[:top]]
    else:
        by_layer: dict[int, list[Feature]] = {}
        for _, feature in ranked:
            by_layer.setdefault(feature.layer, []).append(feature)
        chosen = [feature for layer in sorted(by_layer) for feature in by_layer[layer][:top]]
    if not chosen:
        raise DataError(
            f"No feature has a `{rank_by}` that favours `{target}`. Search other layers or give more texts."
        )
    return chosen
