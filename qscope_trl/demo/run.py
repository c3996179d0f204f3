"""`qscope demo`: find the features of an unwanted habit, fine-tune without and with the callback, compare.

The bundled model sometimes goes on in Chinese inside English text. Each arm's result is a file of its own, so an
interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qscope_trl._version import __version__
from qscope_trl.demo.files import check_same_recipe, choose_arms, collect, find_all, tell, write
from qscope_trl.errors import ConfigError

ALL_ARMS = ("base", "plain", "penalty", "random", "token")
DEFAULT_ARMS = ("plain", "penalty")


def main(argv: Sequence[str]) -> int:
    """Run the demo; `argv` is the command line after `qscope demo`."""
    if argv[:1] == ["grpo"]:
        from qscope_trl.demo.grpo_run import main as grpo

        return grpo(argv[1:])
    options = _parse(argv)
    # Everything is bundled: a hub must not be asked, and a missing file must not wait for one.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()

    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    from qscope_trl.demo import show
    from qscope_trl.demo.recipe import RECIPE

    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    recipe = RECIPE if options.generations is None else replace(RECIPE, generations=options.generations)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_recipe(folder, {**asdict(recipe), "version": __version__})
    features, control, monitors = find_all(folder, recipe)

    def train(arm: str, seed: int) -> dict[str, Any]:
        from qscope_trl.demo.arms import run_arm

        return run_arm(arm, seed, recipe, features, control, monitors, folder / "trainer")

    what = f"{recipe.steps} steps, {recipe.generations} generations"
    results = collect(folder, options.arms, options.seeds, what, train, once=("base",))
    report = f"{show.table(results)}\n\n{show.reading(results)}\n"
    write(folder / "table.md", report)
    drawn = show.figure(results, folder / "figure.png")
    tell(folder, report, drawn, time.perf_counter() - started)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from qscope_trl.parsing import refuse

    parser = argparse.ArgumentParser(
        prog="qscope demo",
        description="Find the features of an unwanted habit of a small bundled model (Chinese inside English text), "
        "fine-tune without and with the SAE penalty, generate, and compare. CPU suffices. `qscope demo grpo`: the "
        "same habit, with GRPO and rollout policies.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over (default 1)")
    parser.add_argument(
        "--arms",
        default=None,
        help=f"comma-separated, of {', '.join(ALL_ARMS)}; default {','.join(DEFAULT_ARMS)}, with several seeds all",
    )
    parser.add_argument("--output", default="runs/demo", help="folder for results; an interrupted run continues there")
    parser.add_argument(
        "--generations", type=int, default=None, help="texts per arm and seed, instead of the recipe's"
    )
    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(list(argv))
    if options.seeds < 1 or (options.generations is not None and options.generations < 1):
        raise ConfigError("`--seeds` and `--generations` are 1 or more.")
    options.arms = choose_arms(options.arms, ALL_ARMS, DEFAULT_ARMS if options.seeds == 1 else ALL_ARMS)
    return options
