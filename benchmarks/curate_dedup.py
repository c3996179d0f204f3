"""Near-duplicates by active features: planted ones found against shingles of the text; time and memory against rows.

python benchmarks/curate_dedup.py [--rows 1000 10000 50000] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reporting import RESULTS, environment, peak_mib, write
from scipy import sparse
from sklearn.metrics import average_precision_score

from qscope_trl.analysis.curation.leaders import near_duplicates
from qscope_trl.analysis.curation.sets import MEASURES, ActiveSets, Nearness, inverse_document_frequency
from qscope_trl.demo import assets

LAYERS = ("2", "4", "all")
PLANTED = 100
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PRECISION = 0.95
SHOWN = ("jaccard, layer 4", "weighted_jaccard, layer 4", "cosine, layer 4", "text, 5 characters")
MOST_ALL_PAIRS = 10_000


def _words(text: str) -> list[str]:
    """Words of Latin text; of Chinese two characters stand for one."""
    found, waiting = [], ""
    for part in text.split(" "):
        if part.isascii():
            found.append(part)
            continue
        waiting = part
        found += [waiting[i : i + 2] for i in range(0, len(waiting), 2)]
    return found


def _replaced(text: str, share: float, draw: random.Random, vocabulary: list[str]) -> str:
    words = [word for word in _words(text) if len(word) > 1]
    for word in draw.sample(words, max(1, round(share * len(words)))):
        text = text.replace(word, draw.choice(vocabulary), 1)
    return text


def edits(texts: list[str]) -> dict[str, Callable[[str, random.Random], str]]:
    """By name, what makes a near-duplicate of a text."""
    english = [w for t in texts for w in t.split() if w.isascii() and w.isalpha()]
    sentences = [s for t in texts for s in t.replace("。", "。\n").replace(". ", ".\n").split("\n") if len(s) > 20]

    def reordered(text: str, draw: random.Random) -> str:
        parts = text.replace("。", "。\n").replace(". ", ".\n").split("\n")
        return "\n".join(draw.sample(parts, len(parts)))

    return {
        "one word replaced": lambda t, d: _replaced(t, 0.0, d, english),
        "a tenth of the words replaced": lambda t, d: _replaced(t, 0.1, d, english),
        "a quarter of the words replaced": lambda t, d: _replaced(t, 0.25, d, english),
        "lower case, no punctuation": lambda t, _: "".join(c for c in t.lower() if c.isalnum() or c.isspace()),
        "a foreign sentence appended": lambda t, d: f"{t} {d.choice(sentences)}",
        "sentences in another order": reordered,
        "cut to two thirds": lambda t, _: t[: max(20, 2 * len(t) // 3)],
    }


def plant() -> tuple[list[str], dict[str, list[tuple[int, int]]], set[tuple[int, int]]]:
    """Texts with edits of some behind them; pairs (original, edit) by kind; pairs of edits of one text."""
    texts = list(dict.fromkeys(row["text"] for row in assets.rows("rules_train")))
    draw = random.Random(0)
    kinds, originals = edits(texts), len(texts)
    pairs: dict[str, list[tuple[int, int]]] = {}
    family = list(range(originals))
    for kind, edit in kinds.items():
        pairs[kind] = []
        for place in draw.sample(range(originals), PLANTED):
            changed = edit(texts[place], draw)
            if changed != texts[place]:
                pairs[kind].append((place, len(texts)))
                texts.append(changed)
                family.append(place)
    of = np.array(family)
    siblings = {
        (i, j) for f in range(originals) for i in np.flatnonzero(of == f) for j in np.flatnonzero(of == f) if i < j
    }
    return texts, pairs, {(int(i), int(j)) for i, j in siblings}


def shingle_similarity(texts: list[str], size: int) -> Any:
    """Exact Jaccard of sets of character n-grams, `(texts, texts)`: what MinHash estimates."""
    place: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        plain = " ".join(text.split())
        for shingle in {plain[i : i + size] for i in range(max(1, len(plain) - size + 1))}:
            rows.append(row)
            columns.append(place.setdefault(shingle, len(place)))
    matrix = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(place)))
    return jaccard_of(matrix)


def jaccard_of(matrix: Any) -> Any:
    """Every pair's Jaccard index of rows of zeros and ones."""
    shared = (matrix @ matrix.T).toarray()
    size = np.diag(shared)
    return shared / np.maximum(size[:, None] + size[None, :] - shared, 1)


