"""What tests with processes of their own rest on: how processes end is told, and none touches another."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.forked import run_forked


def test_how_a_process_ends_is_told() -> None:
    assert run_forked("print('well')").stdout == "well\n"
    failed = run_forked("import sys; print('first', file=sys.stderr); 1 / 0")
    assert failed.codes == [1]
    assert failed.stderr.startswith("first\n")
    assert "ZeroDivisionError" in failed.stderr
    assert run_forked("raise SystemExit(7)").returncode == 7
    assert run_forked("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL


def test_a_process_has_its_own_arguments_environment_folder_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_THE_TEST", "1")
    (tmp_path / "beside.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, beside, trl\n"
        "assert __name__ == '__main__' and sys.argv == [__file__, 'a', 'b']\n"
        "trl.seen = getattr(trl, 'seen', 0) + 1\n"
        "print(os.getcwd(), os.environ['FROM_THE_TEST'], os.environ['GIVEN'], trl.seen)\n"
    )
    for _ in range(2):
        done = run_forked(script, "a", "b", folder=tmp_path, environment={"GIVEN": "2"})
        assert done.stdout.split() == [str(tmp_path), "1", "2", "1"], done.stderr
    assert "GIVEN" not in os.environ


def test_several_processes_are_joined() -> None:
    code = (
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "sum = torch.tensor([dist.get_rank() + 1])\n"
        "dist.all_reduce(sum)\n"
        # One write each: what three processes print piecewise into one pipe comes interleaved.
        "os.write(1, f'{int(sum)}\\n'.encode())\n"
        "os._exit(0)\n"  # pytorch/pytorch#190489
    )
    assert run_forked(code, processes=3).stdout.split() == ["6"] * 3


def test_when_one_fails_the_others_are_ended() -> None:
    start = time.monotonic()
    done = run_forked(
        "import os, time\nif os.environ['RANK'] == '1': raise SystemExit(3)\ntime.sleep(600)", processes=2
    )
    assert done.codes == [-signal.SIGKILL, 3]
    assert time.monotonic() - start < 60


def test_a_process_that_does_not_end_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"Not at its end after 0\.2 s"):
        run_forked("import time; time.sleep(600)", timeout=0.2)
    assert run_forked("print('next')").stdout == "next\n"
