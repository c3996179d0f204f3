"""Settings every test runs under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qscope_trl.ops import build

# The models are tiny: a second thread costs more in waiting than it saves, several times over on a busy machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# TRL 0.24 warns of each trainer that was to move; which ones did is the version's business.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


# Without a compiler the kernels fall back with a warning, and warnings are errors here.
if build.find_compiler("cpu") is None:
    os.environ.setdefault("QSCOPE_TRL_KERNEL", "torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are."""
    available = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if marker in item.keywords and available < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {available}"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs record what they do in their `output_dir`, which most tests name by a relative path."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Trainers keep precision and device for the whole process, by accelerate's state and by environment variables."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in before]:
        del os.environ[name]
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