def feature_similarities(texts: list[str]) -> dict[str, Any]:
    """Every pair's similarity by layers and measure."""
    from qscope_trl.analysis.curation.features import ModelReader, Needs
    from qscope_trl.config.curate import CurateConfig

    found = {}
    for layers in LAYERS:
        config = CurateConfig(
            data="demo:rules_train", dry_run=True, model="demo", saes="demo", layers=layers, deduplicate=0.5
        )
        sets = ModelReader(config, (), Needs((), (), True, "max")).read(texts).sets
        assert sets is not None
        for measure in MEASURES:
            nearness = Nearness(measure, inverse_document_frequency(sets))
            rows = nearness.rows(sets)
            weight = nearness.weights(rows)
            shared = (rows @ rows.T).toarray().ravel()
            count = weight.size
            similarity = nearness.similarity(shared, np.repeat(weight, count), np.tile(weight, count))
            found[f"{measure}, layer{'s' if layers == 'all' else ''} {layers}"] = similarity.reshape(count, count)
    return found


def judge(similarity: Any, pairs: dict[str, list[tuple[int, int]]], siblings: set[tuple[int, int]]) -> dict[str, Any]:
    """Recall of planted pairs by kind, and what else is called near, at each threshold."""
    count = len(similarity)
    first, second = np.triu_indices(count, 1)
    values = similarity[first, second]
    key = first * count + second
    planted = np.array(sorted(i * count + j for some in pairs.values() for i, j in some))
    others_of_one = np.array(sorted({i * count + j for i, j in siblings} - set(planted.tolist())))
    judged = ~np.isin(key, others_of_one)
    is_planted, values = np.isin(key[judged], planted), values[judged]
    by_value = np.argsort(-values, kind="stable")
    precision = np.cumsum(is_planted[by_value]) / np.arange(1, values.size + 1)
    last = np.append(np.diff(values[by_value]) != 0, True)
    good = np.flatnonzero(last & (precision >= PRECISION))
    cut = float(values[by_value][good[-1]])
    at = {}
    for threshold in (*THRESHOLDS, cut):
        near = values >= threshold
        at[f"{threshold:.4g}"] = {
            "recall": float((near & is_planted).sum() / is_planted.sum()),
            "others": int((near & ~is_planted).sum()),
            "by_kind": {
                kind: float(np.mean([similarity[i, j] >= threshold for i, j in some])) for kind, some in pairs.items()
            },
        }
    return {"average_precision": float(average_precision_score(is_planted, values)), "cut": f"{cut:.4g}", "at": at}


