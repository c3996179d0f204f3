"""Tasks of lm-evaluation-harness, by one of its shape; the real one is run where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qscope_trl.analysis.evalmap.tasks import Harness
from qscope_trl.errors import ConfigError, DataError

QUESTIONS = {"add": ["1+1", "2+3", "4+4"], "sub": ["3-1"]}


class FakeTask:
    """What is used of the harness's `ConfigurableTask`."""

    def __init__(self, name: str) -> None:
        self.eval_docs = [{"q": q} for q in QUESTIONS.get(name, ())]
        self.choices = name == "choices"
        if self.choices:
            self.eval_docs = [{"q": "x"}]

    def fewshot_context(self, doc: dict[str, str], num_fewshot: int) -> Any:
        assert num_fewshot == 0
        return ["x", "y"] if self.choices else f"Question: {doc['q']}\nAnswer:"


@pytest.fixture(params=["load", "get_task_dict"])
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> SimpleNamespace:
    """The harness with its present way to load tasks, and with that of older versions."""
    seen = SimpleNamespace(include_path=None)

    class TaskManager:
        all_tasks = ("add", "sub", "arithmetic", "choices", "empty", "offline")

        def __init__(self, include_path: str | None = None) -> None:
            seen.include_path = include_path

    def get_task_dict(names: list[str], manager: TaskManager) -> dict[Any, Any]:
        assert isinstance(manager, TaskManager)
        (name,) = names
        if name == "offline":
            raise ConnectionError("no way to the hub\nwith much detail")
        if name == "arithmetic":
            return {("group", name): {"add": FakeTask("add"), ("group", "more"): {"sub": FakeTask("sub")}}}
        return {name: FakeTask(name)}

    def load(self: Any, names: list[str]) -> dict[str, Any]:
        (name,) = names
        leaves = ["add", "sub"] if name == "arithmetic" else [name]
        if name == "offline":
            raise ConnectionError("no way to the hub\nwith much detail")
        return {"tasks": {leaf: FakeTask(leaf) for leaf in leaves}, "groups": {}}

    if request.param == "load":
        TaskManager.load = load  # type: ignore[attr-defined]
    tasks: Any = ModuleType("lm_eval.tasks")
    tasks.TaskManager, tasks.get_task_dict = TaskManager, get_task_dict
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return seen


def test_prompts_are_the_harness_own(fake: SimpleNamespace, tmp_path: Path) -> None:
    harness = Harness(str(tmp_path))
    assert fake.include_path == str(tmp_path)
    found = harness.texts("add")
    assert found.texts == [f"Question: {q}\nAnswer:" for q in QUESTIONS["add"]]
    assert found.tasks == ("add",)
    assert harness.texts("add", 2).texts == found.texts[:2]


def test_a_group_is_one_set_of_its_tasks(fake: SimpleNamespace) -> None:
    found = Harness().texts("arithmetic")
    assert fake.include_path is None
    assert found.tasks == ("add", "sub")
    assert [text.split()[1] for text in found.texts] == ["1+1", "2+3", "4+4", "3-1"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("ad", ConfigError, r"lm-evaluation-harness has no task `ad`. Did you mean `add`\?"),
        ("choices", DataError, r"Document 0 of the task `choices` has no one prompt: its contexts are the choices"),
        ("empty", DataError, r"The task `empty` has no document"),
        ("offline", DataError, r"The task `offline` cannot be loaded: no way to the hub$"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Harness().texts(name)


@pytest.mark.usefixtures("fake")
def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No folder at '.*none', which `task_path` names"):
        Harness(str(tmp_path / "none"))


def test_without_the_harness_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'qscope-trl\[evals\]'"):
        Harness()


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
description: "Add.\\n"
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
"""


def test_the_real_harness_renders_a_task_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+3", "answer": "5"}\n')
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("own_a", "own_b"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (folder / "both.yaml").write_text("group: own_both\ntask: [own_a, own_b]\n")
    harness = Harness(str(folder))
    assert harness.texts("own_a").texts == ["Add.\nQ: 1+1\nA:", "Add.\nQ: 2+3\nA:"]
    both = harness.texts("own_both")
    assert both.tasks == ("own_a", "own_b")
    assert both.texts == 2 * harness.texts("own_a").texts
