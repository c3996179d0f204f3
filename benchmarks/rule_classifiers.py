"""Learned rules beside probes, words, random features and a text detector, on the bundled model's labelled texts.

Five yes-or-no tasks: Chinese or English, switched between both or not, and which of three sources. A rule is learned
on `demo:rules_train` and judged on `demo:rules_test`; texts of one page are never parted.

python benchmarks/rule_classifiers.py [--layers 4,5] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from reporting import RESULTS, environment, write

from qscope_trl.analysis.rules import learn_run
from qscope_trl.analysis.rules.comparison import Entry, Judge
from qscope_trl.config.rules import RulesLearnConfig
from qscope_trl.demo import assets

CHINESE, LATIN = re.compile(r"[㐀-䶿一-鿿豈-﫿]"), re.compile(r"[A-Za-z]")
ENGLISH_RUN = re.compile(r"[A-Za-z][A-Za-z'\u2019-]*(?:[ ,;:()\"]+[A-Za-z][A-Za-z'\u2019-]*)*")


def chinese_share(text: str) -> float:
    """Chinese characters among Chinese characters and Latin letters."""
    chinese, latin = len(CHINESE.findall(text)), len(LATIN.findall(text))
    return chinese / max(1, chinese + latin)


def both_languages(text: str) -> float:
    """Words of the longest run of Latin words, or half the Chinese characters, whichever is less.

    Runs, since Chinese texts name commands and functions in Latin letters.
    """
    words = max((len(run.split()) for run in ENGLISH_RUN.findall(text)), default=0)
    return min(words, len(CHINESE.findall(text)) / 2)


TASKS: dict[str, tuple[str, str, Any, Any]] = {
    "Chinese or English": ("language", "zh", lambda row: row["language"] != "mixed", chinese_share),
    "switched": ("switched", "true", None, both_languages),
    "source calc": ("source", "calc", None, None),
    "source shared": ("source", "shared", None, None),
    "source writer": ("source", "writer", None, None),
}


def run_task(name: str, folder: Path, layers: str) -> tuple[learn_run.LearnResult, list[Entry]]:
    column, positive, wanted, detector = TASKS[name]
    paths = {}
    for part in ("rules_train", "rules_test"):
        rows = [row for row in assets.rows(part) if wanted is None or wanted(row)]
        paths[part] = folder / f"{part}.jsonl"
        paths[part].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    config = RulesLearnConfig(
        model="demo",
        saes="demo",
        layers=layers,
        data=str(paths["rules_train"]),
        test_data=str(paths["rules_test"]),
        label_column=column,
        positive_label=positive,
        group_column="page",
        max_length=128,
        batch_size=32,
        device="cpu",
        output=str(folder / "rule.yaml"),
    )
    result = learn_run.run(config)
    entries = list(result.entries)
    if detector is not None:
        judge: Judge = result.judge
        entries.append(judge.by_score("text detector", np.array([detector(t) for t in result.data.texts])))
    return result, entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,5")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tasks, table = {}, []
    for name in TASKS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result, entries = run_task(name, Path(folder), options.layers)
        tasks[name] = {
            "rule": str(result.rule),
            "development_f1": result.learned.development,
            "cross_validation": list(result.folds),
            "test": {"texts": int(result.judge.test.sum()), "positive": entries[0].runs[0].positive},
            "seconds": time.perf_counter() - began,
            "classifiers": [
                {**entry.to_dict(), "runs": [{k: v for k, v in run.to_dict().items() if k != "curve"}
                                             for run in entry.runs]}
                for entry in entries
            ],
        }  # fmt: skip
        for entry in entries:
            run = entry.runs[0]
            interval = "" if len(entry.runs) > 1 or run.f1_interval is None else (
                f"{run.f1_interval[0]:.2f} to {run.f1_interval[1]:.2f}")  # fmt: skip
            brier = statistics.fmean(r.calibration.brier for r in entry.runs if r.calibration is not None)
            table.append(
                [
                    name if entry is entries[0] else "",
                    entry.name + (f" ({entry.note})" if entry.note else ""),
                    *(f"{entry.mean(figure):.3f}" for figure in ("precision", "recall", "f1")),
                    interval,
                    f"{entry.mean('auroc'):.3f}",
                    f"{brier:.3f}",
                ]
            )
    report = {
        "what": f"Rules learned on `demo:rules_train`, judged on `demo:rules_test`, layers {options.layers} of the "
        f"bundled model, beside baselines fitted and chosen on the same texts; intervals are 95 %, bootstrap over "
        f"pages.",
        "environment": environment("transformers", "scikit-learn"),
        "tasks": tasks,
    }
    header = ["task", "classifier", "precision", "recall", "F1", "95 %", "AUROC", "Brier"]
    print(write(options.output, "rule_classifiers", report, header, table))


if __name__ == "__main__":
    main()
