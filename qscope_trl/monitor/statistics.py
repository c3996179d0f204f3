"""Running feature statistics of a training run: sums on the device, one reduction per log event.

Nothing here synchronises with the host between log events, and every process holds the same sums in the same order, so
the reduction cannot deadlock when processes see different data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope_trl.features import FeatureId


class FeatureStatistics:
    """Sums over masked tokens of each feature's value and activity, and of the penalty of each layer.

    Args:
        ids: Features in a fixed order, grouped by layer.
        value_names: Name of a feature's metric for the mean of its value, such as `mean_pre_act`.
    """

    def __init__(self, ids: Sequence[FeatureId], value_name: str) -> None:
        self.ids = tuple(ids)
        self.value_name = value_name
        self.layers = tuple(sorted({i.layer for i in self.ids}))
        self._columns = {layer: [n for n, i in enumerate(self.ids) if i.layer == layer] for layer in self.layers}
        self._sums: Tensor | None = None

    @property
    def size(self) -> int:
        """Length of the vector of sums: two per feature, two per layer."""
        return 2 * len(self.ids) + 2 * len(self.layers)

    def update(self, layer: int, values_NS: Tensor, active_NS: Tensor, penalty_N: Tensor, mask_N: Tensor) -> None:
        """Add one micro-batch of one layer.

        Args:
            layer: Decoder layer.
            values_NS: Value of each feature at each token, in the order of `ids` within the layer.
            active_NS: Whether each feature counts as firing at each token.
            penalty_N: Penalty of each token in this layer.
            mask_N: Which tokens count.
        """
        with torch.no_grad():
            if self._sums is None:
                dtype = torch.float32 if values_NS.device.type == "mps" else torch.float64
                self._sums = torch.zeros(self.size, dtype=dtype, device=values_NS.device)
            zero = values_NS.new_zeros(())
            parts = [
                torch.where(mask_N[:, None], values_NS, zero).sum(0),
                (active_NS & mask_N[:, None]).sum(0),
                torch.where(mask_N, penalty_N, zero).sum()[None],
                mask_N.sum()[None],
            ]
            at = torch.tensor(self._slots(layer), device=self._sums.device)
            self._sums.index_add_(0, at, torch.cat([p.to(self._sums) for p in parts]))

    def metrics(self, reduce_fn: Callable[[Tensor], Tensor] | None, device: torch.device) -> dict[str, float]:
        """Means since the last `reset`, over all processes.

        Args:
            reduce_fn: Sums a vector over processes; called exactly once on every process, also on one without data.
            device: Device for the sums if no data came.

        Returns:
            `penalty` (sum over layers of the mean per token), `L12/penalty`, `L12F345/<value_name>` and
            `L12F345/firing_rate`; empty if no process saw a token.
        """
        totals = self._totals(reduce_fn, device)
        metrics: dict[str, float] = {}
        total_penalty = 0.0
        for layer in self.layers:
            *features, penalty, tokens = (totals[slot] for slot in self._slots(layer))
            if tokens == 0:
                continue
            metrics[f"L{layer}/penalty"] = penalty / tokens
            total_penalty += penalty / tokens
            columns = self._columns[layer]
            for n, column in enumerate(columns):
                metrics[f"{self.ids[column]}/{self.value_name}"] = features[n] / tokens
                metrics[f"{self.ids[column]}/firing_rate"] = features[len(columns) + n] / tokens
        return {"penalty": total_penalty, **metrics} if metrics else {}

    def reset(self) -> None:
        """Forget all sums."""
        self._sums = None

    def state(
        self, reduce_fn: Callable[[Tensor], Tensor] | None = None, device: torch.device | None = None
    ) -> list[float] | None:
        """Sums as plain numbers, for a checkpoint: of all processes with `reduce_fn` and `device` as in `metrics`."""
        if self._sums is None and reduce_fn is None:
            return None
        return self._totals(reduce_fn, device or torch.device("cpu"))

    def load_state(self, state: list[float] | None, device: torch.device) -> None:
        """Take up sums that `state` gave, on one process only; a state of another length is ignored."""
        if state is not None and len(state) == self.size:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._sums = torch.tensor(state, dtype=dtype, device=device)

    def _totals(self, reduce_fn: Callable[[Tensor], Tensor] | None, device: torch.device) -> list[float]:
        sums = self._sums
        if sums is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            sums = torch.zeros(self.size, dtype=dtype, device=device)
        if reduce_fn is not None:
            sums = reduce_fn(sums.clone())
        totals: list[float] = sums.tolist()
        return totals

    def _slots(self, layer: int) -> list[int]:
        columns, n = self._columns[layer], len(self.ids)
        at = 2 * n + 2 * self.layers.index(layer)
        return [*columns, *(n + c for c in columns), at, at + 1]


def evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """Prefix of the metrics in a trainer's evaluation log (`eval`, `eval_name`), None in any other log."""
    for key in logs:
        if key.endswith("_runtime") and key != "train_runtime":
            return key.removesuffix("_runtime")
    return None
