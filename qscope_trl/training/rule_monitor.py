"""How often rules hold on fixed texts while a model is trained: a callback for any trainer.

The texts are run through the model between its steps, so nothing of the training path is touched. Left out: the
training batches themselves; rollouts of GRPO are watched by `RuleReward(..., scale=0)`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qscope_trl.activations.feature_table import TableEncoder
from qscope_trl.errors import AttachError, ConfigError, DataError
from qscope_trl.features import FeatureSet
from qscope_trl.rules import Rule, load_rule
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.opening import on_every_process
from qscope_trl.training.stack import calling_trainer


class RuleMonitor(TrainerCallback):  # type: ignore[misc]
    """Logs `sae/rule/NAME`: the share of the given texts for which each rule holds on the model in training.

    ```python
    trainer = SFTTrainer(model, ..., callbacks=[RuleMonitor({"toxic": "toxic.yaml"}, texts, "Qwen/SAE-Res-...")])
    ```

    Measured before the first step, every `every` steps, at each evaluation and after the last step. The model is put
    in evaluation mode meanwhile, gradients and random states are left alone, so training is the same with and without.
    Several processes share the texts. A rule answers by what the SAEs show of the model: that it holds less often may
    mean that the behaviour is gone, or that the features no longer describe the model.

    Args:
        rules: By name: `Rule`, rule file, or the text of a rule.
        texts: What is run through the model.
        saes: Hub id, folder, file, or an open `SAESuite`. The encoders of the rules' layers stay in memory.
        every: Steps between measurements; by default only at evaluations, the begin and the end.
        sets: FeatureSets by the name that the rules use.
        max_length: Tokens kept of each text: its first ones.
        batch_size: Texts in one forward.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If there is no rule, or a setting does not fit.
        DataError: If there is no text.
        RuleError: If a rule cannot be read.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule | str | os.PathLike[str]],
        texts: Sequence[str],
        saes: SAESuite | str | os.PathLike[str],
        *,
        every: int | None = None,
        sets: Mapping[str, FeatureSet] | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        if not rules:
            raise ConfigError("`rules` is empty: name at least one rule to watch.")
        if every is not None and every < 1:
            raise ConfigError(f"`every` is {every}; it is a number of steps from 1, or None.")
        if not any(text.strip() for text in texts):
            raise DataError("`texts` holds no text, so there is nothing a rule could hold for.")
        self.rules = {name: load_rule(rule, sets=sets) for name, rule in rules.items()}
        self.texts = list(texts)
        self.every = every
        self._source = (saes, sae_revision, sae_k)
        self._settings: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size}
        self._encoder: TableEncoder | None = None
        self._last_step = -1

    def measure(self, trainer: Any) -> dict[str, float]:
        """Run the texts through the trainer's model; every process must call this.

        Returns:
            Per rule the share of texts for which it holds, over all processes.

        Raises:
            AttachError: If the model's weights are spread over processes.
            RuleError: If a rule names a feature that is not there, or was made for other SAEs.
        """
        encoder = self._open(trainer)
        accelerator = trainer.accelerator
        mine = self.texts[accelerator.process_index :: accelerator.num_processes]
        with torch.compiler.set_stance("force_eager"):
            table = encoder(mine)
        held = [float(rule.evaluate(table).sum()) for rule in self.rules.values()]
        sums = torch.tensor([*held, float(len(mine))])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
        *counts, total = sums.tolist()
        return {name: count / total for name, count in zip(self.rules, counts, strict=True)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure before the first step."""
        del args, control, kwargs
        self._last_step = -1
        self._log(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if it is time."""
        del args, control, kwargs
        if self.every is not None and state.global_step % self.every == 0:
            self._log(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure beside an evaluation."""
        del args, control, kwargs
        self._log(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure after the last step, and let the encoders go."""
        del args, control, kwargs
        self._log(state)
        self._encoder = None

    def _log(self, state: TrainerState) -> None:
        if state.global_step == self._last_step:
            return
        trainer = calling_trainer(self)
        if trainer is None:
            raise AttachError(
                "`RuleMonitor` found no trainer above it on the call stack. Put it in the trainer's `callbacks`, or "
                "call `measure(trainer)` yourself."
            )
        self._last_step = state.global_step
        found = self.measure(trainer)
        # The base class's own: TRL's and the penalty's versions would close the averages they are in the middle of.
        # It also ends a log event, and one of the training's own may be due at this step.
        is_due = trainer.control.should_log
        Trainer.log(trainer, {f"sae/rule/{name}": share for name, share in found.items()})
        trainer.control.should_log = is_due

    def _open(self, trainer: Any) -> TableEncoder:
        model = trainer.model
        if self._encoder is not None and self._encoder.model is model:
            return self._encoder
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if getattr(trainer, "is_fsdp_enabled", False) or (plugin is not None and plugin.zero_stage == 3):
            raise AttachError(
                "`RuleMonitor` runs its texts through the whole model on each process, and here its weights are "
                "spread over the processes (FSDP or ZeRO-3). Train by data parallelism or ZeRO-2, or evaluate "
                "checkpoints by `qscope rules evaluate`."
            )
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if tokenizer is None:
            raise AttachError("`RuleMonitor` needs the trainer's tokenizer: pass it as `processing_class`.")

        def open_encoder() -> TableEncoder:
            saes, revision, k = self._source
            suite = SAESuite.from_pretrained(saes, revision=revision, k=k)
            for rule in self.rules.values():
                rule.check(suite)
            features = sorted({feature for rule in self.rules.values() for feature in rule.features})
            return TableEncoder(model, tokenizer, suite, features, show_progress=False, **self._settings)

        self._encoder = on_every_process(open_encoder)
        return self._encoder
