"""Repetition features: loops are found where they are, and what grows over them is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.analysis.repetition import Loop, continue_texts, find_loops, find_repetition_features
from qscope_trl.cli import main
from qscope_trl.errors import ConfigError, DataError
from tests.tiny import K, random_sae, sentence, tiny_model, tiny_tokenizer, write_saes
from tests.training.reference import run


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 8], [Loop(1, 3, 3)]),
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], [Loop(1, 3, 3)]),
        ([9, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 8], [Loop(1, 2, 5)]),
        ([9, 1, 2, 3, 1, 2, 3, 4, 1, 2, 3], []),
        ([9, 1, 2, 1, 2, 1, 2, 8], []),
        ([7] * 20, []),
        ([1, 2, 3] * 3 + [4, 5, 6] * 3, [Loop(0, 3, 3), Loop(9, 3, 3)]),
        ([1, 2], []),
    ],
)
def test_loops_are_found(ids: list[int], wanted: list[Loop]) -> None:
    assert find_loops(ids) == wanted


def looping_texts(count: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    return [
        f"{sentence(generator, 3)} " + " ".join([sentence(generator, 3 + n % 3)] * (4 + n % 2)) for n in range(count)
    ]


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


def test_chosen_features_are_those_that_grow_most(saes: Path) -> None:
    """Against plain loops over texts, without batching, padding or sparse sums."""
    texts, model, tokenizer = looping_texts(), tiny_model(), tiny_tokenizer()
    suite = SAESuite.from_pretrained(saes, k=K)
    found = find_repetition_features(
        model, tokenizer, suite, texts, layers=[2], top=5, holdout=0, batch_size=5, show_progress=False
    )
    sae, total, tokens = random_sae(102), torch.zeros(128, dtype=torch.float64), 0
    first_pre = torch.zeros(128, dtype=torch.float64)
    for text in texts:
        ids = tokenizer(text).input_ids
        _, residuals = run(model.eval(), {"input_ids": torch.tensor([ids])}, [2])
        pre = residuals[2][0].detach().double() @ sae["W_enc"].T.double() + sae["b_enc"].double()
        kth = pre.sort(dim=-1, descending=True).values[:, K - 1 : K]
        acts = pre.clamp(min=0) * (pre >= kth)
        for loop in find_loops(ids):
            for step in range(loop.period):
                last = loop.start + (loop.repeats - 1) * loop.period + step
                total += acts[last] - acts[loop.start + step]
                first_pre += pre[loop.start + step]
                tokens += 1
    wanted = (total / tokens).sort(descending=True)
    assert [f.index for f in found.features] == wanted.indices[:5].tolist()
    for place, feature in enumerate(found.features):
        assert feature.evidence["mean_increase"] == pytest.approx(float(wanted.values[place]), rel=1e-4)
        assert feature.threshold == pytest.approx(float(first_pre[feature.index] / tokens), rel=1e-4)
        assert 0 < feature.evidence["loop_rate"] <= 1
    assert found.origin["loops"] == {"chosen_on": 12, "heldout": 0}


def test_held_out_loops_take_no_part(saes: Path) -> None:
    suite = SAESuite.from_pretrained(saes, k=K)
    found = find_repetition_features(
        tiny_model(), tiny_tokenizer(), suite, looping_texts(), layers=[1, 2], top=3, holdout=0.25, show_progress=False
    )
    assert found.origin["loops"] == {"chosen_on": 9, "heldout": 3}
    assert all("heldout_mean_increase" in feature.evidence for feature in found.features)
    assert found.layers == (1, 2)


def test_a_loop_from_the_first_token_is_read_from_its_second_round(saes: Path) -> None:
    suite = SAESuite.from_pretrained(saes, k=K)
    texts = [" ".join(["w5 w6 w7"] * 5), "w9 " + " ".join(["w5 w8 w7"] * 4)]
    found = find_repetition_features(
        tiny_model(), tiny_tokenizer(), suite, texts, layers=[1], top=2, holdout=0, show_progress=False
    )
    assert found.origin["loops"]["chosen_on"] == 2


def test_texts_without_loops_are_refused(saes: Path) -> None:
    suite = SAESuite.from_pretrained(saes, k=K)
    with pytest.raises(DataError, match=r"None of the 1 texts repeats 2 to 64 tokens 3 times .*`--generate-tokens`"):
        find_repetition_features(tiny_model(), tiny_tokenizer(), suite, ["w2 w3 w4"], layers=[1])


def test_loops_over_which_nothing_grows_are_refused(tmp_path: Path) -> None:
    folder = write_saes(tmp_path / "saes", [1])
    silent = random_sae(101)
    silent["b_enc"] -= 1e6
    torch.save(silent, folder / "layer1.sae.pt")
    suite = SAESuite.from_pretrained(folder, k=K)
    with pytest.raises(DataError, match=r"No feature grows over the loops of these texts. Search other layers"):
        find_repetition_features(
            tiny_model(), tiny_tokenizer(), suite, looping_texts(), layers=[1], show_progress=False
        )


def test_continuation_is_the_models_own(saes: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["w5 w6", "w4 w7 w8 w9"]
    continued = continue_texts(model, tokenizer, texts, 6, batch_size=2, max_length=3)
    for text, whole in zip(texts, continued, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids[-3:]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert tokenizer(whole).input_ids == [i for i in alone[0].tolist() if i > 1]


def test_command_writes_repetition_features(saes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "loops.txt").write_text("\n".join(looping_texts()), encoding="utf-8")
    which = ["--model", str(tmp_path / "model"), "--saes", str(saes), "--sae-k", str(K), "--layers", "1"]
    what = ["--repetition", str(tmp_path / "loops.txt"), "--top", "3", "--output", str(tmp_path / "r.yaml")]
    assert main(["find", *which, *what]) == 0
    found = FeatureSet.load(tmp_path / "r.yaml")
    assert len(found) == 3
    assert "3 features of repetition written" in capsys.readouterr().out
    assert found.origin["files"]["repetition"].endswith("loops.txt")


def test_generated_tokens_without_repetition_are_refused() -> None:
    from qscope_trl.config.find import FindConfig

    with pytest.raises(ConfigError, match=r"`--generate-tokens` is for `--repetition`"):
        FindConfig(model="m", saes="s", layers="1", output="o.yaml", positive="a", negative="b", generate_tokens=4)
