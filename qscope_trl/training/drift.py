"""Drift while a model is trained: whether the SAEs still describe it, and how far it has moved, on fixed texts.

A penalty on an internal signal can be met by moving the representation; then the features read something else, and
their silence means nothing. The texts are run through the model between its steps, so nothing of the training path is
touched. Left out: the training batches themselves, and a second copy of the model: what the frozen one showed is kept.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl.errors import AttachError, ConfigError, DataError, QScopeWarning
from qscope_trl.monitor.drift import Crossing, Drift, DriftLimits, crossings, save_reference
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.drift_measure import REFERENCE_FILE, DriftProbe, ProbeSettings
from qscope_trl.training.recording import RunRecorder
from qscope_trl.training.stack import calling_trainer

MAX_SHARE = 0.02
"""Most of the steps' time that probes at the default interval may take."""

# The interval is chosen for a smaller share than the most, as steps and probes vary.
_AIM = 0.75 * MAX_SHARE
# Steps that are timed before the interval is chosen; the first one, which compiles and warms up, is left out.
_TIMED_STEPS = 4
# The latest ones count, as steps may become slower or faster.
_MOST_TIMED_STEPS = 50

_MEANING = {
    "max_fvu_ratio": "SAEs leave more of the residuals unexplained",
    "min_jaccard": "other features are active at the same tokens",
    "min_residual_cosine": "residuals point elsewhere",
    "max_dead_rate": "fewer of the features that were alive fire",
    "max_kl": "next-token distributions are others",
}


class Outcome(NamedTuple):
    """One probe, on every process alike."""

    drift: Drift
    seconds: float
    interval: int | None
    """Steps to the next probe, where the default interval is used and known."""
    cost_share: float | None
    """Of the steps' time so far, that of the probes; None before there is any."""


class Pace:
    """The time that steps and probes take, and how many steps there have to be between probes."""

    def __init__(self) -> None:
        self._started = 0.0
        self._is_warm = False
        self._recent: deque[float] = deque(maxlen=_MOST_TIMED_STEPS)
        self.step_seconds, self.probe_seconds = 0.0, 0.0
        self._latest_probe = 0.0

    def begin_step(self) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def end_step(self) -> None:
        """Stop it. The first step counts for nothing."""
        if self._is_warm:
            seconds = time.perf_counter() - self._started
            self._recent.append(seconds)
            self.step_seconds += seconds
        self._is_warm = True

    @property
    def is_known(self) -> bool:
        """Whether enough steps were timed to choose by."""
        return len(self._recent) >= _TIMED_STEPS

    def see_probe(self, seconds: float, *, counts: bool) -> None:
        """A probe was made; one at the begin or the end does not count for the share."""
        self._latest_probe = seconds
        if counts:
            self.probe_seconds += seconds

    def interval(self) -> int | None:
        """Steps to the next probe, with which they take `_AIM` of the steps' time; None if too few steps were timed.

        As many as the next one needs by itself and, where steps were slower once, as it needs with all before it.
        """
        if not self.is_known:
            return None
        mean = sum(self._recent) / len(self._recent)
        owed = (self.probe_seconds + self._latest_probe) / _AIM - self.step_seconds
        return max(1, math.ceil(max(self._latest_probe / _AIM, owed) / mean))

    @property
    def share(self) -> float | None:
        """Of the steps' time so far, that of the probes that count; None before there is any."""
        return self.probe_seconds / self.step_seconds if self.step_seconds and self.probe_seconds else None


