from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qscope_trl.cli import main
from qscope_trl.errors import KernelError, QScopeWarning
from qscope_trl.ops import backend, build
from qscope_trl.ops.topk_encode import topk_encode
from tests.forked import run_forked
from tests.ops.contract import problem

needs_compiler = pytest.mark.skipif(build.find_compiler("cpu") is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(build.find_compiler("cuda") is None, reason="no nvcc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has loaded nothing yet."""
    monkeypatch.setenv("QSCOPE_TRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QSCOPE_TRL_PREBUILT", raising=False)
    monkeypatch.setenv(backend.SWITCH, "auto")
    monkeypatch.setattr(build, "_outcome", {})
    return tmp_path / "cache"


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n{script}\n")
    path.chmod(0o755)
    return path


def num_runs(folder: Path) -> int:
    runs = folder / "runs"
    return len(runs.read_text().splitlines()) if runs.exists() else 0


# Writes what the compiler would, at the path behind `-o`.
WRITES = 'while [ "$1" != -o ]; do shift; done; sleep 0.3; echo library > "$2"'


def test_a_library_is_compiled_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, WRITES)))
    first = build.build("cpu")
    assert first.read_text() == "library\n"
    assert build.build("cpu") == first
    assert num_runs(tmp_path) == 1
    build.build("cpu", force=True)
    assert num_runs(tmp_path) == 2
    assert not list(cache.rglob("*.tmp"))


def test_of_several_processes_one_compiles(cache: Path, tmp_path: Path) -> None:
    code = "from qscope_trl.ops import build; print(build.build('cpu').read_text())"
    done = run_forked(code, processes=3, environment={"CXX": str(fake_compiler(tmp_path, WRITES))})
    assert done.codes == [0] * 3
    assert done.stdout.split() == ["library"] * 3
    assert num_runs(tmp_path) == 1


def test_another_flag_or_architecture_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {build.library_path("cpu"), build.library_path("cuda", ["80"]), build.library_path("cuda", ["90a"])}
    monkeypatch.setattr(build, "_ABI", "0x020b000000000000")
    paths.add(build.library_path("cpu"))
    assert len(paths) == 4


def test_a_failed_build_is_remembered_until_asked_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "echo no such header >&2; exit 1")))
    with pytest.raises(KernelError, match=r"Building the `cpu` kernels failed; the compiler's words are in '(.*)'"):
        build.build("cpu")
    assert "no such header" in next(cache.rglob("*.failed.txt")).read_text()
    with pytest.raises(KernelError, match="failed before"):
        build.build("cpu")
    assert num_runs(tmp_path) == 1
    fake_compiler(tmp_path, WRITES)
    assert build.build("cpu", force=True).is_file()
    assert not list(cache.rglob("*.failed.txt"))


def test_without_a_compiler_there_is_one_warning_and_the_right_result(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda name: None)
    operands = problem(5, 8, 50)
    with pytest.warns(
        QScopeWarning, match=r"a C\+\+ compiler .* was not found.*Until then plain torch is used"
    ) as seen:
        first, second = (topk_encode(*operands, 4) for _ in range(2))
    assert len(seen) == 1
    monkeypatch.setenv(backend.SWITCH, "torch")
    wanted = topk_encode(*operands, 4)
    assert torch.equal(first.top_acts, wanted.top_acts)
    assert torch.equal(second.top_indices, wanted.top_indices)


def test_a_kernel_that_was_asked_for_and_cannot_be_built_raises(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda name: None)
    monkeypatch.setenv(backend.SWITCH, "cpu")
    with pytest.raises(KernelError, match=r"Install it and run `qscope build cpu`"):
        topk_encode(*problem(5, 8, 50), 4)


def test_a_library_that_does_not_load_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, WRITES)))
    with pytest.raises(KernelError, match=r"libqscope_trl_cpu.so' do not load: .* Run `qscope build cpu` again"):
        build.load("cpu")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QSCOPE_TRL_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, WRITES)))
    with pytest.raises(KernelError, match=r"Set `QSCOPE_TRL_CACHE` to a folder that can be written"):
        build.build("cpu")


@needs_compiler
def test_a_prebuilt_library_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.build("cpu")
    monkeypatch.setenv("QSCOPE_TRL_PREBUILT", str(library.parent))
    monkeypatch.setenv("QSCOPE_TRL_CACHE", str(tmp_path / "other"))
    code = "import torch; from qscope_trl.ops import build; build.load('cpu'); print(torch.ops.loaded_libraries)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(library) in loaded
    assert not (tmp_path / "other").exists()


@needs_nvcc
def test_cuda_sources_compile_for_ampere_and_hopper_and_load_beside_a_cpu_torch(cache: Path) -> None:
    library = build.build("cuda", archs=build.ARCHITECTURES)
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); ops = torch.ops.qscope_trl_cuda; "
        "print(*[getattr(ops, n).default._schema for n in ('select_chunk', 'finish', 'count_above', 'gather_sum')], "
        "sep='\\n')"
    )
    schemas = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(schemas) == 4
    assert schemas[0].startswith("qscope_trl_cuda::select_chunk(Tensor slab, Tensor bias, int first, Tensor(a!) keys")


def test_the_command_builds_what_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, WRITES)))
    assert main(["build", "cpu"]) == 0
    assert capsys.readouterr().out == f"cpu: {build.library_path('cpu')}\n"
    assert main(["build", "cpu", "--force"]) == 0
    assert num_runs(tmp_path) == 2
    assert main(["build", "rocm"]) == 2
    assert "Unknown kernel `rocm`; there are cpu, cuda" in capsys.readouterr().err
    assert main(["build", "--arc", "80"]) == 2


def test_wheels_carry_the_sources() -> None:
    for sources in build.SOURCES.values():
        for source in sources:
            assert (build.CSRC / source).is_file()
