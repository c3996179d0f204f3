"""From scores of all features to a few that are described: shortlists, tests of the search, evidence, the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qscope_trl.analysis.contrast import contrast, intervals, rows
from qscope_trl.analysis.evidence import GroupSums, Pooled, TextFigures, pool
from qscope_trl.analysis.significance import benjamini_hochberg, familywise_p, permutation_test, split_half
from qscope_trl.analysis.text_scores import TextScores
from qscope_trl.analysis.texts import TextGroup
from qscope_trl.errors import DataError
from qscope_trl.features import Feature

# AUROC is too dear for every feature, so `rank_by="auroc"` ranks this many times `top` features that lead by
# mean difference, and as many that lead by delta.
_SHORTLIST = 10


def candidates(ranking: Mapping[int, Mapping[str, Tensor]], rank_by: str, select: str, top: int) -> dict[int, Tensor]:
    """Indices of the features that may be chosen, layer by layer, best first; layers without any are left out.

    Args:
        ranking: Per layer what `evidence.scores` gives.
        rank_by: The score that ranks, or `auroc`.
        select: `layer` or `overall`.
        top: Features to choose.
    """
    found = {layer: _of_layer(scores, rank_by, top) for layer, scores in ranking.items()}
    if rank_by != "auroc" and select == "overall":
        best = sorted(
            ((float(ranking[n][rank_by][i]), n, int(i)) for n in found for i in found[n]), key=lambda c: -c[0]
        )[:top]
        found = {
            n: torch.tensor([i for _, m, i in best if m == n], device=indices.device, dtype=torch.long)
            for n, indices in found.items()
        }
    return {layer: indices for layer, indices in found.items() if indices.numel()}


def _of_layer(ranking: Mapping[str, Tensor], rank_by: str, top: int) -> Tensor:
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


class SearchTest(NamedTuple):
    """What permutations and halves say of a search."""

    evidence: dict[int, dict[str, Tensor]]
    """Per layer `p_value`, `q_value`, `familywise_p` and `selection_rate`, as far as asked for, each `(F,)`."""

    summary: dict[str, Any]
    """Figures of the search as a whole, for the record."""


def examine_search(
    sums: Mapping[int, Mapping[str, GroupSums]],
    sizes: Mapping[str, int],
    *,
    rank_by: str,
    top: int,
    permutations: int,
    splits: int,
    seed: int,
) -> SearchTest:
    """Permutation tests of all features of all layers, and the ranking's stability under halving the texts.

    Args:
        sums: Per layer and group, made with `keep=KEEP[rank_by]`; the target first.
        sizes: Texts of each group, in the same order.
        rank_by: The score.
        top: Best features of a layer that halves are compared by.
        permutations: How many; 0 for no test.
        splits: How many times the texts are halved; 0 for none.
        seed: Decides both.
    """
    if not permutations and not splits:
        return SearchTest({layer: {} for layer in sums}, {})
    texts = {layer: TextScores.of(rank_by, list(of.values()), list(sizes.values())) for layer, of in sums.items()}
    evidence: dict[int, dict[str, Tensor]] = {layer: {} for layer in sums}
    summary: dict[str, Any] = {}
    if permutations:
        tests = {n: permutation_test(of, permutations=permutations, seed=seed) for n, of in texts.items()}
        # One family: every feature that fires in any layer that was searched.
        families = [test.p_value[test.is_tested] for test in tests.values()]
        adjusted = torch.split(benjamini_hochberg(torch.cat(families)), [family.numel() for family in families])
        best = torch.stack([test.best for test in tests.values() if test.best.numel()]).amax(0)
        for (layer, test), q in zip(tests.items(), adjusted, strict=True):
            q_value = torch.ones_like(test.p_value)
            q_value[test.is_tested] = q
            whole = familywise_p(texts[layer].observed(), best, texts[layer].rounding())
            evidence[layer] = {"p_value": test.p_value, "q_value": q_value, "familywise_p": whole}
        summary["tested_features"] = sum(family.numel() for family in families)
        summary["features_with_q_up_to_0.05"] = int((torch.cat(adjusted) <= 0.05).sum())
    for layer, of in texts.items() if splits else ():
        halves = split_half(of, top=top, splits=splits, seed=seed)
        if halves is not None:
            evidence[layer]["selection_rate"] = halves.selected
            summary.setdefault("split_half", {})[f"L{layer}"] = {
                "rank_correlation": float(halves.rank_correlation.nanmean()),
                "top_overlap": float(halves.top_overlap.mean()),
            }
    return SearchTest(evidence, summary)


def describe(
    layer: int,
    sums: Mapping[str, GroupSums],
    ranking: Mapping[str, Tensor],
    tests: Mapping[str, Tensor],
    figures: Mapping[str, TextFigures],
    groups: Mapping[str, TextGroup],
    *,
    rank_by: str,
    bootstrap: int = 0,
    seed: int = 0,
) -> list[tuple[float, Feature]]:
    """Score and record of every candidate of a layer.

    Args:
        layer: The layer.
        sums: Of each group, the target first.
        ranking: What `evidence.scores` gives.
        tests: What `examine_search` gives.
        figures: Of each group, of the candidates.
        groups: The texts.
        rank_by: The score that ranks.
        bootstrap: Resamples for intervals, of the held-out figures if there are any; 0 for none.
        seed: Decides the resamples.
    """
    target, *others = sums
    indices = figures[target].indices
    pooled = {"": pool([sums[target]]), "_others": pool([sums[name] for name in others])}
    heldout = [torch.tensor(groups[name].heldout) for name in sums]
    parts = [figures[name] for name in sums]
    inside = rows(parts, [~mask for mask in heldout])
    evidence = [
        {
            **{key: value for suffix, of in pooled.items() for key, value in _rates(of, index, suffix).items()},
            **{name: float(score[index]) for name, score in ranking.items()},
            **{name: figure for name, figure in found.items() if name not in ranking},
        }
        for index, found in zip(indices.tolist(), contrast(inside), strict=True)
    ]
    outside = rows(parts, heldout)
    has_outside = bool((torch.bincount(outside.group_X, minlength=len(sums)) > 0).all())
    more = [contrast(outside)] if has_outside else []
    if bootstrap:
        more.append(intervals(outside if has_outside else inside, resamples=bootstrap, seed=seed))
    prefix = "heldout_" if has_outside else ""
    for found_all in more:
        for one, found in zip(evidence, found_all, strict=True):
            one.update({f"{prefix}{name}": value for name, value in found.items()})
    for index, one in zip(indices.tolist(), evidence, strict=True):
        one.update({name: float(value[index]) for name, value in tests.items()})

    thresholds = {name: sums[name].mean_pre_act(indices) for name in sums}
    tokens = {name: sums[name].num_tokens for name in others}
    pooled_S = torch.stack([thresholds[name] * n for name, n in tokens.items()]).sum(0) / sum(tokens.values())
    return [
        (
            one[rank_by],
            Feature(
                layer=layer,
                index=index,
                threshold=float(pooled_S[s]),
                group_thresholds={name: float(thresholds[name][s]) for name in sums},
                evidence=one,
            ),
        )
        for s, (index, one) in enumerate(zip(indices.tolist(), evidence, strict=True))
    ]


def _rates(pooled: Pooled, index: int, suffix: str) -> dict[str, float]:
    return {f"{name}{suffix}": float(value[index]) for name, value in pooled._asdict().items()}


def choose(
    found: Sequence[tuple[float, Feature]], *, top: int, select: str, rank_by: str, target: str
) -> list[Feature]:
    """The best of what was described, by layer or, with `overall`, by score.

    Raises:
        DataError: If none favours the target.
    """
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