def synthetic(rows: int, *, d_sae: int = 32768, mean_size: int = 300, duplicates: float = 0.2) -> ActiveSets:
    """Sets with features of Zipf frequencies; a fifth are earlier sets with a twentieth of their features changed."""
    generator = np.random.default_rng(0)
    weight = 1 / np.arange(10, d_sae + 10)
    cumulative = np.cumsum(weight / weight.sum())
    sets: list[Any] = []
    sizes = np.clip(generator.lognormal(np.log(mean_size), 0.5, rows), 20, 2000).astype(int)
    for row in range(rows):
        if row > 10 and generator.random() < duplicates:
            mine = sets[generator.integers(row)]
            mine = mine[generator.random(mine.size) > 0.05]
            sets.append(np.union1d(mine, generator.integers(d_sae, size=mine.size // 20)))
            continue
        drawn = np.searchsorted(cumulative, generator.random(int(1.5 * sizes[row])))
        sets.append(np.unique(drawn))
    offsets = np.concatenate([[0], np.cumsum([mine.size for mine in sets])]).astype(np.int64)
    return ActiveSets(offsets, np.concatenate(sets).astype(np.int32), None, (0, d_sae))


def time_one(rows: int, threshold: float, how: str) -> dict[str, float]:
    """In this process: seconds of its one thread, and MiB, that finding near-duplicates adds."""
    sets = synthetic(rows)
    before = peak_mib()
    start = time.process_time()
    if how == "all pairs":
        matrix = Nearness("jaccard", np.ones(sets.num_features)).rows(sets)
        size = np.diff(matrix.indptr)
        found: Any = 0
        for first in range(0, rows, 1000):
            shared = matrix[first : first + 1000] @ matrix.T
            row = np.repeat(np.arange(first, first + shared.shape[0]), np.diff(shared.indptr))
            near = shared.data / (size[row] + size[shared.indices] - shared.data) >= threshold
            found += int((near & (shared.indices < row)).sum())
    else:
        nearness = Nearness("jaccard", inverse_document_frequency(sets))
        found = near_duplicates(sets, np.arange(rows), nearness, threshold, show_progress=False).rows.size
    return {
        "seconds": time.process_time() - start,
        "mib": peak_mib() - before,
        "sets_mib": (sets.features.nbytes + sets.offsets.nbytes) / 2**20,
        "entries": float(sets.features.size),
        "found": float(found),
    }


def report_planted(folder: Path) -> None:
    """Which planted pairs are found, at a precision of 95 % and at thresholds."""
    texts, pairs, siblings = plant()
    similarities = {
        **{f"text, {size} characters": shingle_similarity(texts, size) for size in (3, 5, 9)},
        **feature_similarities(texts),
    }
    judged = {name: judge(similarity, pairs, siblings) for name, similarity in similarities.items()}
    kinds = list(pairs)
    found = environment("numpy", "scipy", "scikit-learn", "transformers")
    planted = f"planted near-duplicates ({sum(map(len, pairs.values()))} pairs, {len(texts)} texts)"
    table = []
    for name, result in judged.items():
        at = result["at"][result["cut"]]
        kind_cells = [f"{at['by_kind'][kind]:.2f}" for kind in kinds]
        table.append([name, f"{result['average_precision']:.3f}", result["cut"], f"{at['recall']:.2f}", *kind_cells])
    report = {
        "what": f"Recall of {planted} at the lowest threshold where {PRECISION:.0%} of the pairs found are planted.",
        "environment": found,
        "judged": judged,
    }
    print(
        write(
            folder, "curate_planted", report, ["similarity", "average precision", "threshold", "recall", *kinds], table
        )
    )

    table = []
    for threshold in (f"{value:.4g}" for value in THRESHOLDS):
        cells = [judged[name]["at"][threshold] for name in SHOWN]
        table.append([threshold, *(f"{cell['recall']:.2f} ({cell['others']})" for cell in cells)])
    report = {
        "what": f"Recall of {planted}, and how many other pairs are as near, by threshold.",
        "environment": found,
        "thresholds": {name: judged[name]["at"] for name in SHOWN},
    }
    print(write(folder, "curate_thresholds", report, ["threshold", *SHOWN], table))


def report_cost(folder: Path, sizes: list[int]) -> None:
    """Time and memory, each run in a fresh process."""
    runs, table = [], []
    for rows in sizes:
        # All pairs take the same time whatever the threshold.
        for threshold, how in ((0.9, "leaders"), (0.8, "leaders"), (0.5, "leaders"), (0.8, "all pairs")):
            if how == "all pairs" and rows > MOST_ALL_PAIRS:
                continue
            command = [sys.executable, __file__, "--time-one", str(rows), str(threshold), how]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            runs.append({"rows": rows, "threshold": threshold, "how": how, **found})
            shown = "any" if how == "all pairs" else f"{threshold}"
            cells = [str(rows), f"{found['entries'] / rows:.0f}", how, shown, f"{found['seconds']:.2f}"]
            table.append([*cells, f"{found['mib']:.0f}", f"{found['sets_mib']:.0f}"])
            print(runs[-1], flush=True)
    report = {
        "what": "Near-duplicates among synthetic active sets (32,768 features, Zipf frequencies, a fifth planted) in "
        "one thread: its seconds, and peak memory above that of the sets.",
        "environment": environment("numpy", "scipy"),
        "runs": runs,
    }
    header = ["rows", "features a row", "method", "threshold", "seconds", "MiB", "MiB of the sets"]
    print(write(folder, "curate_dedup", report, header, table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10000, 50000], help="none: planted pairs alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--time-one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time_one:
        rows, threshold, how = options.time_one
        print(json.dumps(time_one(int(rows), float(threshold), how)))
        return
    report_planted(options.output)
    if options.rows:
        report_cost(options.output, options.rows)


if __name__ == "__main__":
    main()
