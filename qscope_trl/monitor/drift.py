"""How far a model has moved on fixed tokens, and whether an SAE still describes it: figures, limits, reference.

The reference is what the frozen model showed: residuals, active features and the largest log-probabilities of each
token, on the host. Every comparison is of the same tokens. Left out: running a model; that is `training.drift`.

Shape legend: `N` tokens of the probe, `D` d_model, `F` d_sae, `K` active features a token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from qscope_trl.errors import ConfigError, DataError
from qscope_trl.monitor.divergence import TopLogProbs
from qscope_trl.monitor.fit_sums import MAX_NORM_RATIO, FitSums, codes, jaccard
from qscope_trl.ops.reference import TopKActs, token_chunks
from qscope_trl.sae.topk_sae import TopKSAE

MIN_FIRINGS = 5
"""Tokens of the probe at which a feature must fire on the frozen model to count as alive: a Poisson count of mean 5 is
0 once in 150 times."""


@dataclass(frozen=True, kw_only=True)
class DriftLimits:
    """From where on drift is spoken of; None for no limit.

    Each limit is for every layer by itself, `max_kl` for the model. A figure that is NaN crosses its limit. The
    defaults lie between what harmless and what ruined runs of the bundled model show (benchmarks/drift_levels.py).

    Args:
        max_fvu_ratio: Fraction unexplained over that of the frozen model. 2 is where `qscope doctor` calls a fit
            doubtful, too.
        min_jaccard: Mean over tokens of features active on both models over features active on either. At 0.5 two
            thirds of either set are shared; the doctor's limit too.
        min_residual_cosine: Mean over tokens of the cosine between the residuals of both models.
        max_dead_rate: Share of the features that were alive and are silent.
        max_kl: Mean divergence of next-token distributions from the frozen model's, nats. None: how far a model may
            move is what its training is for, and no figure of ours holds for others.

    Raises:
        ConfigError: If a limit is outside what its figure can be.
    """

    max_fvu_ratio: float | None = 2.0
    min_jaccard: float | None = 0.5
    min_residual_cosine: float | None = 0.9
    max_dead_rate: float | None = 0.1
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_fvu_ratio", 1.0, math.inf),
            ("min_jaccard", 0.0, 1.0),
            ("min_residual_cosine", -1.0, 1.0),
            ("max_dead_rate", 0.0, 1.0),
            ("max_kl", 0.0, math.inf),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and low <= value <= high):
                raise ConfigError(
                    f"`{name}` is {value!r}; it is a number from {low:g} to {high:g}, or None for no limit."
                )

    def as_dict(self) -> dict[str, float | None]:
        """Every limit by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class LayerDrift(NamedTuple):
    """One layer's figures on the probe."""

    fvu: float
    """Fraction of variance unexplained."""

    fvu_ratio: float
    """The same over that of the frozen model."""

    l0: float
    """Mean number of active features per token."""

    dead_rate: float
    """Of the features that fired at `MIN_FIRINGS` tokens or more on the frozen model, the share that fires at none."""

    jaccard: float
    """Mean over tokens of features active on both models over features active on either."""

    activation_cosine: float
    """Mean over tokens of the cosine between the activations of all features on both models."""

    residual_cosine: float
    """Mean over tokens of the cosine between the residuals of both models."""


class Drift(NamedTuple):
    """All figures of one probe."""

    layers: dict[int, LayerDrift]
    """By layer."""

    kl: float | None
    """Mean KL(frozen || now) of next-token distributions, nats a token; None where it is not measured."""

    def metrics(self) -> dict[str, float]:
        """Under the names of the trainer's log, without the prefix `sae/drift/`."""
        found = {f"L{layer}/{name}": value for layer, one in self.layers.items() for name, value in _shown(one)}
        return found if self.kl is None else {**found, "kl": self.kl}


class Crossing(NamedTuple):
    """A limit that a figure has crossed."""

    limit: str
    """Name in `DriftLimits`."""

    layer: int | None
    """Layer of the figure; None for `max_kl`."""

    value: float
    """The figure."""

    bound: float
    """The limit."""

    def __str__(self) -> str:
        return self.limit if self.layer is None else f"L{self.layer}/{self.limit}"


