"""`qscope synthesize` as a whole, with a tiny local model: what is kept fires, and no disturbance changes it."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qscope_trl.activations.sources import open_source
from qscope_trl.analysis.synthesis.plan import Recipe
from qscope_trl.analysis.synthesis.prompts import Template
from qscope_trl.analysis.synthesis.report import Synthesis, format_result
from qscope_trl.analysis.synthesis.run import JOURNAL, run
from qscope_trl.analysis.synthesis.setup import Sources, Start, make_targets, measure
from qscope_trl.cli import main
from qscope_trl.config.synthesize import MAY_CHANGE, SynthesizeConfig
from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureSet
from tests.analysis.synthesis_world import (
    MIN_ACTIVATION,
    World,
    asked_twice,
    fired,
    make_world,
    records,
    same,
    texts,
    write_rows,
)
from tests.forked import run_forked


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Synthesis:
    return run(world.config(tmp_path_factory.mktemp("run") / "out", batch_size=3), show_progress=False)


def test_what_is_kept_fires_its_feature_and_coverage_counts_it(world: World, undisturbed: Synthesis) -> None:
    before = (world.largest(world.data) > MIN_ACTIVATION).sum(0)
    assert list(undisturbed.before.counts.values()) == list(before)
    assert undisturbed.before.value == (before > 0).mean()
    assert [one.feature for one in undisturbed.filled] == world.missing

    rows = undisturbed.rows
    fires = fired(world, rows)
    names = [str(one) for one in world.targets]
    for row, found in zip(rows, fires, strict=True):
        assert found[names.index(row["feature"])]
        assert row["fires"] == [name for name, does in zip(names, found, strict=True) if does]
        assert row["text"] == row["prompt"] + row["response"]
    assert len({row["text"] for row in rows}) == len(rows)
    assert list(undisturbed.after.counts.values()) == list(before + fires.sum(0))
    assert undisturbed.after.num_texts == len(world.data) + len(rows)
    assert undisturbed.after.value > undisturbed.before.value


def test_rates_and_controls_equal_those_of_the_journal(world: World, undisturbed: Synthesis) -> None:
    answers = {one["key"]: one["text"] for one in records(undisturbed.output) if one["record"] == "answer"}
    openings = [" ".join(text.split()[:6]) for text in world.data]

    def read(name: str) -> np.ndarray:
        found = {
            int(key.rsplit(" ", 1)[1]): text for key, text in answers.items() if key.startswith(f"{name}/") and text
        }
        rows = [{"prompt": openings[i % len(openings)], "response": text} for i, text in sorted(found.items())]
        return fired(world, rows)

    plain = read("plain")
    assert undisturbed.num_plain == len(plain) == 4
    shares = plain[:, : len(undisturbed.filled)].mean(1)
    assert undisturbed.plain_error == pytest.approx(shares.std(ddof=1) / len(plain) ** 0.5)
    outcomes = set()
    for place, one in enumerate(undisturbed.filled):
        mine = read(str(one.feature))[:, place]
        assert one.fire_rate == pytest.approx(mine.mean())
        assert one.plain_rate == pytest.approx(plain[:, place].mean())
        assert one.outcomes.get("accepted", 0) == one.accepted == min(2, mine.sum())
        assert one.outcomes.get("silent", 0) == (~mine).sum()
        assert one.matched_rate is not None
        assert 0 <= one.matched_rate <= 1
        assert one.prompts_from == "data"
        outcomes |= set(one.outcomes)
    assert {"accepted", "silent"} <= outcomes


def test_files_hold_what_is_returned(undisturbed: Synthesis) -> None:
    folder = undisturbed.output
    rows = [json.loads(line) for line in (folder / "synthesized.jsonl").read_text().splitlines()]
    assert rows == list(undisturbed.rows)
    assert pq.read_table(folder / "synthesized.parquet").to_pylist() == rows
    written = json.loads((folder / "coverage.json").read_text())
    assert written == json.loads(json.dumps(undisturbed.to_dict()))
    assert written["coverage"]["after"]["value"] == undisturbed.after.value
    assert written["spent"]["requests"] == len([one for one in records(folder) if one["record"] == "ask"])
    assert sorted(file.name for file in folder.iterdir()) == [
        "coverage.json",
        JOURNAL,
        "synthesized.jsonl",
        "synthesized.parquet",
    ]


def test_the_result_is_shown_with_its_controls(undisturbed: Synthesis) -> None:
    shown = format_result(undisturbed)
    assert f"coverage of 6 features, fired above {MIN_ACTIVATION:g}" in shown
    assert ["before", "6", "2", "33.3%", "4", "4"] in [line.split() for line in shown.splitlines()]
    for one in undisturbed.filled:
        (line,) = [line for line in shown.splitlines() if line.strip().startswith(str(one.feature))]
        assert line.split()[1:5] == [
            str(one.before),
            str(one.after),
            str(one.accepted),
            str(sum(one.outcomes.values())),
        ]
    assert "matched random features in the same responses" in shown
    assert "the same features in 4 plain generations" in shown
    gaps = [100 * ((one.fire_rate or 0) - (one.plain_rate or 0)) for one in undisturbed.filled]
    # Features differ, and all of them share the plain generations.
    error = (np.var(gaps, ddof=1) / len(gaps) + (100 * undisturbed.plain_error) ** 2) ** 0.5
    assert f"plain generations: {np.mean([one.plain_rate for one in undisturbed.filled]):.1%}" in shown
    assert f"(difference {np.mean(gaps):.1f} +- {error:.1f} points)" in shown
    assert "requests (0 failed)" in shown
    assert "budget ended" not in shown


def test_a_killed_run_goes_on_to_the_same_texts(world: World, undisturbed: Synthesis, tmp_path: Path) -> None:
    config = world.config(tmp_path / "out", batch_size=3)
    code = (
        "import json, os, signal, sys\n"
        "from qscope_trl.analysis.synthesis import generators, run\n"
        "from qscope_trl.config.synthesize import SynthesizeConfig\n"
        "generate, asked = generators.LocalGenerator._generate, []\n"
        "def dies(*given):\n"
        "    asked.append(1)\n"
        "    if len(asked) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return generate(*given)\n"
        "generators.LocalGenerator._generate = dies\n"
        "run.run(SynthesizeConfig(**json.loads(sys.argv[1])), show_progress=False)\n"
    )
    done = run_forked(code, json.dumps(dataclasses.asdict(config)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = records(tmp_path / "out")
    in_flight = {one["key"] for one in before if one["record"] == "ask"}
    in_flight -= {one["key"] for one in before if one["record"] == "answer"}
    assert len(before) < len(records(undisturbed.output))
    assert not (tmp_path / "out" / "coverage.json").exists()

    resumed = run(replace(config, resume=True), show_progress=False)
    same(resumed, undisturbed)
    assert set(asked_twice(tmp_path / "out")) <= in_flight
    # What was in flight stays in the account, since it may have been paid.
    assert resumed.spent["requests"] == undisturbed.spent["requests"] + len(in_flight)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.55, 0.999])
def test_a_journal_cut_anywhere_leads_to_the_same_texts(
    world: World, undisturbed: Synthesis, tmp_path: Path, share: float
) -> None:
    content = (undisturbed.output / JOURNAL).read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_bytes(content[: int(share * len(content))])
    resumed = run(world.config(tmp_path / "out", batch_size=3, resume=True), show_progress=False)
    same(resumed, undisturbed)
    asked_twice(tmp_path / "out")


@pytest.mark.parametrize("bound", [{"max_requests": 7}, {"max_tokens": 150}])
def test_the_budget_stops_exactly_and_a_larger_one_goes_on(
    world: World, undisturbed: Synthesis, tmp_path: Path, bound: dict[str, int]
) -> None:
    config = world.config(tmp_path / "out", batch_size=3, **bound)
    first = run(config, show_progress=False)
    assert not first.is_finished
    if "max_requests" in bound:
        assert (first.spent["requests"], first.left) == (7, {"requests": 0})
    else:
        # What is left does not hold another request: 6 tokens of a beginning and 12 of an answer.
        assert 0 <= first.left["tokens"] < 18
        assert first.spent["tokens"] == 150 - first.left["tokens"]
    assert "The budget ended before all was asked. Go on with `--resume` and a larger one." in format_result(first)
    again = run(replace(config, resume=True), show_progress=False)
    assert (again.spent, list(again.rows)) == (first.spent, list(first.rows))
    whole = run(replace(config, resume=True, max_requests=1000, max_tokens=None), show_progress=False)
    same(whole, undisturbed)
    assert whole.spent == undisturbed.spent
    assert not asked_twice(tmp_path / "out")


def test_resuming_what_is_whole_asks_nothing(world: World, undisturbed: Synthesis, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    content = (undisturbed.output / JOURNAL).read_bytes()
    (tmp_path / "out" / JOURNAL).write_bytes(content)
    same(run(world.config(tmp_path / "out", batch_size=3, resume=True), show_progress=False), undisturbed)
    assert (tmp_path / "out" / JOURNAL).read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "`seed` = 0, and now it is 1"),
        ({"temperature": 0.5}, "`temperature` = 1.0"),
        ({"min_activation": 0.5}, "`min_activation`"),
        ({"data": "others.jsonl"}, "`content of --data`"),
        ({"mode": "instruct"}, "`mode` = 'continue', and now it is 'instruct'"),
        ({"layers": "1"}, "`layers` = 'all', and now it is '1'"),
    ],
)
def test_other_settings_do_not_resume(
    world: World, undisturbed: Synthesis, changes: dict[str, Any], name: str
) -> None:
    if "data" in changes:
        changes = {"data": str(world.folder / changes["data"])}
    before = (undisturbed.output / JOURNAL).read_bytes()
    config = world.config(undisturbed.output, batch_size=3, resume=True, **changes)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        run(config, show_progress=False)
    assert (undisturbed.output / JOURNAL).read_bytes() == before


def test_settings_that_may_change_are_settings() -> None:
    assert set(MAY_CHANGE) <= {item.name for item in dataclasses.fields(SynthesizeConfig)}


def test_output_that_holds_something_is_refused(world: World, undisturbed: Synthesis, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a synthesis\. Go on with it by `--resume`"):
        run(world.config(undisturbed.output), show_progress=False)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty, and nothing is overwritten"):
        run(world.config(tmp_path, resume=True), show_progress=False)
    with pytest.raises(ConfigError, match=r"note\.txt', which is a file; it is a folder to make"):
        run(world.config(tmp_path / "note.txt"), show_progress=False)
    with pytest.raises(
        ConfigError, match=r"`layers` is .3., and none of the features is of these layers: they are of 1, 2"
    ):
        run(world.config(tmp_path / "out", layers="3"), show_progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_coverage_alone_is_measured_through_the_command_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in world.flags(weak_below=4).items()]
    assert main(["synthesize", *flags, "--generator", "none", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"missing: {', '.join(map(str, world.missing))}" in shown
    counts = (world.largest(world.data) > MIN_ACTIVATION).sum(0)
    weak = [f"{one} ({n})" for one, n in zip(world.targets, counts, strict=True) if 0 < n < 4]
    assert f"weak: {', '.join(weak)}" in shown
    assert weak
    assert "after" not in shown
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["coverage.json"]


def test_examples_give_beginnings_and_weak_features_are_filled(world: World, tmp_path: Path) -> None:
    config = world.config(
        tmp_path / "out",
        fill="weak",
        weak_below=5,
        examples=str(world.folder / "others.jsonl"),
        num_examples=2,
        prefix_tokens=4,
    )
    result = run(config, show_progress=False)
    assert [one.feature for one in result.filled] == list(result.before.weak)
    assert len(result.filled) > len(world.missing)
    assert {one.prompts_from for one in result.filled} == {"examples"}
    largest = world.largest(world.others)
    for row in result.rows:
        place = [str(one) for one in world.targets].index(row["feature"])
        top = [world.others[i] for i in np.argsort(-largest[:, place], kind="stable")[:2]]
        assert any(row["prompt"] in text for text in top)
        assert len(row["prompt"].split()) <= 4


def test_given_prompts_are_used(world: World, tmp_path: Path) -> None:
    own = str(world.missing[0])
    common, mine = texts(3, seed=6, length=6), texts(2, seed=7, length=6)
    rows = [*({"prompt": text} for text in common), *({"prompt": text, "feature": own} for text in mine)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    config = world.config(tmp_path / "out", prompts=str(prompts), control_requests=0, attempts=16)
    result = run(config, show_progress=False)
    assert result.num_plain == 0
    assert all(one.plain_rate is None for one in result.filled)
    assert {row["feature"] for row in result.rows} > {own}
    for row in result.rows:
        given = mine if row["feature"] == own else common
        assert row["prompt"] == given[int(row["key"].rsplit(" ", 1)[1]) % len(given)]


def test_prompts_for_a_feature_that_is_no_target_are_refused(world: World, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w5", "feature": "L1F127"}])
    with pytest.raises(ConfigError, match=r"has prompts for L1F127, which is not in '.*features\.json'"):
        run(world.config(tmp_path / "out", prompts=str(prompts)), show_progress=False)
    assert not (tmp_path / "out").exists()


def test_measuring_needs_a_dataset_and_its_model(world: World) -> None:
    config = world.config(world.folder / "out")
    features = FeatureSet.load(world.folder / "features.json")
    source = open_source(str(world.folder / "data.jsonl"))
    with pytest.raises(ConfigError, match="Reading a dataset needs the model"):
        measure(config, features, Sources(source, None, None, None), None, {})
    with pytest.raises(ConfigError, match="Give `--data` or `--store`"):
        measure(config, features, Sources(None, None, None, None), None, {})


def test_a_store_without_texts_needs_beginnings(world: World) -> None:
    config = SynthesizeConfig(model="m", saes="s", features="f", output="o", store="x", min_activation=MIN_ACTIVATION)
    start = Start({str(one): 0 for one in world.missing}, 9, {}, {}, [])
    recipe = Recipe(config, Template(), len)
    with pytest.raises(
        ConfigError, match=r"nothing to go on from for L1F.*`--examples`, or beginnings by `--prompts`"
    ):
        make_targets(config, FeatureSet.load(world.folder / "features.json"), start, recipe, world.tokenizer, None)


def test_a_local_model_is_instructed(world: World, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts(3, seed=5)])
    flags = {"mode": "instruct", "rewrite": True, "max_prompt_tokens": 12, "control_requests": 0, "attempts": 12}
    config = world.config(tmp_path / "out", prompts=str(prompts), **flags)
    result = run(config, show_progress=False)
    answers = {one["key"]: one["text"] for one in records(tmp_path / "out") if one["record"] == "answer"}
    assert result.rows
    for row in result.rows:
        assert row["prompt"] == answers[row["key"].replace("response", "rewrite")].strip()
    fires = fired(world, result.rows, "\n\n")
    for row, found in zip(result.rows, fires, strict=True):
        assert found[[str(one) for one in world.targets].index(row["feature"])]


def test_nothing_is_generated_for_what_is_covered(world: World, tmp_path: Path) -> None:
    present = [
        feature for feature in FeatureSet.load(world.folder / "features.json").features if feature.id in world.present
    ]
    FeatureSet(features=tuple(present)).save(tmp_path / "present.json")
    result = run(world.config(tmp_path / "out", features=str(tmp_path / "present.json")), show_progress=False)
    assert (result.before.value, result.generator, list(result.rows)) == (1.0, "", [])
    assert "missing: none" in format_result(result)
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_no_hook_is_left(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.nn.Module] = []
    import qscope_trl.analysis.synthesis.run as module

    open_: Callable[..., Any] = module.open_all

    def opened(*given: Any) -> Any:
        found = open_(*given)
        seen.append(found.model)
        return found

    monkeypatch.setattr(module, "open_all", opened)
    run(world.config(tmp_path / "out", attempts=2), show_progress=False)
    (model,) = seen
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
