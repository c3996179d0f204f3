"""Compiling the kernels in `csrc/` and loading them into torch: on first use, or ahead of time by `qscope build`.

The compilers are called directly: torch's own extension builder refuses CUDA code beside a CPU build of torch. The
sources use torch's stable ABI alone, so a library serves every Python. It is built once for a combination of sources,
torch, CUDA, target and flags; of several processes one builds while the others wait. A failed build is remembered too.
Left out: Windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qscope_trl.errors import KernelError, QScopeWarning

CSRC = Path(__file__).parent / "csrc"
SOURCES = {"cpu": ("cpu.cpp", "order.h"), "cuda": ("cuda.cu", "kernels.cuh", "gather_sum.cuh", "order.h")}
"""Sources of each library; the first is compiled, the others are included by it."""

ARCHITECTURES = ("80", "90a")
"""GPU architectures that are built where no GPU says which: Ampere and what runs its code, and Hopper."""

# The stable ABI of torch 2.10: parallel_for, const and mutable pointers.
_ABI = "0x020a000000000000"
_log = logging.getLogger("qscope_trl")
_outcome: dict[str, KernelError | None] = {}


def cache_folder() -> Path:
    """Where libraries are kept: `QSCOPE_TRL_CACHE`, else `qscope_trl` in the user's cache folder."""
    given = os.environ.get("QSCOPE_TRL_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qscope_trl"


def find_compiler(name: str) -> str | None:
    """Path of a library's compiler: `CXX` or g++; `NVCC`, or nvcc of `CUDA_HOME`, the path or PyPI's packages."""
    if name == "cpu":
        return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    # The last: NVIDIA's packages from PyPI, beside torch.
    packages = sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*"), reverse=True)
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [os.environ.get("NVCC"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    places += [str(home / "bin" / "nvcc") for home in packages]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def architectures() -> tuple[str, ...]:
    """The GPUs of this machine as nvcc names them, `90a` for Hopper; `ARCHITECTURES` where there is none."""
    if not torch.cuda.is_available():
        return ARCHITECTURES
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(sorted(f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}" for major, minor in found))


def build_command(name: str, compiler: str, output: Path, archs: Sequence[str] = ()) -> list[str]:
    """The compiler's command line."""
    root = Path(torch.__file__).parent
    source = str(CSRC / SOURCES[name][0])
    common = ["-std=c++17", "-O3", "-shared", f"-DTORCH_TARGET_VERSION={_ABI}", f"-I{root / 'include'}"]
    link = ["-o", str(output), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    if name == "cpu":
        return [compiler, *common, "-fPIC", source, *link]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs or architectures()]
    # nvcc knows `lib64` of a full toolkit; the packages from PyPI have `lib`.
    home = Path(compiler).resolve().parents[1] if compiler else None
    runtime = [f"-L{home / 'lib'}"] if home and (home / "lib" / "libcudart_static.a").is_file() else []
    return [compiler, *common, "-Xcompiler", "-fPIC", *targets, source, *link, *runtime, "-lcudart_static"]


def library_path(name: str, archs: Sequence[str] = ()) -> Path:
    """Where the library for this combination of sources, torch, CUDA, target and flags lies or will lie."""
    digest = hashlib.sha256()
    for source in SOURCES[name]:
        digest.update((CSRC / source).read_bytes())
    facts = [torch.__version__, str(torch.version.cuda), platform.machine(), *build_command(name, "", Path(), archs)]
    digest.update("\0".join(facts).encode())
    return cache_folder() / digest.hexdigest()[:16] / f"libqscope_trl_{name}.so"


def build(name: str, *, archs: Sequence[str] = (), force: bool = False) -> Path:
    """Compile a library, unless it is there.

    Args:
        name: `cpu` or `cuda`.
        archs: GPU architectures for nvcc, such as `80` or `90a`; by default those of this machine.
        force: Compile again, also where an earlier build failed.

    Returns:
        Path of the library.

    Raises:
        KernelError: If no compiler is found, the compiler fails or failed before, or the folder cannot be written.
    """
    path = library_path(name, archs)
    if path.is_file() and not force:
        return path
    compiler = find_compiler(name)
    if compiler is None:
        wanted = "a C++ compiler (`g++`, or set `CXX`)" if name == "cpu" else "`nvcc` (or set `CUDA_HOME`)"
        raise KernelError(
            f"The `{name}` kernels are not built, and {wanted} was not found. Install it and run "
            f"`qscope build {name}`."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / f"{name}.lock"):
            return _build_locked(name, compiler, path, archs, force)
    except OSError as err:
        raise KernelError(
            f"The `{name}` kernels cannot be kept in '{path.parent}': {err}. Set `QSCOPE_TRL_CACHE` to a folder that "
            f"can be written."
        ) from err


def _build_locked(name: str, compiler: str, path: Path, archs: Sequence[str], force: bool) -> Path:
    failed = path.with_suffix(".failed.txt")
    if not force:
        if path.is_file():
            return path
        if failed.is_file():
            raise KernelError(
                f"Building the `{name}` kernels failed before; the compiler's words are in '{failed}'. "
                f"`qscope build {name}` tries again."
            )
    _log.warning("qscope_trl: compiling the %s kernels, once.", name)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so.tmp")
    os.close(handle)
    try:
        command = build_command(name, compiler, Path(temporary), archs)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failed.write_text(f"{' '.join(command)}\n{done.stdout}{done.stderr}", encoding="utf-8")
            raise KernelError(
                f"Building the `{name}` kernels failed; the compiler's words are in '{failed}'. Mend what it names "
                f"and run `qscope build {name}`."
            )
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
        failed.unlink(missing_ok=True)
        return path
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(name: str) -> None:
    """Make `torch.ops.qscope_trl_{name}` available, compiling it on the first call on this machine.

    A library in the folder `QSCOPE_TRL_PREBUILT` comes before the cache.

    Args:
        name: `cpu` or `cuda`.

    Raises:
        KernelError: If it cannot be had; the reason of the first call is kept for the process.
    """
    if name not in _outcome:
        try:
            _load(name)
            _outcome[name] = None
        except KernelError as err:
            _outcome[name] = err
    error = _outcome[name]
    if error is not None:
        raise error


def _load(name: str) -> None:
    if platform.system() == "Windows":
        raise KernelError(f"The `{name}` kernels are not built on Windows. Use `QSCOPE_TRL_KERNEL=torch`.")
    prebuilt = os.environ.get("QSCOPE_TRL_PREBUILT")
    path = Path(prebuilt).expanduser() / f"libqscope_trl_{name}.so" if prebuilt else None
    if path is None or not path.is_file():
        path = build(name)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as err:
        raise KernelError(
            f"The `{name}` kernels in '{path}' do not load: {err}. Run `qscope build {name}` again."
        ) from err


def is_available(name: str) -> bool:
    """Whether the library can be used; one warning a process where it cannot."""
    known = name in _outcome
    try:
        load(name)
    except KernelError as err:
        if not known:
            warnings.warn(
                f"{err} Until then plain torch is used: the same results, slower.", QScopeWarning, stacklevel=2
            )
        return False
    return True
