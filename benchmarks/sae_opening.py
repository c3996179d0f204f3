"""Memory and time of opening ten features of one 80K x 5120 SAE layer, against `torch.load` of the same file.

Every measurement is a fresh process: `VmHWM` (peak resident set, mapped file pages included) is reset before the call,
and its growth over the resident set before the call is what the call costs. Imports and a first call on a tiny file
lie before the clock. Variants are interleaved. `warm`: the file is in the page cache; `cold`: its pages were evicted.

    python benchmarks/sae_opening.py             # 3.4 GB in the temporary folder, some minutes
    python benchmarks/sae_opening.py --small     # 100 MB, seconds
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qscope_trl.sae.suite import SAESuite

RESULTS = Path(__file__).parent / "results"
FEATURES = 10
VARIANTS = {
    "qscope rows": "`SAESuite.encoder_rows`, 10 features of `W_enc`",
    "qscope columns": "`SAESuite.decoder_columns`, 10 features of `W_dec`",
    "mmap rows": "`torch.load(mmap=True)`, then `W_enc[index]`",
    "mmap columns": "`torch.load(mmap=True)`, then `W_dec[:, index]`",
    "full load": "`torch.load`, then `W_enc[index]`",
}


def make(folder: Path, d_sae: int, d_model: int) -> Path:
    """Write a random layer in the Qwen-Scope format."""
    folder.mkdir()
    path = folder / "layer0.sae.pt"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.empty(d_sae, d_model).uniform_(-1, 1, generator=generator),
        "W_dec": torch.empty(d_model, d_sae).uniform_(-1, 1, generator=generator),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_model),
    }
    torch.save(tensors, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path


def touch(variant: str, path: Path) -> torch.Tensor:
    """Get the ten features of a file, from nothing."""
    if variant.startswith("qscope"):
        suite = SAESuite.from_pretrained(path)
        index = torch.linspace(0, suite.d_sae - 1, FEATURES).long().tolist()
        return suite.encoder_rows(0, index).W if variant == "qscope rows" else suite.decoder_columns(0, index).T
    content = torch.load(path, weights_only=True, mmap=variant.startswith("mmap"), map_location="cpu")
    index = torch.linspace(0, len(content["b_enc"]) - 1, FEATURES).long().tolist()
    return content["W_dec"][:, index].T if variant == "mmap columns" else content["W_enc"][index]


def resident(key: str) -> float:
    """`VmRSS` or `VmHWM` in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1000
    raise RuntimeError(key)


def measure(variant: str, path: Path, tiny: Path) -> None:
    """Print time and memory of one call as JSON. Runs in a process of its own."""
    torch.set_num_threads(2)
    touch(variant, tiny)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    rows = touch(variant, path)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": resident("VmHWM") - before, "shape": list(rows.shape)}))


def run(variant: str, path: Path, tiny: Path, *, cold: bool) -> dict[str, float]:
    """One measurement in a fresh process."""
    descriptor = os.open(path, os.O_RDONLY)
    if cold:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        while os.read(descriptor, 1 << 24):
            pass
    os.close(descriptor)
    command = [sys.executable, __file__, "--measure", variant, str(path), str(tiny)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def environment() -> dict[str, str]:
    """Hardware, versions and commit."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    changes = subprocess.run(
        ["git", "status", "--porcelain", "qscope_trl/sae"], cwd=root, capture_output=True, text=True, check=True
    )
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": f"{model[0].split(':')[1].strip()}, {os.cpu_count()} logical cores" if model else platform.machine(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() + (" with uncommitted changes in qscope_trl/sae" if changes.stdout else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure every variant and write results/sae_opening.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, metavar=("VARIANT", "FILE", "TINY"))
    parser.add_argument("--small", action="store_true", help="2560 x 5120; prints, writes no results")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), Path(args.measure[2]))
        return
    d_sae, d_model = (2560 if args.small else 81920), 5120
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "big", d_sae, d_model)
        tiny = make(Path(folder) / "tiny", 32, 16)
        size = path.stat().st_size / 1e9
        runs: dict[str, dict[str, list[dict[str, float]]]] = {
            state: {variant: [] for variant in VARIANTS} for state in ("warm", "cold")
        }
        for state, by_variant in runs.items():
            for _ in range(args.repeats):
                for variant, measured in by_variant.items():
                    measured.append(run(variant, path, tiny, cold=state == "cold"))
    lines = [
        "| page cache | what | peak memory MB, median (min to max) | seconds, median (min to max) "
        "| of full load: memory, time |",
        "|---|---|---|---|---|",
    ]
    for state, by_variant in runs.items():
        full = {key: statistics.median(one[key] for one in by_variant["full load"]) for key in ("peak_mb", "seconds")}
        for variant, measured in by_variant.items():
            memory, seconds = ([one[key] for one in measured] for key in ("peak_mb", "seconds"))
            ratio_memory = statistics.median(memory) / full["peak_mb"]
            ratio_time = statistics.median(seconds) / full["seconds"]
            lines.append(
                f"| {state} | {VARIANTS[variant]} | {statistics.median(memory):.1f} ({min(memory):.1f} to "
                f"{max(memory):.1f}) | {statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | "
                f"{ratio_memory:.4f}, {ratio_time:.4f} |"
            )
    facts = environment()
    title = f"`W_enc` ({d_sae}, {d_model}) and `W_dec` in fp32, a file of {size:.2f} GB; {args.repeats} runs each."
    table = "\n".join([title, "", *lines, "", "; ".join(f"{key}: {value}" for key, value in facts.items())]) + "\n"
    print(table)
    if not args.small:
        RESULTS.mkdir(exist_ok=True)
        content = {"d_sae": d_sae, "d_model": d_model, "file_gb": size, "environment": facts, "runs": runs}
        (RESULTS / "sae_opening.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "sae_opening.md").write_text(table)


if __name__ == "__main__":
    main()
