"""`qscope demo grpo`: the habit of the SFT demo, now unlearned by reinforcement with rollout policies.

Each arm's result is a file of its own, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qscope_trl._version import __version__
from qscope_trl.demo.files import check_same_recipe, choose_arms, collect, find_all, tell, write
from qscope_trl.errors import ConfigError

ALL_ARMS = ("rule", "rule-fast", "amplify", "steered", "random")
DEFAULT_ARMS = ("rule", "amplify", "steered")


def main(argv: Sequence[str]) -> int:
    """Run the demo; `argv` is the command line after `qscope demo grpo`."""
    options = _parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()

    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    from qscope_trl.demo.recipe import GRPO_RECIPE

    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    recipe = GRPO_RECIPE
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps, evaluate_every=min(recipe.evaluate_every, options.steps))
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_recipe(folder, {**asdict(recipe), "version": __version__})
    features, control, monitors = find_all(folder, recipe)

    def train(arm: str, seed: int) -> dict[str, Any]:
        from qscope_trl.demo.grpo_arms import run_arm

        return run_arm(arm, seed, recipe, features, control, monitors, folder / "trainer")

    what = f"{recipe.steps} steps of {recipe.batch_size} rollouts"
    results = collect(folder, options.arms, options.seeds, what, train)
    report = f"{table(results)}\n"
    write(folder / "table.md", report)
    drawn = figure(results, folder / "figure.png")
    tell(folder, report, drawn, time.perf_counter() - started)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from qscope_trl.parsing import refuse

    parser = argparse.ArgumentParser(
        prog="qscope demo grpo",
        description="Unlearn an unwanted habit of a small bundled model (Chinese inside English text) by GRPO with a "
        "rule, without and with rollout policies, and compare. CPU suffices.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over (default 1)")
    parser.add_argument(
        "--arms",
        default=None,
        help=f"comma-separated, of {', '.join(ALL_ARMS)}; default {','.join(DEFAULT_ARMS)}, with several seeds all",
    )
    parser.add_argument("--output", default="runs/demo-grpo", help="folder for results; an interrupted run continues")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps, instead of the recipe's")
    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(list(argv))
    if options.seeds < 1 or (options.steps is not None and options.steps < 1):
        raise ConfigError("`--seeds` and `--steps` are 1 or more.")
    options.arms = choose_arms(options.arms, ALL_ARMS, DEFAULT_ARMS if options.seeds == 1 else ALL_ARMS)
    return options


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row per arm: the text-level detector first, then text loss, features, loops and time."""
    from qscope_trl.demo.grpo_arms import ARMS
    from qscope_trl.demo.show import spread

    first = next(iter(results.values()))
    start, steps = [run["curve"][0] for run in first], first[0]["curve"][-1]["step"]
    halves = min((point["step"] for point in first[0]["curve"]), key=lambda step: abs(step - steps / 2))
    lines = [
        f"| arm | code-switching, %, step {halves} | step {steps} | loops, % | English text loss | features "
        f"| held-out monitors | step time |",
        "|" + "---|" * 8,
        f"| before training | {spread([100 * p['rate'] for p in start[:1]], 2)} | - "
        f"| {spread([100 * p['loops'] for p in start[:1]], 2)} | {spread([p['loss'] for p in start[:1]], 3)} "
        f"| {spread([p['features'] for p in start[:1]], 2)} | {spread([p['monitors'] for p in start[:1]], 2)} | - |",
    ]
    plain = [run["step_seconds"] for run in results.get("rule", ())]
    for arm, runs in results.items():
        end = [run["curve"][-1] for run in runs]
        half = [next(p for p in run["curve"] if p["step"] == halves) for run in runs]
        time_ratio = "-"
        if plain and all(plain) and len(plain) == len(runs):
            time_ratio = spread([r["step_seconds"] / p for r, p in zip(runs, plain, strict=True)], 2) + "x"
        lines.append(
            f"| {arm}: {ARMS[arm]} | {spread([100 * p['rate'] for p in half], 2)} "
            f"| {spread([100 * p['rate'] for p in end], 2)} | {spread([100 * p['loops'] for p in end], 2)} "
            f"| {spread([p['loss'] for p in end], 3)} | {spread([p['features'] for p in end], 2)} "
            f"| {spread([p['monitors'] for p in end], 2)} | {time_ratio} |"
        )
    return "\n".join(lines)


def figure(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Draw behaviour and text loss over steps, and one against the other; False if matplotlib is not installed."""
    from qscope_trl.demo.show import pyplot

    plt = pyplot()
    if plt is None:
        return False
    canvas, axes = plt.subplots(1, 3, figsize=(11.5, 3.4), layout="constrained")
    panels = (
        ("step", "rate", "step", "code-switching, % of generations"),
        ("step", "loss", "step", "English text loss"),
        ("loss", "rate", "English text loss", "code-switching, % of generations"),
    )
    for axis, (x, y, x_title, y_title) in zip(axes, panels, strict=True):
        for arm, runs in results.items():
            points = list(zip(*[run["curve"] for run in runs], strict=True))
            values = {
                key: [statistics.mean(p[key] for p in seeds) * (100 if key == "rate" else 1) for seeds in points]
                for key in (x, y)
            }
            axis.plot(values[x], values[y], "o-", markersize=3, label=arm)
        axis.set_xlabel(x_title)
        axis.set_ylabel(y_title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)
    return True
