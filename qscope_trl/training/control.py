"""The control arm: the same penalty on random features that fire as often, drawn on the data of the trainer itself.

What a penalty on such features does as well says nothing about the chosen ones. Left out: drawing on texts of one's
own; `activations.matching.matched_random_features` does that, and what it returns is penalised like any FeatureSet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from qscope_trl.activations.encode import tokenize
from qscope_trl.activations.matching import matched_by, token_sums
from qscope_trl.errors import AttachError, DataError
from qscope_trl.features import FeatureSet
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.opening import on_main_process

NUM_TEXTS = 128
"""Rows of the training data that firing rates and thresholds are measured on."""

MAX_LENGTH = 512
"""Tokens kept of each."""


def draw_control(trainer: Any, suite: SAESuite, chosen: FeatureSet, monitors: FeatureSet | None) -> FeatureSet:
    """Random features to penalise instead of the chosen ones, the same on every process.

    For each chosen feature one of its layer, of the 20 with the nearest firing rate on rows of the training data, with
    the same weight; its threshold is its mean pre-activation on these rows. All tokens but position 0 count there,
    also those that are not trained. The trainer's `seed` decides the draw, and the model as it is now.

    Args:
        trainer: A trainer whose model has its weights.
        suite: The SAEs.
        chosen: The features to match.
        monitors: Features that are not drawn either.

    Raises:
        AttachError: If the model's weights are spread over processes, or there is no training data; on the other
            processes, if anything fails on the main one.
        DataError: If rows of it hold no text.
    """
    return on_main_process(lambda: _draw(trainer, suite, chosen, monitors), trainer)


def with_monitors(chosen: FeatureSet, monitors: FeatureSet | None) -> FeatureSet:
    """The chosen features and the monitors, to be measured."""
    known = set(chosen.ids)
    others = () if monitors is None else (feature for feature in monitors.features if feature.id not in known)
    return chosen.with_features([*chosen.features, *others])


def _draw(trainer: Any, suite: SAESuite, chosen: FeatureSet, monitors: FeatureSet | None) -> FeatureSet:
    model = trainer.model
    if any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
        raise AttachError(
            "`penalty_control` draws features by running texts through the whole model, and here its weights are "
            "spread over processes (ZeRO-3, or FSDP that has begun). Draw them before, in one process, by "
            "`qscope_trl.activations.matching.matched_random_features`, and penalise what that returns."
        )
    ids = training_ids(trainer)
    sums = token_sums(model, suite, chosen.layers, ids, batch_size=8, show_progress=False)
    return matched_by(chosen, sums, sums, seed=trainer.args.seed, avoid=monitors)


def training_ids(trainer: Any) -> list[list[int]]:
    """Token ids of rows of the training data: evenly spaced ones, or the first where it is streamed.

    Raises:
        AttachError: If there is no training data.
        DataError: If the rows hold no text.
    """
    dataset = trainer.train_dataset
    if dataset is None:
        raise AttachError(
            "`penalty_control` draws features on the training data, and the trainer has no `train_dataset`. Give it "
            "one."
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        step = max(1, len(dataset) // NUM_TEXTS)
        rows = [dataset[n] for n in range(0, len(dataset), step)][:NUM_TEXTS]
    else:
        rows = list(islice(iter(dataset), NUM_TEXTS))
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    found = [_row_ids(row, tokenizer) for row in rows]
    if not any(len(ids) > 1 for ids in found):
        columns = ", ".join(f"`{name}`" for name in rows[0]) if rows else "none"
        raise DataError(
            f"`penalty_control` finds no text in the training data, whose columns are: {columns}. It reads "
            f"`input_ids`, or `prompt`, `completion`, `chosen`, `text` or `messages`."
        )
    return found


def _row_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if "input_ids" in row:
        ids = row["input_ids"]
        return [int(n) for n in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)][:MAX_LENGTH]
    for names in (("prompt_ids", "completion_ids"), ("prompt_ids", "chosen_ids")):
        if all(name in row for name in names):
            return [int(n) for name in names for n in row[name]][:MAX_LENGTH]
    parts = [_text(row[name]) for name in ("prompt", "completion", "chosen", "text", "messages") if name in row]
    return tokenize(tokenizer, ["".join(parts)], max_length=MAX_LENGTH)[0] if tokenizer is not None else []


def _text(value: str | Sequence[Mapping[str, Any]]) -> str:
    """A text as it is, and of messages their contents, without the chat template."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content") or "") for message in value)
