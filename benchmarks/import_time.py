"""Seconds that `import qscope_trl` adds to starting Python, in fresh processes that take turns.

python benchmarks/import_time.py [--rounds 20] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reporting import RESULTS, environment, write


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = {"python": "pass", "qscope_trl": "import qscope_trl", "torch": "import torch"}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, code in names.items():
            times[name].append(seconds(code))
    bare = statistics.median(times["python"])
    medians = {name: statistics.median(values) - bare for name, values in times.items() if name != "python"}
    report = {
        "what": f"Seconds an import adds to the {bare:.3f} s of starting Python; {options.rounds} rounds.",
        "environment": environment(),
        "seconds": times,
    }
    rows = [[name, f"{median:.3f}"] for name, median in medians.items()]
    print(write(options.output, "import_time", report, ["import", "seconds, median"], rows))


if __name__ == "__main__":
    main()
