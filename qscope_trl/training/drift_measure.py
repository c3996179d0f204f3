"""What a drift probe measures: its tokens and SAEs, what the frozen model showed on them, and the model now.

Figures are taken on the main process; the others run the model with it where its weights are spread. Left out: when a
probe is made and what follows from it; that is `drift`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from qscope_trl.activations.opening import require_width
from qscope_trl.errors import AttachError, ConfigError, DataError, QScopeWarning
from qscope_trl.hooks.layers import find_layers
from qscope_trl.monitor import drift
from qscope_trl.monitor.divergence import TopLogProbs, divergence, top_log_probs
from qscope_trl.monitor.drift import Drift, Reference
from qscope_trl.monitor.run_record import RECORD_FOLDER
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE
from qscope_trl.training.attach import attachment_of
from qscope_trl.training.callback import SAEPenaltyCallback
from qscope_trl.training.checks import refuse_unsupported
from qscope_trl.training.drift_probe import SeeLogits, choose_tokens, has_logits, is_spread, run_probe
from qscope_trl.training.opening import on_every_process, on_main_process
from qscope_trl.training.scores import scoring_of
from qscope_trl.training.stack import resumed_folder

REFERENCE_FILE = "drift_reference.safetensors"
"""File in the run's record with what the frozen model showed."""

FEW_TOKENS = 200
"""Tokens below which the figures rest on too little; `qscope doctor` gives no verdict below it either."""

T = TypeVar("T")

_log = logging.getLogger("qscope_trl")


class ProbeSettings(NamedTuple):
    """The settings of `DriftMonitor` that decide what is measured, by the same names."""

    texts: Sequence[str]
    saes: SAESuite | str | os.PathLike[str] | None
    layers: Sequence[int] | None
    max_length: int
    max_tokens: int
    batch_size: int
    kl_top: int
    sae_revision: str | None
    sae_k: int | None


class DriftProbe:
    """The probe of one training run. Every process makes one, and calls the same methods.

    Args:
        trainer: The trainer, whose model is prepared.
        settings: What is measured.

    Raises:
        AttachError: If the trainer has no tokenizer or no SAEs, or they do not fit its model.
        CheckpointError: If the SAEs cannot be read.
        DataError: If the texts have no token that counts.
    """

    def __init__(self, trainer: Any, settings: ProbeSettings) -> None:
        refuse_unsupported(trainer)
        self.trainer, self.settings = trainer, settings
        self.is_main: bool = trainer.is_world_process_zero()
        self.reference: Reference | None = None
        """What the frozen model showed; on the main process alone."""
        self.is_resumed = False
        """Whether the reference is that of the run that is resumed."""
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if tokenizer is None:
            raise AttachError("`DriftMonitor` needs the trainer's tokenizer: pass it as `processing_class`.")
        self.token_ids = choose_tokens(tokenizer, settings.texts, settings.max_length, settings.max_tokens)
        self.num_tokens = sum(len(row) - 1 for row in self.token_ids)
        if not self.token_ids:
            raise DataError(
                "No text of `DriftMonitor` has a token after position 0, which is left out. Give longer texts."
            )
        if self.num_tokens < FEW_TOKENS and self.is_main:
            warnings.warn(
                f"The probe of `DriftMonitor` has {self.num_tokens} tokens; below {FEW_TOKENS} its figures are rough. "
                f"Give more or longer `texts`.",
                QScopeWarning,
                stacklevel=2,
            )
        suite, self.layers = watched_saes(trainer, settings)
        self._saes: dict[int, TopKSAE] = on_every_process(lambda: self._load(suite) if self.is_main else {})
        self._identity: dict[str, Any] = {
            "texts or `max_tokens`": self.token_ids,
            "layers": list(self.layers),
            "SAEs": {str(layer): [suite.fingerprint(layer), sae.k] for layer, sae in self._saes.items()},
            "`kl_top`": settings.kl_top,
        }

    def _load(self, suite: SAESuite) -> dict[int, TopKSAE]:
        for layer in self.layers:
            require_width(self.trainer.model, suite, layer, AttachError)
        return {layer: suite.load(layer, mmap=True) for layer in self.layers}

    # --- the frozen model ----------------------------------------------------------------------------------------

    def take_reference(self, step: int, *, stored: bool) -> None:
        """The model as it is, or what the run that is resumed has stored of the one it began with.

        Args:
            step: The trainer's step; 0 begins a run.
            stored: Whether to look for a stored reference.

        Raises:
            ConfigError: If the stored one is of other texts, SAEs or settings.
            DataError: If the stored one is damaged, or the model shows nothing that can be compared with.
        """
        looks = self.is_main and stored and step > 0
        self.reference = on_every_process(lambda: self._stored() if looks else None)
        [self.is_resumed] = broadcast_object_list([self.reference is not None])
        if self.is_resumed:
            return
        if step > 0 and self.is_main:
            warnings.warn(
                f"Training resumes at step {step}, and the run's record holds no drift reference. Drift is measured "
                f"against the model as it is now, not as it was before training.",
                QScopeWarning,
                stacklevel=2,
            )
        rows: list[TopLogProbs] = []

        def see(_rows: slice, logits: Tensor) -> None:
            rows.append(top_log_probs(logits, self.settings.kl_top))

        def keep(residuals: dict[int, Tensor]) -> None:
            self.reference = self._reference(residuals, rows)

        self._with_residuals(see, keep)
        if self.is_main and self.settings.kl_top and not rows:
            _log.warning("qscope_trl: `sae/drift/kl` is left out, as the logits of this model cannot be read here.")

    def _reference(self, residuals: dict[int, Tensor], rows: list[TopLogProbs]) -> Reference:
        layers = {}
        for layer, x_ND in residuals.items():
            sae, x_ND = self._together(layer, x_ND)
            layers[layer] = drift.layer_reference(sae, x_ND)
        log_probs = TopLogProbs(*map(torch.cat, zip(*rows, strict=True))) if rows else None
        return Reference(layers, log_probs, self._identity)

    def _stored(self) -> Reference | None:
        """Beside the checkpoint, or in the output folder, where another run may have left its own."""
        checkpoint = resumed_folder()
        folders = [*([] if checkpoint is None else [checkpoint.parent]), Path(self.trainer.args.output_dir)]
        path = next((p for p in (f / RECORD_FOLDER / REFERENCE_FILE for f in folders) if p.is_file()), None)
        if path is None:
            return None
        reference = drift.load_reference(path)
        other = reference.difference(self._identity)
        if other is not None:
            raise ConfigError(
                f"The drift reference '{path}' of the run that is resumed has other {other} than `DriftMonitor` is "
                f"given now, so the two cannot be compared. Give what the run began with, or delete that file: drift "
                f"is then measured against the model as it is when training resumes."
            )
        return reference

    # --- the model now -------------------------------------------------------------------------------------------

    def measure(self) -> Drift:
        """The figures of the model now, which the main process tells all others.

        Raises:
            Exception: What failed, on the main process.
            AttachError: On the others, if it failed there.
        """
        kls: list[Tensor] = []

        def see(rows: slice, logits: Tensor) -> None:
            kept = None if self.reference is None else self.reference.log_probs
            if kept is not None:
                kls.append(divergence(TopLogProbs(*(part[rows] for part in kept)), logits))

        def compare(residuals: dict[int, Tensor]) -> Drift:
            if self.reference is None:
                raise AttachError(
                    "`DriftMonitor` has no reference to measure against: it is taken when training begins."
                )
            layers = {}
            for layer, x_ND in residuals.items():
                sae, x_ND = self._together(layer, x_ND)
                layers[layer] = drift.compare_layer(sae, self.reference.layers[layer], x_ND)
            return Drift(layers, float(torch.cat(kls).mean()) if kls else None)

        return self._with_residuals(see, compare)

    def _with_residuals(self, see: SeeLogits, work: Callable[[dict[int, Tensor]], T]) -> T:
        """Run the probe on whom it takes and `work` on the main process; what fails there ends all of them."""
        if not is_spread(self.trainer):
            return on_main_process(lambda: work(self._run(see)), self.trainer)
        residuals = self._run(see)
        return on_main_process(lambda: work(residuals), self.trainer)

    def _run(self, see: SeeLogits) -> dict[int, Tensor]:
        return run_probe(
            self.trainer,
            self.token_ids,
            self.layers,
            batch_size=self.settings.batch_size,
            keeps=self.is_main,
            see_logits=see if self.settings.kl_top and has_logits(self.trainer) else None,
        )

    def _together(self, layer: int, x_ND: Tensor) -> tuple[TopKSAE, Tensor]:
        """SAE and residuals on the layer's device: one layer's at a time are there."""
        device = next((p.device for p in find_layers(self.trainer.model)[layer].parameters()), torch.device("cpu"))
        if is_spread(self.trainer):
            device = self.trainer.accelerator.device
        sae = self._saes[layer]
        return sae if device == sae.W_enc.device else sae.copy_to(device, torch.float32), x_ND.to(device)


