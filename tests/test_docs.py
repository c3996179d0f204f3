"""Examples and the Python of README and docs run as they stand, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qscope_trl import FeatureSet
from tests.forked import run_forked
from tests.snippets import pages_that_run, run_blocks, to_run

ROOT = Path(__file__).parent.parent


def run(code: str, folder: Path) -> str:
    done = run_forked(code, folder=folder, environment={"HF_HUB_OFFLINE": "1", "CI": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.name.startswith(("dpo", "gamed")) else ())
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
    ids=lambda p: p.name,
)
def test_examples_run_and_show_the_penalty(path: Path, tmp_path: Path) -> None:
    assert "penalty 0." in run(path.read_text(encoding="utf-8"), tmp_path)


def test_the_readme_script_runs_on_the_bundled_model(tmp_path: Path) -> None:
    script = blocks(ROOT / "README.md")[0]
    assert len(script.strip().splitlines()) <= 12
    from qscope_trl.demo import assets

    small = 'SFTConfig(output_dir="out", max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to="none")'
    prepared = script
    for given, local in [
        ('"Qwen/Qwen3-8B-Base"', repr(str(assets.MODEL))),
        ('"Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"', repr(str(assets.saes()))),
        ('"features/zh.yaml"', '["L5F1"]'),
        ('SFTConfig(output_dir="out")', small),
    ]:
        assert given in prepared
        prepared = prepared.replace(given, local)
    before = "from datasets import Dataset\nfrom qscope_trl.demo import assets\ndataset = Dataset.from_list(assets.rows('sft_train')[:32])\n"  # noqa: E501
    after = "\nprint([e['sae/penalty'] for e in trainer.state.log_history if 'sae/penalty' in e])"
    penalties = json.loads(run(before + prepared + after, tmp_path).strip().splitlines()[-1])
    assert len(penalties) == 2
    assert min(penalties) > 0


def test_the_readmes_watchers_run_on_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = blocks(ROOT / "README.md")[1]
    for given, local in [
        ('"Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"', "assets.saes()"),
        ('"features/zh.yaml"', '["L5F450"]'),  # fires in ordinary text
        ('"features/held_out.yaml"', '["L4F1740"]'),
    ]:
        assert given in script
        script = script.replace(given, local)
    before = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from qscope_trl import SAEPenaltyCallback
from qscope_trl.demo import assets
rows = assets.rows("sft_train")[:8]
texts, prompts = [row["text"] for row in assets.rows("rules_test")[:2]], [row["prompt"] for row in rows]
"""
    after = """
args = SFTConfig(
    output_dir="out", max_steps=2, logging_steps=1, max_length=32, per_device_train_batch_size=2, use_cpu=True,
    bf16=False, report_to="none",
)
trainer = SFTTrainer(str(assets.MODEL), args=args, train_dataset=Dataset.from_list(rows), callbacks=callbacks)
trainer.train()
print(sorted({key for entry in trainer.state.log_history for key in entry}))
"""
    logged = run(before + script + after, tmp_path).strip().splitlines()[-1]
    for name in ("sae/L5F450/firing_rate", "sae/monitor/L4F1740/firing_rate", "sae/text/rate", "sae/drift/L5/fvu"):
        assert repr(name) in logged
    monkeypatch.chdir(tmp_path)
    run_blocks([("bash", "qscope report out")], "README.md")


def test_the_readmes_grpo_script_runs_on_the_bundled_model(tmp_path: Path) -> None:
    script = blocks(ROOT / "README.md")[2]
    from qscope_trl.demo import assets

    small = (
        'GRPOConfig(output_dir="out", beta=0.02, max_steps=2, per_device_train_batch_size=4, num_generations=4, '
        'max_completion_length=8, logging_steps=1, use_cpu=True, bf16=False, report_to="none")'
    )
    for given, local in [
        ('"Qwen/Qwen3-8B-Base"', repr(str(assets.MODEL))),
        ('"Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"', repr(str(assets.saes()))),
        ('"features/zh.yaml"', '["L5F450"]'),  # fires in ordinary text
        ('GRPOConfig(output_dir="out", beta=0.02)', small),
    ]:
        assert given in script
        script = script.replace(given, local)
    before = (
        "from datasets import Dataset\nfrom qscope_trl.demo import assets\n"
        "prompts = Dataset.from_list([{'prompt': r['prompt'][:40]} for r in assets.rows('sft_train')[:8]])\n"
        "def correctness(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    )
    after = (
        "\nprint([[e[k] for k in ('sae/feature_reward/score', 'sae/rollouts/reweighted')]"
        " for e in trainer.state.log_history if 'reward' in e])"
    )
    steps = json.loads(run(before + script + after, tmp_path).strip().splitlines()[-1])
    assert len(steps) == 2
    assert all(score >= 0 and 0 <= reweighted <= 1 for score, reweighted in steps)
    assert max(score for score, _ in steps) > 0


def test_the_readmes_steering_runs_on_the_bundled_model() -> None:
    found = blocks(ROOT / "README.md")
    assert len(found) == 4, "a block of the README without a test"
    script = found[3]
    for given, local in [
        ('"Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"', "assets.saes()"),
        ('["L34F31"]', '["L5F23"]'),
        ("**inputs", "**inputs, max_new_tokens=4"),
    ]:
        assert given in script
        script = script.replace(given, local)
    before = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\nfrom qscope_trl.demo import assets\n"
        "model = AutoModelForCausalLM.from_pretrained(assets.MODEL)\n"
        "inputs = AutoTokenizer.from_pretrained(assets.MODEL)('Insert a', return_tensors='pt')\n"
    )
    run_blocks([("python", before + script)], "README.md")


@pytest.mark.parametrize("path", pages_that_run(), ids=lambda p: p.name)
def test_commands_and_python_of_the_docs_run_in_order(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(to_run(path.read_text(encoding="utf-8")), path.name)
    if path.name == "find.md":
        chosen = FeatureSet.load(tmp_path / "features" / "zh.yaml")
        assert chosen.layers == (4, 5)
        assert {"L4F1740", "L5F23"} <= {str(feature) for feature in chosen.ids}
        assert all(feature.evidence["heldout_mean_difference"] > 0 for feature in chosen.features)


def test_the_readmes_commands_run_on_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Each command, on the bundled model")[1]
    block = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    assert {line.split()[1] for line in block.splitlines()} >= {"doctor", "find", "index", "rules", "steer", "evalmap"}
    monkeypatch.chdir(tmp_path)
    run_blocks([("bash", block)], "README.md")
