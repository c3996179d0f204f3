"""Steering while a model trains: its residuals are edited in training forwards, and in no others.

`PreventativeSteering` adds features' directions, so that the model need not learn what they stand for;
`ConceptAblation` projects them out, so that it cannot use them. Either is a callback for any transformers or TRL
trainer. Left out: edits that depend on the text; both published methods act at every token.

The hooks hold no counters and branch on no tensors: torch.compile traces them into the model's graph.
"""

from __future__ import annotations

import functools
import math
import os
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qscope_trl.activations.opening import require_fit
from qscope_trl.errors import AttachError, ConfigError, SteeringError
from qscope_trl.features import Features, FeatureSet
from qscope_trl.hooks.layers import find_decoder, find_layers
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.opening import on_every_process
from qscope_trl.training.stack import calling_trainer

_SCOPE = "_qscope_step_scope"


class TrainingEdit(TrainerCallback):  # type: ignore[misc]
    """Edits residuals in the forwards of `training_step` that have gradients. Base of the two below.

    The callback finds its trainer by itself, hooks the model when the trainer is built, and takes everything off when
    training ends or a training step fails. Guaranteed: evaluation, prediction, generation, reference passes and saved
    weights are as without it; gradients are exact under gradient checkpointing and accumulation. Not guaranteed:
    figures that a trainer takes from forwards without gradients inside a training step, such as TRL's entropy; they
    are of the unedited model.

    With a feature penalty on the same trainer, the penalty reads what the callbacks before it in the list have left
    of the residual.
    """

    def __init__(
        self,
        features: Features,
        saes: SAESuite | str | os.PathLike[str],
        *,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        self.features = FeatureSet.load(features)
        self._source = (saes, sae_revision, sae_k)
        self._constants: dict[int, Tensor] = {}
        self._trainer: Any = None
        self._model: nn.Module | None = None
        self._stack = ExitStack()
        self.in_step = self._in_decoder = self._has_grad = self._has_acted = False

    def constant(self, columns_DS: Tensor, weights_S: Tensor, layer: int) -> Tensor:
        """What `edit` needs of the chosen decoder columns of a layer, in fp32."""
        raise NotImplementedError

    def edit(self, x_BTD: Tensor, constant: Tensor) -> Tensor:
        """The residual to put in place of `x_BTD`, in its dtype."""
        raise NotImplementedError

    # --- attaching -----------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on a model."""
        return self._model is not None

    def attach(self, trainer: Any) -> TrainingEdit:
        """Hook a trainer's model and wrap its `training_step`: everything or, on an error, nothing.

        Args:
            trainer: A transformers or TRL trainer, before or during `train()`.

        Raises:
            AttachError: If the trainer has no training step, runs DataParallel, or the SAEs are of another width.
            FeatureSetError: If the features were made for other SAEs, or an index is out of range.
            SteeringError: If the directions of a layer cancel or are zero.
            CheckpointError: If an SAE cannot be read.
        """
        model = trainer.model
        if self._trainer is trainer and self._model is model:
            return self
        self.detach()
        if not callable(getattr(trainer, "training_step", None)):
            raise AttachError(
                f"`{type(trainer).__name__}` has no `training_step`, so it cannot be told which forwards train. Pass "
                f"a transformers or TRL trainer."
            )
        if getattr(trainer.args, "n_gpu", 1) > 1:
            raise AttachError(
                f"The trainer uses DataParallel over {trainer.args.n_gpu} GPUs in one process, which copies the "
                f"model in every step and leaves hooks behind. Start one process per GPU with `accelerate launch`."
            )
        self._constants = on_every_process(lambda: self._open(model))
        decoder, layers = find_decoder(model), find_layers(model)
        with ExitStack() as stack:
            stack.enter_context(decoder.register_forward_pre_hook(self._enter_decoder))
            for layer in self._constants:
                stack.enter_context(layers[layer].register_forward_hook(self._layer_hook(layer)))
            stack.enter_context(decoder.register_forward_hook(self._leave_decoder))
            self._stack = stack.pop_all()
        self._trainer, self._model, self._has_acted = trainer, model, False
        _StepScope.of(trainer).edits.append(self)
        return self

    def detach(self) -> None:
        """Take every hook and the wrapper off; a second call does nothing."""
        self._stack.close()
        if self._trainer is not None:
            _StepScope.of(self._trainer).leave(self)
        self._trainer = self._model = None
        self.in_step = self._in_decoder = False

    def enter_step(self) -> None:
        """A training step begins; where the callback was removed from its trainer, everything comes off."""
        if any(item is self for item in self._trainer.callback_handler.callbacks):
            self.in_step, self._in_decoder = True, False
        else:
            self.detach()

    def _open(self, model: nn.Module) -> dict[int, Tensor]:
        saes, revision, k = self._source
        suite = SAESuite.from_pretrained(saes, layers=self.features.layers, revision=revision, k=k)
        require_fit(model, suite, self.features, AttachError)
        found = {}
        for layer in self.features.layers:
            chosen = self.features.for_layer(layer)
            columns_DS = suite.decoder_columns(layer, [feature.index for feature in chosen])
            weights_S = torch.tensor([feature.weight for feature in chosen], dtype=torch.float32)
            found[layer] = self.constant(columns_DS, weights_S, layer)
        return found

    # --- the forward ---------------------------------------------------------------------------------------------

    def _enter_decoder(self, _module: nn.Module, _args: Any) -> None:
        self._in_decoder, self._has_grad = True, torch.is_grad_enabled()

    def _leave_decoder(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._in_decoder = False

    def _layer_hook(self, layer: int) -> Any:
        def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
            # Outside the decoder's forward, a layer runs again for its gradients: of a forward that was edited.
            if not self.in_step or (self._in_decoder and not self._has_grad):
                return None
            residual = output[0] if isinstance(output, tuple) else output
            constant = self._constants[layer]
            if constant.device != residual.device:
                constant = self._constants[layer] = constant.to(residual.device)
            edited = self.edit(residual, constant)
            self._has_acted = True
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return replace

    # --- events --------------------------------------------------------------------------------------------------

    def on_init_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Attach to the trainer that is being built."""
        trainer = calling_trainer(self)
        if trainer is not None and trainer.model is not None:
            self.attach(trainer)

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Attach if `on_init_end` was missed or the model was replaced."""
        trainer = calling_trainer(self) or self._trainer
        if trainer is None:
            raise AttachError(
                f"`{type(self).__name__}` found no trainer above it on the call stack. Call "
                f"`callback.attach(trainer)` before `trainer.train()`."
            )
        self.attach(trainer)

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Stop if an optimizer step was made and no forward of it was edited."""
        if self.is_attached and not self._has_acted:
            name = type(self._trainer).__name__
            _StepScope.of(self._trainer).close()
            raise SteeringError(
                f"`{name}` finished an optimizer step without a forward that was edited. Usually the model was "
                f"compiled before the callback was attached, or the trainer has a training loop of its own, which "
                f"is not supported."
            )

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Take everything off, so that the trained model carries no hook."""
        self.detach()


class _StepScope:
    """The one wrapper of a trainer's `training_step`, however many callbacks edit in it."""

    def __init__(self, trainer: Any) -> None:
        self.edits: list[TrainingEdit] = []
        self._trainer = trainer
        self._own = trainer.__dict__.get("training_step")
        trainer.training_step = self._wrap(trainer.training_step)
        setattr(trainer, _SCOPE, self)

    @classmethod
    def of(cls, trainer: Any) -> _StepScope:
        found = getattr(trainer, _SCOPE, None)
        return found if isinstance(found, _StepScope) else cls(trainer)

    def leave(self, edit: TrainingEdit) -> None:
        self.edits.remove(edit)
        if self.edits:
            return
        del self._trainer.__dict__[_SCOPE]
        if self._own is None:
            del self._trainer.__dict__["training_step"]
        else:
            self._trainer.training_step = self._own

    def close(self) -> None:
        for edit in list(self.edits):
            edit.detach()

    def _wrap(self, original: Any) -> Any:
        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            for edit in list(self.edits):
                edit.enter_step()
            try:
                return original(*args, **kwargs)
            except BaseException:
                self.close()
                raise
            finally:
                for edit in self.edits:
                    edit.in_step = False

        return training_step


class PreventativeSteering(TrainingEdit):
    """Adds features' directions to the residual while a model trains, so that it need not learn them.

    ```python
    trainer = SFTTrainer(
        model, args=args, train_dataset=dataset,
        callbacks=[PreventativeSteering(["L20F31"], "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", strength=5.0)],
    )
    ```

    At each layer of `features`, `h + strength * (W_dec columns @ weights)` takes the place of the residual `h` in
    every training forward, at every token. The direction is that of the *unwanted* trait, and the strength positive:
    what the steering already supplies, the gradient has no reason to build into the weights. It is taken off at
    evaluation, in generation and after training; the trained model then shows less of the trait.

    Args:
        features: `FeatureSet`, path to one, names such as `L12F345`, or a mapping from name to weight.
        saes: Hub id, folder, file, or an open `SAESuite`.
        strength: Times the decoder columns as in the checkpoint, as of `steer`. 0 leaves training bit-identical.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token; not needed.

    Raises:
        ConfigError: If the strength is not finite.
        FeatureSetError: If the features cannot be read.

    References:
        Persona Vectors, arXiv:2507.21509, "preventative steering"; its published configuration for Qwen2.5-7B-Instruct
        is one layer, 20, and a coefficient of 5, on the unnormalised difference of mean activations.
        Deviation: the direction is a sum of SAE decoder columns, so coefficients do not carry over.
    """

    def __init__(
        self,
        features: Features,
        saes: SAESuite | str | os.PathLike[str],
        *,
        strength: float,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        super().__init__(features, saes, sae_revision=sae_revision, sae_k=sae_k)
        if not isinstance(strength, int | float) or not math.isfinite(strength):
            raise ConfigError(f"`strength` is {strength!r}; it is one finite number.")
        self.strength = strength

    def constant(self, columns_DS: Tensor, weights_S: Tensor, layer: int) -> Tensor:
        """`strength` times the weighted sum of the columns, `(D,)`."""
        vector_D = columns_DS @ weights_S
        if not vector_D.any():
            raise SteeringError(
                f"The weighted directions of {_names(self.features, layer)} add up to zero, so nothing would be added "
                f"at layer {layer}. Change their weights."
            )
        return self.strength * vector_D

    def edit(self, x_BTD: Tensor, constant: Tensor) -> Tensor:
        """`x + vector`, the vector rounded once to the residual's dtype."""
        return x_BTD if self.strength == 0 else x_BTD + constant.to(x_BTD.dtype)


class ConceptAblation(TrainingEdit):
    """Projects features' directions out of the residual while a model trains, so that it cannot use them.

    At each layer of `features`, `h - Q Qᵀ h` takes the place of the residual `h` in every training forward, at every
    token; `Q` is an orthonormal basis of the span of the features' decoder columns. Gradients flow through the
    projection, so that none reaches the weights along these directions from above. Their weights do not matter. It is
    taken off at evaluation, in generation and after training.

    Args:
        features: `FeatureSet`, path to one, or names such as `L12F345`.
        saes: Hub id, folder, file, or an open `SAESuite`.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token; not needed.

    Raises:
        FeatureSetError: If the features cannot be read.

    References:
        Concept Ablation Fine-Tuning (CAFT), arXiv:2507.16795: the span of chosen SAE decoder vectors, or of principal
        components, is projected out of the residual after chosen layers throughout fine-tuning.
        Deviation: the projection is computed in fp32, whatever the model's dtype.
    """

    def constant(self, columns_DS: Tensor, weights_S: Tensor, layer: int) -> Tensor:  # noqa: ARG002 (one signature)
        """An orthonormal basis of the columns' span, `(D, rank)`."""
        left, sizes, _ = torch.linalg.svd(columns_DS.double(), full_matrices=False)
        # numpy's and torch's `matrix_rank`, at the precision in which checkpoints are stored.
        rank = int((sizes > sizes.max() * max(columns_DS.shape) * torch.finfo(torch.float32).eps).sum())
        if rank == 0:
            raise SteeringError(
                f"The directions of {_names(self.features, layer)} are zero, so nothing would be ablated at layer "
                f"{layer}. Choose features that the decoder uses."
            )
        basis_DR: Tensor = left[:, :rank].float().contiguous()
        return basis_DR

    def edit(self, x_BTD: Tensor, constant: Tensor) -> Tensor:
        """`x - Q Qᵀ x`."""
        # Autocast would round the products.
        with torch.autocast(x_BTD.device.type, enabled=False):
            return x_BTD - ((x_BTD.float() @ constant) @ constant.T).to(x_BTD.dtype)


def _names(chosen: FeatureSet, layer: int) -> str:
    return ", ".join(str(feature.id) for feature in chosen.for_layer(layer))