def crossings(limits: DriftLimits, drift: Drift) -> list[Crossing]:
    """The limits that a probe crosses, layer by layer."""
    found = []
    for layer, one in sorted(drift.layers.items()):
        for limit in ("max_fvu_ratio", "min_jaccard", "min_residual_cosine", "max_dead_rate"):
            value, bound = getattr(one, limit[4:]), getattr(limits, limit)
            # Written so that NaN crosses.
            is_within = bound is None or (value <= bound if limit.startswith("max") else value >= bound)
            if not is_within:
                found.append(Crossing(limit, layer, value, bound))
    if limits.max_kl is not None and drift.kl is not None and not drift.kl <= limits.max_kl:
        found.append(Crossing("max_kl", None, drift.kl, limits.max_kl))
    return found


# --- one layer ---------------------------------------------------------------------------------------------------


class LayerReference(NamedTuple):
    """What the frozen model showed in one layer; everything on the host."""

    residuals_ND: Tensor
    """In the model's dtype."""

    acts: TopKActs
    """Active features, fp32 and int32; unused slots have activation 0."""

    within_N: Tensor
    """Tokens that count: those whose norm is at most `MAX_NORM_RATIO` times the median, as SAEs are trained on."""

    fvu: float
    """Fraction of variance unexplained."""


@torch.no_grad()
def layer_reference(sae: TopKSAE, x_ND: Tensor) -> LayerReference:
    """The reference of one layer.

    Args:
        sae: Its SAE, with decoder.
        x_ND: Residuals of the frozen model, on the SAE's device.

    Raises:
        DataError: If a residual is not finite, or the tokens have no variance to explain.
    """
    if not bool(x_ND.isfinite().all()):
        raise DataError(
            "The model's residuals on the probe texts are NaN or infinite before the first step, so nothing can be "
            "compared with them. Load the model in bfloat16 or float32."
        )
    norm_N = x_ND.float().norm(dim=1)
    within_N = norm_N <= MAX_NORM_RATIO * norm_N.median()
    acts = codes(sae, x_ND.float())
    fvu = _fit(sae, x_ND[within_N], _rows(acts, within_N)).fvu()
    if math.isnan(fvu):
        raise DataError(
            f"The {x_ND.shape[0]} tokens of the probe texts are all alike, so there is no variance an SAE could "
            f"explain. Give ordinary, varied texts."
        )
    stored = TopKActs(acts.top_acts.float().cpu(), acts.top_indices.int().cpu())
    return LayerReference(x_ND.cpu(), stored, within_N.cpu(), fvu)


@torch.no_grad()
def compare_layer(sae: TopKSAE, reference: LayerReference, x_ND: Tensor) -> LayerDrift:
    """Figures of one layer, over the tokens that count in the reference.

    Args:
        sae: Its SAE, with decoder.
        reference: What the frozen model showed at the same tokens.
        x_ND: Residuals of the model now, on the SAE's device.
    """
    device = x_ND.device
    within_N = reference.within_N.to(device)
    x_ND, before_ND = x_ND[within_N].float(), reference.residuals_ND.to(device)[within_N].float()
    top_acts, top_indices = (part.to(device) for part in reference.acts)
    before = _rows(TopKActs(top_acts, top_indices.long()), within_N)
    now = codes(sae, x_ND)
    fit = _fit(sae, x_ND, now)
    fired_F = torch.bincount(before.top_indices[before.top_acts > 0], minlength=sae.d_sae)
    alive_F = fired_F >= MIN_FIRINGS
    silent = int((alive_F & (fit.fired_F == 0)).sum())
    fvu = fit.fvu()
    return LayerDrift(
        fvu=fvu,
        fvu_ratio=_ratio(fvu, reference.fvu),
        l0=fit.l0,
        dead_rate=silent / max(1, int(alive_F.sum())),
        jaccard=float(jaccard(before, now).mean()),
        activation_cosine=float(activation_cosine(before, now).mean()),
        residual_cosine=float(_cosine(before_ND, x_ND).mean()),
    )


