"""What callbacks are not told, read off the call stack: the trainer that calls, and what it resumes from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback


def calling_trainer(callback: TrainerCallback) -> Any:
    """The nearest trainer up the call stack whose callback list holds `callback`, or None."""
    for frame in _frames():
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            handler = getattr(candidate, "callback_handler", None)
            if handler is not None and any(item is callback for item in handler.callbacks):
                return candidate
    return None


def resumed_folder() -> Path | None:
    """The checkpoint that the trainer up the call stack resumes from, or None."""
    for frame in _frames():
        chosen = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(chosen, str | os.PathLike):
            return Path(chosen)
    return None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
