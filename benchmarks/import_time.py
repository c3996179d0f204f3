"""Seconds that `import qscope_trl` adds to starting Python, in fresh processes that take turns.

python benchmarks/import_time.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    names = {"python": "pass", "qscope_trl": "import qscope_trl", "torch": "import torch"}
    times = {name: [] for name in names}
    for _ in range(rounds):
        for name, code in names.items():
            times[name].append(seconds(code))
    bare = statistics.median(times["python"])
    for name in ("qscope_trl", "torch"):
        print(f"import {name}: {statistics.median(times[name]) - bare:.3f} s over {bare:.3f} s for Python itself")


if __name__ == "__main__":
    main()
