"""Run by `tests/forked.py`: imports what the tests' processes need once, then forks a process for every job.

A job is a line of JSON on stdin: `script` (a path, or Python itself with `is_code`), `arguments`, `processes`,
`environment`, `folder`, `output` and `errors` (files), `timeout`. The answer is a line with the exit codes by rank and
whether time ran out. Nothing is computed here: a process that has used torch's threads may not be forked.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
import types
from pathlib import Path
from typing import Any

# What the trainers are made of; it takes seconds of a processor, most of the time of a short run.
MODULES = (
    "datasets",
    "peft",
    "peft.peft_model",
    "scipy.sparse",
    "torch.distributed",
    "torch.distributed.fsdp",
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "qscope_trl.training.sft",
    "qscope_trl.training.grpo_run",
    "qscope_trl.training.callback",
    "qscope_trl.training.grpo",
    "qscope_trl.training.rewards",
    "qscope_trl.activations.index_run",
    "qscope_trl.analysis.curation.run",
)
# Those that fail leave the others this long to end of themselves: torchrun ends them as well.
GRACE = 1.0


def free_port() -> int:
    """Below the ports that the system hands out, so that nothing else is given it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port


def environments(job: dict[str, Any]) -> list[dict[str, str]]:
    """One for each process; of several, as torchrun sets them."""
    count = job["processes"]
    if count == 1:
        return [job["environment"]]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    shared["MASTER_PORT"] = str(free_port())
    return [{**job["environment"], **shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]


def become(job: dict[str, Any], environment: dict[str, str]) -> None:
    """In the forked process: all that a fresh interpreter is given."""
    for target, path in enumerate((os.devnull, job["output"], job["errors"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND if target else os.O_RDONLY), target)
    sys.stdin = open(0)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(job["folder"])
    sys.argv = ["-c" if job["is_code"] else job["script"], *job["arguments"]]
    sys.path[0] = "" if job["is_code"] else str(Path(job["script"]).parent)


def execute(job: dict[str, Any]) -> None:
    if job["is_code"]:
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(job["script"], "<string>", "exec"), vars(module))
    else:
        runpy.run_path(job["script"], run_name="__main__")


def wait(started: list[int], timeout: float) -> dict[str, Any]:
    """Exit codes, negative for a signal. Once one fails, or time is out, the others are ended too."""
    codes: dict[int, int] = {}
    end = deadline = time.monotonic() + timeout
    timed_out = False
    while len(codes) < len(started):
        for process in [p for p in started if p not in codes]:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            timed_out = deadline == end
            for process in [p for p in started if p not in codes]:
                os.kill(process, signal.SIGKILL)
                codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.01)
    return {"codes": [codes[process] for process in started], "timed_out": timed_out}


def serve() -> dict[str, Any] | None:
    """Answers jobs until there are no more; in a forked process, returns the job."""
    for line in sys.stdin:
        job = json.loads(line)
        started = []
        for environment in environments(job):
            process = os.fork()
            if process == 0:
                become(job, environment)
                return job
            started.append(process)
        sys.stdout.write(json.dumps(wait(started, job["timeout"])) + "\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads > 1:
        sys.exit(f"{threads} threads after the imports: such a process cannot be forked safely")
    gc.collect()
    gc.freeze()
    mine = serve()
    if mine is not None:
        execute(mine)
