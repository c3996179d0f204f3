"""A FeatureSet against the SAEs and texts at hand: is it of these SAEs, and do its features fire as recorded?

Shape legend: `N` tokens of a batch, `X` texts, `S` chosen features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qscope_trl.analysis.doctor.findings import listed
from qscope_trl.analysis.doctor.result import FeatureFiring, Finding
from qscope_trl.errors import FeatureSetError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.ops.reference import TopKActs
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE

RATE_CHANGE = 2.0
"""Factor beyond the recorded rates from which on a firing rate is called another one."""

MIN_EXPECTED = 5.0
"""Firings that must be expected for silence to mean anything: a Poisson count of mean 5 is 0 once in 150 times."""

_RATES = ("token_rate", "token_rate_others")


class Watch:
    """At how many tokens and in which texts the chosen features of a layer fire.

    Args:
        features: The features, all of one layer.
        sae: Its SAE.
        num_texts: Number of texts.
    """

    def __init__(self, features: Sequence[Feature], sae: TopKSAE, num_texts: int) -> None:
        self.features = tuple(features)
        device = sae.W_enc.device
        self._column_F = torch.full((sae.d_sae,), -1, dtype=torch.int64, device=device)
        self._column_F[[feature.index for feature in features]] = torch.arange(len(features), device=device)
        self._fired_S = torch.zeros(len(features), dtype=torch.int64, device=device)
        self._fired_XS = torch.zeros(num_texts, len(features), dtype=torch.bool, device=device)
        self._num_tokens = 0
        self._num_texts = num_texts

    def update(self, acts: TopKActs, text_index_N: Tensor) -> None:
        """Add tokens."""
        column = self._column_F[acts.top_indices].masked_fill(acts.top_acts <= 0, -1)
        token, slot = (column >= 0).nonzero(as_tuple=True)
        self._fired_S += torch.bincount(column[token, slot], minlength=len(self.features))
        self._fired_XS[text_index_N.to(column.device)[token], column[token, slot]] = True
        self._num_tokens += acts.top_acts.shape[0]

    def firing(self) -> list[FeatureFiring]:
        """Rates of each feature, in order."""
        texts = self._fired_XS.sum(0)
        return [
            FeatureFiring(
                name=str(feature.id),
                label=feature.label,
                num_tokens=self._num_tokens,
                token_rate=int(self._fired_S[s]) / max(1, self._num_tokens),
                text_rate=int(texts[s]) / self._num_texts,
                recorded={name: feature.evidence[name] for name in _RATES if name in feature.evidence},
            )
            for s, feature in enumerate(self.features)
        ]


def watched(features: FeatureSet | None, layer: int, sae: TopKSAE, num_texts: int) -> Watch | None:
    """What to watch in a layer: its chosen features that the SAE has; None without any."""
    mine = [f for f in features.for_layer(layer) if f.index < sae.d_sae] if features is not None else []
    return Watch(mine, sae, num_texts) if mine else None


def check_set(features: FeatureSet, saes: SAESuite, layers: Iterable[int], num_layers: int) -> list[Finding]:
    """Whether a set belongs to these SAEs and this model.

    Args:
        features: The set.
        saes: The SAEs.
        layers: Layers that are checked.
        num_layers: Layers of the model.

    Returns:
        A finding if it does not belong, one if features are in layers that are not checked, or one that it belongs.
    """
    mine = [layer for layer in features.layers if layer in set(layers)]
    missing = [layer for layer in features.layers if layer not in mine]
    found = []
    if missing:
        found.append(
            Finding(
                check="features",
                severity="warn",
                what=f"The FeatureSet has features in {listed(missing)}, which were not checked.",
                why="Nothing is known about these features.",
                action="Add the layers to `--layers`; if the SAEs have none for them, the set is of another release.",
                layers=tuple(missing),
            )
        )
    try:
        prints = {layer: saes.fingerprint(layer) for layer in mine}
        for layer in mine:
            spec = saes.spec(layer)
            own = features.with_features(features.for_layer(layer))
            own.check_fits(
                d_model=spec.d_model, num_layers=num_layers, d_sae=spec.d_sae, sae=saes.source, fingerprints=prints
            )
    except FeatureSetError as err:
        found.append(
            Finding(
                check="features",
                severity="fail",
                what=str(err),
                why="A penalty, rule or dashboard with this set would read unrelated features.",
                action="Use the SAEs the set was made with, or find the features again with `qscope find`.",
                layers=tuple(mine),
            )
        )
        return found
    compared = [layer for layer in mine if layer in features.sae_fingerprints]
    if mine:
        proof = f"fingerprints of {listed(compared)} agree" if compared else "it records no fingerprint"
        found.append(Finding(check="features", severity="ok", what=f"The FeatureSet fits the SAEs: {proof}."))
    return found


def judge_firing(firing: Sequence[FeatureFiring]) -> list[Finding]:
    """Features that never fire on the texts though they should, and ones that fire at another rate than recorded."""
    if not firing:
        return []
    found = []
    silent = [f for f in firing if f.token_rate == 0]
    gone = [f for f in silent if max(f.recorded.values(), default=0) * f.num_tokens >= MIN_EXPECTED]
    if silent:
        found.append(
            Finding(
                check="features",
                severity="warn" if gone else "note",
                what=f"{len(silent)} of {len(firing)} chosen features fire at none of the {firing[0].num_tokens} "
                f"tokens: {_names(silent)}."
                + (f" By their evidence {_names(gone)} should have fired 5 times or more." if gone else ""),
                why="A feature that is silent on your texts is neither penalised nor seen there.",
                action="Compare texts, model and SAEs with those the features were found with."
                if gone
                else "Check on texts that show the behaviour; if they are silent there too, find features anew.",
            )
        )
    moved = [f for f in firing if f.token_rate and _outside(f)]
    if moved:
        worst = max(moved, key=lambda f: f.token_rate)
        low, high = min(worst.recorded.values()), max(worst.recorded.values())
        found.append(
            Finding(
                check="features",
                severity="note",
                what=f"{len(moved)} of {len(firing)} chosen features fire more than {RATE_CHANGE:.0f} times as often, "
                f"or as seldom, as in any group they were found on: {_names(moved)}. {worst.name} fires at "
                f"{worst.token_rate:.2%} of tokens, recorded are {low:.2%} to {high:.2%}.",
                why="Thresholds and weights were set on other rates.",
                action="Expect it on texts of another kind; on texts of the same kind, find the features anew.",
            )
        )
    if not found:
        found.append(
            Finding(
                check="features",
                severity="ok",
                what=f"All {len(firing)} chosen features fire on the texts"
                + (", at rates like those recorded." if all(f.recorded for f in firing) else "."),
            )
        )
    return found


def _outside(firing: FeatureFiring) -> bool:
    if not firing.recorded:
        return False
    low, high = min(firing.recorded.values()), max(firing.recorded.values())
    enough = max(firing.token_rate, low) * firing.num_tokens >= MIN_EXPECTED
    return enough and not low / RATE_CHANGE <= firing.token_rate <= high * RATE_CHANGE


def _names(firing: Sequence[FeatureFiring], most: int = 5) -> str:
    shown = ", ".join(f.name for f in firing[:most])
    return shown if len(firing) <= most else f"{shown} and {len(firing) - most} more"
