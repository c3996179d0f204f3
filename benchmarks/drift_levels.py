"""What `DriftMonitor` shows on the bundled model in harmless runs and in ruined ones: where its default limits lie.

The demo's SFT (recipe of `qscope demo`, 60 steps), the probe on held-out bundled texts, every layer, three seeds:
plain; LoRA; the demo's penalty; a penalty a hundred times as strong on one feature of one early layer; learning rates
ten and fifty times as high. Beside them, what tokens have in common by chance: the Jaccard index between the active
features of unrelated tokens of the frozen model.

    python benchmarks/drift_levels.py [--seeds 3] [--folder runs/drift_levels]

Finished runs are kept in the folder, and an interrupted benchmark goes on there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporting import RESULTS, environment, write

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LoRA": {"lora": True},
    "penalty 0.05 (the demo)": {"weight": 0.05},
    "penalty 5, one feature": {"weight": 5.0, "single": True},
    "learning rate x 10": {"factor": 10.0},
    "learning rate x 50": {"factor": 50.0},
}
FIGURES = ("fvu_ratio", "jaccard", "activation_cosine", "residual_cosine", "dead_rate")
LAYERS = tuple(range(6))


def train(settings: dict[str, Any], seed: int, features: Any, folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.trainer_utils import set_seed
    from trl import SFTTrainer

    from qscope_trl import SAEPenaltyCallback
    from qscope_trl.demo import assets
    from qscope_trl.demo.arms import _arguments, load_model
    from qscope_trl.demo.recipe import RECIPE
    from qscope_trl.training.drift import DriftMonitor

    set_seed(seed)
    model, tokenizer = load_model()
    recipe = replace(RECIPE, learning_rate=RECIPE.learning_rate * settings.get("factor", 1.0))
    texts = [row["text"] for row in assets.rows("rules_test") if row["language"] == "en"]
    callbacks: list[Any] = [DriftMonitor(texts, assets.saes(), layers=LAYERS, every=10)]
    if "weight" in settings:
        chosen = features.with_features(features.for_layer(4)[:1]) if settings.get("single") else features
        callbacks.append(SAEPenaltyCallback(assets.saes(), chosen, settings["weight"]))
    extra = {}
    if settings.get("lora"):
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=16, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model, args=_arguments(recipe, seed, folder), train_dataset=Dataset.from_list(assets.rows("sft_train")),
            eval_dataset=Dataset.from_list(assets.rows("sft_validation")), processing_class=tokenizer,
            callbacks=callbacks, **extra,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    rows = [json.loads(line) for line in (folder / "sae_record" / "drift.jsonl").read_text().splitlines()]
    return {"rows": rows, "loss": loss}


def chance() -> list[float]:
    """Jaccard index between the active features of tokens half the probe apart, by layer."""
    from qscope_trl.activations.encode import residual_batches, tokenize
    from qscope_trl.analysis.doctor.alternatives import chance_jaccard
    from qscope_trl.demo import assets
    from qscope_trl.demo.arms import load_model
    from qscope_trl.sae.suite import SAESuite

    model, tokenizer = load_model()
    texts = [row["text"] for row in assets.rows("rules_test") if row["language"] == "en"][:12]
    ids = tokenize(tokenizer, texts, max_length=128)
    batch = next(residual_batches(model, ids, LAYERS, batch_size=12, show_progress=False))
    suite = SAESuite.from_pretrained(assets.saes())
    return [chance_jaccard(suite.load(layer), batch.residuals[layer]) for layer in LAYERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/drift_levels"))
    options = parser.parse_args()
    from qscope_trl.demo.files import find_all
    from qscope_trl.demo.recipe import RECIPE

    options.folder.mkdir(parents=True, exist_ok=True)
    features, _, _ = find_all(options.folder, RECIPE)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for seed in range(options.seeds):
        for number, (name, settings) in enumerate(RUNS.items()):
            path = options.folder / f"seed{seed}_run{number}.json"
            if not path.is_file():
                with tempfile.TemporaryDirectory() as folder:
                    result = train(settings, seed, features, Path(folder))
                path.write_text(json.dumps(result) + "\n")
                sys.stderr.write(f"seed {seed}: {name}\n")
            found[name].append(json.loads(path.read_text()))
    rows, cells = [], []
    for name, runs in found.items():
        last = [run["rows"][-1] for run in runs]
        row: dict[str, Any] = {
            "run": name,
            "kl": statistics.median(one["kl"] for one in last),
            "loss": statistics.median(run["loss"] for run in runs),
            "layers": {
                figure: [statistics.median(one["layers"][str(layer)][figure] for one in last) for layer in LAYERS]
                for figure in FIGURES
            },
            "last_of_each_seed": last,
        }
        rows.append(row)
        ranges = [f"{min(row['layers'][f]):.2f} to {max(row['layers'][f]):.2f}" for f in FIGURES]
        cells.append([name, *ranges, f"{row['kl']:.3f}", f"{row['loss']:.2f}"])
    by_chance = chance()
    report = {
        "what": f"Drift after 60 steps of the demo's SFT, over layers 0-5, medians of {options.seeds} seeds; by "
        f"chance, unrelated tokens have a Jaccard index of {min(by_chance):.2f} to {max(by_chance):.2f}.",
        "environment": environment("transformers", "trl", "peft"),
        "rows": rows,
        "chance_jaccard": by_chance,
    }
    header = ["run", "fvu ratio", "Jaccard", "activation cosine", "residual cosine", "dead rate", "KL", "val. loss"]
    print(write(options.output, "drift_levels", report, header, cells))


if __name__ == "__main__":
    main()