def activation_cosine(first: TopKActs, second: TopKActs) -> Tensor:
    """Of each token, the cosine between two sets of activations as vectors over all features.

    Returns:
        `(N,)`, fp64; 1 where no feature is active in either, 0 where in one alone.
    """
    parts = [torch.zeros(0, dtype=torch.float64, device=first.top_acts.device)]
    for rows in token_chunks(first.top_acts.shape[0], first.top_acts.shape[1] * second.top_acts.shape[1]):
        a, b = first.top_acts[rows].double(), second.top_acts[rows].double()
        same = first.top_indices[rows, :, None] == second.top_indices[rows, None, :]
        dot = (same * a[:, :, None] * b[:, None, :]).sum((1, 2))
        sizes = a.square().sum(1).sqrt() * b.square().sum(1).sqrt()
        neither = (a.abs().sum(1) + b.abs().sum(1)) == 0
        parts.append(torch.where(neither, 1.0, torch.where(sizes > 0, dot / sizes, dot)))
    return torch.cat(parts)


def _cosine(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    return cosine_similarity(first_ND.double(), second_ND.double(), dim=1)


def _fit(sae: TopKSAE, x_ND: Tensor, acts: TopKActs) -> FitSums:
    sums = FitSums(sae)
    # In chunks: the sums are fp64.
    for rows in token_chunks(x_ND.shape[0], x_ND.shape[1]):
        part = TopKActs(acts.top_acts[rows], acts.top_indices[rows])
        sums.update(x_ND[rows].float(), part, sae.decode(part))
    return sums


def _rows(acts: TopKActs, keep_N: Tensor) -> TopKActs:
    return TopKActs(acts.top_acts[keep_N], acts.top_indices[keep_N])


def _ratio(value: float, reference: float) -> float:
    if reference > 0:
        return value / reference
    return 1.0 if value == 0 else math.inf if value > 0 else value


def _shown(one: LayerDrift) -> list[tuple[str, float]]:
    return [(name, value) for name, value in one._asdict().items() if name != "fvu_ratio"]


# --- the reference as a file -------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What the frozen model showed on the probe."""

    layers: dict[int, LayerReference]
    """By layer."""

    log_probs: TopLogProbs | None
    """None where logits are not read."""

    identity: dict[str, Any]
    """What it was made of: the probe's tokens, the SAEs and the settings, as JSON has them."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self).values())

    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """In which part it is of something else than `identity` says; None if in none."""
        return next((name for name, value in identity.items() if self.identity.get(name) != value), None)


def save_reference(path: Path, reference: Reference) -> None:
    """Write a reference as one safetensors file.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    facts = {"identity": reference.identity, "fvu": {layer: one.fvu for layer, one in reference.layers.items()}}
    try:
        save_file(_tensors(reference), path, metadata={"drift": json.dumps(facts)})
    except SafetensorError as err:
        raise OSError(str(err)) from err


def load_reference(path: Path) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        DataError: If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["drift"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = {
            int(layer): LayerReference(
                tensors[f"L{layer}.residuals"],
                TopKActs(tensors[f"L{layer}.top_acts"], tensors[f"L{layer}.top_indices"]),
                tensors[f"L{layer}.within"],
                float(fvu),
            )
            for layer, fvu in facts["fvu"].items()
        }
        names = [f"log_probs.{name}" for name in TopLogProbs._fields]
        log_probs = TopLogProbs(*(tensors[name] for name in names)) if names[0] in tensors else None
        return Reference(layers, log_probs, dict(facts["identity"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as err:
        raise DataError(
            f"The drift reference '{path}' is damaged ({err}). Delete it; figures are then against the model as it is "
            f"when training resumes."
        ) from err


def _tensors(reference: Reference) -> dict[str, Tensor]:
    found = {}
    for layer, one in reference.layers.items():
        found[f"L{layer}.residuals"] = one.residuals_ND.contiguous()
        found[f"L{layer}.top_acts"] = one.acts.top_acts.contiguous()
        found[f"L{layer}.top_indices"] = one.acts.top_indices.contiguous()
        found[f"L{layer}.within"] = one.within_N.contiguous()
    if reference.log_probs is not None:
        found |= {f"log_probs.{name}": value for name, value in reference.log_probs._asdict().items()}
    return found
