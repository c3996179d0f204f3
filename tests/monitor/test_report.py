"""Reports: every part of a record is shown, what is missing is said, and nothing of data becomes markup."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.config.report import ReportConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.monitor.report import run
from qscope_trl.monitor.report.curves import task_loss
from qscope_trl.monitor.report.reading import read_run
from qscope_trl.monitor.run_record import RunRecord
from tests.monitor import records

HEADINGS = [
    "At a glance",
    "Penalised features",
    "Rewards and rollout policy",
    "Curves",
    "Held-out monitors",
    "Generations before and after",
    "Activations on texts",
    "Drift",
    "Rollouts",
    "Audit",
    "Overhead",
    "Configuration",
]


class Page(HTMLParser):
    """Headings, text, tables and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if "h2" in self._open:
            self.headings[-1] += data
        if "title" not in self._open and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        """The first row that begins so."""
        return next(row for row in self.rows if row[: len(start)] == list(start))


def report(folder: Path, **settings: Any) -> Page:
    result = run.run(ReportConfig(run_dir=str(folder), **settings))
    return Page(result.path.read_text(encoding="utf-8"))


def test_a_full_record_shows_every_part(tmp_path: Path) -> None:
    records.write_full(tmp_path)
    page = report(tmp_path)
    assert page.headings == HEADINGS
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    ids = [f"#{attributes['id']}" for tag, attributes in page.tags if tag == "h2"]
    assert links == ids
    assert "trained by SFTTrainer, 60 steps, 62 s, on cpu, 2 threads, x86_64, 2 processes" in page.text
    assert "Alarm at step 60: The penalised features fell, the monitors did not." in page.text
    assert "Drift at step 60: L5/min_jaccard: 0.400 against 0.500 (warn)" in page.text
    assert "heldout auroc 0.950" in page.row("L5F10")[-1]
    assert "Verdict: feature silent, behaviour stayed" in page.text
    assert page.row("probe") == ["probe", "logistic", "5", "0.970 (0.950 to 0.990)", "0.520"]
    assert page.row("base", "0.400 (0.300 to 0.500)")
    assert "Few prompts." in page.text
    assert "score 0.900 \u00b7 advantage -0.500, after the policy -1.000 \u00b7 amplify_negative" in page.text
    assert "max_fvu_ratio 2.000, min_jaccard 0.500" in page.text
    assert page.row("torch") == ["torch", "2.13.0"]
    assert "L5F10 (penalised)" in page.text
    assert "Never active on these texts: L4F11." in page.text


def test_first_and_last_are_the_first_value_and_the_mean_of_the_last_tenth(tmp_path: Path) -> None:
    records.write_full(tmp_path)
    page = report(tmp_path)
    rows = [row for row in RunRecord(tmp_path).rows("log") if "loss" in row]
    penalty = [row["sae/penalty"] for row in rows]
    last = sum(penalty[-6:]) / 6
    wanted = ["penalty, unweighted", f"{penalty[0]:.3f}", f"{last:.3f}", f"{last / penalty[0] - 1:+.0%}"]
    assert page.row("penalty, unweighted")[:4] == wanted
    task = [row["loss"] - row["sae/penalty_weight"] * row["sae/penalty"] for row in rows]
    assert page.row("task loss (loss - weight x penalty)")[1:3] == [f"{task[0]:.3f}", f"{sum(task[-6:]) / 6:.3f}"]
    line = task_loss(read_run(tmp_path))
    assert line is not None
    assert line.values == pytest.approx(task)
    rates = [sum(row[f"sae/L{layer}F{index}/firing_rate"] for layer, index in ((5, 10), (4, 11), (5, 12))) / 3
             for row in rows]  # fmt: skip
    shown = page.row("firing rate, mean of penalised features")
    assert shown[1:3] == [f"{rates[0]:.3f}", f"{sum(rates[-6:]) / 6:.3f}"]


