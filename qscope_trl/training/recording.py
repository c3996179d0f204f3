"""Recording a run beside the trainer's own log: what is trained on, every log event, and the seconds our parts take.

One recorder a trainer, shared by the penalty, rewards, drift monitor and dashboard; `monitor/run_record.py` says what
lies in which file. Left out: what is shown of it; that is `qscope report`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl._version import __version__
from qscope_trl.features import FeatureId
from qscope_trl.monitor import model_card
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.checkpoints import CompleteCheckpoints
from qscope_trl.training.reader import FeatureReader
from qscope_trl.training.run_facts import arguments, hardware, plain, versions
from qscope_trl.training.used_features import UsedFeatures

_ORIGINAL = "_qscope_original"
_MOST_EVENTS = 1000


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes the record of one trainer's runs; `RunRecorder.of(trainer)`.

    It neither looks at the model nor draws random numbers, and only the main process writes. `used_features.json` is
    written into every checkpoint and, at the end, into `output_dir`; the model card that the trainer makes gains a
    section on the features.

    Args:
        is_enabled: Whether anything is written.
    """

    def __init__(self, is_enabled: bool = True) -> None:
        self._is_enabled = is_enabled
        self.record = RunRecord(".", writes=False)
        self._trainer: Any = None
        self._parts: dict[str, Any] = {}
        self.used: UsedFeatures
        """What the trainer's model was trained on; there is one as soon as there is a trainer."""
        self._begun = False
        self._started, self._date = 0.0, ""
        self._step_started = 0.0
        self._steps, self._step_seconds = 0, 0.0
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []
        self._marks: CompleteCheckpoints | None = None
        self._owns_marks = False
        self._card: Any = None
        self._has_run = False

    @classmethod
    def of(cls, trainer: Any) -> RunRecorder:
        """The one in a trainer's list of callbacks; added if there is none."""
        found = next((item for item in trainer.callback_handler.callbacks if isinstance(item, cls)), None)
        if found is None:
            found = cls()
            trainer.add_callback(found)
        found._join(trainer)
        return found

    def _join(self, trainer: Any) -> None:
        if self._trainer is trainer:
            return
        self.leave()
        self._trainer, self._has_run = trainer, False
        self.record = RunRecord(trainer.args.output_dir, writes=self._is_enabled and trainer.is_world_process_zero())
        self._parts, self.used = {}, UsedFeatures(trainer.model)
        present = list(trainer.callback_handler.callbacks)
        self._marks = CompleteCheckpoints.of(trainer)
        self._owns_marks = self._marks not in present
        self._marks.writers.append(self._write_used)
        self._card = trainer.__dict__.get("create_model_card")
        trainer.create_model_card = self._wrap_card(trainer.create_model_card)

    def leave(self) -> None:
        """Take itself out of its trainer; a second call does nothing.

        After a run the card's section stays, as `push_to_hub` writes the card anew.
        """
        trainer, self._trainer = self._trainer, None
        if trainer is None:
            return
        if self._marks is not None:
            self._marks.writers.remove(self._write_used)
            if self._owns_marks:
                self._marks.leave(trainer)
        if not self._has_run:
            trainer.__dict__.pop("create_model_card")
            if self._card is not None:
                trainer.create_model_card = self._card
        handler = trainer.callback_handler
        # A new list: the trainer may be going through the present one, and would skip the callback after this.
        handler.callbacks = [item for item in handler.callbacks if item is not self]

    # --- what others say -----------------------------------------------------------------------------------------

    def describe(self, **parts: Any) -> None:
        """Set keys of `run.json`; the schema is in `monitor/run_record.py`."""
        self._parts.update(parts)
        if self._begun:
            self._put_run()

    def use(self, ids: Iterable[FeatureId], how: str) -> None:
        """Mark features as trained on; see `UsedFeatures.add`."""
        self.used.add(ids, how)
        if self._begun:
            self._put_run()

    @contextmanager
    def clock(self, part: str, *, is_between_steps: bool = False) -> Iterator[None]:
        """Count the seconds inside into `overhead.jsonl`: on a GPU those of its stream, read at the next log event.

        Args:
            part: Under which name.
            is_between_steps: Whether this is no part of a step; it does not lengthen one that has just begun.
        """
        entered = time.perf_counter()
        try:
            with self._clock(part):
                yield
        finally:
            if is_between_steps and self._step_started:
                self._step_started += time.perf_counter() - entered

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        if torch.cuda.is_available() and self._trainer is not None and self._trainer.args.device.type == "cuda":
            cuda: Any = torch.cuda
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((part, start, end))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - begun

    # --- events --------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the record, or go on with that of the run that is resumed."""
        del args, control, kwargs
        self._begun = False
        self._begin(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        del args, control, kwargs
        self._begin(state)
        self._step_started = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it: before `on_step_end`, where others measure and would be counted as part of the step."""
        del args, state, control, kwargs
        if self._step_started:
            self._steps += 1
            self._step_seconds += time.perf_counter() - self._step_started
            self._step_started = 0.0
        if len(self._events) > _MOST_EVENTS:
            self._read_events()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the event, and the seconds since the last one that closed some steps."""
        del args, control, kwargs
        if not self._begun:
            return
        self.record.add("log", state.global_step, plain(logs or {}))
        if self._steps:
            self._add_overhead(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the record."""
        del control, kwargs
        if not self._begun:
            return
        if self._steps or self._seconds or self._events:
            self._add_overhead(state)
        last: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
        self.record.put(
            "end",
            {
                "step": state.global_step,
                "seconds": time.perf_counter() - self._started,
                "finished": _now(),
                "metrics": plain(last),
            },
        )
        self._write_used(Path(args.output_dir))
        self._begun = False

    # --- details -------------------------------------------------------------------------------------------------

    def _begin(self, state: TrainerState) -> None:
        if self._begun:
            return
        self._begun = self._has_run = True
        self._started, self._date = time.perf_counter(), _now()
        self._steps, self._step_seconds, self._seconds, self._events = 0, 0.0, {}, []
        self.record.begin(state.global_step)
        self._put_run()

    def _put_run(self) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        self.record.put(
            "run",
            {
                "qscope_trl": __version__,
                "model": getattr(trainer.model.config, "_name_or_path", ""),
                "trainer": type(trainer).__name__,
                **self._parts,
                "uses": self.used.uses,
                "arguments": arguments(trainer.args),
                "versions": versions(),
                "hardware": hardware(trainer.args.device),
                "num_processes": trainer.accelerator.num_processes,
                "started": self._date,
            },
        )

    def _read_events(self) -> None:
        for part, start, end in self._events:
            end.synchronize()
            self._seconds[part] = self._seconds.get(part, 0.0) + start.elapsed_time(end) / 1000
        self._events = []

    def _add_overhead(self, state: TrainerState) -> None:
        self._read_events()
        row = {"steps": self._steps, "step_seconds": self._step_seconds, "parts": self._seconds}
        self.record.add("overhead", state.global_step, row)
        self._steps, self._step_seconds, self._seconds = 0, 0.0, {}

    def _write_used(self, folder: Path) -> None:
        if self.record.writes:
            self.used.write(folder)

    def _wrap_card(self, present: Any) -> Any:
        record, output_dir = self.record, self.record.folder.parent
        # What an earlier training left on it writes into the same card.
        original = getattr(present, _ORIGINAL, present)

        @functools.wraps(original)
        def create_model_card(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if record.writes:
                model_card.update_if_possible(output_dir)
            return result

        setattr(create_model_card, _ORIGINAL, original)
        return create_model_card


def describe_penalty(recorder: RunRecorder, attachment: Any) -> None:
    """Put into the record what a penalty is on and what it only measures, and which features it trains on.

    Args:
        recorder: Of the trainer that it is attached to.
        attachment: The `PenaltyAttachment`.
    """
    features, monitors, control_of = attachment.features, attachment.monitor_features, attachment.control_of
    source, revision, _ = attachment._source
    opened = source.source if isinstance(source, SAESuite) else str(source)
    if attachment.config.penalty_weight > 0:
        recorder.use(features.ids, "penalty")
    if monitors is not None:
        recorder.used.warn_of(monitors.ids)
    recorder.describe(
        sae={
            "name": features.sae or opened,
            "source": opened,
            "revision": source.revision if isinstance(source, SAESuite) else revision,
        },
        penalty=asdict(attachment.config),
        features=features.to_dict(),
        monitors=None if monitors is None else monitors.to_dict(),
        control=None if control_of is None else {"kind": "random", "of": control_of.to_dict()},
    )


def describe_rollouts(trainer: Any, readers: Iterable[FeatureReader], policy: Any) -> None:
    """Put into the record what is read of a trainer's rollouts, and which features that trains on.

    Args:
        trainer: A GRPO or RLOO trainer.
        readers: What is read.
        policy: Its `RolloutPolicy`, or None.
    """
    recorder = RunRecorder.of(trainer)
    rewards, monitors = [], list[FeatureId]()
    acting = None if policy is None else policy.reader
    functions = getattr(trainer, "reward_funcs", ())
    for reader in readers:
        # A policy that brought features of its own reads them by a reward function that is in no list.
        scale = getattr(reader, "scale", 0.0) if any(function is reader for function in functions) else 0.0
        rewards.append(
            {
                "name": reader.name,
                "features": reader.features.to_dict(),
                "kind": reader.kind,
                "reader": reader.reader,
                "scale": scale,
                "sign": getattr(reader, "sign", -1),
            }
        )
        if scale:
            recorder.use(reader.features.ids, f"reward {reader.name}")
        elif reader is not acting:
            monitors.extend(reader.features.ids)
    if acting is not None:
        recorder.use(acting.features.ids, f"policy {policy.kind}")
    recorder.used.warn_of(monitors)
    described = None if policy is None else {"kind": policy.kind, "strength": policy.strength}
    recorder.describe(rewards=rewards, policy=described)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
