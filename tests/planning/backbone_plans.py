"""The plans that stand in the headers of `configs/backbones`: computed here, compared by a test, written by

python -m tests.planning.backbone_plans
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from qscope_trl.config.plan import PlanConfig
from qscope_trl.parsing import add_flags
from qscope_trl.planning import run, show

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "backbones").glob("*.yaml"))
FACTS = Path(__file__).parent / "backbones"
BLOCK = re.compile(r"^# --- plan\n(.*?)^# ---\n", re.DOTALL | re.MULTILINE)


def command(config: Path) -> list[str]:
    """Arguments of the `qscope plan` command in a header."""
    found = re.search(r"^#   qscope plan (.*)$", config.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1].split()


def planned(config: Path) -> str:
    """What that command prints, from the facts kept here instead of the Hub's `config.json`; run at the root."""
    parser = argparse.ArgumentParser()
    add_flags(parser, PlanConfig)
    own, overrides = parser.parse_known_args(command(config))
    options = PlanConfig(**vars(own))
    name = next(line for line in config.read_text().splitlines() if line.startswith("model_name_or_path: "))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FACTS / f"{config.stem}.json", Path(folder) / "config.json")
        plan = run.run(options, [*overrides, "--model_name_or_path", folder])
    return show.format_plan(plan).replace(folder, name.split(": ")[1])


def written(config: Path) -> str:
    """What the header says."""
    found = BLOCK.search(config.read_text(encoding="utf-8"))
    assert found is not None
    return "".join(line.removeprefix("#").removeprefix(" ") for line in found[1].splitlines(keepends=True))


if __name__ == "__main__":
    for config in CONFIGS:
        commented = "".join(f"# {line}".rstrip() + "\n" for line in planned(config).splitlines())
        text = config.read_text(encoding="utf-8")
        config.write_text(BLOCK.sub(lambda _, new=commented: f"# --- plan\n{new}# ---\n", text), encoding="utf-8")