class DriftMonitor(TrainerCallback):  # type: ignore[misc]
    """Logs `sae/drift/...` on fixed texts: figures of the SAEs' fit, and distances from the frozen model.

    ```python
    trainer = SFTTrainer(model, ..., callbacks=[SAEPenaltyCallback(...), DriftMonitor(texts)])
    ```

    Per layer `sae/drift/L12/`: `fvu`, `l0`, `dead_rate` (features that fired on the frozen model and fire nowhere
    now), `jaccard` and `activation_cosine` (of the active features of each token, against the frozen model) and
    `residual_cosine`; and `sae/drift/kl`, the mean KL(frozen || now) of next-token distributions. All tokens but
    position 0 of each text count, and in a layer those whose norm on the frozen model is at most 10 times its median.

    The frozen model is the one at the beginning of training; with fresh LoRA adapters that is the model without them.
    What it showed is kept in host memory and in the run's record, so that a resumed run compares with the same: for
    each token `d_model` numbers and `k` activations a layer and `kl_top` log-probabilities, 36 MB for 1024 tokens and
    3 layers of width 4096 in bf16 with k = 100. The SAEs with their decoders stay in the main process's host memory
    (encoders in their files, where the format allows) and are copied to a layer's device one by one for a probe, in
    fp32: of 64K features of width 4096 that is 1.1 GB of the host a layer (2.1 without such a file), and 2.1 GB of the
    device while its layer is measured.

    Measured before the first step, every `every` steps and after the last one; where an evaluation ends the training,
    after what the trainer does at its end (`load_best_model_at_end`). The model is in evaluation mode meanwhile;
    gradients, modes and random states are left alone, so training is the same with and without. Under FSDP and ZeRO-3
    every process runs the probe; `sae/drift/kl` is left out under ZeRO-3.

    Args:
        texts: The probe: ordinary texts of the kind the model is used on. As many are taken, from the first, as
            `max_tokens` allows.
        saes: Hub id, folder, file, or an open `SAESuite`; by default those of the trainer's penalty or feature reward.
        layers: Layers to watch, from 0; by default those of the penalty and its monitors, or of the rewards.
        every: Steps between probes; by default so many that probes take less than 2 % of the steps' time, by what
            steps and probes are measured to take: `sae/drift/cost_share`. Where steps become faster or probes slower
            it may be more until the next probe, which then comes later. The reference and the probes at the begin and
            the end come on top.
        limits: From where on drift is spoken of; `DriftLimits()` by default.
        on_drift: `warn` says it once for each limit, `stop` also ends the training.
        max_length: Tokens kept of each text: its first ones.
        max_tokens: Tokens of the probe after position 0.
        batch_size: Texts in one forward.
        kl_top: Log-probabilities kept of each token; the rest of the vocabulary counts as one event, which makes
            `sae/drift/kl` a lower bound. 0 leaves it out.
        record: Write rows, and the reference, into the run's record.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If a setting does not fit.
        DataError: If there is no text.
    """

    def __init__(
        self,
        texts: Sequence[str],
        saes: SAESuite | str | os.PathLike[str] | None = None,
        *,
        layers: Sequence[int] | None = None,
        every: int | None = None,
        limits: DriftLimits | None = None,
        on_drift: Literal["warn", "stop"] = "warn",
        max_length: int = 128,
        max_tokens: int = 1024,
        batch_size: int = 4,
        kl_top: int = 1024,
        record: bool = True,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        for name, value, least in (
            ("max_length", max_length, 2),
            ("max_tokens", max_tokens, 2),
            ("batch_size", batch_size, 1),
            ("kl_top", kl_top, 0),
            ("every", 1 if every is None else every, 1),
        ):
            if value < least:
                raise ConfigError(f"`{name}` of `DriftMonitor` is {value}; it is a whole number from {least}.")
        if on_drift not in ("warn", "stop"):
            raise ConfigError(f"`on_drift` is {on_drift!r}; choose `warn` or `stop`.")
        if isinstance(texts, str) or not any(text.strip() for text in texts):
            raise DataError("`texts` of `DriftMonitor` holds no text, so nothing can be compared. Give a list.")
        self.every = every
        self.limits = limits or DriftLimits()
        self.on_drift = on_drift
        self._settings = ProbeSettings(
            list(texts), saes, layers, max_length, max_tokens, batch_size, kl_top, sae_revision, sae_k
        )
        self._records = record
        self._recorder: RunRecorder | None = None
        self._owns_recorder = False
        self._forget()

    def _forget(self) -> None:
        self.probe: DriftProbe | None = None
        """What is measured, while training runs."""
        self._pace = Pace()
        self._pending: Outcome | None = None
        self._last_step, self._interval = -1, self.every
        self._warned: set[str] = set()

    # --- events --------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the reference, or that of the run that is resumed, and measure."""
        del args, control, kwargs
        trainer = self._trainer()
        begun = time.perf_counter()
        self._forget()
        if self._records:
            present = list(trainer.callback_handler.callbacks)
            recorder = RunRecorder.of(trainer)
            # Training may begin anew without having ended: `auto_find_batch_size`, or an error.
            if recorder is not self._recorder:
                self._recorder, self._owns_recorder = recorder, recorder not in present
        self.probe = DriftProbe(trainer, self._settings)
        self.probe.take_reference(state.global_step, stored=self._records)
        # Written at the first step: until then the record of an earlier run may still be in the folder.
        self._pending = self._measure(trainer, counts=False)
        self._describe(self.probe, time.perf_counter() - begun)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        del args, kwargs
        self._write_pending(state, control)
        self._pace.begin_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it: before `on_step_end`, where others measure and would be counted as part of the step."""
        del args, state, control, kwargs
        self._pace.end_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if it is time, or if this was the last step: once training has ended, reporters are closed."""
        del args, kwargs
        if self._interval is None and self._pace.is_known:
            # One clock decides for all processes.
            [self._interval] = broadcast_object_list([self._pace.interval()])
        is_due = self._is_due(state.global_step)
        if is_due or control.should_training_stop:
            trainer = self._trainer()
            self._write(trainer, self._measure(trainer, counts=is_due), state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure after the last step if that was not foreseen, and let the SAEs and the reference go."""
        del args, kwargs
        self._write_pending(state, control)
        if self._last_step != state.global_step:
            trainer = self._trainer()
            self._write(trainer, self._measure(trainer, counts=False), state, control)
        self._forget()
        if self._recorder is not None and self._owns_recorder:
            self._recorder.leave()
        self._recorder, self._owns_recorder = None, False

    # --- measuring -----------------------------------------------------------------------------------------------

    def _trainer(self) -> Any:
        trainer = calling_trainer(self)
        if trainer is None:
            raise AttachError(
                "`DriftMonitor` found no trainer above it on the call stack. Put it in the trainer's `callbacks`."
            )
        return trainer

    def _is_due(self, step: int) -> bool:
        if self._interval is None or step == self._last_step:
            return False
        return step % self.every == 0 if self.every else step - self._last_step >= self._interval

    def _measure(self, trainer: Any, *, counts: bool) -> Outcome:
        """Run the probe; every process must call this, and all get the main process's outcome."""
        probe = self.probe
        if probe is None:
            raise AttachError("`DriftMonitor` has no reference to measure against: it is taken when training begins.")
        # What is still running on the GPU is the step's.
        _synchronise(trainer)
        begun = time.perf_counter()
        with self._recorder.clock("drift") if self._recorder is not None else nullcontext():
            found = probe.measure()
        seconds = time.perf_counter() - begun
        self._pace.see_probe(seconds, counts=counts)
        # One clock decides for all processes.
        mine = Outcome(found, seconds, self._pace.interval(), self._pace.share)
        outcome: Outcome = broadcast_object_list([mine])[0]
        if self.every is None:
            self._interval = outcome.interval
        return outcome

    # --- what follows --------------------------------------------------------------------------------------------

    def _write_pending(self, state: TrainerState, control: TrainerControl) -> None:
        outcome, self._pending = self._pending, None
        if outcome is None:
            return
        probe = self.probe
        if self._recorder is not None and probe is not None and probe.reference is not None:
            reference = probe.reference
            self._recorder.record.put_file(REFERENCE_FILE, lambda path: save_reference(path, reference))
        self._write(self._trainer(), outcome, state, control)

    def _write(self, trainer: Any, outcome: Outcome, state: TrainerState, control: TrainerControl) -> None:
        """Log, record, and warn or stop."""
        self._last_step = state.global_step
        metrics = outcome.drift.metrics()
        if outcome.cost_share is not None:
            metrics["cost_share"] = outcome.cost_share
        # The base class's own: TRL's and the penalty's versions would close the averages they are in the middle of.
        # It also ends a log event, and one of the training's own may be due at this step.
        is_due = trainer.control.should_log
        Trainer.log(trainer, {f"sae/drift/{name}": value for name, value in metrics.items()})
        trainer.control.should_log = is_due
        crossed = crossings(self.limits, outcome.drift)
        if self._recorder is not None:
            row = {
                "layers": {str(layer): one._asdict() for layer, one in outcome.drift.layers.items()},
                "kl": outcome.drift.kl,
                "crossed": [str(one) for one in crossed],
                "action": self.on_drift if crossed else None,
                "seconds": outcome.seconds,
                "cost_share": outcome.cost_share,
            }
            self._recorder.record.add("drift", state.global_step, row)
        if crossed and self.on_drift == "stop":
            control.should_training_stop = True
        if trainer.is_world_process_zero():
            for limit in dict.fromkeys(one.limit for one in crossed):
                if limit not in self._warned:
                    self._warned.add(limit)
                    self._warn(state.global_step, [one for one in crossed if one.limit == limit])

    def _warn(self, step: int, crossed: Sequence[Crossing]) -> None:
        limit, bound = crossed[0].limit, crossed[0].bound
        where = ", ".join(f"{one.value:.3g}" + _in_layer(one.layer) for one in crossed)
        than = "the frozen one's" if limit == "max_kl" else "on the frozen model"
        why = "" if limit == "max_kl" else ", so the SAE may no longer say what its features' labels say"
        advice = (
            "Training stops here: go back to an earlier checkpoint, or train with a smaller penalty weight or "
            "learning rate."
            if self.on_drift == "stop"
            else "Look at `sae/drift/` and at generated text; a smaller penalty weight or learning rate moves the "
            "model less."
        )
        warnings.warn(
            f"Step {step}: the probe texts cross `{limit}`, which is {bound:g} ({where}): {_MEANING[limit]} than "
            f"{than}{why}. {advice}",
            QScopeWarning,
            stacklevel=2,
        )

    def _describe(self, probe: DriftProbe, seconds: float) -> None:
        if self._recorder is None or probe.reference is None:
            return
        self._recorder.describe(
            drift={
                "limits": self.limits.as_dict(),
                "on_drift": self.on_drift,
                "every": self.every,
                "layers": list(probe.layers),
                "num_texts": len(probe.token_ids),
                "num_tokens": probe.num_tokens,
                "reference_mib": probe.reference.num_bytes / 2**20,
                "begin_seconds": seconds,
            }
        )


def _in_layer(layer: int | None) -> str:
    return "" if layer is None else f" in layer {layer}"


def _synchronise(trainer: Any) -> None:
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
