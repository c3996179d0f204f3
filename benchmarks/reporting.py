"""What every benchmark here does with its figures: where they were taken, how they scatter, and writing them down."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment(*packages: str) -> dict[str, Any]:
    """Processor, memory, GPU, versions and commit of this run."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    found: dict[str, Any] = {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()},
        "commit": commit(),
    }
    for package in ("torch", *packages):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["versions"]["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The checked-out commit, marked where files differ from it."""
    root = Path(__file__).parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "--", ":!results"], cwd=root.parent,
                                 capture_output=True, text=True)  # fmt: skip
    except OSError:
        return "unknown"
    return (name.stdout.strip() or "unknown") + (" with changes" if changed.stdout.strip() else "")


def describe(found: dict[str, Any]) -> str:
    """The environment in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    gpu = f"{found['gpu']}, " if "gpu" in found else ""
    return (
        f"{gpu}{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, {found['system']}; "
        f"{versions}; commit {found['commit']}."
    )


def median_interval(values: Sequence[float], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def peak_mib() -> float:
    """This process's peak resident size."""
    # Not ru_maxrss: a child process starts with its parent's peak there.
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def report_peak(above: float = 0.0) -> None:
    """Write the peak resident size where `peaks_of` reads it."""
    sys.stderr.write(f"PEAK {peak_mib() - above:.1f}\n")


def peaks_of(script: str, variants: Iterable[str], runs: int, arguments: Sequence[str] = ()) -> dict[str, list[float]]:
    """What `report_peak` said for each variant, each run in a fresh process: `script --memory-of VARIANT ...`."""
    peaks: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(runs):
        for variant, found in peaks.items():
            command = [sys.executable, script, "--memory-of", variant, *arguments]
            text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stderr
            found.append(float(text.rsplit("PEAK ", 1)[1].split()[0]))
    return peaks


def write(
    folder: Path, name: str, report: dict[str, Any], header: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """`name.json` with everything and `name.md` with the table; returns the table's text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    table = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    text = f"{report['what']} {describe(report['environment'])}\n\n" + "\n".join(table) + "\n"
    (folder / f"{name}.md").write_text(text)
    return text
