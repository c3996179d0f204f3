"""Calibration: the strength at which steering changes the model's predictions by a given amount.

A raw strength says nothing across features, layers or models. The KL divergence of the next-token distribution from
the unsteered model's, in nats, on a probe text, does. Left out: calibration to a rate of behaviour; a sweep
shows that.

Shape legend: `B` texts of a batch, `T` positions, `V` vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl.activations.encode import residual_batches, tokenize
from qscope_trl.errors import ConfigError, DataError, SteeringError
from qscope_trl.features import Features
from qscope_trl.sae.suite import SAESuite
from qscope_trl.steering.span import PHASES, Span
from qscope_trl.steering.steer import Steering, steer

_START = 0.02
"""First shift tried, as a share of the residual's norm."""

_FARTHEST = 1e3
"""Largest shift tried, as a multiple of the residual's norm: beyond it the residual is the direction alone."""

_NEAREST = 1e-6
_STEP = 8.0
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Calibration:
    """A strength and what it does.

    Args:
        strength: The strength found, in `unit`; negative if that was asked for.
        kl: Mean KL divergence that was measured at it, in nats.
        target_kl: What was asked for.
        unit: `raw` or `norm`.
        num_tokens: Tokens of the probe text that the mean is over.
        tried: Every strength tried, with its KL divergence, in order.
    """

    strength: float
    kl: float
    target_kl: float
    unit: str
    num_tokens: int
    tried: tuple[tuple[float, float], ...]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite | str | os.PathLike[str],
    features: Features,
    texts: Sequence[str],
    target_kl: float,
    *,
    unit: str = "raw",
    negative: bool = False,
    max_length: int = 512,
    batch_size: int = 8,
    tolerance: float = 0.01,
    max_tries: int = 40,
    show_progress: bool = True,
    sae_revision: str | None = None,
    sae_k: int | None = None,
) -> Calibration:
    """Find the strength of `steer(mode="add")` whose mean KL divergence on a probe text is the target.

    The mean of `KL(unsteered || steered)` of the next-token distributions runs over all tokens of the texts but the
    first of each, the texts given as they are (teacher forcing) and every position steered. Where the divergence does
    not grow with the strength throughout, one of the strengths that reach the target is found.

    Args:
        model: A transformers model, wrapped or not, on its device.
        tokenizer: Its tokenizer.
        saes: As of `steer`.
        features: As of `steer`.
        texts: Probe texts, like those to be generated; a few thousand tokens are enough.
        target_kl: Divergence in nats, above 0: 0.1 is slight, 0.5 clear, above 2 the text often falls apart.
        unit: Of the strength: `raw` or `norm`, as of `steer`.
        negative: Look for a negative strength.
        max_length: Tokens kept of each text.
        batch_size: Texts in one forward.
        tolerance: Relative distance from the target that is close enough.
        max_tries: Strengths to try; each runs the texts twice.
        show_progress: Whether to show a progress bar on stderr.
        sae_revision: As of `steer`.
        sae_k: As of `steer`.

    Returns:
        The strength, to be passed to `steer`, and how it was found.

    Raises:
        ConfigError: If a number is out of its range.
        DataError: If the texts have no token after their first.
        SteeringError: If the target cannot be reached, or not closely enough.

    Errors of `steer` are raised as there.
    """
    if not (math.isfinite(target_kl) and target_kl > 0):
        raise ConfigError(f"`target_kl` is {target_kl!r}; it is a divergence in nats above 0, such as 0.5.")
    if not 0 < tolerance < 1 or max_tries < 1:
        raise ConfigError(
            f"`tolerance` is {tolerance!r} and `max_tries` is {max_tries!r}; give a share below 1, and 1 or more."
        )
    opened = steer(model, saes, features, unit=unit, sae_revision=sae_revision, sae_k=sae_k)
    ids = [row for row in tokenize(tokenizer, texts, max_length=max_length) if len(row) > 1]
    if not ids:
        raise DataError(
            f"No token is left to calibrate on: none of the {len(texts)} texts has a token after its first, which is "
            f"left out. Give longer texts."
        )
    scale = _one_residual(model, opened, ids, batch_size) if unit == "raw" else 1.0
    sign = -1.0 if negative else 1.0

    def measure(strength: float) -> float:
        return mean_kl(model, opened, sign * strength, ids, batch_size)

    tried = _search(measure, target_kl, scale, tolerance, max_tries, show_progress)
    strength, kl = min(tried, key=lambda pair: abs(pair[1] - target_kl))
    return Calibration(
        sign * strength,
        kl,
        target_kl,
        unit,
        sum(len(row) - 1 for row in ids),
        tuple((sign * one, value) for one, value in tried),
    )


