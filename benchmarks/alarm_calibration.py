"""How often the alarm speaks up by chance: plain runs of the demo, random features as penalised ones and monitors.

No penalty acts, so every alarm is one of chance, or of fine-tuning itself, which moves features too. The demo's data
and settings; the excess over the threshold of every watched feature is taken at each step, and log events of several
lengths are made of it afterwards.

python benchmarks/alarm_calibration.py [--seeds 3] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, environment, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WATCHED = 60
DRAWS = 2000
SIZES = (1, 2, 5, 10)
LENGTHS = (1, 2, 5)
BATCHES = (16, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    cells, noise, rows = {}, {}, []
    for batch in BATCHES:
        courses = [plain_run(seed, batch) for seed in range(options.seeds)]
        for size in SIZES:
            name = f"{batch}-{size}"
            cells[name] = [
                sum(false_alarms(values_TF, size, length) for values_TF in courses) / len(courses)
                for length in LENGTHS
            ]
            noise[name] = sum(scatter(values_TF, size) for values_TF in courses) / len(courses)
            shares = [f"{100 * share:.2f} %" for share in cells[name]]
            rows.append([str(batch), str(size), f"{noise[name]:.0%}", *shares])
    report: dict[str, Any] = {
        "what": f"Share of sets of random features for which the alarm speaks up in a plain run of the demo: "
        f"{options.seeds} runs of 60 steps, {DRAWS} draws each, monitors of 5 features.",
        "environment": environment("transformers", "trl"),
        "lengths": LENGTHS,
        "false_alarms": cells,
        "noise": noise,
    }
    header = ["samples a step", "penalised features", "scatter of a step"]
    header += [f"log event of {n} step{'s' * (n > 1)}" for n in LENGTHS]
    print(write(options.output, "alarm_calibration", report, header, rows))


def plain_run(seed: int, batch: int) -> torch.Tensor:
    """Mean excess of each watched feature at each step of a plain run, `(steps, features)`."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.trainer_utils import set_seed
    from trl import SFTTrainer

    from qscope_trl import FeatureSet, SAEPenaltyCallback, SAESuite
    from qscope_trl.activations.encode import tokenize
    from qscope_trl.activations.matching import token_sums
    from qscope_trl.demo import assets
    from qscope_trl.demo.arms import _arguments, load_model
    from qscope_trl.demo.recipe import RECIPE
    from qscope_trl.features import Feature

    set_seed(seed)
    model, tokenizer = load_model()
    suite = SAESuite.from_pretrained(assets.saes())
    ids = tokenize(tokenizer, [row["text"] for row in assets.rows("find_en")[:128]], max_length=128)
    sums = token_sums(model, suite, suite.layers, ids, batch_size=32, show_progress=False)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for layer, of in sums.items():
        # Features that fire at one token in a thousand or more: rarer ones are not what a run is judged by.
        alive = (of.rate > 1e-3).nonzero().flatten()
        for index in alive[torch.randperm(alive.numel(), generator=generator)[: WATCHED // len(sums)]].tolist():
            chosen.append(Feature(layer=layer, index=index, threshold=of.mean_pre_act(index)))
    features = FeatureSet(features=tuple(chosen))
    callback = SAEPenaltyCallback(suite, features, 0.0)
    metrics = callback.attachment.metrics
    original, step_values = metrics.update, []

    def update(mode: str, layer: int, is_monitor: bool, terms: Any, mask_BT: torch.Tensor) -> None:
        original(mode, layer, is_monitor, terms, mask_BT)
        thresholds = torch.tensor([f.threshold for f in features.for_layer(layer)])
        step_values.append((terms.values_BTS[mask_BT].double() - thresholds).relu().mean(0))

    metrics.update = update  # type: ignore[method-assign]
    trainer = SFTTrainer(
        model,
        args=_arguments(replace(RECIPE, batch_size=batch), seed, Path("/tmp/alarm_calibration")),
        train_dataset=Dataset.from_list(assets.rows("sft_train")),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    per_step = len(features.layers)
    return torch.stack([torch.cat(step_values[n : n + per_step]) for n in range(0, len(step_values), per_step)])


def false_alarms(values_TF: torch.Tensor, size: int, length: int) -> float:
    """Share of draws of `size` penalised features and 5 monitors with an alarm, in log events of `length` steps."""
    from qscope_trl.monitor.alarm import MONITORS, PENALISED, AlarmLimits, GamingAlarm

    generator = torch.Generator().manual_seed(size)
    raised = 0
    for _ in range(DRAWS):
        order = torch.randperm(values_TF.shape[1], generator=generator)
        pair = {PENALISED: values_TF[:, order[:size]].sum(1), MONITORS: values_TF[:, order[size : size + 5]].sum(1)}
        alarm = GamingAlarm(AlarmLimits())
        alarm.begin({name: float(course[0]) for name, course in pair.items()})
        events = {name: course.unfold(0, length, length).mean(1).tolist() for name, course in pair.items()}
        steps = range(len(events[PENALISED]))
        raised += any(alarm.see(n, {name: course[n] for name, course in events.items()}) for n in steps)
    return raised / DRAWS


def scatter(values_TF: torch.Tensor, size: int) -> float:
    """Standard deviation of a step's sum over `size` features, as a share of its mean, over random draws."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        course = values_TF[:, torch.randperm(values_TF.shape[1], generator=generator)[:size]].sum(1)
        found.append(float(course.std() / course.mean()))
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
