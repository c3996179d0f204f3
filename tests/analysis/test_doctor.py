"""`qscope doctor` on the bundled model: it fits, each planted mistake is found, and what it writes can be read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qscope_trl import SAESuite
from qscope_trl.analysis.doctor.diagnosis import diagnose
from qscope_trl.analysis.doctor.result import Diagnosis
from qscope_trl.bundled import MODEL, saes
from qscope_trl.cli import main
from qscope_trl.demo import assets
from qscope_trl.features import Feature, FeatureSet

State = dict[str, Tensor]
LAYERS = (2, 3)
TRAINED_K = 16
TEXTS = [row["text"] for row in assets.rows("rules_test")[:32]]
SHORT = ["--max-texts", "32", "--max-length", "48", "--probe-tokens", "256"]
DEMO = ["doctor", "--model", "demo", "--data", "demo:rules_test", *SHORT]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def released() -> dict[int, State]:
    files = {layer: torch.load(saes() / f"layer{layer}.sae.pt") for layer in range(6)}
    return {layer: {name: value.float() for name, value in state.items()} for layer, state in files.items()}


def write(folder: Path, states: dict[int, State]) -> Path:
    folder.mkdir()
    for layer, state in states.items():
        torch.save({name: value.contiguous() for name, value in state.items()}, folder / f"layer{layer}.sae.pt")
    return folder


def run(model: Any, tokenizer: Any, folder: Path, *, k: int = TRAINED_K, **settings: Any) -> Diagnosis:
    suite = SAESuite.from_pretrained(folder, k=k)
    return diagnose(model, tokenizer, suite, TEXTS, max_length=48, probe_tokens=256, show_progress=False, **settings)


def decisive(result: Diagnosis) -> dict[str, str]:
    """Check to severity of the findings that decide the verdict."""
    return {one.check: one.severity for one in result.findings if one.severity in ("fail", "warn")}


def every(change: Callable[[State], State]) -> Callable[[dict[int, State]], dict[int, State]]:
    return lambda released: {layer: {**released[layer], **change(released[layer])} for layer in LAYERS}


def unchanged(state: State) -> State:
    return state


def random_sae(state: State) -> State:
    W_enc = torch.randn(state["W_enc"].shape, generator=torch.Generator().manual_seed(0)) * state["W_enc"].std()
    return {"W_enc": W_enc, "W_dec": W_enc.T / W_enc.norm(dim=1).square(), "b_enc": torch.zeros(len(W_enc))}


def of_a_turned_model(state: State) -> State:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    return {"W_enc": state["W_enc"] @ Q.T, "W_dec": Q @ state["W_dec"], "b_dec": Q @ state["b_dec"]}


def times(factor: float) -> Callable[[State], State]:
    return lambda state: {
        "W_enc": state["W_enc"] * factor, "W_dec": state["W_dec"] / factor, "b_dec": state["b_dec"] / factor,
    }  # fmt: skip


MISTAKES: dict[str, tuple[Any, int, int, dict[str, str], str]] = {
    "none": (every(unchanged), 16, 0, {}, "The SAEs reconstruct: fvu 0.1"),
    "one layer early": (lambda a: {n + 1: a[n] for n in (1, 2)}, 16, 3, {"layer": "fail"}, "Read 1 layer earlier"),
    "one layer late": (lambda a: {n - 1: a[n] for n in (3, 4)}, 16, 3, {"layer": "fail"}, "Read 1 layer later"),
    "k too small": (every(unchanged), 8, 1, {"k": "warn"}, "Twice k=8 reconstructs better"),
    "k too large": (every(unchanged), 40, 1, {"k": "warn"}, "Half of k=40 reconstructs better"),
    "b_dec not subtracted": (
        every(lambda s: {"b_enc": s["b_enc"] + s["W_enc"] @ s["b_dec"]}), 16, 3, {"b_dec": "fail"},
        "With `b_dec` subtracted from the input the SAEs reconstruct better",
    ),
    "b_dec subtracted": (
        every(lambda s: {"b_enc": s["b_enc"] - s["W_enc"] @ s["b_dec"]}), 16, 3, {"b_dec": "fail"},
        "With `b_dec` added to the input the SAEs reconstruct better",
    ),
    "other scale": (
        every(times(3.0)), 16, 3, {"scale": "fail"}, "With inputs multiplied by 0.3",
    ),
    "decoder reshaped": (
        every(lambda s: {"W_dec": s["W_dec"].T.reshape(128, 2048)}), 16, 3,
        {"reconstruction": "fail", "weights": "fail"}, "if `W_dec` is taken as reshaped",
    ),
    "random": (every(random_sae), 16, 3, {"reconstruction": "fail"}, "reconstruct no better than chance"),
    "another model's": (every(of_a_turned_model), 16, 3, {"reconstruction": "fail"}, "no better than chance"),
    "dead": (
        every(lambda s: {"b_enc": s["b_enc"] - 1e4}), 16, 3, {"reconstruction": "fail", "l0": "fail"},
        "No feature fires at any token in layers 2-3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(
    mistake: str, model: Any, tokenizer: Any, released: dict[int, State], tmp_path: Path
) -> None:
    change, k, exit_code, checks, told = MISTAKES[mistake]
    result = run(model, tokenizer, write(tmp_path / "saes", change(released)), k=k)
    assert decisive(result) == checks
    assert result.exit_code == exit_code
    assert any(told in finding.what for finding in result.findings)
    # In words: what was found, why it matters, what to do.
    for finding in result.findings:
        if finding.severity in ("fail", "warn"):
            assert finding.why
            assert finding.action


def test_the_scale_that_is_told_mends_the_saes(
    model: Any, tokenizer: Any, released: dict[int, State], tmp_path: Path
) -> None:
    wrong = run(model, tokenizer, write(tmp_path / "wrong", every(times(3.0))(released)))
    factor = wrong.layers[0].scale
    assert factor == pytest.approx(1 / 3, rel=0.1)
    mended = {n: {**state, **times(factor)(state)} for n, state in every(times(3.0))(released).items()}
    assert run(model, tokenizer, write(tmp_path / "mended", mended)).verdict == "fits"


def test_a_tuned_model_whose_features_changed_is_doubtful(
    model: Any, tokenizer: Any, released: dict[int, State], tmp_path: Path
) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.dim() == 2:
                weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    result = run(model, tokenizer, write(tmp_path / "saes", every(unchanged)(released)), tuned=tuned)
    assert decisive(result) == {"tuned": "warn", "tuned features": "warn"}
    assert all(one.jaccard < 0.6 for one in result.tuned)
    # fvu alone would have called each layer a good fit.
    assert all(one.fvu < 0.3 for one in result.tuned)


# The command


def test_the_bundled_model_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main([*DEMO, "--saes", "demo", "--json", str(tmp_path / "d.json"), "--report", str(tmp_path / "d.html")])
    out = capsys.readouterr().out
    assert code == 0
    assert out.endswith("Verdict: fits (exit code 0)\n")
    assert out.startswith("SAEs 'demo' on model 'demo' (bfloat16, cpu): 32 texts, ")
    assert "BOS              The tokenizer has no BOS token" in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["verdict"], found["exit_code"], found["tuned"]) == ("fits", 0, [])
    assert [one["layer"] for one in found["layers"]] == list(range(6))
    assert all(0 < one["fvu"] < 0.2 < one["chance"] for one in found["layers"])
    assert found["layers"][0]["alignment_reshaped"] is None
    assert found["layers"][0]["places"].keys() == {"-1", "0", "1"}
    page = (tmp_path / "d.html").read_text()
    assert "<title>qscope doctor: fits</title>" in page
    assert "b_dec subtracted" in page
    assert "embeddings" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.html", "d.json"]


def test_a_misfit_is_told_by_the_exit_code(
    released: dict[int, State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifted = write(tmp_path / "saes", {n - 1: released[n] for n in (3, 4)})
    assert main([*DEMO, "--saes", str(shifted), "--sae-k", "16"]) == 3
    assert "Rename each file from layer n to n+1" in " ".join(capsys.readouterr().out.split())
    assert main([*DEMO, "--saes", "demo", "--layers", "3", "--sae-k", "8"]) == 1
    assert capsys.readouterr().out.endswith("Verdict: doubtful (exit code 1)\n")


def test_saes_of_another_width_are_told_by_the_exit_code(
    released: dict[int, State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = {
        "W_enc": released[2]["W_enc"][:, :64], "W_dec": released[2]["W_dec"][:64],
        "b_enc": released[2]["b_enc"], "b_dec": released[2]["b_dec"][:64],
    }  # fmt: skip
    assert main([*DEMO, "--saes", str(write(tmp_path / "saes", {2: narrow})), "--sae-k", "16"]) == 3
    assert "read residuals of width 64, the model's are 128 wide" in " ".join(capsys.readouterr().out.split())


def test_the_same_model_as_tuned_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    assert main([*DEMO, "--saes", "demo", "--layers", "4", "--tuned", "demo", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Tuned model 'demo'" in out
    assert "On the tuned model the SAEs fit as on the base" in out
    found = json.loads(path.read_text())
    assert (found["kl"], found["tuned"][0]["jaccard"]) == (0.0, 1.0)


def test_a_feature_set_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: Any) -> None:
    suite = SAESuite.from_pretrained(saes())
    mine = FeatureSet(
        features=(Feature(layer=4, index=1740, label="Chinese <b>"), Feature(layer=4, index=23)),
        sae="demo", sae_fingerprints={4: suite.fingerprint(4)},
    )  # fmt: skip
    mine.save(tmp_path / "zh.yaml")
    command = [*DEMO, "--saes", "demo", "--layers", "4", "--features", str(tmp_path / "zh.yaml")]
    assert main([*command, "--json", str(tmp_path / "d.json"), "--report", str(tmp_path / "d.html")]) == 0
    assert "fingerprints of layer 4 agree" in capsys.readouterr().out
    found = json.loads((tmp_path / "d.json").read_text())["features"]
    assert [one["name"] for one in found] == ["L4F1740", "L4F23"]
    assert "Chinese &lt;b&gt;" in (tmp_path / "d.html").read_text()
    # The rates are those of the encoder, text by text.
    sae, model = suite.load(4), AutoModelForCausalLM.from_pretrained(MODEL)
    fired = []
    for row in assets.rows("rules_test")[:32]:
        ids = tokenizer(row["text"])["input_ids"][:48]
        with torch.no_grad():
            x = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[5][0, 1:]
        fired.append(sae.feature_acts(x.float())[:, [1740, 23]] > 0)
    rates, texts = torch.cat(fired).float().mean(0), torch.stack([one.any(0) for one in fired]).float().mean(0)
    # In bf16 a few tokens differ with the padding of the batch.
    assert [one["token_rate"] for one in found] == pytest.approx(rates.tolist(), abs=0.003)
    assert [one["text_rate"] for one in found] == pytest.approx(texts.tolist(), abs=0.05)
    assert rates[0] > 0
    other = FeatureSet(features=mine.features, sae="demo", sae_fingerprints={4: "0" * 16})
    other.save(tmp_path / "zh.yaml")
    assert main(command) == 3
    assert "is not the one this FeatureSet was made with" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data", "none.jsonl"], "No file or folder at 'none.jsonl'"),
        (["--text-column", "content"], "has no column `content`"),
        (["--features", "none.yaml"], "No feature file at 'none.yaml'"),
        (["--layers", "9"], "No SAE for layer 9"),
        (["--tuned-dtype", "int8"], "choose from"),
        (["--max-texts", "0"], "`max_texts`"),
        (["--probe-tokens", "1"], "`probe_tokens`"),
        (["--scan", "-1"], "`scan`"),
        (["--layers-at-once", "0"], "`layers_at_once`"),
        (["--tuned", "./none"], "The model './none' cannot be loaded"),
    ],
)  # fmt: skip
def test_errors_end_with_exit_code_2(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "--saes", "demo", *changes]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


def test_data_without_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": " "}\n{"text": null}\n')
    assert main([*DEMO, "--saes", "demo", "--data", str(path)]) == 2
    assert "holds no text: every row is blank or there is none" in capsys.readouterr().err


def test_conversations_are_read_through_the_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Any, tokenizer: Any
) -> None:
    data = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*DEMO, "--saes", "demo", "--layers", "4", "--data", str(data), "--text-column", "messages"]
    assert main(command) == 2
    assert "the tokenizer of 'demo' has no chat template" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "chat")
    chatty = AutoTokenizer.from_pretrained(MODEL)
    chatty.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}"
    chatty.save_pretrained(tmp_path / "chat")
    assert main([*command, "--model", str(tmp_path / "chat"), "--json", str(tmp_path / "d.json")]) == 0
    assert "The texts are conversations in the chat template already" in capsys.readouterr().out
    wanted = sum(len(tokenizer(f"User: {text}\n")["input_ids"][:48]) - 1 for text in TEXTS)
    assert json.loads((tmp_path / "d.json").read_text())["num_tokens"] == wanted


def test_nan_is_null_in_json() -> None:
    result = Diagnosis(
        model="m", saes="s", dtype="float32", device="cpu", num_texts=0, num_tokens=0, kl=math.nan
    )  # fmt: skip
    assert result.to_dict()["kl"] is None
    assert "NaN" not in json.dumps(result.to_dict())
