"""`steer`: a block in which a model's residuals are edited along SAE features.

Shape legend: `B` rows of the forward (with beam search all beams), `T` columns of the forward, `D` d_model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from qscope_trl.activations.opening import require_fit
from qscope_trl.errors import ConfigError, ModelStructureError, QScopeWarning, SteeringError
from qscope_trl.features import Features, FeatureSet
from qscope_trl.hooks.edit import Edit, Forward, ResidualEdits
from qscope_trl.rules import Rule
from qscope_trl.sae.suite import SAESuite
from qscope_trl.steering.direction import MODES, UNITS, LayerDirection
from qscope_trl.steering.gate import Gate
from qscope_trl.steering.span import PHASES, Positions, Span


class Steering:
    """What `steer` gives: the steered block. It can be entered again; counts start anew.

    Guaranteed: rows with strength 0, and positions outside `phases` and `positions`, stay bit-identical, whatever
    else is in the batch. No hook remains after the block, however it ends. Not guaranteed: generation outside this
    model object (vLLM, an exported copy), or in a graph that was compiled before the block; both raise at its end,
    because nothing was steered.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Mapping[int, LayerDirection],
        *,
        strength: float | Sequence[float] | Tensor,
        span: Span,
        gate: Gate | None,
    ) -> None:
        self.model = model
        self.directions = dict(directions)
        self.strength = strength
        self.span = span
        self.gate = gate
        self._first = min(directions)
        self._strength = _strengths(strength)
        self._is_off = not isinstance(self._strength, Tensor) and self._strength == 0
        self._for_rows: dict[tuple[int, torch.device], Tensor] = {}
        self._columns: Tensor | None = None
        self._gate_BT: Tensor | None = None
        self._edits: ResidualEdits | None = None
        self.num_forwards = 0
        self._edited: Tensor | int = 0
        self._active: dict[torch.device, Tensor] = {}

    @property
    def num_edits(self) -> int:
        """Tokens steered in the block: (row, position) pairs, padding apart, at the first steered layer."""
        return int(self._edited)

    @property
    def num_active(self) -> int:
        """Of `ablate` and `clamp`: steered tokens at which a chosen feature was active, over all layers."""
        return sum(int(count) for count in self._active.values())

    def __enter__(self) -> Steering:
        if self._edits is not None:
            raise SteeringError("This block is already steering. Make another by `steer(...)`.")
        layers = {*self.directions, *(self.gate.layers if self.gate else ())}
        edits = ResidualEdits(self.model, {layer: self._edit(layer) for layer in sorted(layers)}, self._on_forward)
        edits.__enter__()
        self.span.forget()
        self._edits, self._edited, self._active, self.num_forwards = edits, 0, {}, 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        edits, self._edits = self._edits, None
        if edits is None:
            return
        edits.__exit__(kind, error, trace)
        if self.gate is not None:
            self.gate.release()
        self._gate_BT = self._columns = None
        if kind is None:
            self._require_firing()

    def _require_firing(self) -> None:
        if self.num_forwards == 0:
            raise SteeringError(
                f"Nothing was steered: no forward of this `{type(self.model).__name__}` ran in the block. Generate "
                f"with the model given to `steer`, not with a copy, a server, or a graph compiled before."
            )
        if self._is_off:
            return
        if self.num_edits == 0 and self.gate is not None:
            warnings.warn(
                f"The gate `{self.gate.rule}` never held, so nothing was steered in {self.num_forwards} forwards.",
                QScopeWarning,
                stacklevel=3,
            )
            return
        if self.num_edits == 0:
            raise SteeringError(
                f"Nothing was steered: {self.num_forwards} forwards ran, but none had a position that `phases` and "
                f"`positions` name. Widen them."
            )
        modes = {direction.mode for direction in self.directions.values()}
        if modes == {"ablate"} and self.num_edits and not self.num_active:
            warnings.warn(
                "No ablated feature was active at any steered token, so the text is as without steering.",
                QScopeWarning,
                stacklevel=3,
            )

    def _on_forward(self, forward: Forward) -> None:
        self.num_forwards += 1
        self._columns, self._gate_BT = None, None
        if self.gate is None and self.span.is_everywhere and forward.width == 1:
            # A decode step, steered whatever its place: nothing has to be looked up.
            return
        self.span.enter(forward)
        self._require_rows(forward)
        self._columns = self.span.columns(forward)
        if self.gate is not None:
            self.gate.enter(forward)

    def _edit(self, layer: int) -> Edit:
        direction = self.directions.get(layer)

        def edit(x_BTD: Tensor, forward: Forward) -> Tensor | None:
            if self.gate is not None and layer in self.gate.layers:
                self.gate.read(layer, x_BTD.detach())
            if direction is None or self._is_off:
                return None
            strength = self._strength_of(x_BTD)
            mask_BT = self._mask(forward, strength, x_BTD.device)
            delta, active_BT = direction.delta(x_BTD, strength)
            self._count(layer, forward, mask_BT, active_BT)
            if mask_BT is None:
                return x_BTD + delta
            return torch.where(mask_BT[..., None], x_BTD + delta, x_BTD)

        return edit

    def _strength_of(self, x_BTD: Tensor) -> Tensor | float:
        """One strength for all rows, or one for each row of the forward: beams follow their row."""
        if not isinstance(self._strength, Tensor):
            return self._strength
        rows, given = x_BTD.shape[0], self._strength.numel()
        found = self._for_rows.get((rows, x_BTD.device))
        if found is None:
            if rows % given:
                raise ModelStructureError(
                    f"`strength` has {given} values, one for each row, but the model ran {rows} rows. Give one value "
                    f"for each prompt of the batch, or a single number."
                )
            found = self._strength.to(x_BTD.device).repeat_interleave(rows // given)
            self._for_rows[rows, x_BTD.device] = found
        return found

    def _require_rows(self, forward: Forward) -> None:
        """Refuse more rows than strengths, unless they are beams or return sequences of as many prompts."""
        if not isinstance(self._strength, Tensor):
            return
        given = self._strength.numel()
        group = forward.rows // given
        if group > 1 and forward.rows % given == 0 and self.span.is_new:
            tokens = forward.tokens.reshape(given, group, *forward.tokens.shape[1:])
            if not torch.equal(tokens, tokens[:, :1].expand_as(tokens)):
                raise ModelStructureError(
                    f"`strength` has {given} values, but the model ran {forward.rows} rows that are not {group} beams "
                    f"or return sequences of each of {given} prompts. Give one value for each prompt of the batch."
                )

    def _mask(self, forward: Forward, strength: Tensor | float, device: torch.device) -> Tensor | None:
        """Where to edit, boolean, broadcastable to `(B, T)`; None: everywhere."""
        found = None if self._columns is None else self._columns.to(device)
        if isinstance(strength, Tensor):
            rows = (strength != 0)[:, None]
            found = rows if found is None else found & rows
        if self.gate is not None:
            if self._gate_BT is None:
                self._gate_BT = self.gate.decide(forward, self.span)
            gate = self._gate_BT.to(device)
            found = gate if found is None else found & gate
        return found

    def _count(self, layer: int, forward: Forward, mask_BT: Tensor | None, active_BT: Tensor | None) -> None:
        """Added up on the device; nothing is waited for."""
        if layer == self._first:
            if forward.width == 1:
                real = forward.rows if mask_BT is None else mask_BT.expand(forward.rows, 1).sum()
            else:
                real = self.span.num_tokens(forward, mask_BT)
            self._edited = self._edited + real
        if active_BT is not None:
            active = active_BT if mask_BT is None else active_BT & mask_BT
            before = self._active.get(active.device)
            self._active[active.device] = active.sum() if before is None else before + active.sum()


def steer(
    model: nn.Module,
    saes: SAESuite | str | os.PathLike[str],
    features: Features,
    *,
    strength: float | Sequence[float] | Tensor = 1.0,
    mode: str = "add",
    unit: str = "raw",
    phases: Sequence[str] = PHASES,
    positions: Positions = None,
    gate: Rule | str | os.PathLike[str] | None = None,
    gate_reads: str = "prompt",
    sae_revision: str | None = None,
    sae_k: int | None = None,
) -> Steering:
    """Steer a model along SAE features while a block runs.

    ```python
    with steer(model, "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", ["L20F31"], strength=20):
        model.generate(**inputs)
    ```

    Around `generate`, a pipeline, or a plain forward; sampled, beam search, with or without a cache, padded on either
    side, several layers and features at once.

    Args:
        model: A transformers model, wrapped or not.
        saes: Hub id, folder, file, or an open `SAESuite`.
        features: `FeatureSet`, path to one, names such as `L12F345`, or a mapping from name to weight.
        strength: One number, or one for each prompt of the batch; its meaning depends on `mode` and `unit`. 0 leaves a
            row bit-identical.
        mode: `add`: the weighted sum of the decoder columns, times the strength, whatever the features do. `ablate`:
            takes the features' present contribution away, all of it with strength 1. `clamp`: holds the features'
            activations at strength times weight, also where they are not active.
        unit: Of `add`: `raw`, times the decoder columns as in the checkpoint, or `norm`, relative to the residual's
            own norm at each token (0.1: a tenth of it). `calibrate` finds the raw strength of a given KL divergence.
        phases: `prompt`: the prompt's positions but the last. `generation`: the prompt's last position, which decides
            the first new token, and every one after it.
        positions: Positions to steer, among those of `phases`: a slice or whole numbers, from the text's first
            token; padding does not count, and negative numbers count from the prompt's end.
        gate: Rule, rule file or text of a rule: steer only where it holds. It reads layers up to the first steered
            one.
        gate_reads: `prompt`: decided once by the prompt. `text`: at every token, by the text so far.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Returns:
        A context manager that counts what it steered.

    Raises:
        ConfigError: If a setting is unknown or does not fit another.
        ModelStructureError: If the SAEs are of another width, or a layer does not exist.
        CheckpointError: If an SAE cannot be read.
        FeatureSetError: If the features were made for other SAEs, or an index is out of range.
        RuleError: If the gate cannot be read.
        SteeringError: At the end of the block, if nothing was steered.

    References:
        Qwen-Scope, arXiv:2605.11887, section 3: `h + alpha * d`, the raw decoder column.
        Deviation: the prompt's last position counts as generation, so that every new token is decided under steering.
    """
    if mode not in MODES:
        raise ConfigError(f"`mode` is {mode!r}; choose one of {', '.join(MODES)}.")
    if unit not in UNITS:
        raise ConfigError(f"`unit` is {unit!r}; choose one of {', '.join(UNITS)}.")
    if unit == "norm" and mode != "add":
        raise ConfigError(f"`unit='norm'` is for `mode='add'`; with `{mode}` the strength is of the activations.")
    chosen = FeatureSet.load(features)
    whole = SAESuite.from_pretrained(saes, revision=sae_revision, k=sae_k)
    suite = SAESuite.from_pretrained(whole, layers=chosen.layers)
    require_fit(model, suite, chosen)
    directions = {
        layer: LayerDirection.open(suite, layer, chosen.for_layer(layer), mode, unit) for layer in chosen.layers
    }
    return Steering(
        model,
        directions,
        strength=strength,
        span=Span(phases, positions),
        gate=None if gate is None else Gate(gate, whole, min(chosen.layers), gate_reads),
    )


def _strengths(strength: float | Sequence[float] | Tensor) -> Tensor | float:
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    try:
        values = torch.as_tensor([strength] if is_number else strength, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as err:
        raise ConfigError(f"`strength` is {strength!r}; it is a finite number, or one for each row.") from err
    if values.dim() == 0:
        values, is_number = values[None], not isinstance(strength, bool)
    is_row = values.dim() == 1 and values.numel() > 0 and not isinstance(strength, bool)
    if not is_row or not bool(torch.isfinite(values).all()):
        raise ConfigError(f"`strength` is {strength!r}; it is a finite number, or one for each row.")
    return float(values[0]) if is_number or not values.any() else values
