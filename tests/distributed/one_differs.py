"""Run by `test_one_differs.py` in two processes: one of two has something that the other has not.

Also python -m torch.distributed.run --nproc_per_node 2 one_differs.py CASE SAES OUTPUT

CASE `missing`: the second process's folder lacks a layer. CASE `hub`: a Hub whose downloads take a second and are
written down. CASE `nan`: activations of the second process are NaN. CASE `dashboard`: the main process fails while it
measures and the other one waits. Each process writes what became of it to `rank{rank}.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qscope_trl import FeatureDashboard, SAEPenaltyCallback
from qscope_trl.errors import AttachError, CheckpointError, NonFiniteError
from qscope_trl.sae import sources
from tests.tiny import K
from tests.training.harness import train
from tests.training.penalty_harness import make_trainer


class SlowHub:
    """A Hub with one repository; a file that is in the cache is not downloaded again."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.downloads: list[tuple[str, float]] = []

    def model_info(self, _repo: str, *, revision: str | None = None) -> Any:
        return SimpleNamespace(
            sha="0" * 40, siblings=[SimpleNamespace(rfilename=p.name) for p in self.remote.iterdir()]
        )

    def download(self, _repo: str, name: str, *, revision: str) -> str:
        if not (self.cache / name).exists():
            time.sleep(1)
            shutil.copy(self.remote / name, self.cache / f"{name}.part")
            os.replace(self.cache / f"{name}.part", self.cache / name)
            self.downloads.append((name, time.time()))
        return str(self.cache / name)


def main() -> None:
    case, saes, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {"rank": rank}
    source: str = str(saes)
    if case == "missing" and rank == 1:
        source = str(output / "incomplete")
        shutil.copytree(saes, source)
        (Path(source) / "layer2.sae.pt").unlink()
    hub = SlowHub(saes, output / "cache")
    if case == "hub":
        hub.cache.mkdir(exist_ok=True)
        sources.HfApi, sources.hf_hub_download = lambda: hub, hub.download
        source = "Qwen/SAE-Res-Tiny"
    start = time.time()
    try:
        callbacks: list[Any] = [SAEPenaltyCallback(source, ["L1F3", "L2F40"], 0.5, sae_k=K)]
        if case == "dashboard":
            callbacks.append(FeatureDashboard(["w3"], ["w3 w4"], num_samples=1))
        trainer = make_trainer(output, callbacks, max_steps=1)
        if case == "dashboard" and rank == 0:
            trainer.model.generate = lambda **_: (_ for _ in ()).throw(RuntimeError("no such kernel"))
        if case == "nan" and rank == 1:
            trainer.model.model.layers[1].register_forward_hook(lambda *given: given[2] * float("nan"))
        train(trainer)
        found["trained"] = trainer.state.global_step
    except (AttachError, CheckpointError, NonFiniteError, RuntimeError) as error:
        found["error"] = str(error)
    found.update(seconds=time.time() - start, downloads=hub.downloads)
    (output / f"rank{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without any teardown (pytorch/pytorch#190489).
    os._exit(0)


main()
