"""Joining a feature penalty to a trainer's loss.

Layer hooks capture residuals during the trainer's own forward; a wrapper of the public `trainer.compute_loss` computes
the penalty afterwards and adds it, normalised as the trainer normalises its own loss. Loss scaling, accumulation and
averaging over processes then hold by construction. `SAEPenaltyCallback` is the drop-in face of this; `attach` the
explicit one. Left out: trainers that never call `compute_loss`, sequence parallelism and DataParallel; each is refused
with a reason.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.errors import AttachError, NonFiniteError, PenaltySelfCheckError
from qscope_trl.features import FeatureSet
from qscope_trl.files import write_whole
from qscope_trl.hooks.residual import Capture, ResidualHook
from qscope_trl.monitor.alarm import AlarmLimits
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.alarm import say_if_nothing_is_held_out
from qscope_trl.training.captured import CapturedPenalty
from qscope_trl.training.checkpoints import CompleteCheckpoints
from qscope_trl.training.checks import (
    FiniteCheck,
    FirstStepCheck,
    check_captures,
    refuse_unsupported,
    require_trainable_below,
)
from qscope_trl.training.collator import GROUP_KEY
from qscope_trl.training.control import draw_control, with_monitors
from qscope_trl.training.masks import GroupFn
from qscope_trl.training.metrics import STATE_FILE, PenaltyMetrics
from qscope_trl.training.normalisation import loss_divisor
from qscope_trl.training.opening import on_every_process, open_features, open_suite_for
from qscope_trl.training.penalty import LayerFeatures
from qscope_trl.training.recording import RunRecorder, describe_penalty
from qscope_trl.training.used_features import UsedFeatures

_ATTRIBUTE = "_qscope_penalty_attachment"


def attach(trainer: Any, saes: Any, features: Any, **settings: Any) -> PenaltyAttachment:
    """Attach a feature penalty to a trainer; the same as `PenaltyAttachment(saes, features, ...).attach(trainer)`.

    Use it as a context manager to be sure that everything comes off again:
    `with attach(trainer, saes, features, penalty_weight=0.1): trainer.train()`.
    """
    return PenaltyAttachment(saes, features, **settings).attach(trainer)


def attachment_of(trainer: Any) -> PenaltyAttachment | None:
    """The penalty that is attached to a trainer, if any."""
    found = getattr(trainer, _ATTRIBUTE, None)
    return found if isinstance(found, PenaltyAttachment) else None


class PenaltyAttachment:
    """A feature penalty and the one trainer it is attached to.

    The loss of every micro-batch grows by `weight * s / n`: `s` is the sum over penalised tokens, layers and features,
    and `n` is what the trainer divides its own loss by. Where that is the number of trained tokens of the optimizer
    step (SFT, plain `Trainer`), the penalty is the exact mean over those tokens; where the trainer averages
    micro-batches (DPO, KTO, Reward, multimodal models such as Qwen3_5ForConditionalGeneration, or
    `penalty_tokens="all"`), it is the mean of micro-batch means.

    Args:
        saes: Hub id, folder, file, or an open `SAESuite`.
        features: `FeatureSet`, path to one, or a list of names like `L12F345`.
        config: Settings as one object, instead of `settings`.
        monitor_features: Features that are measured and never penalised.
        group_fn: Names the group of a sequence from its token ids; groups choose thresholds, and samples of the
            FeatureSet's `target_group` are exempt.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.
        alarm: From where on features are silent and what they stand for is not; None for no alarm.
        record: Write the run's record into `output_dir/sae_record`, for `qscope report` and the model card, and
            `used_features.json` into checkpoints.
        **settings: Fields of `PenaltyConfig`.

    Raises:
        ConfigError: If a setting does not fit.
        FeatureSetError: If a feature file is unreadable.
    """

    def __init__(
        self,
        saes: SAESuite | str | os.PathLike[str],
        features: FeatureSet | str | os.PathLike[str] | Sequence[str],
        *,
        config: PenaltyConfig | None = None,
        monitor_features: FeatureSet | str | os.PathLike[str] | Sequence[str] | None = None,
        group_fn: GroupFn | None = None,
        sae_revision: str | None = None,
        sae_k: int | None = None,
        alarm: AlarmLimits | None = AlarmLimits(),  # noqa: B008 (frozen)
        record: bool = True,
        **settings: Any,
    ) -> None:
        self.config = PenaltyConfig.from_settings(config, **settings)
        self.features = FeatureSet.load(features)
        self.monitor_features = None if monitor_features is None else FeatureSet.load(monitor_features)
        self.group_fn = group_fn
        self.owner: Any = None
        """The callback in the trainer's list that attached this, or None."""
        self._source = (saes, sae_revision, sae_k)
        self._hook: ResidualHook | None = None
        self._trainer: Any = None
        self._originals: dict[str, Any] = {}
        self.control_of: FeatureSet | None = None
        """The chosen features, where `penalty_control` has put the penalty on others; they are monitors then."""
        self._alarm = alarm
        metrics = PenaltyMetrics(self.config, self.features, self.monitor_features, alarm)
        self._captured = CapturedPenalty(self.config, self.features, group_fn, metrics)
        self._check = FirstStepCheck(self.after_optimizer_step, self.before_optimizer_step)
        self._marks: CompleteCheckpoints | None = None
        self._owns_marks = False
        self._records = record
        self._recorder: RunRecorder | None = None
        self._owns_recorder = False

    # --- attaching -----------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Any:
        """The trainer this is attached to, or None."""
        return self._trainer

    @property
    def metrics(self) -> PenaltyMetrics:
        """What is measured, for the trainer's log and its checkpoints."""
        return self._captured.metrics

    @property
    def is_attached(self) -> bool:
        """Whether hooks and wrappers are in place."""
        return self._hook is not None and self._hook.is_attached

    def attach(self, trainer: Any) -> PenaltyAttachment:
        """Hook the trainer's model and wrap its `compute_loss` and `log`: everything or, on an error, nothing.

        Attaching again to the same trainer follows a replaced model (`model_init`) and is otherwise without effect.

        Args:
            trainer: A transformers or TRL trainer, before or during `train()`.

        Returns:
            Itself, usable as a context manager.

        Raises:
            AttachError: If the trainer cannot carry a penalty or has another one, or no parameter below the penalised
                layers trains.
            FeatureSetError: If the features belong to another model or SAE.
            CheckpointError: If the SAEs cannot be read.
            ModelStructureError: If the decoder layers cannot be found.
        """
        if self._trainer is trainer and self._hook is not None and self._hook.model is trainer.model:
            return self
        self.detach()
        other = attachment_of(trainer)
        if other is not None:
            raise AttachError(
                f"A penalty on {', '.join(map(str, other.features.ids[:3]))} is attached to this trainer already, and "
                f"a second one would share its metrics and groups. Put all features into one FeatureSet, each with "
                f"its own `weight` (only measured ones into `monitor_features`), or `detach()` the first."
            )
        model = trainer.model
        refuse_unsupported(trainer)
        captured = self._captured
        if not captured.layers:
            captured.layers, captured.monitors = on_every_process(lambda: self._open_features(model))
        if self.config.penalty_control == "random" and self.control_of is None:
            suite = open_suite_for(self._source, self.features)
            self.penalise_instead(draw_control(trainer, suite, self.features, self.monitor_features), model)
        if self.config.penalty_weight > 0:
            require_trainable_below(model, self.features.layers)
        hook = ResidualHook(model, sorted(captured.read_layers))
        hook.attach()
        self._hook, self._trainer = hook, trainer
        with ExitStack() as stack:
            stack.callback(self.detach)
            self._join_trainer(trainer)
            stack.pop_all()
        return self

    def _join_trainer(self, trainer: Any) -> None:
        for name, wrapper in (("compute_loss", self._wrap_compute_loss), ("log", self._wrap_log)):
            self._originals[name] = trainer.__dict__.get(name)
            setattr(trainer, name, wrapper(getattr(trainer, name)))
        setattr(trainer, _ATTRIBUTE, self)
        self._check = FirstStepCheck(self.after_optimizer_step, self.before_optimizer_step)
        self._captured.finite = FiniteCheck()
        self._check.start(trainer)
        present = list(trainer.callback_handler.callbacks)
        self._marks = CompleteCheckpoints.of(trainer)
        self._owns_marks = self._marks not in present
        self._marks.writers.append(self._write_state)
        if self._records:
            self._recorder = RunRecorder.of(trainer)
            self._owns_recorder = self._recorder not in present
            describe_penalty(self._recorder, self)
        elif self.monitor_features is not None:
            used = UsedFeatures(trainer.model)
            if self.config.penalty_weight > 0:
                used.add(self.features.ids, "penalty")
            used.warn_of(self.monitor_features.ids)
        if self.metrics.alarm is not None:
            say_if_nothing_is_held_out(trainer, self.monitor_features)

    def detach(self) -> None:
        """Take off every hook and wrapper; a second call does nothing."""
        if self._hook is not None:
            self._hook.detach()
            self._hook = None
        if self._trainer is not None:
            for name, original in self._originals.items():
                if original is None:
                    self._trainer.__dict__.pop(name, None)
                else:
                    setattr(self._trainer, name, original)
            self._originals = {}
            self._trainer.__dict__.pop(_ATTRIBUTE, None)
            self._check.stop(self._trainer)
            if self._recorder is not None and self._owns_recorder:
                self._recorder.leave()
            self._recorder = None
            if self._marks is not None:
                self._marks.writers.remove(self._write_state)
                if self._owns_marks:
                    self._marks.leave(self._trainer)
                self._marks = None
            self._trainer = None

    def __enter__(self) -> PenaltyAttachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def penalise_instead(self, control: FeatureSet, model: torch.nn.Module) -> None:
        """Put the penalty on `control`, of the same layers, and only measure the chosen features."""
        self.control_of = self.control_of or self.features
        self.features, self.monitor_features = control, with_monitors(self.control_of, self.monitor_features)
        captured = self._captured
        captured.layers, captured.monitors = on_every_process(lambda: self._open_features(model))
        captured.metrics = PenaltyMetrics(self.config, control, self.monitor_features, self._alarm)
        if self._recorder is not None:
            describe_penalty(self._recorder, self)

    def _open_features(self, model: torch.nn.Module) -> tuple[dict[int, LayerFeatures], dict[int, LayerFeatures]]:
        watched, groups = self.monitor_features, self._captured.groups
        suite = open_suite_for(self._source, self.features, watched)
        layers = open_features(model, suite, self.features, groups, self.config.penalty_kind)
        monitors = {} if watched is None else open_features(model, suite, watched, groups, "preact_hinge")
        return layers, monitors

    # --- the loss ------------------------------------------------------------------------------------------------

    def _wrap_compute_loss(self, original: Any) -> Any:
        @functools.wraps(original)
        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
            groups = inputs.pop(GROUP_KEY, None) if isinstance(inputs, MutableMapping) else None
            batch = dict(inputs) if isinstance(inputs, Mapping) else {}
            hook = self._hook
            if hook is None:
                return original(model, inputs, return_outputs, *args, **kwargs)
            training = torch.is_grad_enabled() and self._trainer.model.training
            try:
                with hook.listen() as captures:
                    result = original(model, inputs, return_outputs, *args, **kwargs)
                if not training:
                    self._captured.measure_evaluation(captures, batch, groups)
                    return result
                self._check.see_loss()
                num_items = args[0] if args else kwargs.get("num_items_in_batch")
                loss, *rest = result if isinstance(result, tuple) else (result,)
                with nullcontext() if self._recorder is None else self._recorder.clock("penalty"):
                    joined = self._join(loss, captures, batch, groups, num_items)
                return (joined, *rest) if isinstance(result, tuple) else joined
            except BaseException as error:
                if not self._trains_again_after(error):
                    self.detach()
                raise

        return compute_loss

    def _trains_again_after(self, error: BaseException) -> bool:
        """Whether the trainer starts over with smaller batches, and no callback would attach again."""
        retries = self._trainer is not None and getattr(self._trainer.args, "auto_find_batch_size", False)
        return bool(self.owner is None and retries and should_reduce_batch_size(error))

    def _join(
        self, loss: Tensor, captures: Sequence[Capture], batch: Mapping[str, Any], groups: Any, num_items: Any
    ) -> Tensor:
        seen = [capture for capture in captures if capture.has_grad]
        check_captures(captures, self._captured.read_layers)
        weight = self._current_weight()
        with torch.set_grad_enabled(weight > 0):
            total, count = self._captured.sum(seen, batch, groups, "train")
        if weight == 0:
            return loss
        penalty = total.to(loss.device) / loss_divisor(
            self._trainer, count.to(loss.device), num_items, batch, self.config
        )
        self._check.see_penalty(penalty)
        return loss + (weight * penalty).to(loss.dtype)

    def _current_weight(self) -> float:
        state = self._trainer.state
        return self.config.weight_at(state.global_step, state.max_steps)

    # --- checks --------------------------------------------------------------------------------------------------

    def before_optimizer_step(self) -> None:
        """Stop, or say so, if the step's activations are not finite. DeepSpeed has stepped already by then.

        Raises:
            NonFiniteError: If they are not, and `penalty_nonfinite` is `raise`.
        """
        if not self.is_attached:
            return
        try:
            # A penalty that does not act is no reason to stop.
            action = self.config.penalty_nonfinite if self._current_weight() > 0 else "skip"
            self._captured.finite.finish_step(self._trainer, action)
        except NonFiniteError:
            self.detach()
            raise

    def after_optimizer_step(self) -> None:
        """The self-check, which the trainer calls at the end of every optimizer step while this is attached.

        Raises:
            PenaltySelfCheckError: If `compute_loss` was not called, or no backward reached the penalty.
        """
        if not self.is_attached:
            return
        self.metrics.after_step(self._trainer)
        try:
            self._check.finish_step(self._trainer)
        except PenaltySelfCheckError:
            self.detach()
            raise

    # --- metrics -------------------------------------------------------------------------------------------------

    def _wrap_log(self, original: Any) -> Any:
        @functools.wraps(original)
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            self.metrics.add_to(logs, self._trainer)
            return original(logs, *args, **kwargs)

        return log

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept: also the features of a control arm, whatever would be drawn now."""
        if self.control_of is not None and state.get("control"):
            control = FeatureSet.from_dict(state["control"])
            if control != self.features:
                self.penalise_instead(control, self._trainer.model)
        self.metrics.load_state_dict(state, self._trainer)

    def _write_state(self, folder: Path) -> None:
        """Write the penalty's state into a checkpoint: on every process, as sums are added up; one writes."""
        saved = self.metrics.state_dict(self._trainer)
        saved["control"] = None if self.control_of is None else self.features.to_dict()
        if self._trainer.args.should_save:
            write_whole(folder / STATE_FILE, json.dumps(saved, indent=2))
