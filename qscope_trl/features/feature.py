"""One feature: its address, and what it was chosen on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qscope_trl.errors import FeatureSetError
from qscope_trl.features.values import is_number, require_mapping, require_text, unquote

_NAME = re.compile(r"L(\d+)F(\d+)")


@dataclass(frozen=True, order=True)
class FeatureId:
    """Address of one SAE feature, written `L12F345`: layer 12 (counted from 0), feature 345.

    Args:
        layer: Decoder layer whose output the SAE reads, from 0.
        index: Row of `W_enc`, from 0.
    """

    layer: int
    index: int

    def __post_init__(self) -> None:
        for name in ("layer", "index"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise FeatureSetError(f"A feature's `{name}` is a whole number from 0, got {value!r}.")

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Read `L12F345`.

        Raises:
            FeatureSetError: If `text` has another form.
        """
        match = _NAME.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise FeatureSetError(f"`{text}` is not a feature name. Write layer and index as in `L12F345`.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"L{self.layer}F{self.index}"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One chosen feature.

    Args:
        layer: Decoder layer, from 0.
        index: Row of `W_enc`, from 0.
        weight: Factor of this feature in a penalty or score. Typical 1.0; must be finite.
        threshold: Pre-activation above which a hinge penalty starts (`alpha` in SASFT), typically the untuned
            model's mean pre-activation on text that should not carry the feature. May be negative.
        group_thresholds: Threshold per group of samples (for example per language); a group that is not listed uses
            `threshold`.
        label: What the feature stands for, in words.
        evidence: Figures it was chosen on, such as `auroc` or `mean_difference`.
    """

    layer: int
    index: int
    weight: float = 1.0
    threshold: float = 0.0
    group_thresholds: Mapping[str, float] = field(default_factory=dict)
    label: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of = f" of feature {self.id}"
        require_mapping(f"`group_thresholds`{of}", self.group_thresholds, "group to threshold, as in {en: 0.5}")
        require_mapping(f"`evidence`{of}", self.evidence, "name to number, as in {auroc: 0.9}")
        require_text(f"`label`{of} is", self.label)
        for key, value in [
            ("weight", self.weight),
            ("threshold", self.threshold),
            *((f"group_thresholds.{group}", value) for group, value in self.group_thresholds.items()),
        ]:
            if not is_number(value) or not math.isfinite(value):
                raise FeatureSetError(f"`{key}`{of} is a finite number, got {value!r}.{unquote(value)}")
        for key, value in self.evidence.items():
            if not is_number(value):
                raise FeatureSetError(f"`evidence.{key}`{of} is a number, got {value!r}.{unquote(value)}")

    @property
    def id(self) -> FeatureId:
        """Address of the feature."""
        return FeatureId(self.layer, self.index)

    def threshold_for(self, group: str | None) -> float:
        """Threshold that applies to a sample of `group`."""
        return self.threshold if group is None else self.group_thresholds.get(group, self.threshold)
