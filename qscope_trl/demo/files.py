"""A demo's folder: its settings, its features, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qscope_trl.errors import ConfigError


def check_same_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Note the settings of a folder's results, or raise `ConfigError` if it holds results of others."""
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
    write(path, json.dumps(recipe, indent=2))


def find_all(folder: Path, recipe: Any) -> tuple[Any, Any, Any]:
    """Chosen features, matched random ones and monitors: found once, then read from the folder."""
    from qscope_trl.features import FeatureSet

    paths = [folder / f"{name}.yaml" for name in ("features", "random", "monitors")]
    if not all(path.is_file() for path in paths):
        from qscope_trl.activations.matching import matched_random_features
        from qscope_trl.analysis.discovery import find_features
        from qscope_trl.analysis.find_run import format_table
        from qscope_trl.demo import assets
        from qscope_trl.demo.arms import load_model
        from qscope_trl.sae.suite import SAESuite

        model, tokenizer = load_model()
        suite = SAESuite.from_pretrained(assets.saes())
        groups = {name: [r["text"] for r in assets.rows(f"find_{name}")[: recipe.find_texts]] for name in ("zh", "en")}
        shared = {"batch_size": 32, "max_length": recipe.max_length}
        say(f"finding features of Chinese in layers {', '.join(map(str, recipe.layers))}")
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


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def say(text: str) -> None:
    """Progress, apart from results."""
    sys.stderr.write(f"{text}\n")


def choose_arms(named: str | None, every: Sequence[str], default: Sequence[str]) -> list[str]:
    """The arms of a comma-separated list, or the default ones, in the order of `every`.

    Raises:
        ConfigError: If one is unknown.
    """
    chosen = named.split(",") if named else list(default)
    for arm in chosen:
        if arm not in every:
            raise ConfigError(f"Unknown arm `{arm}`. Choose of {', '.join(every)}.")
    return [arm for arm in every if arm in chosen]


def collect(
    folder: Path,
    arms: Sequence[str],
    seeds: int,
    what: str,
    train: Callable[[str, int], dict[str, Any]],
    once: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """The result of every arm and seed: read where it is already in the folder, else made and written.

    Args:
        folder: Of the demo.
        arms: Which ones.
        seeds: How many, from 0.
        what: Said of each before it starts.
        train: Makes the result of an arm and a seed.
        once: Arms that no seed changes.
    """
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    for place, (arm, seed) in enumerate(jobs, 1):
        if arm in once and seed > 0:
            continue
        path = folder / "results" / f"{arm}-{seed}.json"
        if not path.is_file():
            say(f"[{place}/{len(jobs)}] {arm}, seed {seed}: {what}")
            write(path, json.dumps(train(arm, seed), indent=2, ensure_ascii=False))
        results[arm].append(json.loads(path.read_text(encoding="utf-8")))
    return results


def tell(folder: Path, report: str, drawn: bool, seconds: float) -> None:
    """Show the table, and where everything is."""
    sys.stdout.write(f"\n{report}\n")
    sys.stdout.write(f"Table{', figure' if drawn else ''}, features and samples: {folder}\n")
    if not drawn:
        sys.stdout.write("No figure: matplotlib is not installed (pip install 'qscope-trl[demo]').\n")
    say(f"{seconds:.0f} s")
