"""The model as it was before a training, where a trainer keeps it: a reference model, or the policy's own base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qscope_trl.errors import AttachError


def frozen_model(trainer: Any) -> Any:
    """The reference model, or the policy itself, whose adapters are then to be turned off.

    Args:
        trainer: A GRPO or RLOO trainer.

    Raises:
        AttachError: If the trainer keeps none, or moves it after the policy.
    """
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        if getattr(trainer.args, "sync_ref_model", False):
            raise AttachError(
                "`sync_ref_model` moves the reference model after the policy, so `reader='frozen'` would follow "
                "the training. Turn it off, or choose `reader='policy'`."
            )
        return reference
    if getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None):
        return trainer.model
    raise AttachError(
        "`reader='frozen'` needs the model as it was before this training, and full fine-tuning with `beta=0` "
        "keeps none. Set `beta` above 0 (TRL then keeps a reference model), train with LoRA, or choose "
        "`reader='policy'`."
    )


@contextmanager
def reading(trainer: Any, source: str) -> Iterator[Any]:
    """The model to run, in the state that shows a source.

    Args:
        trainer: A GRPO or RLOO trainer.
        source: `frozen` or `policy`.

    Raises:
        AttachError: As `frozen_model`.
    """
    model = trainer.model
    if source == "policy":
        yield model
        return
    reference = frozen_model(trainer)
    if reference is not model:
        yield reference
        return
    adapted = trainer.accelerator.unwrap_model(model)
    if "ref" in adapted.peft_config:
        before = adapted.active_adapter
        adapted.set_adapter("ref")
        try:
            yield model
        finally:
            adapted.set_adapter(before)
        return
    with adapted.disable_adapter():
        yield model
