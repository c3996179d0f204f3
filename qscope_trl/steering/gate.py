"""Steering on a condition: a rule over the features of the text so far, decided row by row while it is generated.

Residuals are read before anything is added to them, and at layers no higher than the first steered one. So the rule
reads what the model itself makes of the text, also where that text was generated under steering.

Shape legend: `B` rows, `T` columns of a forward, `S` features the rule reads.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qscope_trl.activations.running import RunningValues
from qscope_trl.errors import ConfigError, SteeringError
from qscope_trl.hooks.edit import Forward
from qscope_trl.rules import Rule, load_rule
from qscope_trl.sae.chosen import ChosenEncoder
from qscope_trl.sae.suite import SAESuite
from qscope_trl.steering.span import Span

READS = ("prompt", "text")
"""What a gate reads: the prompt, once; or the text so far, at every token."""


class Gate:
    """Decides where the rule holds.

    Args:
        rule: `Rule`, rule file, or the text of a rule.
        suite: SAEs; those of the rule's layers are opened.
        first_steered: Lowest steered layer.
        reads: `prompt`: decided once for each row, by its whole prompt. `text`: decided anew at every token, by the
            text up to and including it.

    Raises:
        ConfigError: If the rule reads a layer above the first steered one, or `reads` is unknown.
        RuleError: If the rule cannot be read or names what is not there.
    """

    def __init__(self, rule: Rule | str | os.PathLike[str], suite: SAESuite, first_steered: int, reads: str) -> None:
        if reads not in READS:
            raise ConfigError(f"`gate_reads` is {reads!r}; choose one of {', '.join(READS)}.")
        self.rule = load_rule(rule)
        self.rule.check(suite)
        above = [layer for layer in self.rule.layers if layer > first_steered]
        if above:
            raise ConfigError(
                f"The gate reads layer {above[0]}, but layer {first_steered} is steered: what is above it would be "
                f"steered already when the rule is decided. Use features of layers up to {first_steered}."
            )
        self.reads = reads
        self.layers = self.rule.layers
        self._encoders = {
            layer: ChosenEncoder.open(suite, layer, [f.index for f in self.rule.features if f.layer == layer])
            for layer in self.layers
        }
        self._acts: dict[int, Tensor] = {}
        self._sums: RunningValues | None = None
        self._is_on_B1: Tensor | None = None
        self._seen = 0
        self._cache: Any = None

    def enter(self, forward: Forward) -> None:
        """Begin a forward.

        Raises:
            SteeringError: If the forward does not go on token by token where the last one ended.
        """
        self._acts.clear()
        if forward.past == 0:
            self._sums, self._is_on_B1, self._seen = None, None, 0
            self._watch(forward)
        if forward.past != self._seen or (forward.past > 0 and forward.width > 1):
            raise SteeringError(
                f"A gate follows a text token by token; it has read {self._seen} tokens, and was given "
                f"{forward.width} after {forward.past} cached ones. Generate without assisted decoding, chunked "
                f"prefill and a cache of your own."
            )
        self._seen += forward.width

    @torch.no_grad()
    def read(self, layer: int, x_BTD: Tensor) -> None:
        """Read a layer's residuals, before they are steered."""
        self._acts[layer] = self._encoders[layer](x_BTD).acts

    def decide(self, forward: Forward, span: Span) -> Tensor:
        """Where the rule holds, boolean, `(B, T)` or `(B, 1)`; once all layers of the rule were read."""
        index_BT = span.text_index(forward)
        # Position 0 is outside the SAEs' training data, and before it is padding.
        keep_BT = index_BT > 0
        if self.reads == "prompt":
            if self._is_on_B1 is not None:
                return self._is_on_B1
            keep_BT = keep_BT & span.in_prompt(forward)
        # Layers may be on several devices.
        acts_BTS = torch.cat([self._acts[layer].to(index_BT.device) for layer in self.layers], dim=-1)
        if self._sums is None:
            self._sums = RunningValues(self.rule.features)
        self._sums.extend(acts_BTS, keep_BT)
        found: Tensor = self.rule.evaluate(self._sums)
        if self.reads == "prompt":
            found = self._is_on_B1 = found[:, -1:]
        return found

    def release(self) -> None:
        """Forget the text, and leave the cache as it was."""
        if self._cache is not None:
            vars(self._cache).pop("reorder_cache", None)
        self._cache = self._sums = self._is_on_B1 = None
        self._acts.clear()

    def _watch(self, forward: Forward) -> None:
        """Beam search moves rows of the cache; what is known of them moves along."""
        if self._cache is not None:
            vars(self._cache).pop("reorder_cache", None)
        self._cache = forward.cache
        if self._cache is None or not hasattr(self._cache, "reorder_cache"):
            return
        move = self._cache.reorder_cache

        def reorder_cache(beam_idx: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._sums is not None:
                self._sums.select(beam_idx)
            if self._is_on_B1 is not None:
                self._is_on_B1 = self._is_on_B1.index_select(0, beam_idx.to(self._is_on_B1.device))
            return move(beam_idx, *args, **kwargs)

        self._cache.reorder_cache = reorder_cache
