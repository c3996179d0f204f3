"""Time and memory of a map of 17 sets of up to 26,000 samples, once their features are there, on synthetic footprints.

Sizes are those of published benchmarks; each sample has 50 active features of 32,768 a layer, features as unequally
frequent as an SAE's, differently in each set. 1 % of each set's samples are near copies of samples of the next one. In
the last run (`alike`) all samples of a set have 46 features in common, so that all are near each other.

Each number of layers runs in a process of its own. `--output FOLDER` writes `evalmap_scale.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from reporting import environment, peak_mib, write

from qscope_trl.analysis.evalmap.footprints import Footprints, bitmap
from qscope_trl.analysis.evalmap.mapping import make_map
from qscope_trl.analysis.evalmap.near import NearIndex
from qscope_trl.analysis.evalmap.report import write_report
from qscope_trl.analysis.evalmap.run import Mapped
from qscope_trl.analysis.evalmap.samples import Read, Reading
from qscope_trl.analysis.evalmap.texts import SampleSet
from qscope_trl.config.evalmap import EvalmapConfig

SIZES = (26000, 14042, 12032, 10042, 10000, 8000, 6511, 5000, 4183, 3000, 2500, 1838, 1319, 1172, 817, 541, 164)
FEATURES, K = 32768, 50
COPIES, CHANGED = 0.01, 3


def one_layer(samples: int, generator: np.random.Generator) -> np.ndarray:
    """Active features `(samples, K)`: drawn with unequal chances until K different ones are there."""
    popularity = 1 / (np.arange(FEATURES) + 20) * generator.exponential(size=FEATURES)
    steps = np.cumsum(popularity) / popularity.sum()
    found = np.empty((samples, K), dtype=np.int64)
    for row in range(samples):
        seen = np.zeros(0, dtype=np.int64)
        while seen.size < K:
            more = np.minimum(np.searchsorted(steps, generator.random(2 * K)), FEATURES - 1)
            drawn = np.concatenate([seen, more])
            seen = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        found[row] = seen[:K]
    return found


def make(layers: int) -> Footprints:
    """All sets."""
    generator = np.random.default_rng(0)
    bitmaps: dict[str, Any] = {}
    before: np.ndarray | None = None
    for number, samples in enumerate(SIZES):
        active = np.concatenate([one_layer(samples, generator) + layer * FEATURES for layer in range(layers)], axis=1)
        if before is not None:
            copies = min(max(1, round(COPIES * samples)), len(before))
            active[:copies] = before[:copies]
            active[:copies, :CHANGED] = generator.integers(0, FEATURES, (copies, CHANGED))
        before = active
        rows = np.repeat(np.arange(samples), active.shape[1])
        matrix = sp.csr_matrix(
            (np.ones(rows.size, dtype=np.int8), (rows, active.ravel())), shape=(samples, layers * FEATURES)
        )
        matrix.sort_indices()
        bitmaps[f"set{number:02d}"] = matrix
    return Footprints(
        bitmaps, dict.fromkeys(range(layers), FEATURES), {n: np.arange(b.shape[0]) for n, b in bitmaps.items()}
    )


def make_alike() -> Footprints:
    """Sets in which every sample is near every other."""
    generator = np.random.default_rng(0)
    bitmaps: dict[str, Any] = {}
    for number, samples in enumerate(SIZES):
        common = np.tile(generator.choice(FEATURES, K - 4, replace=False), (samples, 1))
        active = np.concatenate([common, generator.integers(0, FEATURES, (samples, 4))], axis=1)
        bitmaps[f"set{number:02d}"] = bitmap(active, FEATURES)
    return Footprints(bitmaps, {0: FEATURES})


def clock() -> tuple[float, float]:
    """Wall and processor time; on a machine with other work the second is what the analysis needs."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    """What has passed of both."""
    wall, processor = clock()
    return wall - started[0], processor - started[1]


def measure(layers: int, near_samples: int, *, alike: bool = False) -> dict[str, Any]:
    """Seconds of each part, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "sets.npz"
        # Made in a process of its own: its memory is not the map's.
        kind = ["--alike"] if alike else []
        subprocess.run([sys.executable, __file__, "--make", str(layers), "--cache", str(cache), *kind], check=True)
        loaded = np.load(cache)
        names = sorted({key.split("/")[0] for key in loaded.files})
        bitmaps = {
            name: sp.csr_matrix(
                (np.ones(loaded[f"{name}/indices"].size, dtype=np.int8), loaded[f"{name}/indices"],
                 loaded[f"{name}/indptr"]), shape=(loaded[f"{name}/indptr"].size - 1, layers * FEATURES)
            )
            for name in names
        }  # fmt: skip
    rows = {name: np.arange(matrix.shape[0]) for name, matrix in bitmaps.items()}
    footprints = Footprints(bitmaps, dict.fromkeys(range(layers), FEATURES), rows)
    start_mib = peak_mib()
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    started = clock()
    found = make_map(footprints)
    seconds["map"], processor["map"] = since(started)
    started = clock()
    index = NearIndex(footprints, dict.fromkeys(names), 0.8)
    near = index.between(near_samples or None, show_progress=False)
    seconds["near"], processor["near"] = since(started)
    config = EvalmapConfig(output="-", data=["x"])
    reading = Reading(dict.fromkeys(range(layers), FEATURES), {}, "", True)
    sets = tuple(SampleSet(name, "synthetic", rows[name], None) for name in names)
    read = Read(sets, footprints, dict.fromkeys(names, 0), reading, None)
    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        write_report(Path(folder), config, Mapped(Path(folder), read, found, near, [], {}, None))
        size = (Path(folder) / "report.html").stat().st_size
    seconds["report"], processor["report"] = since(started)
    return {
        "layers": layers,
        "alike": alike,
        "near_samples": near_samples,
        "samples": sum(SIZES),
        "entries": int(sum(matrix.nnz for matrix in bitmaps.values())),
        "seconds": {**seconds, "all": sum(seconds.values())},
        "processor_seconds": {**processor, "all": sum(processor.values())},
        "near_found": sum(entry.near for entry in near if entry.name != entry.other),
        "peak_mib": peak_mib(),
        "peak_before_mib": start_mib,
        "report_bytes": size,
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--make", type=int)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--one", type=int, nargs=2)
    options = parser.parse_args()
    if options.make:
        found = make_alike() if options.alike else make(options.make)
        arrays = {f"{n}/{key}": getattr(b, key) for n, b in found.bitmaps.items() for key in ("indices", "indptr")}
        np.savez(options.cache, **arrays)
        return
    if options.one:
        sys.stdout.write(json.dumps(measure(*options.one, alike=options.alike)))
        return
    runs = []
    for layers, near_samples, *kind in ((1, 1000), (4, 1000), (1, 0), (1, 1000, "--alike")):
        command = [sys.executable, __file__, "--one", str(layers), str(near_samples), *kind]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(text))
        sys.stderr.write(text + "\n")
    header = [
        "layers", "looked up of each set", "figures", "near samples", "report", "all, processor s", "all, wall s",
        "peak, MiB",
    ]  # fmt: skip
    rows = [
        [
            f"{run['layers']}, alike" if run["alike"] else str(run["layers"]), str(run["near_samples"] or "all"),
            *(f"{run['processor_seconds'][part]:.1f}" for part in ("map", "near", "report", "all")),
            f"{run['seconds']['all']:.1f}", f"{run['peak_mib']:.0f}",
        ]
        for run in runs
    ]  # fmt: skip
    what = f"{len(SIZES)} sets, {sum(SIZES)} samples, {K} of {FEATURES} features active a layer."
    report = {"what": what, "environment": environment("scipy", "numpy", "matplotlib"), "runs": runs}
    if options.output:
        sys.stdout.write(write(options.output, "evalmap_scale", report, header, rows))
    else:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
