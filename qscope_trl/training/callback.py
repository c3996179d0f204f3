"""The drop-in: one callback in a trainer's list joins the feature penalty to its loss."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.errors import AttachError, QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.alarm import AlarmLimits
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.attach import PenaltyAttachment, attachment_of
from qscope_trl.training.checkpoints import find_fault
from qscope_trl.training.masks import GroupFn
from qscope_trl.training.metrics import STATE_FILE
from qscope_trl.training.stack import calling_trainer, resumed_folder


class SAEPenaltyCallback(TrainerCallback):  # type: ignore[misc]
    """Adds a penalty on SAE features to the loss of the trainer it is given to.

    ```python
    trainer = SFTTrainer(
        model, args=args, train_dataset=dataset,
        callbacks=[SAEPenaltyCallback("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "zh.yaml", penalty_weight=0.1)],
    )
    ```

    The callback finds its trainer by itself, hooks the model when the trainer is built and takes everything off when
    training ends or a training step fails. `detach()` does the same by hand. What is computed, on which tokens and how
    it is normalised: see `PenaltyAttachment` and `PenaltyConfig`.

    The trainer's log gains `sae/penalty` (unweighted), `sae/penalty_weight`, `sae/L12/penalty`, and for each feature
    `sae/L12F345/mean_pre_act` and `sae/L12F345/firing_rate`; monitors appear under `sae/monitor/`, evaluation under
    `eval_sae/`. `sae/alarm` is 1 where the features are silent and the monitors, or a text detector, are not.

    Args:
        saes: Hub id, folder, file, or an open `SAESuite`.
        features: `FeatureSet`, path to one, or a list of names like `L12F345`.
        penalty_weight: Factor of the penalty in the loss; 0 measures only and leaves training unchanged.
        config: All settings as one object, instead of keywords.
        monitor_features: Features that are measured and never penalised.
        group_fn: Names the group of a sequence from its token ids.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.
        alarm: From where on features are silent and what they stand for is not, for one warning of each kind; None
            for no alarm.
        record: Write the run's record into `output_dir/sae_record`, for `qscope report` and the model card, and
            `used_features.json` into checkpoints.
        **settings: Further fields of `PenaltyConfig`, such as `penalty_kind="topk_act"`.

    Raises:
        ConfigError: If a setting does not fit.
        FeatureSetError: If the feature file is unreadable.
    """

    def __init__(
        self,
        saes: SAESuite | str | os.PathLike[str],
        features: FeatureSet | str | os.PathLike[str] | Sequence[str],
        penalty_weight: float | None = None,
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
        if penalty_weight is not None:
            settings["penalty_weight"] = penalty_weight
        self.attachment = PenaltyAttachment(
            saes,
            features,
            config=config,
            monitor_features=monitor_features,
            group_fn=group_fn,
            sae_revision=sae_revision,
            sae_k=sae_k,
            alarm=alarm,
            record=record,
            **settings,
        )

    def attach(self, trainer: Any) -> SAEPenaltyCallback:
        """Attach to a trainer by hand, where the callback cannot find it. Errors as `PenaltyAttachment.attach`."""
        self.attachment.attach(trainer)
        return self

    def detach(self) -> None:
        """Take every hook and wrapper off the trainer and its model."""
        self.attachment.detach()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the trainer that is being built."""
        trainer = calling_trainer(self)
        if trainer is not None and trainer.model is not None:
            self._join(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach if `on_init_end` was missed or the model was replaced, and take up a checkpoint's state."""
        trainer = calling_trainer(self)
        if trainer is not None:
            self._join(trainer)
        elif self.attachment.trainer is not None:
            self.attach(self.attachment.trainer)
        else:
            raise AttachError(
                "`SAEPenaltyCallback` found no trainer above it on the call stack. Call `callback.attach(trainer)` "
                "before `trainer.train()`."
            )
        if state.global_step > 0:
            self._load_state(resumed_folder() or Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Forget what `trainer.predict` measured, so that the next evaluation reports its own data only."""
        self.attachment.metrics.forget_evaluation()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take everything off, so that the trained model carries no hook."""
        self.detach()

    def _join(self, trainer: Any) -> None:
        """Attach to the trainer that lists this callback, instead of a penalty whose callback it lists no longer."""
        other = attachment_of(trainer)
        listed = trainer.callback_handler.callbacks
        # Removed from the list, or replaced by an instance that `restore_callback_states_from_checkpoint` made.
        if other is not None and other.owner is not None and all(item is not other.owner for item in listed):
            other.detach()
        try:
            self.attach(trainer)
        except AttachError:
            if other is not None:
                # The trainer is not built or does not train, so nothing of the first penalty may remain either.
                other.detach()
            raise
        self.attachment.owner = self

    def _load_state(self, folder: Path) -> None:
        if find_fault(folder) is not None:
            return  # `CompleteCheckpoints` refuses it, on every process.
        if not (folder / STATE_FILE).is_file():
            warnings.warn(
                f"Training resumes from '{folder}', which holds no `{STATE_FILE}`: the penalty's settings cannot be "
                f"compared. Its schedule goes on from the trainer's step.",
                QScopeWarning,
                stacklevel=2,
            )
            return
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.attachment.resume(state)
