"""Values of features over the tokens seen so far, of texts that grow: what a gate asks after every token.

Kept on the device that the activations are on; nothing is waited for. `rules.TokenValues` is the same over the tokens
of one finished text. Left out: where the activations come from.

Shape legend: `B` texts, `T` tokens that are added at once, `S` features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qscope_trl.activations.active import AGGREGATIONS
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureId


class RunningValues:
    """Values of features over every prefix of growing texts; a rule reads them as it reads documents.

    ```python
    running = RunningValues(rule.features)
    running.extend(acts_BTS)               # a prompt, then token by token
    is_on_BT = rule.evaluate(running)      # after each of the tokens just added
    ```

    Equal at every token to `rule.evaluate` on the values of the text up to it. That the activations are finite is not
    checked here: it would wait for the device.

    Args:
        features: Features, in the order of the columns of what `extend` is given.
    """

    num_documents = 0

    def __init__(self, features: Sequence[FeatureId]) -> None:
        self.features = tuple(features)
        self._place = {feature: place for place, feature in enumerate(self.features)}
        self._ends: dict[str, Tensor] = {}
        self._prefixes: dict[str, Tensor] = {}

    @torch.no_grad()
    def extend(self, acts_BTS: Tensor, keep_BT: Tensor | None = None) -> None:
        """Go on by some tokens of each text.

        Args:
            acts_BTS: Activations after TopK and ReLU at those tokens.
            keep_BT: Whether a token counts; one that does not leaves all values as they were. Position 0 of a text
                does not count, nor does padding.

        Raises:
            ConfigError: If the shape is another.
        """
        if acts_BTS.dim() != 3 or acts_BTS.shape[-1] != len(self.features):
            raise ConfigError(
                f"`acts` has the shape {tuple(acts_BTS.shape)}; it is (texts, tokens, {len(self.features)} features)."
            )
        if keep_BT is None:
            keep_BT = torch.ones(acts_BTS.shape[:2], dtype=torch.bool, device=acts_BTS.device)
        keep = keep_BT[..., None]
        acts = torch.where(keep, acts_BTS.double(), 0.0)
        place_T = torch.arange(acts.shape[1], device=acts.device)
        # Place of the last token so far that counts; -1 before the first.
        latest_BT = torch.where(keep_BT, place_T, -1).cummax(1).values
        last = acts.gather(1, latest_BT.clamp(min=0)[..., None].expand_as(acts))
        if self._ends:
            last = torch.where((latest_BT >= 0)[..., None], last, self._ends["last"][:, None])
        self._prefixes = {
            "max": acts.cummax(1).values,
            "sum": acts.cumsum(1),
            "fired": (acts > 0).double().cumsum(1),
            "tokens": keep.double().cumsum(1),
            "last": last,
        }
        for name, end in self._ends.items():
            if name == "max":
                self._prefixes[name] = torch.maximum(self._prefixes[name], end[:, None])
            elif name != "last":
                self._prefixes[name] = self._prefixes[name] + end[:, None]
        self._ends = {name: value[:, -1] for name, value in self._prefixes.items()}

    def select(self, rows: Tensor) -> None:
        """Put other texts in the places of these, as beam search does.

        Args:
            rows: For each place, which text goes on there, int64 `(B,)`.
        """
        self._ends = {name: end.index_select(0, rows.to(end.device)) for name, end in self._ends.items()}

    def values(self, feature: FeatureId, aggregation: str) -> Tensor:
        """Value of one feature after each of the tokens just added, `(B, T)`.

        Rounded to fp32 as documents' values are, given as fp64.

        Raises:
            ConfigError: If the aggregation is unknown.
            DataError: If the feature is not among the columns.
        """
        if aggregation not in AGGREGATIONS:
            raise ConfigError(f"`{aggregation}` is no aggregation; choose one of {', '.join(AGGREGATIONS)}.")
        if feature not in self._place:
            raise DataError(f"{feature} is not among the features whose activations are given.")
        place = self._place[feature]
        if aggregation in ("max", "last"):
            found = self._prefixes[aggregation][..., place]
        else:
            total = self._prefixes["sum" if aggregation == "mean" else "fired"][..., place]
            found = total / self._prefixes["tokens"][..., 0].clamp(min=1)
        rounded: Tensor = found.float()
        return rounded.double()
