"""A dashboard of features while a model is trained: a callback for any trainer.

Between steps it reads features on fixed texts, generates from fixed prompts, and takes up the last rollouts of GRPO.
What it finds goes into the run's record and, where one is going on, into a wandb run; scalars go through the trainer's
own log and so reach whatever it reports to. Left out: scalars per feature, which the penalty and the rewards log, and
drift.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl.activations.sampling import Sampling
from qscope_trl.errors import AttachError, ConfigError, DataError, QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.monitor import dashboard_wandb
from qscope_trl.monitor.dashboard_things import (
    histogram_things,
    penalty_things,
    rollout_things,
    sample_things,
    text_things,
)
from qscope_trl.monitor.dashboard_wandb import Shown, WandbSink
from qscope_trl.monitor.detectors import text_detector
from qscope_trl.monitor.html import token_texts
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.dashboard_reading import (
    FeatureValues,
    ValueLists,
    histograms,
    named,
    prompt_ids,
    samples,
    shown_features,
    strongest,
    strongest_texts,
    text_ids,
    untouched,
    value_lists,
    watched_of,
    weights_are_spread,
)
from qscope_trl.training.dashboard_rollouts import Reading, RolloutView
from qscope_trl.training.opening import on_every_process, on_main_process
from qscope_trl.training.recording import RunRecorder
from qscope_trl.training.stack import calling_trainer
from qscope_trl.training.wandb_start import WandbStart

_TIMES = 10


class FeatureDashboard(TrainerCallback):  # type: ignore[misc]
    """Shows what features do on fixed texts, fixed prompts and rollouts, before, during and after training.

    ```python
    dashboard = FeatureDashboard(prompts, texts, behaviour="chinese")
    trainer = SFTTrainer(model, ..., callbacks=[SAEPenaltyCallback(saes, features, 0.05), dashboard])
    ```

    Measured before the first step, every `every` steps and after the last one, by the main process, with the model in
    evaluation mode; gradients, random states and modes are left alone, so training is the same with and without. It
    writes `histograms.jsonl`, `texts.jsonl`, `samples.jsonl` and `rollouts.jsonl` of the run's record, and logs
    `sae/text/rate`, the share of generations that show the behaviour. In a wandb run it shows histograms, tables and
    pages under `sae_...`, on the axis `train/global_step`; texts, prompts and rollouts are sent there as they are.

    Where weights are spread over processes (FSDP, ZeRO-3, tensor parallelism), no process can run the model alone:
    texts and generations are left out, with one warning; rollouts are shown there too.

    Args:
        prompts: What generations begin with, texts or conversations. By default column `prompt` of the training data,
            where it has one.
        texts: Fixed texts that features are read on. By default the first 32 rows of the training data, or where these
            are no texts, as in GRPO, the prompts.
        every: Steps between measurements; by default a tenth of the run.
        behaviour: Text detector on generations: `chinese`, `repetition` or `regex:PATTERN`. It knows no features, so
            it tells a behaviour that is gone from a feature that is silent.
        saes: Hub id, folder, file, or an open `SAESuite`, with `features`. By default those of the penalty that is
            attached to the trainer, and of the rewards that read features.
        features: What to show, with `saes`: `FeatureSet`, path to one, or names like `L12F345`.
        monitor_features: Features that are not trained on, likewise.
        num_samples: Generations of each measurement; prompts are used in turn.
        max_new_tokens: Tokens of each generation.
        temperature: Of sampling; 0 takes the likeliest token.
        top: Texts, generations and rollouts that are shown with their tokens.
        max_length: Tokens kept of each text (its first) and prompt (its last).
        batch_size: Texts in one forward.
        seed: Decides the sampling; the same at each measurement.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If a setting does not fit.
        DataError: If `texts` holds no text.
        FeatureSetError: If a feature file is unreadable.
    """

    def __init__(
        self,
        prompts: Sequence[Any] | None = None,
        texts: Sequence[str] | None = None,
        *,
        every: int | None = None,
        behaviour: str | None = None,
        saes: SAESuite | str | os.PathLike[str] | None = None,
        features: FeatureSet | str | os.PathLike[str] | Sequence[str] | None = None,
        monitor_features: FeatureSet | str | os.PathLike[str] | Sequence[str] | None = None,
        num_samples: int = 16,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top: int = 8,
        max_length: int = 256,
        batch_size: int = 8,
        seed: int = 0,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        for name, value, least in (
            ("every", every, 1),
            ("num_samples", num_samples, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("top", top, 1),
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"`{name}` of the dashboard is {value}; it is {least} or more.")
        if not math.isfinite(temperature) or temperature < 0:
            raise ConfigError(f"`temperature` of the dashboard is {temperature}; it is a finite number from 0.")
        if (saes is None) is not (features is None) or (monitor_features is not None and features is None):
            raise ConfigError(
                "`saes` and `features` of the dashboard come together, and `monitor_features` with them."
            )
        if texts is not None and not any(text.strip() for text in texts):
            raise DataError("`texts` of the dashboard holds no text, so there is nothing to read features on.")
        self.prompts, self.texts = prompts, None if texts is None else list(texts)
        self.every, self.top, self.num_samples = every, top, num_samples
        self.detector = None if behaviour is None else text_detector(behaviour)
        self._chosen = None if features is None else named(saes, features, monitor_features, sae_revision, sae_k)
        self._max_length = max_length
        self._sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
        )
        self._rollouts = RolloutView(top)
        self._forget()

    def _forget(self) -> None:
        self._trainer: Any = None
        self._recorder: RunRecorder | None = None
        self._owns_recorder = False
        self._is_spread = False
        self._read: FeatureValues | None = None
        self._sink: WandbSink | None = None
        self._interval = 1
        self._last_step = -1
        self._texts: list[list[int]] = []
        self._prompts: list[list[int]] = []
        self._fixed: list[int] = []
        self._first: list[dict[str, Any]] = []
        self._points: list[tuple[int, float, float]] = []

    # --- events --------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See to it that a wandb that cannot start does not end the run."""
        del args, state, control, kwargs
        trainer = calling_trainer(self)
        if trainer is not None:
            WandbStart.put_before(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out what there is to show, and refuse what does not fit."""
        del args, control, kwargs
        trainer = calling_trainer(self)
        if trainer is None:
            raise AttachError(
                "`FeatureDashboard` found no trainer above it on the call stack. Put it in the trainer's `callbacks`."
            )
        self._forget()
        self._trainer = trainer
        present = list(trainer.callback_handler.callbacks)
        self._recorder = RunRecorder.of(trainer)
        self._owns_recorder = self._recorder not in present
        self._interval = self.every or max(1, math.ceil(state.max_steps / _TIMES))
        watched = self._chosen or watched_of(trainer)
        self._rollouts.watch(trainer)
        tokenizer = self._tokenizer()
        self._is_spread = weights_are_spread(trainer)
        if self._is_spread:
            warnings.warn(
                "`FeatureDashboard` shows no texts and generations here: the weights are spread over processes (FSDP, "
                "ZeRO-3 or tensor parallelism), and it runs the model on one. Read checkpoints by `qscope audit`, or "
                "train by data parallelism or ZeRO-2.",
                QScopeWarning,
                stacklevel=2,
            )
        with untouched(trainer.model):
            if not self._is_spread:
                self._prompts = prompt_ids(tokenizer, self.prompts, trainer.train_dataset, self._max_length)
                self._texts = text_ids(tokenizer, self.texts, trainer.train_dataset, self._max_length) or self._prompts
            # On every process, so that none goes on alone when one cannot.
            self._read = on_every_process(lambda: FeatureValues(trainer.model, watched))
        if not self._is_spread and not getattr(trainer.model, "can_generate", lambda: True)():
            if self.prompts is not None or self.detector is not None:
                raise ConfigError(
                    f"`FeatureDashboard` has `prompts` or `behaviour`, but `{type(trainer.model).__name__}` cannot "
                    f"generate. Leave both out, and give `texts` to read features on."
                )
            self._prompts = []
        elif self.detector is not None and not self._prompts and not self._is_spread:
            raise ConfigError(
                f"`behaviour` is {self.detector.name!r}, but there are no prompts to generate from: the training data "
                f"has no column `prompt`. Give `prompts`."
            )
        if not (self._texts or self._prompts or self._is_spread):
            raise ConfigError(
                "The dashboard has no texts and no prompts, and the training data shows none. Give `texts`, `prompts` "
                "or both."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure before the first step: by now every callback has begun, also the record's.

        A run that is resumed goes on with the texts of its record, whose first measurement is the one before training.
        """
        del args, control, kwargs
        if self._last_step >= 0:
            return
        if state.global_step == 0:
            self._measure(state)
        elif self._recorder is not None:
            self._last_step = state.global_step
            # Of the process that writes, and measures; another one may read while that one rewrites.
            if self._recorder.record.writes:
                self._fixed, self._first = _taken_up(self._recorder.record, len(self._texts), self.top)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if it is time, and after the last step while all callbacks are still there."""
        del args, control, kwargs
        if state.global_step % self._interval == 0 or state.global_step >= state.max_steps:
            self._measure(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the scalars in groups, in a wandb run."""
        del args, control, kwargs
        if self._trainer is None or not state.is_world_process_zero:
            return
        scalars: dict[str, Shown] = dict(dashboard_wandb.grouped(logs or {}))
        loss, penalty, weight = ((logs or {}).get(key) for key in ("loss", "sae/penalty", "sae/penalty_weight"))
        if loss is not None and penalty is not None and weight is not None:
            task = float(loss) - float(weight) * float(penalty)
            self._points.append((state.global_step, float(penalty), task))
            scalars["sae_penalty/task_loss"] = task
        self._show(state.global_step, scalars)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure after the last step, if that was not foreseen, and let everything go."""
        del args, control, kwargs
        if self._trainer is None:
            return
        self._measure(state)
        if state.is_world_process_zero:
            self._show(state.global_step, penalty_things(self._points))
        self._rollouts.leave()
        if self._recorder is not None and self._owns_recorder:
            self._recorder.leave()
        self._forget()

    # --- measuring -----------------------------------------------------------------------------------------------

    def _measure(self, state: TrainerState) -> None:
        """On every process; the main one works, and tells the others what it logs."""
        trainer, recorder, step = self._trainer, self._recorder, state.global_step
        if trainer is None or recorder is None or step == self._last_step:
            return
        self._last_step = step

        def measure() -> float | None:
            with recorder.clock("dashboard", is_between_steps=True), untouched(trainer.model):
                return self._measure_here(trainer.model, recorder, step)

        rate = on_main_process(measure, trainer)
        if rate is not None:
            # The base class's own: TRL's and the penalty's versions would close the averages they are in the middle
            # of. It also ends a log event, and one of the training's own may be due at this step.
            is_due = trainer.control.should_log
            scalars = {"sae/text/rate": rate}
            Trainer.log(trainer, scalars)
            trainer.control.should_log = is_due
            if all(item is not recorder for item in trainer.callback_handler.callbacks):
                recorder.record.add("log", step, scalars)

    def _measure_here(self, model: Any, recorder: RunRecorder, step: int) -> float | None:
        """The share of generations that show the behaviour, if there are any."""
        read = self._read
        if read is None:
            return None
        things: dict[str, Shown] = {}
        shown = shown_features(read)
        record = recorder.record
        try:
            values = read(model, self._texts, self._sampling.batch_size) if self._texts else []
            rows = self._samples(model, read, shown) if self._prompts and self.num_samples else []
        except (DataError, torch.OutOfMemoryError) as err:
            warnings.warn(
                f"`FeatureDashboard` shows nothing at step {step}: {err} Training goes on.",
                QScopeWarning,
                stacklevel=5,
            )
            return None
        if values:
            counted = histograms(values, read)
            self._fixed = self._fixed or strongest_texts(values, read, shown, self.top)
            for row in counted:
                record.add("histograms", step, row)
            for index in self._fixed:
                ids, lists = self._texts[index], value_lists(values[index], read.names, shown)
                tokens = token_texts(self._tokenizer(), ids)
                record.add("texts", step, {"index": index, "tokens": tokens, "values": lists})
            now = strongest(values, read, shown, self._tokenizer(), self._texts)
            things |= {**histogram_things(counted), **text_things(step, now)}
        for row in rows:
            record.add("samples", step, row)
        dated = [{"step": step, **row} for row in rows[: self.top]]
        # Those of a resumed run's record may be of other prompts, or of another number of them.
        if [row["prompt"] for row in self._first] != [row["prompt"] for row in dated]:
            self._first = dated
        penalised = [name for name in shown if read.kinds[name] == "penalised"]
        things |= sample_things(step, dated, self._first, penalised)
        seen = self._rollouts.rows(self._tokenizer(), shown, self._reading(read, model))
        for row in seen:
            record.add("rollouts", step, row)
        things |= rollout_things(step, seen, penalised)
        self._show(step, things)
        verdicts = [row["is_shown"] for row in rows if row["is_shown"] is not None]
        return sum(verdicts) / len(verdicts) if verdicts else None

    def _reading(self, read: FeatureValues, model: Any) -> Reading | None:
        """What reads rollouts that no reward reads; None where the model cannot be run."""
        if self._is_spread:
            return None

        def run(ids: Sequence[Sequence[int]], first: Sequence[int], shown: Sequence[str]) -> list[ValueLists]:
            found = read(model, ids, self._sampling.batch_size)
            return [value_lists(one[start:], read.names, shown) for one, start in zip(found, first, strict=True)]

        return run

    def _samples(self, model: Any, read: FeatureValues, shown: Sequence[str]) -> list[dict[str, Any]]:
        prompts = [self._prompts[n % len(self._prompts)] for n in range(self.num_samples)]
        return samples(model, self._tokenizer(), prompts, self._sampling, read, shown, self.detector)

    def _show(self, step: int, things: Mapping[str, Shown]) -> None:
        self._sink = self._sink or WandbSink.of_running()
        if self._sink is not None:
            self._sink.show(step, things)

    def _tokenizer(self) -> Any:
        tokenizer = getattr(self._trainer.processing_class, "tokenizer", self._trainer.processing_class)
        if tokenizer is None:
            raise AttachError("`FeatureDashboard` needs the trainer's tokenizer: pass it as `processing_class`.")
        return tokenizer


def _taken_up(record: RunRecord, num_texts: int, top: int) -> tuple[list[int], list[dict[str, Any]]]:
    """Texts and generations of a record's first measurement; none of what does not belong to these texts."""
    fixed = sorted({row["index"] for row in record.first("texts")})
    return fixed if all(index < num_texts for index in fixed) else [], list(record.first("samples"))[:top]
