"""What the doctor measured and what it concludes; plain data, ready for JSON.

Left out: how anything is measured (`fit`, `context`, `tuned`, `chosen`) and judged (`findings`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qscope_trl.files import json_values

Severity = Literal["fail", "warn", "note", "ok"]

VERDICTS = {"fail": ("does not fit", 3), "warn": ("doubtful", 1)}
"""By the worst severity among the findings: verdict and exit code. 2 is taken by errors."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One conclusion.

    Args:
        check: Which check it comes from, in a word or two.
        severity: `fail` and `warn` decide the verdict; `note` tells what to mind; `ok` what was in order.
        what: What was found, with its figures.
        why: Why it matters; empty for `ok`.
        action: What to do; empty if nothing.
        layers: Layers concerned; empty if it is about the whole.
    """

    check: str
    severity: Severity
    what: str
    why: str = ""
    action: str = ""
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FirstPosition:
    """How an SAE does at position 0.

    Args:
        num_tokens: Texts that were seen.
        fvu: Squared error over squared distance from the mean of the other positions.
        cosine: Mean cosine between residual and reconstruction.
        l0: Mean number of active features.
        norm_ratio: Median norm over that of the other positions.
    """

    num_tokens: int
    fvu: float
    cosine: float
    l0: float
    norm_ratio: float


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How one layer's SAE describes the model on the texts, at all positions but 0 and without norm outliers.

    Args:
        layer: The layer.
        d_sae: Number of features.
        k: Active features per token as stated; None for other activations than TopK.
        num_tokens: Tokens counted.
        fvu: Fraction of variance unexplained.
        chance: The same of noise with the residuals' mean and covariance, on the sample.
        cosine: Mean cosine between residual and reconstruction.
        l0: Mean number of active features per token.
        short_share: Share of tokens with fewer than k active features.
        silent_share: Share of features that fire at no token.
        norm: Median norm of the residuals.
        norm_ratio: Mean norm of the reconstructions over that of the residuals.
        outlier_share: Share of tokens left out because their norm exceeds ten times the median.
        fvu_with_outliers: Fraction unexplained with them.
        first: Position 0; None if no text has more than that.
        places: Fraction unexplained of the sample at the layer and at the places beside it, by place: -1 is what
            enters layer 0, the number of layers what leaves the final norm.
        readings: Fraction unexplained of the sample under other conventions; see `alternatives.alternatives`.
        scale: The factor that `readings["scaled"]` stands for.
        roundings: By dtype, Jaccard index of active features and relative error of values against fp32.
        chance_jaccard: Mean Jaccard index between active features of different tokens.
        alignment: Mean cosine between a feature's encoder and decoder vector.
        alignment_reshaped: The same had `W_dec` been reshaped instead of transposed; NaN if that is no question.
    """

    layer: int
    d_sae: int
    k: int | None
    num_tokens: int
    fvu: float
    chance: float
    cosine: float
    l0: float
    short_share: float
    silent_share: float
    norm: float
    norm_ratio: float
    outlier_share: float
    fvu_with_outliers: float
    first: FirstPosition | None
    places: dict[int, float]
    readings: dict[str, float]
    scale: float
    roundings: dict[str, dict[str, float]]
    chance_jaccard: float
    alignment: float
    alignment_reshaped: float


@dataclass(frozen=True, kw_only=True)
class ContextFit:
    """The same content tokens read plainly and in another context (BOS, chat template), one layer.

    Args:
        layer: The layer.
        num_tokens: Tokens compared.
        fvu_plain: Fraction unexplained in the plain text.
        fvu: In the other context.
        l0_plain: Active features per token in the plain text.
        l0: In the other context.
        jaccard: Mean Jaccard index of the active features.
        not_finite: Tokens left out because a residual of theirs holds NaN or inf in either context.
    """

    layer: int
    num_tokens: int
    fvu_plain: float
    fvu: float
    l0_plain: float
    l0: float
    jaccard: float
    not_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class TunedFit:
    """Base and tuned model on the same tokens, one layer.

    Args:
        layer: The layer.
        num_tokens: Tokens compared.
        fvu_base: Fraction unexplained in the base model.
        fvu: In the tuned one.
        cosine_base: Mean cosine between residual and reconstruction in the base model.
        cosine: In the tuned one.
        l0: Active features per token in the tuned one.
        jaccard: Mean Jaccard index of the active features, base against tuned.
        residual_cosine: Mean cosine between the two models' residuals.
        changed_share: Of features that fire at 20 tokens or more in either, the share whose firing rate differs more
            than twofold; NaN without any.
    """

    layer: int
    num_tokens: int
    fvu_base: float
    fvu: float
    cosine_base: float
    cosine: float
    l0: float
    jaccard: float
    residual_cosine: float
    changed_share: float


@dataclass(frozen=True, kw_only=True)
class FeatureFiring:
    """How a chosen feature fires on the texts.

    Args:
        name: The feature.
        label: What it stands for, if the set says.
        num_tokens: Tokens seen.
        token_rate: Share of tokens at which it fires.
        text_rate: Share of texts in which it fires.
        recorded: Token rates in its evidence, by name.
    """

    name: str
    label: str
    num_tokens: int
    token_rate: float
    text_rate: float
    recorded: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was measured, and the findings.

    Args:
        model: Name of the model.
        saes: Name of the SAEs.
        dtype: Dtype of the model's weights.
        device: Where it ran.
        num_texts: Texts with a token after position 0.
        num_tokens: Their tokens after position 0.
        layers: By layer; those that could be measured.
        bos: Per layer with BOS against without; empty if that is no question.
        chat: Per layer in the chat template against plain; empty if there is none.
        tuned_name: Name of the tuned model.
        tuned: Per layer base against tuned; empty without one.
        kl: Mean divergence of the tuned model's next-token distribution from the base's, KL(base || tuned), nats.
        features: The chosen features.
        findings: Conclusions, the worst first.
    """

    model: str
    saes: str
    dtype: str
    device: str
    num_texts: int
    num_tokens: int
    layers: tuple[LayerFit, ...] = ()
    bos: tuple[ContextFit, ...] = ()
    chat: tuple[ContextFit, ...] = ()
    tuned_name: str | None = None
    tuned: tuple[TunedFit, ...] = ()
    kl: float | None = None
    features: tuple[FeatureFiring, ...] = ()
    findings: tuple[Finding, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """`fits`, `doubtful` or `does not fit`."""
        return self._conclusion[0]

    @property
    def exit_code(self) -> int:
        """0 fits, 1 doubtful, 3 does not fit."""
        return self._conclusion[1]

    @property
    def _conclusion(self) -> tuple[str, int]:
        severities = {finding.severity for finding in self.findings}
        return next((VERDICTS[s] for s in VERDICTS if s in severities), ("fits", 0))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, NaN as null, with verdict and exit code."""
        plain: dict[str, Any] = json_values({"verdict": self.verdict, "exit_code": self.exit_code, **asdict(self)})
        return plain
