"""`qscope audit` from files to files: settings, the run's record, adapters, the report."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest

from qscope_trl.analysis.audit import run as audit_run
from qscope_trl.analysis.audit.report import write_html
from qscope_trl.analysis.audit.run import format_result, run
from qscope_trl.analysis.audit.setup import read_inputs
from qscope_trl.cli import main
from qscope_trl.config.audit import AuditConfig
from qscope_trl.errors import CheckpointError, ConfigError, DataError, FeatureSetError, QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.monitor.run_record import RunRecord
from qscope_trl.parsing import parse_flags
from tests.analysis.audit_world import BEHAVIOUR, World, make_world, rotated
from tests.tiny import K, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"prompts": None, "behaviour": None, "max_texts": 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("audit"))
    rotated(world.base).save_pretrained(world.folder / "tuned")
    return world


def record(world: World, folder: Path, **changes: Any) -> Path:
    """What a run leaves, as far as the audit reads it."""
    features, monitors = (FeatureSet.from_names([name]).to_dict() for name in ("L2F5", "L1F7"))
    run_record = RunRecord(folder)
    run_record.begin(0)
    given = {
        "model": str(world.folder / "base"), "sae": {"name": "elsewhere", "source": str(world.folder / "saes")},
        "features": features, "monitors": monitors,
    }  # fmt: skip
    run_record.put("run", {**given, **changes})
    return folder


def test_a_run_is_audited_from_its_record(world: World, tmp_path: Path) -> None:
    folder = record(world, tmp_path / "run")
    shutil.copytree(world.folder / "tuned", folder / "checkpoint-2")
    (folder / "checkpoint-10").mkdir()
    (folder / "README.md").write_text("---\ntags: []\n---\n# A model\n", encoding="utf-8")
    config = AuditConfig(
        run_dir=str(folder), sae_k=K, positive=str(world.folder / "positive.jsonl"),
        negative=str(world.folder / "negative.jsonl"), prompts=str(world.folder / "prompts.jsonl"),
        prompt_column="text", behaviour=BEHAVIOUR, max_new_tokens=12, resamples=200, batch_size=64, permutations=3,
        output=str(tmp_path / "audit.html"), json=str(tmp_path / "audit.json"),
    )  # fmt: skip
    result = run(config, show_progress=False)
    assert result.verdict == "feature silent, behaviour stayed"
    assert result.tuned == str(folder / "checkpoint-2")
    assert [row.feature for row in result.features] == ["L2F5", "L1F7"]
    stored = RunRecord(folder).get("audit")
    assert stored == json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert stored == result.to_dict()
    assert stored["reason"].startswith("`regex:")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "### Audit\n\nfeature silent, behaviour stayed" in card
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    for heading in ("Behaviour in texts", "Activity of the features", "Who tells", "Neutral texts", "Generations"):
        assert heading in page
    assert "Content-Security-Policy" in page
    shown = format_result(result)
    assert "Verdict: feature silent, behaviour stayed." in shown
    assert "Note: The SAEs describe the tuned model worse" in shown


def test_a_card_that_is_damaged_costs_no_audit(world: World, tmp_path: Path) -> None:
    folder = record(world, tmp_path / "run")
    (folder / "README.md").write_text("---\ntags: [a\n---\n# A model\n", encoding="utf-8")
    tuned = str(world.folder / "base")
    config = world.config(run_dir=str(folder), tuned=tuned, json=str(tmp_path / "audit.json"), **QUICK)
    with pytest.warns(QScopeWarning, match="gets no new section on features"):
        result = run(config, show_progress=False)
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == result.to_dict()
    assert RunRecord(folder).get("audit") == result.to_dict()


def test_what_is_said_goes_before_what_is_recorded(world: World, tmp_path: Path) -> None:
    folder = record(world, tmp_path / "run", control="random")
    inputs = read_inputs(world.config(run_dir=str(folder), model="", saes="", features="L2F9", monitors=None))
    assert (inputs.config.model, inputs.config.saes) == (str(world.folder / "base"), str(world.folder / "saes"))
    assert inputs.config.tuned == "tuned"
    assert [str(one) for one in inputs.features.ids] == ["L2F9"]
    # The record's monitors belong to the record's features.
    assert inputs.monitors is None
    assert inputs.is_control
    recorded = read_inputs(world.config(run_dir=str(folder), features=None, monitors=None))
    assert recorded.monitors is not None
    assert [str(one) for one in recorded.monitors.ids] == ["L1F7"]
    assert read_inputs(world.config(neutral=None)).texts["neutral"] == recorded.texts["negative"]
    assert recorded.texts["neutral"] != recorded.texts["negative"]


def test_the_newest_checkpoint_with_a_model_is_taken(world: World, tmp_path: Path) -> None:
    folder = record(world, tmp_path / "run")
    config = world.config(run_dir=str(folder), tuned=None)
    with pytest.raises(ConfigError, match=r"holds no saved model\. Name it by `--tuned`"):
        read_inputs(config)
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").touch()
    assert read_inputs(config).config.tuned == str(folder / "checkpoint-10")
    (folder / "config.json").touch()
    assert read_inputs(config).config.tuned == str(folder)


def test_a_control_run_is_noted(world: World, tmp_path: Path) -> None:
    folder = record(world, tmp_path / "run", control="random")
    result = run(world.config(run_dir=str(folder), tuned=str(world.folder / "base"), **QUICK), show_progress=False)
    assert any(note.startswith("This run was a control") for note in result.notes)


def test_an_adapter_is_put_on_the_base(world: World, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    config = world.config(tuned=str(tmp_path / "adapter"), **QUICK)
    opened = audit_run._open_tuned(config, world.base)
    assert isinstance(opened, peft.PeftModel)
    result = run(config, show_progress=False)
    assert result.collateral.kl > 1e-4
    assert result.fits[0].residual_cosine < 1


def test_the_tuned_model_is_opened_in_the_bases_dtype(world: World) -> None:
    config = world.config(tuned=str(world.folder / "tuned"), dtype="bfloat16")
    opened = audit_run._open_tuned(config, tiny_model().bfloat16())
    assert {str(weight.dtype) for weight in opened.parameters()} == {"torch.bfloat16"}


def test_the_page_shows_any_text_as_it_is(world: World, tmp_path: Path) -> None:
    from dataclasses import replace

    from qscope_trl.analysis.audit.result import Sample

    result = run(world.config(tuned=str(world.folder / "base"), **QUICK), show_progress=False)
    bad = "<script>alert(1)</script>\x00"
    sample = Sample(prompt=bad, base=bad, tuned=bad, base_shows=True, tuned_shows=False)
    hostile = replace(result, samples=[sample], model=bad, notes=[bad], settings={"x": bad})
    write_html(hostile, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_conversations_are_prompts_that_end_where_the_answer_begins(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.folder / "base", base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w90 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w91{% endif %}"
    )
    tokenizer.save_pretrained(base)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "w5 w6"}]}) + "\n", encoding="utf-8")
    inputs = read_inputs(world.config(model=str(base), prompts=str(prompts), prompt_column="prompt"))
    assert inputs.texts["prompts"] == ["w90 w5 w6 w91"]


def test_the_number_of_texts_is_bounded(world: World, tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n{"text": "w5 w6 w7"}\n', encoding="utf-8")
    inputs = read_inputs(world.config(max_texts=7, max_prompts=3, neutral=str(blank)))
    assert [len(inputs.texts[name]) for name in ("positive", "negative", "prompts", "neutral")] == [7, 7, 3, 1]


def test_the_command_ends_with_0_whatever_the_verdict(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {
        "model": world.folder / "base", "tuned": world.folder / "base", "saes": world.folder / "saes", "sae-k": K,
        "features": "L2F5", "positive": world.folder / "positive.jsonl", "negative": world.folder / "negative.jsonl",
        "max-texts": 12, "permutations": 2, "resamples": 100,
    }  # fmt: skip
    assert main(["audit", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 0
    assert "Verdict: feature active, behaviour not decided." in capsys.readouterr().out


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "`--model` is missing"),
        ({"model": "", "saes": "", "tuned": None}, "`--model`, `--saes`, `--tuned` are missing"),
        ({"features": None}, "`--features` is missing"),
        ({"positive": None}, "`--positive` is missing"),
        ({"negative": None}, "`--negative` is missing"),
        ({"prompts": None}, "come together"),
        ({"behaviour": None}, "come together"),
        ({"holdout": 1.0}, "`holdout` is 1.0"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"positions": "first"}, "`positions` is 'first'"),
        ({"resamples": 50}, "`resamples` is 50"),
        ({"max_texts": 3}, "`max_texts` is 3"),
        ({"permutations": 0}, "`permutations` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"layers": "last"}, "`layers` is 'last'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"output": "/"}, "`output` is '/'"),
        ({"json": "/"}, "`json` is '/'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(world: World, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        world.config(**changes)


def test_bad_input_is_refused_before_a_model_is_opened(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(audit_run, "open_model", opened)
    empty = record(world, tmp_path / "empty", features=None)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n', encoding="utf-8")
    nothing = record(world, tmp_path / "nothing", model="", sae=None)
    named = record(world, tmp_path / "named", sae={"name": "SAE-Res-Demo"})
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "w5 w6"}\n' * 9 + '{"text": "w6 w5"}\n' * 9, encoding="utf-8")
    for changes, error, message in (
        ({"run_dir": str(tmp_path / "none")}, DataError, "has no record of a run"),
        ({"run_dir": str(empty), "features": None}, ConfigError, "names no penalised features"),
        ({"run_dir": str(nothing), "model": ""}, ConfigError, "does not know the model. Name it by `--model`"),
        ({"run_dir": str(nothing), "saes": ""}, ConfigError, "does not know the saes. Name it by `--saes`"),
        ({"run_dir": str(named), "saes": ""}, ConfigError, "says 'SAE-Res-Demo' of the SAEs"),
        ({"negative": str(few)}, DataError, "has 2 different texts"),
        ({"monitors": "L2F5,L1F7"}, ConfigError, "L2F5 is among the features trained on and among the monitors"),
        ({"behaviour": "rule:L2F5 > 0"}, ConfigError, "which reads features"),
        ({"behaviour": "french"}, ConfigError, "`behaviour` is 'french'"),
        ({"positive": str(blank)}, DataError, "holds no text"),
        ({"positive": "none.jsonl"}, DataError, "No file or folder"),
        ({"prompt_column": "question"}, DataError, "no column `question`"),
        ({"layers": "0"}, ConfigError, "none of the features is of these layers"),
        ({"features": "L2F500"}, FeatureSetError, "F500"),
        ({"features": "L9F5"}, CheckpointError, "No SAE for layer 9"),
    ):
        with pytest.raises(error, match=message):
            run(world.config(**changes), show_progress=False)


def test_flags_are_parsed_and_name_no_default_that_is_none() -> None:
    config = parse_flags(
        ["--run-dir", "out", "--positive", "a", "--negative", "b", "--max-texts", "9"],
        AuditConfig,
        prog="qscope audit",
        description="x",
    )
    assert (config.run_dir, config.max_texts, config.model) == ("out", 9, "")


def test_help_of_empty_defaults_says_nothing_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(["--help"], AuditConfig, prog="qscope audit", description="x")
    assert "Default: ." not in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_opens_in_a_browser_without_network(world: World, tmp_path: Path) -> None:
    file = tmp_path / "audit.html"
    run(world.config(tuned=str(world.folder / "tuned"), output=str(file), max_texts=12), show_progress=False)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Who tells positive from negative texts" in shown
    assert "<h2>Generations</h2>" in shown
