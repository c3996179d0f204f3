"""What rollouts show to frozen SAEs, harvested from forwards that a GRPO step makes anyway.

Between generation and rewards TRL may run the policy (old log-probabilities) and the reference model over whole
rollouts. A listener reads the chosen features there, at the end of each forward, and keeps no residual. Only if the
forward that a reader needs does not happen is one more made, without gradient. Left out: what becomes of the scores;
that is `rewards` and `rollouts`.

Shape legend: `B` rows, `T` positions of prompt and completion, `C` completion tokens of one rollout, `S` features.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from qscope_trl.errors import AttachError, ConfigError, NonFiniteError, PenaltySelfCheckError
from qscope_trl.hooks.layers import find_decoder, is_compiled
from qscope_trl.hooks.residual import Capture, ResidualHook
from qscope_trl.training.checks import finite_tokens, processes_with
from qscope_trl.training.frozen import frozen_model, reading
from qscope_trl.training.generations import (
    RolloutActivations,
    Rollouts,
    SeenRollouts,
    find_rollouts,
    last_logits,
    padded_rollouts,
    read_generation,
    refuse_unknown_shape,
    see_rollouts,
    shows_frozen,
)
from qscope_trl.training.opening import on_every_process, open_features
from qscope_trl.training.penalty import PENALTIES, LayerFeatures
from qscope_trl.training.reader import FeatureReader
from qscope_trl.training.recording import describe_rollouts

ACTIVATIONS_KEY = "sae_activations"
"""Keyword of reward functions: for each rollout a mapping from reader's name to `RolloutActivations`, or None."""

READERS_KEY = "sae_readers"
"""Keyword of reward functions beside it: for each rollout, the readers that the trainer's scoring knows."""

_ATTRIBUTE = "_qscope_rollout_scoring"
_log = logging.getLogger("qscope_trl")


def scoring_of(trainer: Any) -> RolloutScoring | None:
    """The scoring of a trainer, if it has one."""
    found = getattr(trainer, _ATTRIBUTE, None)
    return found if isinstance(found, RolloutScoring) else None


