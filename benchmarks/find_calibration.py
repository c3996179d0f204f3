"""How often `qscope find` calls chance a finding: groups drawn at random over the bundled labelled texts.

Two ways to draw them: text by text, which is what the test assumes; and page by page, so that the texts of a page stay
together, as texts that depend on each other do in a real data set.

python benchmarks/find_calibration.py [--searches 40] [--layer 5] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from reporting import RESULTS, environment, write

from qscope_trl import SAESuite
from qscope_trl.activations.encode import residual_batches, tokenize
from qscope_trl.activations.opening import load_encoders, open_model
from qscope_trl.analysis.evidence import GroupSums, collect
from qscope_trl.analysis.significance import benjamini_hochberg, familywise_p, permutation_test
from qscope_trl.analysis.text_scores import KEEP, TextScores
from qscope_trl.bundled import saes
from qscope_trl.demo import assets

SCORES = ("mean_difference", "delta", "auroc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=40)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = assets.rows("rules_train")
    model, tokenizer = open_model("demo", device="cpu")
    sae = load_encoders(model, SAESuite.from_pretrained(saes()), [options.layer])[options.layer]
    ids = tokenize(tokenizer, [row["text"] for row in rows])
    sums = {score: GroupSums(sae, KEEP[score]) for score in SCORES}
    collect(residual_batches(model, ids, [options.layer], batch_size=32), *({options.layer: s} for s in sums.values()))
    pages = sorted({row["page"] for row in rows})
    page_X = torch.tensor([pages.index(row["page"]) for row in rows])

    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for score in SCORES:
        texts = TextScores.of(score, [sums[score]], [len(rows)])
        for unit, unit_X in (("text", torch.arange(len(rows))), ("page", page_X)):
            figures: dict[str, list[float]] = {"p": [], "q": [], "familywise": []}
            for seed in range(options.searches):
                generator = torch.Generator().manual_seed(seed)
                order = torch.rand(int(unit_X.max()) + 1, generator=generator)[unit_X]
                texts.group_X = (order > order.median()).long()
                again = TextScores(score, texts.starts_F1, texts.text_M, texts.value_M, texts.tokens_X, texts.group_X)
                test = permutation_test(again, permutations=options.permutations, seed=seed)
                p = test.p_value[test.is_tested]
                whole = familywise_p(again.observed(), test.best, again.rounding())
                figures["p"].append(float((p <= 0.05).double().mean()))
                figures["q"].append(float((benjamini_hochberg(p) <= 0.05).any()))
                figures["familywise"].append(float((whole[test.is_tested] <= 0.05).any()))
            found.setdefault(score, {})[unit] = figures
    report = {
        "what": f"Groups drawn at random over {len(rows)} texts of {len(pages)} pages, layer {options.layer} of the "
        f"bundled model, {options.searches} searches of {options.permutations} permutations each.",
        "environment": environment("transformers"),
        "searches": found,
    }
    header = ["score", "groups drawn by", "features with p up to 0.05", "searches with any q up to 0.05",
              "searches with any family-wise p up to 0.05"]  # fmt: skip
    table = [
        [f"`{score}`", unit, *(f"{100 * statistics.mean(figures[name]):.1f} %" for name in ("p", "q", "familywise"))]
        for score, units in found.items()
        for unit, figures in units.items()
    ]
    print(write(options.output, "find_calibration", report, header, table))


if __name__ == "__main__":
    main()
