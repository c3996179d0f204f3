"""Python in processes of its own, one or several joined by gloo, at the price of a fork.

A fresh interpreter spends five seconds of a processor on importing TRL, transformers and torch, each time; under
torchrun three of them do. Here one process imports all that once (`fork_server.py`) and forks one for every job. What
is forked is a process like any other: of its own memory, environment, folder and end, by SIGKILL too. Not for what is
to be shown of imports, or of torchrun and `accelerate launch` themselves.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Done:
    """How the processes ended: exit codes by rank, negative for a signal, and what all of them wrote."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """0 if all ended well, otherwise the code of the first that did not."""
        return next((code for code in self.codes if code), 0)


@functools.cache
def _server(_: int) -> subprocess.Popen[str]:
    """The server of this process, started when first needed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Otherwise pyarrow's allocator starts a thread as it is imported.
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fork_server.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip

    def end() -> None:
        for pipe in (server.stdin, server.stdout):
            if pipe is not None:
                pipe.close()
        server.wait(timeout=10)

    atexit.register(end)
    return server


def run_forked(
    script: Path | str,
    *arguments: str,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 240,
) -> Done:
    """Run a file, or Python given as text, to its end; `environment` is added to this process's."""
    server = _server(os.getpid())
    assert server.stdin is not None
    assert server.stdout is not None
    surroundings = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as kept:
        paths = {name: Path(kept) / name for name in ("output", "errors")}
        for path in paths.values():
            path.touch()
        job = {
            "script": str(script),
            "is_code": not isinstance(script, Path),
            "arguments": list(arguments),
            "processes": processes,
            "environment": {**os.environ, **surroundings, **(environment or {})},
            "folder": str(folder or Path.cwd()),
            "timeout": timeout,
            **{name: str(path) for name, path in paths.items()},
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        assert line, "the server ended; its words are on stderr"
        answer = json.loads(line)
        written = {name: path.read_text(errors="replace") for name, path in paths.items()}
    if answer["timed_out"]:
        raise TimeoutError(f"Not at its end after {timeout} s: {written['errors'][-3000:]}")
    return Done(answer["codes"], written["output"], written["errors"])