def watched_saes(trainer: Any, settings: ProbeSettings) -> tuple[SAESuite, tuple[int, ...]]:
    """The SAEs to watch and their layers: as told, or those of the penalty, or of feature rewards.

    Raises:
        AttachError: If nothing says which, or the model lacks a layer.
        CheckpointError: If a layer has no SAE.
        ConfigError: If SAEs are told without layers, and no penalty names any.
    """
    callbacks = trainer.callback_handler.callbacks
    listed = (item.attachment for item in callbacks if isinstance(item, SAEPenaltyCallback))
    penalty = attachment_of(trainer) or next(listed, None)
    saes, revision, k = settings.saes, settings.sae_revision, settings.sae_k
    layers = set(settings.layers or ())
    if penalty is not None:
        sets = [penalty.features, *([] if penalty.monitor_features is None else [penalty.monitor_features])]
        layers = layers or {layer for one in sets for layer in one.layers}
        if saes is None:
            saes, revision, k = penalty._source
    elif (scoring := scoring_of(trainer)) is not None and scoring.readers:
        readers = list(scoring.readers.values())
        layers = layers or {layer for reader in readers for layer in reader.features.layers}
        if saes is None:
            saes, revision, k = readers[0].saes, readers[0].sae_revision, readers[0].sae_k
    if saes is None:
        raise AttachError(
            "`DriftMonitor` was given no SAEs, and the trainer has neither a feature penalty nor a feature reward "
            "whose SAEs it could watch. Pass `saes` and `layers`."
        )
    if not layers:
        raise ConfigError(
            "`DriftMonitor` was given SAEs without `layers`, and no penalty or reward names any. Say which layers to "
            "watch: the SAE of each is kept in memory."
        )
    num_layers = len(find_layers(trainer.model))
    for layer in sorted(layers):
        if not 0 <= layer < num_layers:
            raise AttachError(
                f"`DriftMonitor` is to watch layer {layer}, but the model has layers 0-{num_layers - 1}. Choose "
                f"`layers` within that range."
            )
    suite = on_every_process(lambda: SAESuite.from_pretrained(saes, layers=sorted(layers), revision=revision, k=k))
    return suite, suite.layers
