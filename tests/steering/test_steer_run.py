"""`qscope steer` on the bundled model: what it generates, counts, shows and writes."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.activations.opening import open_model
from qscope_trl.activations.sampling import Generation, Sampling, generate, perplexity
from qscope_trl.bundled import sae_path
from qscope_trl.cli import main
from qscope_trl.config.steer import SteerConfig
from qscope_trl.errors import ConfigError, DataError, QScopeWarning
from qscope_trl.monitor.detectors import num_chinese, text_detector
from qscope_trl.steering import show
from qscope_trl.steering.run import format_result, run
from qscope_trl.steering.steer import steer
from qscope_trl.steering.sweep import Point, Sweep, draw_controls, open_behaviour

GGUF = {"export": "gguf", "output": "x.gguf"}
PROMPTS = ["Insert a table\n", "Open the Chart Wizard and", "Charts"]
FEATURES = "L4F1740,L5F23"


def config(**changes: Any) -> SteerConfig:
    given: dict[str, Any] = {
        "model": "demo", "saes": "demo", "features": [FEATURES], "prompt": PROMPTS, "max_new_tokens": 12,
    }  # fmt: skip
    return SteerConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any, SAESuite]:
    return (*open_model("demo"), SAESuite.from_pretrained(sae_path("demo")))


def alone(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_greedy_texts_are_those_of_each_prompt_alone(opened: tuple[Any, Any, SAESuite]) -> None:
    model, tokenizer, saes = opened
    found = run(config(strength=24.0, temperature=0.0, batch_size=2, skip_first=True), show_progress=False)
    assert found.prompts == PROMPTS
    assert found.plain == [alone(model, tokenizer, prompt) for prompt in PROMPTS]
    with steer(model, saes, FEATURES.split(","), strength=24.0, positions=slice(1, None)):
        assert found.steered == [alone(model, tokenizer, prompt) for prompt in PROMPTS]
    assert found.steered != found.plain
    shown = format_result(found)
    assert "prompt  Insert a table\nplain   " in shown
    assert f"{found.num_edits} tokens steered" in shown


def test_a_seed_gives_the_same_texts_and_leaves_the_random_state(opened: tuple[Any, Any, SAESuite]) -> None:
    model, tokenizer, _ = opened
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        [g.text for g in generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8, seed=seed))]
        for seed in (1, 1, 2)
    )
    assert torch.rand(1) == wanted
    assert first == again != other
    result = run(config(strength=0.0, num_generations=2), show_progress=False)
    assert result.steered == result.plain
    assert result.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len(set(result.plain)) == 6


@pytest.mark.parametrize("is_list", [False, True])
def test_an_end_token_ends_a_generation_and_an_empty_prompt_is_no_error(
    opened: tuple[Any, Any, SAESuite], is_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = opened
    end = tokenizer(" the")["input_ids"][0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end] if is_list else end)
    made = generate(model, tokenizer, ["", *PROMPTS] * 4, Sampling(max_new_tokens=24, batch_size=16))
    ended = [g for g in made if end in g.ids]
    assert ended
    assert all(g.ids.index(end) == len(g.ids) - 1 for g in ended)
    assert all(len(g.ids) == 24 for g in made if end not in g.ids)
    assert len(made[0].prompt_ids) == 1


def test_perplexity_is_that_of_the_new_tokens_alone(opened: tuple[Any, Any, SAESuite]) -> None:
    model, _, _ = opened
    made = [Generation([5, 6, 7], [8, 9], ""), Generation([10], [11, 12, 13, 14], ""), Generation([3, 4], [9], "")]
    nll, count = 0.0, 0
    for one in made:
        with torch.no_grad():
            log_p = model(torch.tensor([one.prompt_ids + one.ids])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(one.ids, len(one.prompt_ids)):
            nll, count = nll - float(log_p[place - 1, token]), count + 1
    assert perplexity(model, made, batch_size=2) == pytest.approx(math.exp(nll / count), rel=1e-4)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sweep")
    result = run(
        config(
            prompt=[], data="demo:prompts", max_prompts=24, max_length=32, batch_size=24, sweep="24", control_draws=2,
            behaviour="chinese", figure=str(folder / "f" / "sweep.png"), json=str(folder / "sweep.json"),
        ),
        show_progress=False,
    )  # fmt: skip
    return result, folder


def test_a_sweep_has_the_zero_the_other_sign_and_random_features_beside_it(sweep: tuple[Any, Path]) -> None:
    result, folder = sweep
    points = {(p.arm, p.strength): p for p in result.sweep.points}
    assert set(points) == {("features", s) for s in (-24, 0, 24)} | {
        (f"random {n}", s) for n in (1, 2) for s in (-24, 24)
    }
    share = {key: point.share for key, point in points.items()}
    assert share["features", 24] > 0.2 > share["features", 0] > share["features", -24]
    assert all(share[f"random {n}", 24] < share["features", 24] / 2 for n in (1, 2))
    assert all(p.rate_interval[0] <= p.rate <= p.rate_interval[1] and p.num_texts == 24 for p in points.values())
    written = json.loads((folder / "sweep.json").read_text())
    assert [p["share"] for p in written["points"]] == [p.share for p in result.sweep.points]
    assert (folder / "f" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in (folder / "f").iterdir()] == ["sweep.png"]


def test_the_table_has_a_line_for_each_strength_and_arm(sweep: tuple[Any, Path]) -> None:
    result, _ = sweep
    lines = show.format_sweep(result.sweep).splitlines()
    assert sum("features" in line for line in lines[1:4]) == 2
    assert sum("no steering" in line for line in lines) == 1
    assert sum("random (2 draws)" in line for line in lines) == 2
    zero = next(p for p in result.sweep.points if p.strength == 0)
    assert f"{100 * zero.rate:.1f}" in next(line for line in lines if "no steering" in line)


def test_the_zero_of_a_sweep_is_the_plain_text(sweep: tuple[Any, Path], opened: tuple[Any, Any, SAESuite]) -> None:
    model, tokenizer, _ = opened
    result, _ = sweep
    sampling = Sampling(max_new_tokens=12, max_length=32, batch_size=24)
    from qscope_trl.demo.assets import rows

    made = generate(model, tokenizer, [row["prompt"] for row in rows("prompts")[:24]], sampling)
    zero = next(p for p in result.sweep.points if p.strength == 0)
    is_shown = text_detector("chinese").is_shown
    assert zero.rate == sum(is_shown(g.text) for g in made) / 24
    assert zero.perplexity == pytest.approx(perplexity(model, made), rel=1e-4)


def test_controls_are_other_features_that_add_vectors_as_long(opened: tuple[Any, Any, SAESuite]) -> None:
    model, tokenizer, saes = opened
    chosen = FeatureSet.from_names(["L4F1740", "L4F493", "L5F23"])
    texts = ["Open the file. 打开文件夹中的文件。"] * 4
    drawn = draw_controls(model, tokenizer, saes, chosen, texts, 3, Sampling(), same_length=True)
    assert len({control.ids for control in drawn}) == 3
    for control in drawn:
        assert [f.layer for f in control.features] == [4, 4, 5]
        assert not set(control.ids) & set(chosen.ids)
        for layer in (4, 5):
            lengths = [
                (
                    saes.decoder_columns(layer, [f.index for f in one.for_layer(layer)])
                    @ torch.tensor([f.weight for f in one.for_layer(layer)])
                ).norm()
                for one in (chosen, control)
            ]
            assert float(lengths[0]) == pytest.approx(float(lengths[1]), rel=1e-5)
    assert draw_controls(model, tokenizer, saes, chosen, texts, 0, Sampling(), same_length=True) == []
    kept = draw_controls(model, tokenizer, saes, chosen, texts, 1, Sampling(), same_length=False)
    assert all(feature.weight == 1 for feature in kept[0].features)


def test_a_rule_is_a_behaviour(opened: tuple[Any, Any, SAESuite]) -> None:
    model, tokenizer, saes = opened
    detector, shows = open_behaviour("rule:L4F1740 > 1", model, tokenizer, saes, max_length=64, batch_size=4)
    texts = ["Open the file.", "打开文件夹中的文件。", ""]
    assert shows(texts) == [False, True, False]
    assert [detector.is_shown(text) for text in texts] == shows(texts)
    assert [num_chinese(text) > 0 for text in texts] == shows(texts)


def test_report_json_calibration_and_export_are_written(tmp_path: Path) -> None:
    from qscope_trl.steering.exports import load_vectors

    names = {"report": "r/steer.html", "json": "steer.json", "output": "vector.safetensors"}
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    result = run(config(calibrate=0.5, strength=-1.0, export="safetensors", **paths), show_progress=False)
    assert result.calibration is not None
    assert result.strength == result.calibration.strength < 0
    assert result.calibration.kl == pytest.approx(0.5, rel=0.01)
    assert load_vectors(paths["output"]).strength == result.strength
    page = Path(paths["report"]).read_text(encoding="utf-8")
    assert page.count('class="text"') == 3 * 2 * 3
    assert 'title="not read"' in page
    assert "Insert a table" in page
    facts = json.loads(Path(paths["json"]).read_text())
    assert [t["steered"] for t in facts["texts"]] == result.steered
    assert facts["calibration"]["num_tokens"] == result.calibration.num_tokens
    assert f"KL divergence {result.calibration.kl:.4g} over " in format_result(result)


def test_the_command_runs_and_takes_negative_strengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FeatureSet.from_names(FEATURES.split(",")).save("zh.yaml")
    start = ["steer", "--model", "demo", "--saes", "demo", "--features", "zh.yaml", "--max-new-tokens", "4"]
    gated = ["--prompt", "Charts", "--layers", "5", "--gate", "L4F1740 > 100", "--strength", "9"]
    with pytest.warns(QScopeWarning, match="The gate `L4F1740 > 100` never held"):
        assert main([*start, *gated]) == 0
    assert "0 tokens steered" in capsys.readouterr().out
    assert main(
        [*start, "--prompt", "Charts", "--sweep", "-4,8", "--behaviour", "regex:e", "--control-draws", "0"]
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "share" not in shown
    assert [line.split("  ")[0].strip() for line in shown.splitlines()[2:3]] == ["no steering"]
    assert [any(f" {s} " in line for s in ("-4", "0", "8")) for line in shown.splitlines()[1:4]] == [True] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "Give the prompts in exactly one way"),
        ({"data": "demo:prompts"}, "Give the prompts in exactly one way"),
        ({"mode": "remove"}, "`mode` is 'remove'; choose one of add, ablate, clamp"),
        ({"top_p": 0.0}, r"`top_p` is 0.0; it is a share above 0, up to 1\."),
        ({"temperature": math.nan}, "`temperature` is nan; it is a finite number"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; it is 1 or more"),
        ({"export": "gguf"}, "`--export FORMAT` and `--output FILE` come together"),
        ({"calibrate_data": "x.txt"}, "`--calibrate-data` is for `--calibrate`, which is not given"),
        ({"calibrate": 0.5, "mode": "clamp"}, "but `--mode clamp` adds no direction"),
        ({"calibrate": 0.5, "sweep": "4", "behaviour": "chinese"}, "but `--sweep` names its strengths"),
        ({"calibrate": 0.5, "prompt": [], **GGUF}, "`--calibrate` needs texts"),
        ({"behaviour": "chinese"}, "`--behaviour` is for `--sweep`, which is not given"),
        ({"sweep": "4"}, "`--sweep` needs a `--behaviour` to count"),
        ({"sweep": "4;8", "behaviour": "chinese"}, "`sweep` is '4;8'; write strengths as `-8,-4,0,4,8`"),
        ({"sweep": "0", "behaviour": "chinese"}, "at least one of them not 0"),
        ({"sweep": "4", "behaviour": "chinese", "report": "r.html"}, "`--report` shows one strength"),
        (
            {"sweep": "4", "behaviour": "chinese", "export": "gguf", "output": "x.gguf"},
            "`--export` writes one strength; leave out `--sweep`",
        ),
        ({"calibrate": math.nan}, "`calibrate` is nan; it is a divergence in nats above 0"),
        ({"calibrate": 0.0}, "`calibrate` is 0.0; it is a divergence in nats above 0"),
        ({"phases": "promt"}, "`phases` is 'promt'; write `prompt`, `generation`, or both"),
        ({"phases": " ,"}, "`phases` is ' ,'; write `prompt`"),
        ({"unit": "norm", "mode": "clamp"}, "`--unit norm` is for `--mode add`; in `clamp`"),
        ({"export": "onnx", "output": "x"}, "`export` is 'onnx'; choose one of safetensors, gguf"),
        ({"export": "gguf", "output": "z.pt"}, "`output` is 'z.pt', but the ending of a `gguf` file is `.gguf`"),
        ({**GGUF, "mode": "ablate"}, "one and the same at every token, but `--mode ablate` depends on the features"),
        ({**GGUF, "unit": "norm"}, "but `--unit norm` depends on the residual's norm"),
        ({**GGUF, "phases": "prompt"}, "but `--phases prompt` leaves tokens out"),
        ({**GGUF, "skip_first": True}, "but `--skip-first` leaves tokens out"),
        ({**GGUF, "gate": "L4F1 > 1"}, "but `--gate` depends on the text"),
        ({"report": "same", "json": "./same"}, "`json` would write './same', which `report` writes. Choose another"),
        (
            {"export": "safetensors", "output": "zh.safetensors", "json": "zh.json"},
            "`output` would write 'zh.json', which `json` writes",
        ),
    ],
)
def test_settings_that_do_not_fit_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"export": "safetensors", "output": "old.safetensors"},
            ConfigError,
            "'old.json' is there already. Choose another `--output`, or give `--overwrite`",
        ),
        ({"export": "gguf", "output": "old.gguf"}, ConfigError, "'old.gguf' is there already"),
        (
            {"features": ["old.json"], "json": "old.json"},
            ConfigError,
            "`json` would write 'old.json', which `features` reads",
        ),
        ({"features": ["zh.yaml", "L5F1"]}, ConfigError, "`features` names a file and more: zh.yaml, L5F1"),
        ({"layers": "2"}, ConfigError, "none of the features is of these layers: they are of 4, 5"),
        (
            {"sweep": "4", "behaviour": "chinese", "figure": "x.pdf"},
            ConfigError,
            "`figure` is 'x.pdf'; its ending is `.png` or `.svg`",
        ),
        ({"prompt": [], "data": "empty.jsonl"}, DataError, "'empty.jsonl' has no rows, so there is no prompt"),
    ],
)
def test_what_cannot_be_run_raises(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    for name in ("old.json", "old.gguf"):
        Path(name).write_text("kept")
    monkeypatch.setattr("qscope_trl.steering.run.open_model", lambda *_args, **_rest: pytest.fail("opened the model"))
    with pytest.raises(error, match=message):
        run(config(**changes), show_progress=False)
    assert {Path(name).read_text() for name in ("old.json", "old.gguf")} == {"kept"}


def test_overwrite_replaces_an_exported_file(tmp_path: Path) -> None:
    from qscope_trl.steering.exports import load_vectors

    path = tmp_path / "zh.safetensors"
    path.write_text("old")
    run(config(prompt=[], export="safetensors", output=str(path), overwrite=True), show_progress=False)
    assert sorted(load_vectors(path).vectors) == [4, 5]


def test_each_batch_draws_its_own_numbers_however_early_the_one_before_ended(
    opened: tuple[Any, Any, SAESuite], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = opened
    states: list[list[Any]] = []

    def fake(extra: int) -> Any:
        states.append([])

        def draw(input_ids: torch.Tensor, **_rest: Any) -> torch.Tensor:
            states[-1].append(float(torch.rand(1, dtype=torch.float64)))
            torch.rand(extra)
            return torch.cat([input_ids, input_ids[:, :1]], 1)

        return draw

    for extra, seed in ((0, 0), (5, 0), (0, 1)):
        monkeypatch.setattr(model, "generate", fake(extra))
        generate(model, tokenizer, PROMPTS, Sampling(seed=seed, batch_size=1))
    assert states[0] == states[1]
    assert len({*states[0], *states[2]}) == 6
    torch.manual_seed(0)
    assert states[0][0] == float(torch.rand(1, dtype=torch.float64))


def test_the_table_says_which_arm_and_strength_was_warned_of(opened: tuple[Any, Any, SAESuite]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", QScopeWarning)
        result = run(
            config(
                features=["L5F1"], prompt=["a"], mode="ablate", max_new_tokens=1,
                sweep="2", behaviour="regex:e", control_draws=1,
            ),
            show_progress=False,
        )  # fmt: skip
    assert result.sweep is not None
    (where,) = (where for message, where in result.sweep.warned.items() if "No ablated feature was active" in message)
    assert where[:2] == ["features at -2", "features at 2"]
    assert "\nfeatures at -2, features at 2" in show.format_sweep(result.sweep)


def test_the_share_of_one_text_has_no_interval() -> None:
    points = [
        Point(
            arm="features", strength=float(n), rate=0.0, rate_interval=(0.0, 0.5), share=0.1818,
            share_interval=(0.1818, 0.1818), perplexity=9.0, num_texts=1 + n,
        )
        for n in (0, 1)
    ]  # fmt: skip
    lines = show.format_sweep(Sweep(points, text_detector("chinese"), [], {})).splitlines()
    assert lines[1].split()[-3:] == ["18.18", "-", "9.0"]
    assert "18.18 to 18.18" in lines[2]


def test_a_calibration_says_that_it_did_not_look_at_phases_or_gate() -> None:
    given = {"prompt": ["Charts"], "max_new_tokens": 4, "calibrate": 0.5}
    shown = [
        format_result(run(config(**given, **changes), show_progress=False)) for changes in ({}, {"skip_first": True})
    ]
    note = "strengths tried; measured at every position, without gate\n"
    assert [note in one for one in shown] == [False, True]


def test_sweep_lists_hold_zero_and_a_strength_of_the_other_sign() -> None:
    found = {given: config(sweep=given, behaviour="chinese").sweep_list for given in ("4,8", "-8", "-2,4", "0,3,3")}
    assert found == {"4,8": (-8, 0, 4, 8), "-8": (-8, 0, 8), "-2,4": (-2, 0, 4), "0,3,3": (-3, 0, 3)}


def test_choices_are_those_of_the_functions() -> None:
    from qscope_trl.config import steer as settings
    from qscope_trl.steering import direction, exports, gate, span

    assert (settings.MODES, settings.UNITS, settings.GATE_READS) == (direction.MODES, direction.UNITS, gate.READS)
    assert config().phase_list == settings.PHASES == span.PHASES
    assert {name: endings for name, (_, endings) in exports.FORMATS.items()} == settings.EXPORTS