class RolloutScoring:
    """Reads features from the rollouts of one GRPO or RLOO trainer.

    Use `RolloutScoring.of(trainer)`; `SAEGRPOTrainer` and `FeatureReward` do. It wraps three methods of the trainer
    object and hooks the model only while rollouts are scored.
    """

    def __init__(self, trainer: Any) -> None:
        refuse_unknown_shape(trainer)
        self.trainer = trainer
        self.readers: dict[str, FeatureReader] = {}
        self.num_forwards = 0
        self.policy: Any = None
        self.observers: list[Callable[[SeenRollouts], None]] = []
        """Called with each generation of training, after the policy."""
        self.scores: list[Mapping[str, RolloutActivations] | None] = []
        self._opened: dict[str, dict[int, LayerFeatures]] = {}
        self._described: tuple[Any, Any] = ((), None)
        self._rollouts: Rollouts | None = None
        self._window: ExitStack | None = None
        self._listening: ExitStack | None = None
        self._rewards_BF: Tensor | None = None
        self._said = False
        for name, wrapper in (
            ("_generate", self._wrap_generate),
            ("_generate_and_score_completions", self._wrap_score),
            ("_calculate_rewards", self._wrap_rewards),
        ):
            setattr(trainer, name, wrapper(getattr(trainer, name)))
        setattr(trainer, _ATTRIBUTE, self)

    @classmethod
    def of(cls, trainer: Any) -> RolloutScoring:
        """The trainer's scoring; made on the first call.

        Raises:
            AttachError: If the trainer's methods are not as in the versions this package knows.
        """
        return scoring_of(trainer) or cls(trainer)

    def add(self, reader: FeatureReader) -> None:
        """Read these features too; a second call with the same reader does nothing.

        Raises:
            ConfigError: If another reader has the same name.
        """
        known = self.readers.get(reader.name)
        if known is not None and known is not reader:
            raise ConfigError(f"Two feature readers are called `{reader.name}`. Give one of them another `name`.")
        self.readers[reader.name] = reader

    def open(self) -> None:
        """Open the SAEs of all readers and check that the models they read exist; again after a change only.

        Raises:
            AttachError: If a reader's model does not exist, or its SAEs do not fit.
            FeatureSetError: If the features belong to another model or SAE.
            CheckpointError: If the SAEs cannot be read.
        """
        for name, reader in self.readers.items():
            if name not in self._opened:
                if reader.reader == "frozen":
                    frozen_model(self.trainer)
                divides = getattr(self.trainer, "multi_objective_aggregation", None) == "normalize_then_sum"
                if divides and getattr(reader, "schedule", "constant") != "constant":
                    raise AttachError(
                        f"`multi_objective_aggregation='normalize_then_sum'` divides every reward by its own spread, "
                        f"so the schedule of `{name}` would change nothing. Use `sum_then_normalize`."
                    )
                self._opened[name] = on_every_process(functools.partial(self._open_reader, reader))
        if (tuple(self._opened), self.policy) != self._described:
            self._described = (tuple(self._opened), self.policy)
            describe_rollouts(self.trainer, [self.readers[name] for name in self._opened], self.policy)

    def _open_reader(self, reader: FeatureReader) -> dict[int, LayerFeatures]:
        return open_features(self.trainer.model, reader.suite(), reader.features, (), reader.kind)

    # --- what is wrapped -----------------------------------------------------------------------------------------

    def _wrap_score(self, original: Any) -> Any:
        @functools.wraps(original)
        def generate_and_score(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.open()
            if (self.readers or self.policy is not None) and any(key in inputs[0] for key in ("image", "images")):
                raise AttachError(
                    "Rollouts with images cannot be scored: their tokens are not in the token ids. Train without "
                    "feature rewards and rollout policies, or on text."
                )
            self.scores, self._rollouts, self._rewards_BF = [], None, None
            with ExitStack() as window:
                self._window = window
                try:
                    output = original(inputs, *args, **kwargs)
                finally:
                    self._window = self._listening = None
            rollouts: Rollouts | None = self._rollouts
            self._rollouts = None
            before = output["advantages"]
            if self.policy is not None:
                self.policy.after_scoring(self.trainer, output, self.scores)
            if self.observers and rollouts is not None and self.trainer.model.training:
                seen = see_rollouts(self.trainer, rollouts, self.scores, self._rewards_BF, before, output, self.policy)
                for observe in self.observers:
                    observe(seen)
            return output

        return generate_and_score

    def _wrap_generate(self, original: Any) -> Any:
        @functools.wraps(original)
        def generate(prompts: Any, *args: Any, **kwargs: Any) -> Any:
            if self._window is None:
                return original(prompts, *args, **kwargs)
            if self.policy is None:
                output = original(prompts, *args, **kwargs)
            else:
                with self.policy.generating(self.trainer, len(prompts)):
                    output = original(prompts, *args, **kwargs)
            self._rollouts = read_generation(output, len(prompts))
            self._listening = self._window.enter_context(ExitStack())
            self._listening.enter_context(self._listen())
            return output

        return generate

    def _wrap_rewards(self, original: Any) -> Any:
        @functools.wraps(original)
        def calculate_rewards(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._rollouts is None or self._listening is None:
                return original(inputs, *args, **kwargs)
            if not self.readers and self.policy is None:
                # A feature reward inside another function learns from this that nothing is read for it.
                rows = [{**row, ACTIVATIONS_KEY: None, READERS_KEY: ()} for row in inputs]
                self._rewards_BF = original(rows, *args, **kwargs)
                return self._rewards_BF
            self._read_missing()
            self._listening.close()
            self.scores = self._collect()
            self._refuse_nonfinite()
            known = tuple(self.readers.values())
            rows = [
                {**row, ACTIVATIONS_KEY: scores, READERS_KEY: known}
                for row, scores in zip(inputs, self.scores, strict=True)
            ]
            rewards = original(rows, *args, **kwargs)
            if self.policy is not None:
                rewards = self.policy.after_rewards(self.trainer, rewards, self.scores)
            self._rewards_BF = rewards
            return rewards

        return calculate_rewards

    # --- reading -------------------------------------------------------------------------------------------------

    @contextmanager
    def _listen(self) -> Iterator[None]:
        """Read every whole-rollout forward that runs inside."""
        reference = getattr(self.trainer, "ref_model", None)
        sources = {reader.reader for reader in self.readers.values()}
        with ExitStack() as stack:
            for model, source in ((self.trainer.model, None), (reference, "frozen")):
                # torch.compile would trace the hooks into its graph, or not see them: our own forward is eager.
                if model is not None and (source is None or source in sources) and not is_compiled(model):
                    stack.enter_context(self._listen_to(model, source))
            yield

    @contextmanager
    def _listen_to(self, model: Any, source: str | None) -> Iterator[None]:
        layers = sorted({layer for opened in self._opened.values() for layer in opened})
        with ResidualHook(model, layers) as hook, hook.listen(functools.partial(self._read, model, source)):
            yield

    @torch.no_grad()
    def _read(self, model: Any, source: str | None, capture: Capture) -> None:
        rollouts = self._rollouts
        if rollouts is None or capture.has_grad or capture.input_ids is None:
            return
        if source is None:
            source = "frozen" if shows_frozen(model) else "policy"
        wanted = {name: reader for name, reader in self.readers.items() if reader.reader == source}
        if not wanted:
            return
        first = rollouts.next_row[source]
        places = find_rollouts(capture.input_ids.tolist(), rollouts, first)
        if places is None:
            return
        rollouts.next_row[source] += len(places)
        rows = rollouts.found.setdefault(source, [None] * len(rollouts.completions))
        mask = capture.attention_mask
        for name, reader in wanted.items():
            read = self._read_features(reader, capture)
            for row, start in enumerate(places):
                number = first + row
                completion = rollouts.completions[number]
                span = slice(start, start + len(completion))
                seen = mask is None or bool(mask[row, span].all())
                if not completion or not seen:
                    continue
                generated = [1] * len(completion) if rollouts.generated is None else rollouts.generated[number]
                keep = torch.tensor(generated, dtype=torch.bool)
                if start == 0:
                    keep[0] = False
                values, active, score = (tensor[row, span] for tensor in read)
                entry = rows[number] = rows[number] or {}
                ids = reader.features.ids
                entry[name] = RolloutActivations(ids, values, active, score, keep.to(score.device))

    def _read_features(self, reader: FeatureReader, capture: Capture) -> tuple[Tensor, Tensor, Tensor]:
        """Values and firings `(B, T, S)`, columns in the order of the reader's features, and scores `(B, T)`."""
        values, active, score, columns = [], [], [], []
        opened = self._opened[reader.name]
        for layer in opened:
            residual = capture.residuals[layer]
            chosen = opened[layer] = opened[layer].for_residual(residual)
            terms = PENALTIES[reader.kind](residual, chosen)
            values.append(terms.values_BTS)
            active.append(terms.active_BTS)
            # An inactive feature counts as 0 whatever the residual, so the score itself has to say it.
            broken_BT = ~finite_tokens(residual, terms.values_BTS)
            score.append(terms.penalty_BT.float().masked_fill(broken_BT, torch.nan))
            columns += [feature.id for feature in reader.features.for_layer(layer)]
        first = score[0].device
        order = [columns.index(feature) for feature in reader.features.ids]
        return (
            torch.cat([v.float().to(first) for v in values], dim=-1)[..., order],
            torch.cat([a.to(first) for a in active], dim=-1)[..., order],
            torch.stack([s.to(first) for s in score]).sum(0),
        )

    def _read_missing(self) -> None:
        """One forward without gradient for each source that a reader needs and no forward has shown."""
        rollouts = self._rollouts
        if rollouts is None:
            return
        num_rows = len(rollouts.completions)
        sources = {reader.reader for reader in self.readers.values()}
        missing = sorted(source for source in sources if rollouts.next_row[source] < num_rows)
        if not self._said:
            self._said = True
            for source in sorted(sources):
                way = "one more forward a generation" if source in missing else "a forward TRL makes anyway"
                _log.warning("qscope_trl: rollouts are scored on the %s model by %s.", source, way)
            if "policy" in sources and getattr(self.trainer, "beta", 0.0) == 0:
                _log.warning(
                    "qscope_trl: features are read on the model in training, and `beta=0` holds it to nothing. It can "
                    "move its features instead of its behaviour; watch a monitor that reads text."
                )
        for source in missing:
            rollouts.next_row[source] = 0
            self._forward(source, rollouts)
            if rollouts.next_row[source] != num_rows:
                raise PenaltySelfCheckError(
                    f"The scoring forward showed {rollouts.next_row[source]} of {num_rows} rollouts: the hooks did "
                    f"not fire, or not on these token ids. Rollout scoring needs a model whose forward runs its "
                    f"decoder layers on `input_ids`, as those of transformers do."
                )

    def _forward(self, source: str, rollouts: Rollouts) -> None:
        trainer = self.trainer
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        training = trainer.model.training
        size = trainer.args.per_device_train_batch_size if training else trainer.args.per_device_eval_batch_size
        ends = {tokenizer.pad_token_id, *(getattr(trainer, "eos_token_ids", None) or [trainer.eos_token_id])}
        rows, masks = padded_rollouts(
            rollouts, tokenizer.pad_token_id, ends, getattr(trainer.args, "mask_truncated_completions", False)
        )
        device = trainer.accelerator.device
        ids_BT, mask_BT = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            model = stack.enter_context(reading(trainer, source))
            if is_compiled(model):
                stack.enter_context(self._listen_to(model, None if model is trainer.model else source))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            extra = last_logits(model, 1)
            plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
            if plugin is not None and plugin.zero_stage == 3:
                # TRL trains through `lm_head.weight`, not the module. Once a forward has run the module, ZeRO-3 frees
                # that weight before TRL's backward needs it.
                model, extra = find_decoder(model), {}
            for start in range(0, len(rows), size):
                chunk = slice(start, start + size)
                model(input_ids=ids_BT[chunk], attention_mask=mask_BT[chunk], use_cache=False, **extra)
        self.num_forwards += 1

    def _refuse_nonfinite(self) -> None:
        """Stop on all processes if a rollout's activations are not finite on one: TRL takes NaN for no reward."""
        rows = [
            row
            for row, found in enumerate(self.scores)
            if not all(bool(read.score_C.isfinite().all()) for read in (found or {}).values())
        ]
        accelerator = self.trainer.accelerator
        processes = processes_with(torch.tensor(bool(rows)), accelerator)
        if not processes:
            return
        where = f" on process {processes[0]}" if accelerator.num_processes > 1 else ""
        which = f" (rows {rows} here)" if rows else ""
        raise NonFiniteError(
            f"Step {self.trainer.state.global_step + 1}: the activations of rollouts{where} are NaN or "
            f"infinite{which}, so their features cannot be rewarded. Look at the model's loss before it, and go "
            f"back to a checkpoint."
        )

    def _collect(self) -> list[Mapping[str, RolloutActivations] | None]:
        rollouts = self._rollouts
        if rollouts is None:
            return []
        merged: list[dict[str, RolloutActivations]] = [{} for _ in rollouts.completions]
        for rows in rollouts.found.values():
            for entry, found in zip(merged, rows, strict=True):
                entry.update(found or {})
        return [entry or None for entry in merged]
