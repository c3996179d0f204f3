"""Refusals at the boundary and the self-check of the first step: no penalty is silently without effect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import TrainerCallback

from qscope_trl.errors import AttachError, DataError, NonFiniteError, PenaltySelfCheckError, QScopeWarning
from qscope_trl.hooks.layers import find_decoder, find_layers
from qscope_trl.hooks.residual import Capture

KNOWN_GOOD = "transformers 4.57-5.23 with TRL 0.24-1.16"
"""Versions on which the penalty's gradients were shown equal to an independent computation."""
_UNSUPPORTED = (
    f"This trainer is not supported; known to work: {KNOWN_GOOD}, for SFT, DPO, KTO, Reward and plain `Trainer`."
)


def refuse_unsupported(trainer: Any) -> None:
    """Raise `AttachError` for a trainer in which a penalty cannot be right."""
    parallelism = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
    if parallelism is not None and (
        getattr(parallelism, "sp_enabled", False) or getattr(parallelism, "cp_enabled", False)
    ):
        raise AttachError(
            "The trainer splits sequences over processes (sequence or context parallelism), so no process sees whole "
            "sequences and the penalised tokens cannot be told. Train with data, tensor or ZeRO parallelism instead."
        )
    if getattr(trainer.args, "n_gpu", 1) > 1:
        raise AttachError(
            f"The trainer uses DataParallel over {trainer.args.n_gpu} GPUs in one process, which copies the model in "
            f"every step and leaves hooks behind. Start one process per GPU with `accelerate launch`."
        )
    adapters = getattr(getattr(trainer, "model", None), "peft_config", None) or {}
    learned = [name for name, config in adapters.items() if getattr(config, "is_prompt_learning", False)]
    if learned:
        raise AttachError(
            f"Adapter `{learned[0]}` learns virtual tokens ({type(adapters[learned[0]]).__name__}), which shift every "
            f"position against the batch's labels, so the penalised tokens cannot be told. Use LoRA or full weights."
        )
    for name, why in (("compute_loss", "there is no loss to join"), ("add_callback", "no step can be checked")):
        if not callable(getattr(trainer, name, None)):
            raise AttachError(
                f"`{type(trainer).__name__}` has no `{name}`, so {why}. Pass a transformers or TRL trainer."
            )


def require_trainable_below(model: torch.nn.Module, layers: Sequence[int]) -> None:
    """Raise if a penalised layer has no trainable parameter at or below it."""
    decoder, found = find_decoder(model), find_layers(model)
    inside = {id(p) for layer in found for p in layer.parameters()}
    own = [p for p in decoder.parameters() if id(p) not in inside]
    # Embeddings come before every layer; the final norm, after them, is told apart by its one dimension.
    trainable = any(p.requires_grad and p.dim() > 1 for p in own)
    for layer, module in enumerate(found):
        trainable = trainable or any(p.requires_grad for p in module.parameters())
        if layer in layers and not trainable:
            raise AttachError(
                f"No trainable parameter lies at or below layer {layer}, so its penalty can change nothing. Penalise "
                f"features of a layer above the lowest trained one, or let LoRA's `layers_to_transform` reach layer "
                f"{layer} or below."
            )
        if layer >= max(layers):
            return


def check_captures(captures: Sequence[Capture], wanted: set[int]) -> None:
    """Raise unless every forward of a training step showed every hooked layer, one of them with gradients."""
    if not captures or any(wanted - capture.residuals.keys() for capture in captures):
        shown = set().union(*(capture.residuals.keys() for capture in captures))
        raise PenaltySelfCheckError(
            f"A training step ran without a residual of layers {sorted(wanted - shown)}: the hooks did not "
            f"fire. Usually the model was compiled before the penalty was attached; build the trainer before the "
            f"first compiled forward, or let `torch_compile=True` compile it."
        )
    if not any(capture.has_grad for capture in captures):
        raise PenaltySelfCheckError(
            f"A training step ran the model without gradients only, so no penalty can reach the weights. "
            f"Known to work: {KNOWN_GOOD}."
        )


