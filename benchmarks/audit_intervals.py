"""How often the audit's word for a behaviour is wrong, from simulated generations whose rates are known.

    python benchmarks/audit_intervals.py --output benchmarks/results

Base and tuned generations are drawn independently, which is the least that pairing by prompt can give.
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path

import torch

from benchmarks.reporting import environment, write
from qscope_trl.analysis.audit.estimates import rates
from qscope_trl.analysis.audit.verdict import GONE, MIN_SHOWN, STAYED, fall

LEFT = (1.0, STAYED, GONE, 0.1)
WORDS = ("stayed", "fell", "gone", "undecided", "not judged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    measured = []
    for prompts in (100, 400):
        for base_rate in (0.3, 0.1):
            for left in LEFT:
                counts: collections.Counter[str] = collections.Counter()
                for seed in range(options.draws):
                    base, tuned = (
                        (torch.rand(prompts, generator=generator) < rate).tolist()
                        for rate in (base_rate, base_rate * left)
                    )
                    if sum(base) < MIN_SHOWN:
                        counts["not judged"] += 1
                        continue
                    found = rates(base, tuned, resamples=400, seed=seed)
                    counts[fall(found.left.low, found.left.high)] += 1
                shares = {word: counts[word] / options.draws for word in WORDS}
                measured.append({"prompts": prompts, "base_rate": base_rate, "left": left, **shares})
    header = ["prompts", "base's rate", "truly left", *WORDS]
    table = [
        [f"{row['prompts']}", f"{row['base_rate']:.0%}", f"{row['left']:.0%}", *(f"{row[word]:.1%}" for word in WORDS)]
        for row in measured
    ]
    report = {
        "what": f"Words of `qscope audit` for a behaviour's rate, {options.draws} simulated audits a row.",
        "environment": environment(),
        "measured": measured,
    }
    if options.output:
        sys.stdout.write(write(options.output, "audit_intervals", report, header, table))
    else:
        sys.stdout.write("\n".join(" | ".join(row) for row in [header, *table]) + "\n")


if __name__ == "__main__":
    main()