@torch.no_grad()
def mean_kl(
    model: nn.Module, opened: Steering, strength: float, token_ids: Sequence[Sequence[int]], batch_size: int = 8
) -> float:
    """Mean `KL(unsteered || steered)` in nats over all tokens but the first of each text, every position steered.

    Args:
        model: The model that `opened` steers, on its device.
        opened: What `steer` gave; its directions are used, not its strength, phases or positions.
        strength: The strength.
        token_ids: Token ids of each text.
        batch_size: Texts in one forward.
    """
    steering = Steering(model, opened.directions, strength=strength, span=Span(PHASES), gate=None)
    was_training = model.training
    model.eval()
    order = sorted(range(len(token_ids)), key=lambda n: -len(token_ids[n]))
    total, count = 0.0, 0
    try:
        for start in range(0, len(order), batch_size):
            inputs, keep_BT = _padded([token_ids[n] for n in order[start : start + batch_size]], _device(model))
            plain_BTV = model(**inputs, use_cache=False).logits
            with steering:
                steered_BTV = model(**inputs, use_cache=False).logits
            keep_BT = keep_BT.to(plain_BTV.device)
            total += _kl_sum(plain_BTV[keep_BT], steered_BTV[keep_BT])
            count += int(keep_BT.sum())
    finally:
        model.train(was_training)
    return total / count


def _kl_sum(plain_NV: Tensor, steered_NV: Tensor) -> float:
    total = 0.0
    rows = max(1, _LOGITS_AT_ONCE // plain_NV.shape[-1])
    for start in range(0, len(plain_NV), rows):
        log_p = plain_NV[start : start + rows].float().log_softmax(-1)
        log_q = steered_NV[start : start + rows].float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total


def _search(
    measure: Callable[[float], float],
    target: float,
    scale: float,
    tolerance: float,
    max_tries: int,
    show_progress: bool,
) -> list[tuple[float, float]]:
    """Strengths tried, with their KL; one of them is close enough. First outwards until the target is between two."""
    from tqdm.auto import tqdm

    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    tried: list[tuple[float, float]] = []
    strength, is_halved = _START * scale, False
    with tqdm(desc="calibrating", unit="strength", disable=not show_progress, leave=False) as bar:
        while len(tried) < max_tries:
            kl = measure(strength)
            bar.update()
            tried.append((strength, kl))
            if not math.isfinite(kl):
                raise SteeringError(
                    f"At strength {strength:.4g} the KL divergence is {kl}. Choose a smaller `target_kl`, or run the "
                    f"model in float32."
                )
            if abs(kl - target) <= tolerance * target:
                return tried
            if kl < target:
                low = (strength, kl)
            else:
                high = (strength, kl)
            if high is None and strength >= _FARTHEST * scale:
                raise SteeringError(
                    f"A KL divergence of {target:g} is not reached: the largest found is "
                    f"{max(kl for _, kl in tried):.4g}, with strengths up to {strength:.4g}. Choose a smaller "
                    f"`target_kl`, or other features."
                )
            if low is None and strength <= _NEAREST * scale:
                raise SteeringError(
                    f"A KL divergence of {target:g} is too small to be met: at strength {strength:.4g} it is {kl:.4g} "
                    f"still. Choose a larger `target_kl`, or run the model in float32."
                )
            strength = _next(low, high, target, scale, is_halved)
            is_halved = not is_halved
    closest = min(tried, key=lambda pair: abs(pair[1] - target))
    raise SteeringError(
        f"After {max_tries} strengths the closest KL divergence to {target:g} is {closest[1]:.4g}, at "
        f"{closest[0]:.4g}. Raise `max_tries` or `tolerance`; in bfloat16 the divergence moves in steps."
    )


def _next(
    low: tuple[float, float] | None,
    high: tuple[float, float] | None,
    target: float,
    scale: float,
    is_halved: bool,
) -> float:
    """The next strength: by the square law of small strengths until the target is between two, then inside of them."""
    if low is not None and high is not None:
        (a, kl_a), (b, kl_b) = low, high
        middle = math.sqrt(a * b)
        if is_halved or kl_a <= 0 or kl_a >= kl_b:
            return middle
        share = math.log(target / kl_a) / math.log(kl_b / kl_a)
        return float(math.exp(math.log(a) + share * math.log(b / a)))
    strength, kl = low or high or (scale, target)
    factor = math.sqrt(target / kl) if kl > 0 else _STEP
    # A little beyond, so that the target comes to lie between the two.
    factor = min(_STEP, max(1.05, 1.05 * factor)) if high is None else max(1 / _STEP, min(0.95, 0.95 * factor))
    return min(max(strength * factor, _NEAREST * scale), _FARTHEST * scale)


def _one_residual(model: nn.Module, opened: Steering, ids: Sequence[Sequence[int]], batch_size: int) -> float:
    """The raw strength that shifts a layer's residual by its mean norm; the smallest one of the layers."""
    layers = tuple(opened.directions)
    batch = next(residual_batches(model, ids[:batch_size], layers, batch_size=batch_size, show_progress=False))
    return min(
        float(batch.residuals[layer].float().norm(dim=-1).mean()) / float(opened.directions[layer].vector_D.norm())
        for layer in layers
    )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a forward, padded on the right, and which positions count."""
    width = max(map(len, rows))
    length_B1 = torch.tensor([len(row) for row in rows])[:, None]
    column_T = torch.arange(width)
    real_BT = column_T < length_B1
    # Any id does for padding: it is masked, and lies to the right of every token that counts.
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    inputs = {"input_ids": input_ids.to(device), "attention_mask": real_BT.long().to(device)}
    return inputs, real_BT & (column_T > 0)


def _device(model: nn.Module) -> torch.device:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    found: torch.device = embedding.weight.device
    return found
