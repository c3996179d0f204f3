"""A wandb that cannot start, for want of an account or of network, does not end the training run."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl.monitor import dashboard_wandb


class WandbStart(TrainerCallback):  # type: ignore[misc]
    """Stands before transformers' own callback and starts wandb as that would, but survives its failing."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter

    @classmethod
    def put_before(cls, trainer: Any) -> None:
        """Put one before the trainer's wandb callback, if it has one and none stands there."""
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(item, cls) for item in callbacks):
            return
        reporter = next((item for item in callbacks if type(item).__name__ == "WandbCallback"), None)
        if reporter is not None:
            callbacks.insert(callbacks.index(reporter), cls(reporter))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start wandb, or begin an offline run, or take its callback out."""
        del control
        reporter = self._reporter
        if not state.is_world_process_zero or getattr(reporter, "_initialized", True) or state.is_hyper_param_search:
            return
        model = kwargs.get("model")
        how = dashboard_wandb.start(
            lambda: reporter.setup(args, state, model),
            project=os.getenv("WANDB_PROJECT", "huggingface"),
            name=args.run_name,
        )
        if how == "offline":
            # It then finds the run that is going on, and describes it.
            reporter._initialized = False
        elif how == "not":
            # Without it, every event of the callback does nothing.
            reporter._wandb = None
