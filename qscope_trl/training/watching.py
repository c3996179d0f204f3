"""What `qscope sft` and `qscope grpo` watch a run with: their `monitor_` settings as callbacks."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

from transformers import TrainerCallback

from qscope_trl.activations.sources import open_source, text_of
from qscope_trl.config.training import MonitorConfig
from qscope_trl.errors import DataError
from qscope_trl.training.dashboard import FeatureDashboard
from qscope_trl.training.drift import DriftMonitor
from qscope_trl.training.recording import RunRecorder

MOST_TEXTS = 256
"""Rows that are read of the fixed texts and prompts; the callbacks take of these what their own bounds allow."""


def watchers(monitor: MonitorConfig, suite: Any, layers: list[int]) -> list[TrainerCallback]:
    """The callbacks that the settings ask for, without the penalty and the rewards.

    Every process calls this, and reads the files itself.

    Args:
        monitor: The settings.
        suite: The SAEs.
        layers: Layers whose drift is watched.

    Raises:
        ConfigError: If a setting does not fit.
        DataError: If texts or prompts cannot be read, or there are none.
    """
    texts, prompts = None, None
    if monitor.monitor_texts is not None:
        texts = read_texts(monitor.monitor_texts, monitor.monitor_text_column, "monitor_text_column")
    if monitor.monitor_prompts is not None:
        prompts = read_prompts(monitor.monitor_prompts, monitor.monitor_prompt_column)
    # The recorder that the penalty, the rewards and these find in the trainer's list.
    found: list[TrainerCallback] = [RunRecorder(is_enabled=monitor.monitor_record)]
    if texts is not None and monitor.monitor_drift != "off":
        on_drift: Literal["warn", "stop"] = "stop" if monitor.monitor_drift == "stop" else "warn"
        found.append(DriftMonitor(texts, suite, layers=layers, every=monitor.monitor_every, on_drift=on_drift))
    if texts is not None or prompts is not None or monitor.monitor_behaviour is not None:
        found.append(
            FeatureDashboard(prompts, texts, every=monitor.monitor_every, behaviour=monitor.monitor_behaviour)
        )
    return found


def read_texts(name: str, column: str, setting: str) -> list[str]:
    """The first texts of a dataset.

    Args:
        name: File, folder, Hub dataset or `demo:NAME`.
        column: Its column.
        setting: Name of the setting that names the column, for messages.

    Raises:
        DataError: If it cannot be read, or holds no text.
    """
    source = open_source(name)
    texts: list[str] = []
    for index, row in islice(source.rows(), MOST_TEXTS):
        try:
            texts.append(text_of(row, text_column=column, source_name=name, index=index))
        except DataError as err:
            raise DataError(f"{err} Here that is `{setting}`.") from err
    if not any(text.strip() for text in texts):
        raise DataError(f"'{name}' holds no text in column `{column}`. Name another one by `{setting}`.")
    return texts


def read_prompts(name: str, column: str) -> list[Any]:
    """The first prompts of a dataset, texts or conversations.

    Raises:
        DataError: If it cannot be read, or has no such column.
    """
    source = open_source(name)
    prompts: list[Any] = []
    for index, row in islice(source.rows(), MOST_TEXTS):
        if column not in row:
            listed = ", ".join(f"`{key}`" for key in row)
            raise DataError(
                f"Row {index} of '{name}' has no column `{column}`; it has {listed}. Name the right one by "
                f"`monitor_prompt_column`."
            )
        if row[column]:
            prompts.append(row[column])
    if not prompts:
        raise DataError(f"'{name}' holds no prompt in column `{column}`. Name another one by `monitor_prompt_column`.")
    return prompts
