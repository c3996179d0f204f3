"""From names of features to tensors that fit a model: every mismatch is refused here, before anything is hooked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from qscope_trl.activations.opening import require_fit
from qscope_trl.errors import AttachError, CheckpointError
from qscope_trl.features import FeatureSet
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.penalty import LayerFeatures, open_layer

T = TypeVar("T")


def on_every_process(open_fn: Callable[[], T]) -> T:
    """Run `open_fn` on every process of a training run, and end it on all of them if it fails on one.

    On each node one process goes first, so that one downloads and the others find the files. Every process must call
    this at the same place.

    Args:
        open_fn: Opens files; without collectives of its own.

    Returns:
        What `open_fn` returned here.

    Raises:
        Exception: What `open_fn` raised here.
        CheckpointError: If it failed on another process, with that one's message.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    if world == 1:
        return open_fn()
    state = PartialState()
    opened: list[T] = []
    error: Exception | None = None
    for turn in (True, False):
        if state.is_local_main_process is turn:
            try:
                opened.append(open_fn())
            except Exception as err:  # noqa: BLE001 (raised below, once every process knows)
                error = err
        if turn:
            state.wait_for_everyone()
    messages: list[str | None] = [None] * world
    torch.distributed.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(
                f"Process {rank} of {world} cannot open what the run needs, so no process goes on: {message} "
                f"Every node needs the same files at the same paths."
            )
    return opened[0]


def on_main_process(work: Callable[[], T], trainer: Any) -> T:
    """Run `work` on the main process and give every process what it returned; if it fails there, end all of them.

    Every process must call this at the same place; the others wait for the main one.

    Args:
        work: What is done, without collectives.
        trainer: The trainer whose processes these are.

    Raises:
        Exception: What `work` raised, on the main process.
        AttachError: On the others, with its message.
    """
    found: list[Any] = [None, None]
    error: Exception | None = None
    if trainer.is_world_process_zero():
        try:
            found[0] = work()
        except Exception as err:  # noqa: BLE001 (raised below, once every process knows)
            error, found[1] = err, f"{type(err).__name__}: {err}"
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    if error is not None:
        raise error
    if found[1] is not None:
        raise AttachError(f"The main process failed while this one waited for it, so none goes on: {found[1]}")
    result: T = found[0]
    return result


def open_suite_for(source: tuple[Any, str | None, int | None], *sets: FeatureSet | None) -> SAESuite:
    """The SAEs of the layers of some sets.

    Args:
        source: Hub id, folder, file or open suite; revision; k.
        *sets: Features; None counts for nothing.

    Raises:
        CheckpointError: If a layer has no SAE.
    """
    saes, revision, k = source
    layers = sorted({layer for one in sets if one is not None for layer in one.layers})
    return SAESuite.from_pretrained(saes, layers=layers, revision=revision, k=k)


def open_features(
    model: nn.Module, suite: SAESuite, chosen: FeatureSet, groups: Sequence[str], kind: str
) -> dict[int, LayerFeatures]:
    """The chosen features of each layer as tensors.

    Args:
        model: The model whose residuals will be read.
        suite: The SAEs.
        chosen: Features of these SAEs.
        groups: Names of groups, in the order of the thresholds' rows after the default.
        kind: `preact_hinge` reads only the chosen rows, `topk_act` the whole encoder.

    Returns:
        Features by layer.

    Raises:
        AttachError: If the SAEs read residuals of another width.
        FeatureSetError: If the features belong to another model or SAE.
        CheckpointError: If the SAEs cannot be read.
    """
    require_fit(model, suite, chosen, AttachError)
    return {layer: open_layer(suite, layer, chosen.for_layer(layer), groups, kind) for layer in chosen.layers}