def test_one_value_has_no_change(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    record.put("run", {"model": "m"})
    record.add("log", 1, {"loss": 2.0, "eval_loss": 3.0})
    record.add("log", 2, {"loss": 1.0})
    glance = report(tmp_path).text.split("At a glance")[-1].split("Curves")[0]
    assert "-50%" in glance
    assert "+0%" not in glance


def test_time_of_the_parts_is_their_share_of_the_steps(tmp_path: Path) -> None:
    records.write_full(tmp_path)
    page = report(tmp_path)
    # 6 rows of 10 steps in 2 s, of which the penalty took 0.06.
    assert page.row("penalty", "0.360")[:4] == ["penalty", "0.360", "6.000", "3.00%"]
    assert page.row("all of these")[:4] == ["all of these", "0.540", "9.000", "4.50%"]
    assert "60 steps took 12.0 s, 200.0 ms each." in page.text


def test_generations_stand_side_by_side_with_verdict_and_shade(tmp_path: Path) -> None:
    records.write_full(tmp_path)
    page = report(tmp_path)
    assert page.row("0", "4", "4") == ["0", "4", "4", "1.000", "0.510 to 1.000"]
    assert page.row("60", "0", "4")[3] == "0.000"
    text = page.text.split("Generations before and after")[-1].split("Activations on texts")[0]
    assert text.count("Step 0 shows it") == 4
    assert text.count("Step 60 does not show it") == 4
    # The sum of both penalised features: L4F11 is 0.5 at token 2; L5F10 peaks with 3 at token 6, before training.
    spans = [a for tag, a in page.tags if tag == "span" and a.get("class") == "high"]
    assert {"0.500", "1.000"} <= {span["title"] for span in spans}
    assert max(float((span["style"] or "").split(":")[1]) for span in spans) == pytest.approx(0.9)


@pytest.mark.parametrize("ends", [True, False], ids=["finished", "killed"])
def test_a_run_without_an_end_says_so(ends: bool, tmp_path: Path) -> None:
    record = records.write_full(tmp_path, ends=ends)
    with open(record.folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 61, "lo')
    result = run.run(ReportConfig(run_dir=str(tmp_path)))
    page = Page(result.path.read_text(encoding="utf-8"))
    assert ("No end was recorded: the run was stopped after step 60, or is still going." in page.text) is not ends
    said = run.format_result(result)
    assert said.startswith(
        "Report of 60 steps, 1 alarm written to " if ends else "Report of 60 steps, no end recorded"
    )
    assert page.headings == HEADINGS


def test_a_run_with_only_a_penalty_lists_what_it_lacks(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    penalised = records.features(2)
    record.put("run", {"model": "m", "features": penalised.to_dict(), "monitors": None, "rewards": [], "policy": None})
    for step in (1, 2, 3):
        record.add("log", step, records.log_row(step, 3, penalised, records.features(1)))
    page = report(tmp_path)
    missing = page.text.split("Not in this run")[-1]
    for word in ("monitor_features", "FeatureDashboard", "DriftMonitor", "qscope audit"):
        assert word in missing
    assert {"Drift", "Rollouts", "Audit", "Overhead", "Generations before and after"}.isdisjoint(page.headings)
    assert {"At a glance", "Penalised features", "Curves"} <= set(page.headings)


def test_a_record_that_has_only_begun_is_a_page(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    record.put("run", {"model": "m"})
    page = report(tmp_path)
    assert "Model m, 0 steps." in page.text
    assert page.headings == ["Configuration", "Not in this run"]
    record.put("run", {"model": "/data/of/mine/models/qwen"})
    page = report(tmp_path)
    assert "Model .../models/qwen, 0 steps." in page.text
    assert "Model: /data/of/mine/models/qwen" in page.text


def test_a_run_without_a_record_is_read_from_its_last_checkpoint(tmp_path: Path) -> None:
    records.write_state(tmp_path)
    page = report(tmp_path)
    assert "20 steps. Read from `trainer_state.json`: this run left no record." in page.text
    assert {"Penalised features", "Curves", "Held-out monitors", "Configuration"} <= set(page.headings)
    assert page.row("penalty_kind") == ["penalty_kind", "topk_act"]
    assert page.row("L4F11")
    assert "No end was recorded" not in page.text
    assert "10 steps." in report(tmp_path / "checkpoint-10").text


def test_old_drift_comes_from_the_log(tmp_path: Path) -> None:
    history = [{"step": step, "sae/drift/L5/fvu": 0.1 * step, "sae/drift/kl": 0.01 * step} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = report(tmp_path)
    assert page.row("5", "0.100 to 0.300")
    assert "On fixed texts, 3 times, step 1 to step 3" in page.text


def test_a_control_run_is_named_first(tmp_path: Path) -> None:
    record = records.write_full(tmp_path)
    control = {"kind": "random", "of": records.features(2).to_dict()}
    record.put("run", {**(record.get("run") or {}), "control": control})
    assert "Control run: random features were penalised instead of L5F10, L4F11." in report(tmp_path).text


def test_a_folder_of_a_record_is_a_run_too(tmp_path: Path) -> None:
    records.write_full(tmp_path)
    (tmp_path / "sae_record").rename(tmp_path / "sae_record_previous")
    page = report(tmp_path / "sae_record_previous", output=str(tmp_path / "old.html"))
    assert page.headings == HEADINGS


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`run_dir` is '.*none', which is no folder"):
        read_run(tmp_path / "none")
    with pytest.raises(DataError, match="holds neither `sae_record` nor a checkpoint"):
        read_run(tmp_path)
    records.write_full(tmp_path / "b", steps=6)
    records.write_full(tmp_path / "a", steps=6)
    with pytest.raises(DataError, match="Runs lie in it: a, b; name one"):
        read_run(tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text("{")
    with pytest.raises(DataError, match=r"trainer_state\.json' is damaged"):
        read_run(damaged)
    with pytest.raises(ConfigError, match="`samples` is -1"):
        ReportConfig(run_dir=".", samples=-1)
    with pytest.raises(ConfigError, match=r"`output` is '.*', which is a folder"):
        ReportConfig(run_dir=".", output=str(tmp_path))


def hostile_record(folder: Path) -> None:
    """A run whose every text is `HOSTILE`."""
    hostile = records.HOSTILE
    record = records.write_full(folder, steps=20)
    described = record.get("run") or {}
    features = [{**one, "label": hostile, "evidence": {hostile: 1.0}, "group_thresholds": {hostile: 1.0}}
                for one in described["features"]["features"]]  # fmt: skip
    # JSON escapes the lone surrogate, which the file could not hold.
    (record.folder / "run.json").write_text(
        json.dumps(
            {
                **described,
                "features": {**described["features"], "features": features},
                "control": hostile, "model": hostile, "trainer": hostile, "hardware": hostile, "started": hostile,
                "arguments": {hostile: hostile}, "versions": {hostile: hostile}, "uses": {hostile: [hostile]},
                "sae": {"name": hostile}, "penalty": {"penalty_kind": hostile, hostile: hostile},
                "rewards": [{"name": hostile, "features": described["features"], hostile: hostile}],
                "policy": {hostile: hostile}, "drift": {"limits": {hostile: 1.0}}, hostile: {hostile: [hostile]},
            }
        )
    )  # fmt: skip
    tokens = {"tokens": [hostile, "a"], "values": {hostile: [1.0, 2.0]}, "step": 20}
    lines: dict[str, list[dict[str, Any]]] = {
        "log": [{"step": 20, "loss": 1.0, hostile: 2.0, f"sae/rule/{hostile}": 1.0, f"rewards/{hostile}/mean": 1.0}],
        "samples": [{**tokens, "index": hostile, "prompt": hostile, "text": hostile, "is_shown": True,
                     "detector": hostile}],
        "texts": [{**tokens, "index": 0}],
        "rollouts": [{**tokens, "prompt": hostile, "policy": hostile, "score": hostile, "rewards": {hostile: "a"}}],
        "alarms": [{"step": 20, "kind": hostile, "message": hostile}],
        "drift": [{"step": 20, "layers": {hostile: {"fvu": 1.0}}, "kl": 1.0, "crossed": [hostile], "action": hostile}],
        "histograms": [{"step": 20, "feature": hostile, "kind": hostile, "edges": [0, 1], "counts": [1]}],
        "overhead": [{"step": 20, "steps": 1, "step_seconds": 1.0, "parts": {hostile: 0.5}}],
    }  # fmt: skip
    for name, rows in lines.items():
        with open(record.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (record.folder / "audit.json").write_text(json.dumps({"verdict": hostile, hostile: [{hostile: hostile}]}))


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    hostile_record(tmp_path)
    page = report(tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert source.count("&lt;script&gt;") > 40
    assert {"script", "img", "iframe", "link", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "xlink:href", "action") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in source
    assert "\x00" not in source


def test_secrets_are_not_shown_and_tokens_that_are_none_are(tmp_path: Path) -> None:
    record = records.write_full(tmp_path, steps=6)
    arguments = {
        "hub_token": "hf_abcdef",
        "wandb_api_key": "hf_abcdef",
        "token": "hf_abcdef",
        "push_to_hub_token": None,
    }
    record.put("run", {**(record.get("run") or {}), "arguments": {**arguments, "max_tokens": 7}})
    page = report(tmp_path)
    assert [page.row(name)[1] for name in arguments] == ["(hidden)"] * 3 + ["None"]
    assert page.row("max_tokens") == ["max_tokens", "7"]
    assert page.row("penalty_tokens") == ["penalty_tokens", "labels"]
    assert "hf_abcdef" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_many_features_and_long_runs_stay_readable(tmp_path: Path) -> None:
    steps = 600
    records.write_full(tmp_path, steps=steps, num_features=200, num_monitors=30)
    page = report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    folded = [place for place, (tag, _) in enumerate(page.tags) if tag == "details"]
    first = folded[0]
    # Twenty rows of each table of features stand open.
    assert sum(tag == "tr" for tag, _ in page.tags[:first]) < 40
    assert "180 more features" in page.text
    assert "the mean and the 7 that reach highest" in page.text
    assert all(page.row(f"L{5 - n % 2}F{10 + n}") for n in range(200))
    counts = [len(re.findall(r"[ML]", attributes.get("d") or "")) for tag, attributes in page.tags if tag == "path"]
    assert max(counts) <= 500 < steps


def test_samples_and_tokens_shown_are_bounded(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    record.put("run", {"model": "m"})
    for index in range(30):
        row = {"index": index, "prompt": "p" * 9000, "tokens": ["tok "] * 1000, "values": {"L1F1": [0.5] * 1000}}
        record.add("samples", 0, {**row, "text": "", "is_shown": None, "detector": None})
    page = report(tmp_path, samples=3)
    assert "27 more prompts are in the record." in page.text
    assert "600 more tokens" in page.text
    assert page.text.count("tok") < 3 * 410
    assert "p" * 2001 not in page.text
    assert "recorded features' activations" in page.text
    assert "0 more" not in report(tmp_path, samples=30).text.split("Not in this run")[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_values_that_are_not_finite_are_gaps(value: float, tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin(0)
    for step, loss in enumerate([value, 2.0, value, 1.0], 1):
        record.add("log", step, {"loss": loss, "bad": value, "text": "no number", "flag": True})
    page = report(tmp_path)
    assert page.row("loss")[1:3] == ["2.000", "1.000"]
    assert page.row("bad")[1:6] == ["4", "-", "-", "-", "-"]
    assert "flag" not in page.text


def test_a_report_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, qscope_trl.monitor.report.run\nprint({'torch', 'matplotlib', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
