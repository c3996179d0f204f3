"""The worked negative of docs/safeguards.md: a penalty that is gamed, what shows it, and a run that is not.

All arms see the demo's data in the same order for the same 60 steps. `gamed` penalises one feature of layer 0 with
100 times the demo's weight; `stopped` is the same under a drift monitor that may end it; `moderate` is the demo's
penalty: five features in each of the last two layers, weight 0.05. All are watched by the same monitors, five features
of layer 3, by the same drift probe, and judged by a detector that reads generated text.

python benchmarks/gamed_penalty.py [--seeds 3] [--output benchmarks/results] [--folder runs/gamed]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporting import RESULTS, environment, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GAMED_LAYER, GAMED_TOP, GAMED_WEIGHT = 0, 1, 5.0
ARMS = {
    "plain": "no penalty",
    "gamed": "1 feature of layer 0, weight 5",
    "stopped": "the same, `DriftMonitor(on_drift='stop')`",
    "moderate": "5 features in each of layers 4 and 5, weight 0.05",
}
GENERATIONS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/gamed"))
    options = parser.parse_args()

    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sets = find_sets(options.folder)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in ARMS:
            path = options.folder / f"{arm}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run_arm(arm, seed, sets, options.folder / f"run-{arm}-{seed}"), indent=1))
            results[arm].append(json.loads(path.read_text()))
    report = {
        "what": f"A gamed penalty on the bundled model: {options.seeds} seeds, {GENERATIONS} generations each, means; "
        f"alarms and limits seed by seed.",
        "environment": environment("transformers", "trl"),
        "arms": ARMS,
        "results": results,
    }
    header = ["arm", "penalised features", "code-switching", "monitors", "fvu ratio, penalised layers",
              "lowest Jaccard", "validation loss", "steps", "alarm at step", "drift limit at step"]  # fmt: skip
    print(write(options.output, "gamed_penalty", report, header, [row(arm, found) for arm, found in results.items()]))


def find_sets(folder: Path) -> dict[str, Any]:
    """Penalised features of each arm and the monitors: found once, then read from the folder."""
    from qscope_trl import FeatureSet, SAESuite
    from qscope_trl.analysis.discovery import find_features
    from qscope_trl.demo import assets
    from qscope_trl.demo.arms import load_model
    from qscope_trl.demo.recipe import RECIPE

    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"gamed": ((GAMED_LAYER,), GAMED_TOP), "moderate": (RECIPE.layers, RECIPE.top), "monitors": ((3,), 5)}
    for name, (layers, top) in wanted.items():
        if not (folder / f"{name}.yaml").is_file():
            model, tokenizer = load_model()
            groups = {group: [row["text"] for row in assets.rows(f"find_{group}")] for group in ("zh", "en")}
            found = find_features(
                model, tokenizer, SAESuite.from_pretrained(assets.saes()), groups, target="zh", layers=layers, top=top,
                rank_by=RECIPE.rank_by, model_name="bundled demo model", batch_size=32, max_length=RECIPE.max_length,
                show_progress=False,
            )  # fmt: skip
            # Every sample is English here; without a target group none is exempt.
            replace(found, target_group=None).save(folder / f"{name}.yaml")
    return {name: FeatureSet.load(folder / f"{name}.yaml") for name in wanted}


def run_arm(arm: str, seed: int, sets: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.trainer_utils import set_seed
    from trl import SFTTrainer

    from qscope_trl import SAEPenaltyCallback, attach
    from qscope_trl.demo import assets
    from qscope_trl.demo.arms import _arguments, generate, load_model
    from qscope_trl.demo.judge import judge
    from qscope_trl.demo.recipe import RECIPE
    from qscope_trl.errors import QScopeWarning
    from qscope_trl.monitor.alarm import MONITORS, PENALISED
    from qscope_trl.monitor.run_record import RunRecord
    from qscope_trl.training.alarm import KEY
    from qscope_trl.training.drift import DriftMonitor

    recipe = replace(RECIPE, generations=GENERATIONS)
    features = sets["moderate" if arm in ("plain", "moderate") else "gamed"]
    weight = {"plain": 0.0, "moderate": recipe.penalty_weight}.get(arm, GAMED_WEIGHT)
    probe = [row["text"] for name in ("monitor_en", "monitor_zh") for row in assets.rows(name)[:6]]
    set_seed(seed)
    model, tokenizer = load_model()
    drift = DriftMonitor(
        probe, assets.saes(), layers=(0, 3, 4, 5), every=6, max_tokens=1500, batch_size=12,
        on_drift="stop" if arm == "stopped" else "warn",
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        args=_arguments(recipe, seed, folder),
        train_dataset=Dataset.from_list(assets.rows("sft_train")),
        eval_dataset=Dataset.from_list(assets.rows("sft_validation")),
        processing_class=tokenizer,
        callbacks=[SAEPenaltyCallback(assets.saes(), features, weight, monitor_features=sets["monitors"]), drift],
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QScopeWarning)  # they are read from the record
        trainer.train()
    record = RunRecord(folder)
    rows = record.rows("drift")
    with attach(trainer, assets.saes(), features, penalty_weight=0.0, monitor_features=sets["monitors"], record=False):
        measured = trainer.evaluate()
    verdict = judge(generate(trainer.model, tokenizer, recipe, seed))
    log = [entry for entry in trainer.state.log_history if PENALISED in entry]
    return {
        "arm": arm,
        "seed": seed,
        "steps": trainer.state.global_step,
        "rate": verdict.rate,
        "share": verdict.share,
        "validation_loss": measured["eval_loss"],
        "penalised": measured["eval_sae/penalty"],
        "monitors": measured["eval_sae/monitor/penalty"],
        "course": [{key: e[key] for key in ("step", PENALISED, MONITORS, KEY) if key in e} for e in log],
        "alarms": record.rows("alarms"),
        "drift": [
            {
                "step": one["step"],
                "crossed": one["crossed"],
                "layers": {n: {key: of[key] for key in ("fvu_ratio", "jaccard")} for n, of in one["layers"].items()},
            }
            for one in rows
        ],
        "layers": list(features.layers),
    }


def row(arm: str, found: list[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    rates = [one["rate"] for one in found]
    last = [one["drift"][-1]["layers"] for one in found]
    ratio = statistics.mean(max(layers[str(n)]["fvu_ratio"] for n in one["layers"])
                            for one, layers in zip(found, last, strict=True))  # fmt: skip
    jaccard = statistics.mean(min(figures["jaccard"] for figures in layers.values()) for layers in last)
    alarms = [str(one["alarms"][0]["step"]) if one["alarms"] else "none" for one in found]
    crossed = [next((str(d["step"]) for d in one["drift"] if d["crossed"]), "none") for one in found]
    spread = f" ± {100 * statistics.stdev(rates):.1f}" if len(rates) > 1 else ""
    return [
        f"{arm}: {ARMS[arm]}",
        f"{statistics.mean(one['penalised'] for one in found):.3f}",
        f"{100 * statistics.mean(rates):.1f}{spread} %",
        f"{statistics.mean(one['monitors'] for one in found):.2f}",
        f"{ratio:.2f}",
        f"{jaccard:.2f}",
        f"{statistics.mean(one['validation_loss'] for one in found):.3f}",
        f"{statistics.mean(one['steps'] for one in found):.0f}",
        ", ".join(alarms),
        ", ".join(crossed),
    ]


if __name__ == "__main__":
    main()
