"""`qscope demo`: find the features of an unwanted habit, fine-tune without and with the callback, compare.

The bundled model sometimes goes on in Chinese inside English text. Each arm's result is a file of its own, so an
interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qscope_trl._version import __version__
from qscope_trl.errors import ConfigError

ALL_ARMS = ("base", "plain", "penalty", "random", "token")
DEFAULT_ARMS = ("plain", "penalty")


def main(argv: Sequence[str]) -> int:
    """Run the demo; `argv` is the command line after `qscope demo`."""
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
    _check_same_recipe(folder, {**asdict(recipe), "version": __version__})
    features, control, monitors = _features(folder, recipe)

    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]
    for place, (arm, seed) in enumerate(jobs, 1):
        if arm == "base" and seed > 0:
            continue
        path = folder / "results" / f"{arm}-{seed}.json"
        if not path.is_file():
            _say(f"[{place}/{len(jobs)}] {arm}, seed {seed}: {recipe.steps} steps, {recipe.generations} generations")
            from qscope_trl.demo.arms import run_arm

            outcome = run_arm(arm, seed, recipe, features, control, monitors, folder / "trainer")
            _write(path, json.dumps(outcome, indent=2, ensure_ascii=False))
        results[arm].append(json.loads(path.read_text(encoding="utf-8")))
    report = f"{show.table(results)}\n\n{show.reading(results)}\n"
    _write(folder / "table.md", report)
    drawn = show.figure(results, folder / "figure.png")
    sys.stdout.write(f"\n{report}\n")
    sys.stdout.write(f"Table{', figure' if drawn else ''}, features and samples: {folder}\n")
    if not drawn:
        sys.stdout.write("No figure: matplotlib is not installed (pip install 'qscope-trl[demo]').\n")
    _say(f"{time.perf_counter() - started:.0f} s")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from qscope_trl.parsing import refuse

    parser = argparse.ArgumentParser(
        prog="qscope demo",
        description="Find the features of an unwanted habit of a small bundled model (Chinese inside English text), "
        "fine-tune without and with the SAE penalty, generate, and compare. CPU suffices.",
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
    chosen = options.arms.split(",") if options.arms else list(DEFAULT_ARMS if options.seeds == 1 else ALL_ARMS)
    for arm in chosen:
        if arm not in ALL_ARMS:
            raise ConfigError(f"Unknown arm `{arm}`. Choose of {', '.join(ALL_ARMS)}.")
    options.arms = [arm for arm in ALL_ARMS if arm in chosen]
    return options


def _check_same_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    path = folder / "recipe.json"
    if path.is_file():
        was = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(recipe))
        differing = sorted(k for k in {*was, *now} if was.get(k) != now.get(k))
        if differing:
            raise ConfigError(
                f"'{folder}' holds results of other settings ({', '.join(f'`{k}`' for k in differing)}). Results of "
                f"both would mix; choose another `--output` or delete that folder."
            )
        return
    _write(path, json.dumps(recipe, indent=2))


def _features(folder: Path, recipe: Any) -> tuple[Any, Any, Any]:
    """Chosen features, matched random ones and monitors: found once, then read from the folder."""
    from qscope_trl.features import FeatureSet

    paths = [folder / f"{name}.yaml" for name in ("features", "random", "monitors")]
    if not all(path.is_file() for path in paths):
        from qscope_trl.analysis.controls import matched_random_features
        from qscope_trl.analysis.discovery import find_features, format_table
        from qscope_trl.demo import assets
        from qscope_trl.demo.arms import load_model
        from qscope_trl.sae.suite import SAESuite

        model, tokenizer = load_model()
        suite = SAESuite.from_pretrained(assets.saes())
        groups = {name: [r["text"] for r in assets.rows(f"find_{name}")[: recipe.find_texts]] for name in ("zh", "en")}
        shared = {"batch_size": 32, "max_length": recipe.max_length}
        _say(f"finding features of Chinese in layers {', '.join(map(str, recipe.layers))}")
        found = [
            find_features(
                model, tokenizer, suite, groups, target="zh", layers=layers, top=recipe.top, rank_by=recipe.rank_by,
                model_name="bundled demo model", **shared,
            )
            for layers in (recipe.layers, recipe.monitor_layers)
        ]  # fmt: skip
        # Every sample is English here; without a target group none is exempt.
        chosen, monitors = (replace(s, target_group=None) for s in found)
        control = matched_random_features(
            chosen, model, tokenizer, suite, groups["zh"] + groups["en"], groups["en"], **shared
        )
        for path, features in zip(paths, (chosen, control, monitors), strict=True):
            features.save(path)
        sys.stdout.write(format_table(found[0]))
    chosen, control, monitors = (FeatureSet.load(path) for path in paths)
    return chosen, control, monitors


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