class FirstStepCheck(TrainerCallback):  # type: ignore[misc]
    """Follows the penalty through the first optimizer step that has one.

    Every micro-batch of that step is watched: a trainer may throw one loss away, or skip its backward, but not all.
    Loss scaling changes the size of the gradient that is seen, not whether one comes.

    Args:
        on_step_end: Called by the trainer at the end of each optimizer step, once `start` was.
        before_step: Called before it, when all its gradients are there.
    """

    def __init__(self, on_step_end: Callable[[], None], before_step: Callable[[], None]) -> None:
        self._on_step_end = on_step_end
        self._before_step = before_step
        self._num_losses = 0
        self._num_penalties = 0
        self._gradients: list[float] = []
        self._is_done = False

    def start(self, trainer: Any) -> None:
        """Join the trainer's callbacks."""
        trainer.add_callback(self)

    def stop(self, trainer: Any) -> None:
        """Leave the trainer's callbacks; a second call does nothing."""
        handler = trainer.callback_handler
        # A new list: the trainer may be going through the present one, and would skip the callback after this.
        handler.callbacks = [callback for callback in handler.callbacks if callback is not self]

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        """What the trainer calls before an optimizer step."""
        self._before_step()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """What the trainer calls after it."""
        self._on_step_end()

    def see_loss(self) -> None:
        """`compute_loss` ran on a training batch."""
        self._num_losses += 1

    def see_penalty(self, penalty: Tensor) -> None:
        """A penalty is about to join a loss.

        Raises:
            PenaltySelfCheckError: If it has no graph.
        """
        if self._is_done or any(self._gradients):
            return
        if not penalty.requires_grad:
            raise PenaltySelfCheckError(
                f"The penalty of the first training step carries no gradient, so it would change nothing at any "
                f"weight. Known to work: {KNOWN_GOOD}; report the trainer's class and versions."
            )
        self._num_penalties += 1
        penalty.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]

    def _see_gradient(self, grad: Tensor) -> None:
        self._gradients.append(float(grad.abs().max()))

    def finish_step(self, trainer: Any) -> None:
        """Judge an optimizer step that has ended.

        Raises:
            PenaltySelfCheckError: If `compute_loss` was not called, or no backward reached the penalty.
        """
        name = type(trainer).__name__
        if self._num_losses == 0:
            raise PenaltySelfCheckError(
                f"`{name}` finished an optimizer step without calling `compute_loss` on the model in training mode, "
                f"so the penalty never joined the loss. {_UNSUPPORTED}"
            )
        if self._is_done or self._num_penalties == 0:
            return
        if not self._gradients:
            raise PenaltySelfCheckError(
                f"`{name}` finished an optimizer step, and no backward reached the penalty in the loss that "
                f"`compute_loss` returned: the trainer replaces or detaches that loss, so the penalty has no effect. "
                f"{_UNSUPPORTED}"
            )
        if not any(self._gradients):
            warnings.warn(
                "The backward pass reached the SAE penalty with gradient 0 in the first step. Unless the loss scaler "
                "skipped that step, the penalty has no effect.",
                QScopeWarning,
                stacklevel=2,
            )
        self._is_done = True


class FiniteCheck:
    """Notes which rows of an optimizer step have NaN or infinite activations, and speaks up once at its end.

    The notes stay on the device until then, so that a micro-batch costs no synchronisation.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[Tensor, Tensor | None]] = []

    def see(self, bad_BT: Tensor, input_ids: Tensor | None) -> None:
        """Note one forward of a micro-batch: its penalised positions without finite activations, and its tokens."""
        self._notes.append((bad_BT.any(1), input_ids))

    def finish_step(self, trainer: Any, action: str) -> None:
        """Judge the optimizer step that is about to be made, on every process alike.

        Args:
            trainer: Whose step it is.
            action: `raise` or `skip`, as `PenaltyConfig.penalty_nonfinite`.

        Raises:
            NonFiniteError: If an activation was not finite on any process, unless they are skipped.
        """
        notes, self._notes = self._notes, []
        accelerator = trainer.accelerator
        flag = torch.stack([bad.any() for bad, _ in notes]).any() if notes else torch.tensor(False)
        flags = processes_with(flag, accelerator)
        if not flags:
            return
        step = f"Optimizer step {trainer.state.global_step + 1}"
        if accelerator.process_index in flags:
            number, bad, ids = next((n, bad, ids) for n, (bad, ids) in enumerate(notes) if bool(bad.any()))
            rows = bad.nonzero().flatten().tolist()
            shown = "" if ids is None else f" (row {rows[0]} begins with the tokens {ids[rows[0]][:12].tolist()})"
            where = f" on process {accelerator.process_index}" if accelerator.num_processes > 1 else ""
            which = f"of rows {rows} of micro-batch {number + 1} are NaN or infinite{shown}"
            message = f"{step}{where}: the activations {which}."
        else:
            message = f"{step}: activations on process {flags[0]} are NaN or infinite; its message names the batch."
        if action == "raise":
            made = (
                "DeepSpeed has made this step already, so go back to the last checkpoint."
                if getattr(trainer, "is_deepspeed_enabled", False)
                else "The step was not made."
            )
            raise NonFiniteError(
                f"{message} {made} Look at that batch and at the loss before it; `penalty_nonfinite='skip'` leaves "
                f"such tokens out of the penalty and trains on."
            )
        if accelerator.process_index in flags:
            warnings.warn(f"{message} They were left out of the penalty.", QScopeWarning, stacklevel=2)


def processes_with(flag: Tensor, accelerator: Any) -> list[int]:
    """Processes on which a flag is true; every process must call this, and all get the same answer."""
    if accelerator.num_processes == 1:
        return [0] if bool(flag) else []
    flags = accelerator.gather(flag.to(accelerator.device, torch.int32).reshape(1))
    return [rank for rank, value in enumerate(flags.tolist()) if value]


def finite_tokens(residual_BTD: Tensor, values_BTS: Tensor) -> Tensor:
    """Tokens `(B, T)` whose residual is finite, and so are the values read from it.

    Values alone do not tell: a feature that is not active counts as 0, whatever the residual.
    """
    total_BT = residual_BTD.detach().sum(-1, dtype=torch.promote_types(residual_BTD.dtype, torch.float32))
    return total_BT.isfinite() & values_BTS.isfinite().all(-1)


def raise_unknown_tokens(batch: Mapping[str, Any], penalty_tokens: str) -> NoReturn:
    """Refuse a batch that does not say which of its tokens are trained."""
    raise DataError(
        f"Neither the forward's `labels` nor the batch (keys {', '.join(f'`{key}`' for key in batch)}) says which of "
        f"its tokens are trained, so `penalty_tokens='{penalty_tokens}'` has no meaning here. Set "
        f"`penalty_tokens='all'`."
    )
