"""The demo end to end with a few steps: it finds, trains, judges, tells, and goes on after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qscope_trl import FeatureSet
from qscope_trl.demo import assets, grpo_run, recipe, run, show
from qscope_trl.errors import ConfigError


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of every data set: most of an arm's time is its evaluation."""
    rows = assets.rows
    monkeypatch.setattr(assets, "rows", lambda name: rows(name)[:32])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, few_rows: None) -> None:
    monkeypatch.setattr(
        recipe, "RECIPE", replace(recipe.RECIPE, steps=4, batch_size=4, generations=16, new_tokens=8, find_texts=40)
    )


@pytest.mark.usefixtures("small")
def test_demo_runs_every_arm_and_continues_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--output", str(tmp_path), "--arms", "base,plain,penalty,random,token"]
    assert run.main(arguments) == 0
    shown = capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert sorted(results) == ["base-0", "penalty-0", "plain-0", "random-0", "token-0"]
    for arm in run.ALL_ARMS:
        assert f"| {arm}: " in shown
    assert len({result["validation_loss"] for result in results.values()}) == 5  # each arm trains another way
    assert results["penalty-0"]["penalty_curve"]
    assert not results["plain-0"]["penalty_curve"]
    found, control = (FeatureSet.load(tmp_path / f"{name}.yaml") for name in ("features", "random"))
    assert len(found) == len(control)
    assert not set(found.ids) & set(control.ids)
    assert (tmp_path / "figure.png").stat().st_size > 5000

    (tmp_path / "results" / "penalty-0.json").unlink()
    trained: list[str] = []
    from qscope_trl.demo import arms

    original = arms.run_arm

    def counting(arm: str, *rest: Any) -> dict[str, Any]:
        trained.append(arm)
        return original(arm, *rest)

    monkeypatch.setattr(arms, "run_arm", counting)
    assert run.main(arguments) == 0
    assert trained == ["penalty"]
    again = json.loads((tmp_path / "results" / "penalty-0.json").read_text())
    assert again["rate"] == results["penalty-0"]["rate"]
    assert again["validation_loss"] == results["penalty-0"]["validation_loss"]


@pytest.mark.usefixtures("small")
def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": 1}))
    with pytest.raises(ConfigError, match=r"holds results of other settings .*`steps`"):
        run.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "plain,magic"], r"Unknown arm `magic`. Choose of base, plain"),
        (["--seeds", "0"], r"`--seeds` and `--generations` are 1 or more"),
        (["--seed", "3"], r"--seed 3"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.main(flags)


def result(rate: float, penalty: float) -> dict[str, Any]:
    return {
        "rate": rate, "share": rate / 4, "validation_loss": 3.0, "penalty": penalty, "monitor": penalty,
        "step_seconds": 0.5, "generations": 1000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("penalised", "words"),
    [
        (result(0.05, 0.1), "less."),
        (result(0.21, 2.0), "no clear difference."),
        (result(0.40, 2.0), "more."),
        (result(0.21, 0.1), "no clear difference. The penalised features fell silent and the behaviour stayed"),
    ],
)
def test_the_reading_follows_the_numbers(penalised: dict[str, Any], words: str) -> None:
    assert words in show.reading({"plain": [result(0.2, 2.0)], "penalty": [penalised]})


def test_the_table_gives_means_and_spread_and_the_step_time_ratio() -> None:
    slow = {**result(0.1, 1.0), "step_seconds": 0.6}
    text = show.table({"plain": [result(0.2, 2.0), result(0.4, 2.0)], "penalty": [slow, slow]})
    assert "| 30.00 ± 14.14 |" in text
    assert "| 1.20 ± 0.00x |" in text


@pytest.mark.usefixtures("few_rows")
def test_grpo_demo_runs_every_arm_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(
        recipe.GRPO_RECIPE, steps=2, batch_size=8, num_generations=4, generations=8, new_tokens=6, find_texts=40,
        evaluate_every=1,
    )  # fmt: skip
    monkeypatch.setattr(recipe, "GRPO_RECIPE", small)
    assert run.main(["grpo", "--output", str(tmp_path), "--arms", ",".join(grpo_run.ALL_ARMS)]) == 0
    shown = capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    for arm in grpo_run.ALL_ARMS:
        assert f"| {arm}: " in shown
        assert [point["step"] for point in results[f"{arm}-0"]["curve"]] == [0, 1, 2]
    assert len({result["curve"][0]["loss"] for result in results.values()}) == 1
    assert "sae/rollouts/steered_advantage" in results["steered-0"]["policy"]
    assert not results["rule-0"]["policy"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "rule,magic"], r"Unknown arm `magic`. Choose of rule, rule-fast"),
        (["--seeds", "0"], r"`--seeds` and `--steps` are 1 or more"),
    ],
)
def test_bad_flags_of_the_grpo_demo_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.main(["grpo", *flags])


def test_the_rule_reads_text_alone() -> None:
    from qscope_trl.demo.grpo_arms import rule

    texts = ["An ordinary sentence about printing.", "Click 确定按钮 now.", "go on and go on and go on and go on and"]
    assert rule(texts) == [1.0, 0.0, 0.0]
