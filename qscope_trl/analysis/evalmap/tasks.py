"""Prompts of lm-evaluation-harness: its tasks, its own rendering, zero-shot with the description, without the answer.

A group, such as `mmlu`, is one set of all its tasks' documents. Left out: few-shot prompts, chat templates, and tasks
whose contexts are the choices, which have no one prompt a document.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qscope_trl.errors import ConfigError, DataError


class TaskTexts(NamedTuple):
    """A task's prompts, in the order of its documents."""

    texts: list[str]
    """One a document."""

    tasks: tuple[str, ...]
    """The tasks they are of: itself, or those of the group."""


class Harness:
    """Tasks of the installed lm-evaluation-harness.

    Args:
        task_path: Folder with more task files.

    Raises:
        ConfigError: If it is not installed, or there is no such folder.
    """

    def __init__(self, task_path: str | None = None) -> None:
        try:
            self._tasks: Any = importlib.import_module("lm_eval.tasks")
        except ImportError as err:
            raise ConfigError(
                "`--tasks` needs lm-evaluation-harness, which is not installed: pip install 'qscope-trl[evals]'."
            ) from err
        if task_path is not None and not Path(task_path).is_dir():
            raise ConfigError(f"No folder at '{task_path}', which `task_path` names.")
        self._manager = self._tasks.TaskManager(include_path=task_path)

    def texts(self, name: str, max_samples: int | None = None) -> TaskTexts:
        """Prompts of a task or group, of its test documents, or where it has none of those it is evaluated on.

        Args:
            name: The task.
            max_samples: How many at most.

        Raises:
            ConfigError: If there is no such task.
            DataError: If its data cannot be read, or a document has no one prompt.
        """
        known = self._manager.all_tasks
        if name not in known:
            from qscope_trl.parsing import suggestion

            raise ConfigError(f"lm-evaluation-harness has no task `{name}`.{suggestion(name, known)}")
        found: list[str] = []
        try:
            tasks = self._load(name)
            for leaf, task in tasks.items():
                for place, document in enumerate(task.eval_docs):
                    if max_samples is not None and len(found) == max_samples:
                        return TaskTexts(found, tuple(tasks))
                    found.append(_prompt(leaf, place, task, document))
        except DataError:
            raise
        # What loading data and rendering raise derives from one of these.
        except (OSError, ValueError, RuntimeError, LookupError, ImportError) as err:
            raise DataError(f"The task `{name}` cannot be loaded: {(str(err) or repr(err)).splitlines()[0]}") from err
        if not found:
            raise DataError(f"The task `{name}` has no document.")
        return TaskTexts(found, tuple(tasks))

    def _load(self, name: str) -> dict[str, Any]:
        """The tasks of a name: one, or those of a group."""
        load = getattr(self._manager, "load", None)
        if load is not None:
            return dict(load([name])["tasks"])
        # Older versions.
        return dict(_leaves(self._tasks.get_task_dict([name], self._manager)))


def _prompt(name: str, place: int, task: Any, document: Any) -> str:
    text = task.fewshot_context(document, num_fewshot=0)
    if not isinstance(text, str):
        raise DataError(
            f"Document {place} of the task `{name}` has no one prompt: its contexts are the choices. Write the texts "
            f"to a file, and map that by `--data`."
        )
    return text


def _leaves(tasks: Mapping[Any, Any] | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The tasks of nested groups, by name."""
    if isinstance(tasks, Mapping):
        for name, task in tasks.items():
            if isinstance(task, Mapping):
                yield from _leaves(task)
            else:
                yield str(name), task
