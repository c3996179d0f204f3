"""Finding features by contrast: texts that show a behaviour against texts that do not.

Two passes over the texts. The first, on the texts not held out, sums up every feature of every layer and ranks them;
the second measures the chosen ones text by text, on the texts they were chosen on and, apart from these, on the ones
held out. Left out: feature descriptions and causal tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import nn

from qscope_trl._version import __version__
from qscope_trl.activations.encode import Positions, ResidualBatch, residual_batches
from qscope_trl.activations.opening import load_encoders
from qscope_trl.analysis.choosing import candidates, choose, describe, examine_search
from qscope_trl.analysis.evidence import GroupSums, TextFigures, collect, scores
from qscope_trl.analysis.outliers import NormLimits, norm_limits
from qscope_trl.analysis.text_scores import KEEP
from qscope_trl.analysis.texts import TextGroup, prepare_group
from qscope_trl.config.find import RANK_BY, SELECT
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.hooks.layers import find_layers
from qscope_trl.monitor.fit_sums import MAX_NORM_RATIO
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of a search: `find_features` says what each of them means."""

    target: str
    top: int = 10
    select: str = "layer"
    rank_by: str = "mean_difference"
    positions: Positions = "all"
    max_length: int = 512
    max_tokens: int | None = None
    max_norm_ratio: float = MAX_NORM_RATIO
    batch_size: int = 8
    holdout: float = 0.2
    seed: int = 0
    permutations: int = 0
    splits: int = 0
    bootstrap: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (("rank_by", self.rank_by, RANK_BY), ("select", self.select, SELECT)):
            if value not in allowed:
                raise ConfigError(f"`{name}` is {value!r}; choose one of {', '.join(allowed)}.")
        if self.top < 1 or not 0 <= self.holdout < 1:
            raise ConfigError(
                f"`top` is {self.top} and `holdout` is {self.holdout}; give 1 or more, and a share from 0 to below 1."
            )
        for name in ("permutations", "splits", "bootstrap"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it is 0 for none, or a number above.")


class Discovery(NamedTuple):
    """What a search found, and what it read to find it: for baselines and reports."""

    found: FeatureSet
    settings: Search
    groups: dict[str, TextGroup]
    """Token ids of each group's texts; the target first."""

    encoders: dict[int, TopKSAE]
    sums: dict[int, dict[str, GroupSums]]
    """Per layer and group, over the texts not held out."""

    figures: dict[int, dict[str, TextFigures]]
    """Per layer and group, of the candidates, over all texts."""

    limits: NormLimits | None


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
    max_norm_ratio: float = MAX_NORM_RATIO,
    permutations: int = 0,
    splits: int = 0,
    bootstrap: int = 0,
    model_name: str | None = None,
    show_progress: bool = True,
) -> FeatureSet:
    """Choose the features that set a group of texts apart from the other groups.

    Position 0 of every text is left out, and so is any token whose residual is far longer than usual. Only features
    whose score favours the target are chosen, so there may be fewer than asked for. Which texts are held out depends
    on their content and `seed` alone, and equal texts are held out together. The whole encoder of each layer is in
    memory: `d_sae * d_model * 4` bytes per layer. With `permutations` or `splits` one number per text and feature that
    fires in it is kept, 12 bytes each.

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
        rank_by: `mean_difference`, `delta`, `log_odds`, `monolinguality` (see `evidence.scores`) or `auroc`.
        positions: `all` tokens, or the `last` of each text: for texts that end just before a decision.
        max_length: Tokens kept of each text.
        max_tokens: Stop taking texts of a group at this many tokens; by default take all.
        batch_size: Texts in one forward.
        holdout: Share of each group's texts that takes no part in the choice, from 0 to below 1.
        seed: Decides which texts are held out, which are taken under `max_tokens`, permutations, halves and resamples.
        max_norm_ratio: Leave out tokens whose residual is longer than this many times the layer's median; 0: none.
        permutations: Permutations for `p_value`, `q_value` and `familywise_p`; 0: none. 1000 is a start.
        splits: Times the texts are halved for `selection_rate`; 0: none. 10 is a start.
        bootstrap: Resamples for 95 % intervals, `..._low` and `..._high`; 0: none. 1000 is a start. Of the held-out
            figures if there are any, else of those on the texts that features were chosen on, which flatter.
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
    search = Search(
        target=target,
        top=top,
        select=select,
        rank_by=rank_by,
        positions=positions,
        max_length=max_length,
        max_tokens=max_tokens,
        max_norm_ratio=max_norm_ratio,
        batch_size=batch_size,
        holdout=holdout,
        seed=seed,
        permutations=permutations,
        splits=splits,
        bootstrap=bootstrap,
    )
    return discover(
        model, tokenizer, saes, groups, search, layers=layers, model_name=model_name, show_progress=show_progress
    ).found


def discover(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    groups: Mapping[str, Sequence[str]],
    search: Search,
    *,
    layers: Sequence[int] | None = None,
    model_name: str | None = None,
    show_progress: bool = True,
) -> Discovery:
    """What `find_features` does, with everything that was read on the way."""
    target = search.target
    if target not in groups or len(groups) < 2:
        raise ConfigError(
            f"The target group `{target}` and at least one other are needed; got "
            f"{', '.join(f'`{name}`' for name in groups) or 'no group'}."
        )
    layers = tuple(sorted(set(saes.layers if layers is None else layers)))
    encoders = load_encoders(model, saes, layers)
    prepared = {
        name: prepare_group(
            name,
            groups[name],
            tokenizer,
            positions=search.positions,
            max_length=search.max_length,
            max_tokens=search.max_tokens,
            holdout=search.holdout,
            seed=search.seed,
        )
        for name in [target, *(name for name in groups if name != target)]
    }

    def encode(name: str, token_ids: list[list[int]], what: str) -> Iterator[ResidualBatch]:
        return residual_batches(
            model,
            token_ids,
            layers,
            batch_size=search.batch_size,
            positions=search.positions,
            show_progress=show_progress,
            description=f"{what} `{name}`",
        )

    limits = norm_limits(
        model,
        [group.kept() for group in prepared.values()],
        layers,
        ratio=search.max_norm_ratio,
        positions=search.positions,
        batch_size=search.batch_size,
        show_progress=show_progress,
    )
    keep = KEEP[search.rank_by] if search.permutations or search.splits else None
    sums: dict[int, dict[str, GroupSums]] = {layer: {} for layer in layers}
    for name, group in prepared.items():
        sinks = {layer: GroupSums(sae, keep) for layer, sae in encoders.items()}
        collect(encode(name, group.kept(), "searching"), sinks, limits=limits)
        for layer, sink in sinks.items():
            _require_tokens(sink, name, layer, search.max_norm_ratio)
            sums[layer][name] = sink

    ranking = {layer: scores(sums[layer], target) for layer in layers}
    shortlist = candidates(ranking, search.rank_by, search.select, search.top)
    if not shortlist:
        raise DataError(
            f"No feature of layers {', '.join(map(str, layers))} has a positive `{search.rank_by}` for `{target}`. "
            f"Search other layers, or give more or clearer texts."
        )
    tests = examine_search(
        sums,
        {name: group.heldout.count(False) for name, group in prepared.items()},
        rank_by=search.rank_by,
        top=search.top,
        permutations=search.permutations,
        splits=search.splits,
        seed=search.seed,
    )

    figures: dict[int, dict[str, TextFigures]] = {layer: {} for layer in shortlist}
    masked = dict.fromkeys(shortlist, 0)
    for name, group in prepared.items():
        measured = {n: TextFigures(encoders[n], indices, len(group.token_ids)) for n, indices in shortlist.items()}
        for layer, count in collect(encode(name, group.token_ids, "measuring"), measured, limits=limits).items():
            masked[layer] += count
            figures[layer][name] = measured[layer]

    described = [
        item
        for layer in shortlist
        for item in describe(
            layer,
            sums[layer],
            ranking[layer],
            tests.evidence[layer],
            figures[layer],
            prepared,
            rank_by=search.rank_by,
            bootstrap=search.bootstrap,
            seed=search.seed,
        )
    ]
    chosen = choose(described, top=search.top, select=search.select, rank_by=search.rank_by, target=target)
    found = make_set(
        chosen,
        model,
        saes,
        encoders,
        model_name=model_name,
        target_group=target,
        origin={
            "made_by": f"qscope_trl {__version__}, find_features",
            "layers": list(layers),
            "settings": {name: value for name, value in asdict(search).items() if name not in _NOT_RECORDED},
            "texts": {name: group.heldout.count(False) for name, group in prepared.items()},
            "tokens": {name: sums[layers[0]][name].num_tokens for name in prepared},
            "heldout_texts": {name: group.heldout.count(True) for name, group in prepared.items()},
            "masked": {
                "first_positions": sum(len(group.token_ids) for group in prepared.values()),
                "norm_outliers": {f"L{layer}": count for layer, count in masked.items()},
                "median_norm": {} if limits is None else {f"L{layer}": limits.median[layer] for layer in shortlist},
            },
            **({"search": tests.summary} if tests.summary else {}),
        },
    )
    return Discovery(found, search, prepared, encoders, sums, figures, limits)


# The target is on record as the set's own, and the size of batches changes no result.
_NOT_RECORDED = ("target", "batch_size")


def _require_tokens(sums: GroupSums, name: str, layer: int, ratio: float) -> None:
    if not sums.num_tokens:
        raise DataError(
            f"No token of group `{name}` is left in layer {layer}: the residual of every one is longer than {ratio:g} "
            f"times the median. Raise `max_norm_ratio`, or set it to 0 to keep all."
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
