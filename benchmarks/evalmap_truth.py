"""Sets of the bundled bilingual texts whose overlap is known by construction, mapped by the bundled model.

English texts of three parts of one help system and their Chinese ones (`demo:rules_train` and `demo:rules_test`), in
sets of equal size: two halves of one part, another part, the other language, the same texts as questions, mixtures.
The mixture of x % holds x % of the samples of `calc` and else samples of `basic`, so the share of its samples that are
of `calc` is known, and so are the texts that both have. The table says what is measured, for several random divisions.
Beside it: how many active features change when texts are encoded in batches of 32 instead of one by one.

`--output FOLDER` writes `evalmap_truth.json` and `.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from reporting import environment, write

from qscope_trl.activations.sources import open_source
from qscope_trl.analysis.evalmap.footprints import Footprints
from qscope_trl.analysis.evalmap.mapping import make_map
from qscope_trl.analysis.evalmap.near import NearIndex
from qscope_trl.analysis.evalmap.overlap import overlaps
from qscope_trl.analysis.evalmap.samples import Encoder
from qscope_trl.config.evalmap import EvalmapConfig

MIXTURES = (0, 25, 50, 75, 100)
SEEDS = range(20)


def texts() -> dict[str, list[str]]:
    """By part and language, every text of it once."""
    found: dict[str, dict[str, None]] = {}
    for name in ("demo:rules_train", "demo:rules_test"):
        for _, row in open_source(name).rows():
            if not row["switched"]:
                found.setdefault(f"{row['source']} {row['language']}", {})[row["text"]] = None
    return {name: list(rows) for name, rows in found.items()}


def prompt(text: str) -> str:
    """The text as a question: its content is the same, its last token is not."""
    return f"Question: {text}\nAnswer:"


def changed_by_batch(texts: list[str], layer: str, dtype: str) -> float:
    """Entries that are active with batches of 32 or one by one, but not with both, over those with both or either."""
    one, many = (
        Encoder(
            EvalmapConfig(
                output="-", data=["-"], model="demo", saes="demo", layers=layer, batch_size=batch_size, dtype=dtype
            )
        )(texts).bitmap
        for batch_size in (1, 32)
    )
    return float((one != many).nnz / (one + many).nnz)


def divide(rows: dict[str, list[str]], size: int, seed: int) -> dict[str, list[str]]:
    """Sets of `size` samples."""
    generator = np.random.default_rng(seed)

    def some(name: str, count: int) -> list[str]:
        return [rows[name][i] for i in generator.permutation(len(rows[name]))[:count]]

    calc, basic = some("calc en", 2 * size), some("basic en", size)
    sets = {
        "calc": calc[:size],
        "same part, other half": calc[size:],
        "other part (basic)": basic,
        "other language (calc)": some("calc zh", size),
        "same texts, in a prompt": [prompt(text) for text in calc[:size]],
    }
    for percent in MIXTURES:
        own = round(size * percent / 100)
        sets[f"{percent} % calc"] = [*calc[:own], *basic[: size - own]]
    return sets


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layer", default="5")
    options = parser.parse_args()
    rows = texts()
    size = min(len(rows["calc en"]) // 2, len(rows["basic en"]), len(rows["calc zh"]))
    everything = list(dict.fromkeys(text for some in rows.values() for text in some))
    everything += [prompt(text) for text in rows["calc en"]]
    place = {text: i for i, text in enumerate(everything)}
    columns = {}
    encoded = {}
    for pool in ("last", "max"):
        config = EvalmapConfig(
            output="-", data=["-"], model="demo", saes="demo", layers=options.layer, batch_size=16, pool=pool
        )
        encoder = Encoder(config)
        columns, found_texts = encoder.columns, encoder(everything)
        encoded[pool] = found_texts.bitmap
        if not found_texts.num_tokens.all():
            raise SystemExit("A text has no token to read.")
    measured: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        sets = divide(rows, size, seed)
        footprints, any_token = (
            Footprints({name: bitmap[[place[text] for text in some]] for name, some in sets.items()}, columns)
            for bitmap in encoded.values()
        )
        found = make_map(footprints)
        by_max = overlaps(any_token.unions()).of_row
        near = {
            entry.other: entry
            for entry in NearIndex(footprints, sets, 0.8).between(show_progress=False)
            if entry.name == "calc"
        }
        for j, name in enumerate(found.names[1:], 1):
            values = {
                "of calc": found.overlaps.of_row[0, j],
                "of calc, max": by_max[0, j],
                "near": near[name].near,
                "same": near[name].same_text,
                "planted": len(set(sets["calc"]) & set(sets[name])),
            }
            for key, value in values.items():
                measured.setdefault(name, {}).setdefault(key, []).append(float(value))

    def shown(name: str, key: str, digits: int = 3) -> str:
        values = measured[name][key]
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    share = {f"{percent} % calc": f"{percent} %" for percent in MIXTURES}
    share |= {"same part, other half": "100 %, other samples", "other part (basic)": "0 %"}
    share |= {"other language (calc)": "0 %, translated", "same texts, in a prompt": "100 %, in another form"}
    header = [
        "set", "samples of `calc`", "`calc` covered by it, last token", "any token", "texts in common", "found",
        "near, other text",
    ]  # fmt: skip
    table = [
        [
            name, share[name], shown(name, "of calc"), shown(name, "of calc, max"),
            f"{measured[name]['planted'][0]:.0f}",
            f"{statistics.mean(measured[name]['same']):.1f}",
            f"{statistics.mean(map(float.__sub__, measured[name]['near'], measured[name]['same'])):.1f}",
        ]
        for name in measured
    ]  # fmt: skip
    changed = {dtype: changed_by_batch(everything[:400], options.layer, dtype) for dtype in ("float32", "bfloat16")}
    what = (
        f"Sets of {size} samples, {len(SEEDS)} random divisions (mean ± standard deviation), layer {options.layer}. "
        f"Active features changed by batches of 32 instead of 1: {changed['float32']:.2%} in float32, "
        f"{changed['bfloat16']:.2%} in bfloat16."
    )
    report: dict[str, Any] = {
        "what": what,
        "environment": environment("transformers", "scipy"),
        "size": size,
        "changed_by_batch": changed,
        "measured": measured,
    }
    if options.output:
        sys.stdout.write(write(options.output, "evalmap_truth", report, header, table))
    else:
        sys.stdout.write("\n".join(" | ".join(row) for row in [header, *table]) + "\n")


if __name__ == "__main__":
    main()
