"""The residual stream that the doctor reads, and what it sums over it, against transformers' own and numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qscope_trl import SAESuite
from qscope_trl.analysis.doctor.diagnosis import diagnose
from qscope_trl.analysis.doctor.fit import Run, fit, places_of, survey
from qscope_trl.analysis.doctor.reading import EMBEDDINGS, place_name, read
from qscope_trl.errors import DataError, ModelStructureError
from qscope_trl.features import Feature, FeatureSet
from tests.analysis.dense import decoded, dense, unexplained
from tests.tiny import D_SAE, NUM_LAYERS, K, prompt_completion_rows, tiny_model, tiny_tokenizer, write_saes

TEXTS = [row["prompt"] + row["completion"] for row in prompt_completion_rows(20, longest=20)]
IDS = tiny_tokenizer()(TEXTS)["input_ids"]
PLACES = tuple(range(-1, NUM_LAYERS + 1))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes") / "x"), k=K)


@torch.no_grad()
def stream(model: Any, ids: list[int]) -> dict[int, torch.Tensor]:
    """Every place of one text, by `hidden_states` and a hook on the last layer; no padding, no batch."""
    last: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: last.append(out))
    was_training = model.training
    output = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True)
    model.train(was_training)
    handle.remove()
    states = {n - 1: state[0] for n, state in enumerate(output.hidden_states)}
    states[NUM_LAYERS] = states[NUM_LAYERS - 1]  # transformers puts the normed state at the last entry
    states[NUM_LAYERS - 1] = (last[0] if isinstance(last[0], torch.Tensor) else last[0][0]).reshape(len(ids), -1)
    return states


def hooks_of(model: Any) -> int:
    """All of them: transformers keeps some of its own after `output_hidden_states`."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("batch_size", [1, 7])
def test_every_place_is_the_models_own(model: Any, batch_size: int) -> None:
    model.train()
    before = hooks_of(model)
    keep = [range(i % 3, len(row)) for i, row in enumerate(IDS)]
    seen: dict[int, list[torch.Tensor]] = {place: [] for place in PLACES}
    text, position = [], []
    for states in read(model, IDS, PLACES, keep=keep, batch_size=batch_size, show_progress=False):
        text += states.text_index.tolist()
        position += states.position.tolist()
        for place in PLACES:
            seen[place].append(states.at[place])
    assert hooks_of(model) == before
    assert model.training
    assert sorted(zip(text, position, strict=True)) == [(i, p) for i, row in enumerate(keep) for p in row]
    assert [len(IDS[i]) for i in dict.fromkeys(text)] == sorted(map(len, IDS), reverse=True)
    wanted = [stream(model, row) for row in IDS]
    for place in PLACES:
        expected = torch.stack([wanted[i][place][p] for i, p in zip(text, position, strict=True)])
        assert torch.allclose(torch.cat(seen[place]), expected, atol=2e-5), place_name(place, NUM_LAYERS)


def test_hooks_come_off_when_reading_stops_early(model: Any) -> None:
    before = hooks_of(model)
    reading = read(model, IDS, PLACES, batch_size=2, show_progress=False)
    next(reading)
    assert hooks_of(model) > before
    reading.close()
    assert hooks_of(model) == before


def test_a_place_the_model_lacks_is_refused(model: Any) -> None:
    before = hooks_of(model)
    with pytest.raises(ModelStructureError, match=f"{NUM_LAYERS + 1}"):
        next(read(model, IDS, (NUM_LAYERS + 1,), show_progress=False))
    assert hooks_of(model) == before


def test_places_beside_the_layers() -> None:
    assert places_of((0, 2), NUM_LAYERS, 1) == [-1, 0, 1, 2, 3]
    assert places_of((NUM_LAYERS - 1,), NUM_LAYERS, 2) == [1, 2, 3, 4]
    assert places_of((1,), NUM_LAYERS, 0) == [1]
    named = [place_name(place, NUM_LAYERS) for place in (EMBEDDINGS, 2, NUM_LAYERS)]
    assert named == ["the embeddings", "layer 2", "the final norm"]


def test_the_sample_is_every_nth_usable_text() -> None:
    ids = [[1], [], *([[1, 2, 3, 4, 5]] * 10)]
    assert Run(token_ids=ids, probe_tokens=40).probe_texts == frozenset(range(2, 12))
    assert Run(token_ids=ids, probe_tokens=12).probe_texts == frozenset({2, 5, 8, 11})
    assert Run(token_ids=[[1], []]).probe_texts == frozenset()


def everything(model: Any, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals after position 0, and at position 0."""
    rows = [stream(model, row)[place] for row in IDS]
    return torch.cat([row[1:] for row in rows]), torch.stack([row[0] for row in rows])


def test_the_survey_counts_norms(model: Any) -> None:
    found = survey(model, Run(token_ids=IDS, batch_size=4, show_progress=False), PLACES)
    for place in PLACES:
        later, first = (x.norm(dim=1).double().numpy() for x in everything(model, place))
        # torch's median of an even number is the lower of the two in the middle.
        assert found.norm[place] == pytest.approx(np.sort(later)[(len(later) - 1) // 2], rel=1e-4)
        assert found.first_norm[place] == pytest.approx(np.sort(first)[(len(first) - 1) // 2], rel=1e-4)
        assert found.outliers[place] == []
    assert found.not_finite == {}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_layers_figures_equal_the_dense_computation(model: Any, suite: SAESuite, batch_size: int) -> None:
    run = Run(token_ids=IDS, batch_size=batch_size, probe_tokens=10**6, show_progress=False)
    layers = (1, 3)
    loaded = {layer: suite.load(layer) for layer in layers}
    chosen = FeatureSet(features=(Feature(layer=1, index=5), Feature(layer=3, index=7)))
    norms = survey(model, run, places_of(layers, NUM_LAYERS, 1))
    found, firing = fit(model, loaded, run, norms, NUM_LAYERS, chosen)
    assert [one.layer for one in found] == [1, 3]
    for one, sae in zip(found, loaded.values(), strict=True):
        x, first = everything(model, one.layer)
        acts, first_acts = dense(sae, x), dense(sae, first)
        x_hat, wide = decoded(sae, acts), x.double().numpy()
        assert one.num_tokens == len(x) == sum(len(row) - 1 for row in IDS)
        assert one.fvu == pytest.approx(unexplained(wide, x_hat), rel=1e-4)
        norm = np.linalg.norm(wide, axis=1)
        cosine = (wide * x_hat).sum(1) / norm / np.linalg.norm(x_hat, axis=1)
        assert one.cosine == pytest.approx(cosine.mean(), rel=1e-4)
        assert one.l0 == pytest.approx((acts > 0).sum(1).mean(), rel=1e-3)
        assert one.short_share == pytest.approx(((acts > 0).sum(1) < K).mean(), abs=1e-3)
        assert one.silent_share == pytest.approx((acts == 0).all(0).mean(), abs=2 / D_SAE)
        assert one.first is not None
        assert one.first.num_tokens == len(IDS)
        wanted = unexplained(first.double().numpy(), decoded(sae, first_acts), about=wide.mean(0))
        assert one.first.fvu == pytest.approx(wanted, rel=1e-4)
        assert one.outlier_share == 0
        assert sorted(one.places) == [one.layer - 1, one.layer, one.layer + 1]
        for place, value in one.places.items():
            there = everything(model, place)[0]
            there_hat = decoded(sae, dense(sae, there))
            assert value == pytest.approx(unexplained(there.double().numpy(), there_hat), rel=1e-4)
    for rates, layer, index in zip(firing, layers, (5, 7), strict=True):
        per_text = [dense(loaded[layer], stream(model, row)[layer][1:])[:, index] > 0 for row in IDS]
        assert rates.token_rate == pytest.approx(np.concatenate(per_text).mean(), rel=1e-3)
        assert rates.text_rate == pytest.approx(np.mean([fired.any() for fired in per_text]), rel=1e-3)
    assert any(rates.token_rate > 0 for rates in firing)


def test_norm_outliers_are_left_out_and_counted_apart(suite: SAESuite) -> None:
    model = tiny_model()
    giant = 7
    with torch.no_grad():  # one token's embedding is a hundred times as large as the others
        model.model.embed_tokens.weight[giant] *= 100
    run = Run(token_ids=IDS, probe_tokens=10**6, show_progress=False)
    norms = survey(model, run, [0, 1, 2])
    later = [(i, p) for i, row in enumerate(IDS) for p, token in enumerate(row) if token == giant and p > 0]
    assert later
    assert sorted(norms.outliers[1]) == later
    sae = suite.load(1)
    [one], _ = fit(model, {1: sae}, run, norms, NUM_LAYERS)
    x, _ = everything(model, 1)
    usual = x[x.norm(dim=1) <= norms.limit(1)]
    assert one.num_tokens == len(usual) == len(x) - len(later)
    assert one.outlier_share == pytest.approx(len(later) / len(x))
    assert one.fvu == pytest.approx(unexplained(usual.double().numpy(), decoded(sae, dense(sae, usual))), rel=1e-4)
    whole = unexplained(x.double().numpy(), decoded(sae, dense(sae, x)))
    assert one.fvu_with_outliers == pytest.approx(whole, rel=1e-3)
    result = diagnose(model, tiny_tokenizer(), suite, TEXTS, layers=[1], show_progress=False)
    [told] = [finding for finding in result.findings if finding.check == "outliers"]
    assert told.severity == "note"
    assert "most often 'w7'" in told.what


def test_neither_batches_nor_lots_of_layers_change_a_figure(model: Any, suite: SAESuite) -> None:
    one, other = (
        diagnose(model, tiny_tokenizer(), suite, TEXTS, show_progress=False, batch_size=size, layers_at_once=lot)
        for size, lot in ((1, 1), (16, 4))
    )
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.fvu == pytest.approx(theirs.fvu, rel=1e-4)
        assert mine.readings == pytest.approx(theirs.readings, rel=1e-3)
        assert mine.places == pytest.approx(theirs.places, rel=1e-3)
    assert [finding.severity for finding in one.findings] == [finding.severity for finding in other.findings]


def test_the_model_is_left_as_it_was(model: Any, suite: SAESuite) -> None:
    model.train()
    model.model.layers[1].eval()
    hooks, before = hooks_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    diagnose(model, tiny_tokenizer(), suite, TEXTS[:6], show_progress=False)
    assert model.training
    assert not model.model.layers[1].training
    assert model.model.layers[2].training
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_residuals_that_are_not_finite_end_in_a_misfit(suite: SAESuite) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(math.inf)
    result = diagnose(model, tiny_tokenizer(), suite, TEXTS, show_progress=False)
    assert (result.exit_code, result.layers) == (3, ())
    [told] = result.findings
    assert told.check == "dtype"
    assert told.what.startswith("In float32 the residuals of")
    assert "are NaN or inf at layer 2, and at 2 places after it" in told.what
    assert told.layers == (2, 3)
    assert told.action == "Check the model's weights."


def test_texts_without_a_second_token_are_refused(model: Any, suite: SAESuite) -> None:
    with pytest.raises(DataError, match="none of the 3 texts has a token after position 0"):
        diagnose(model, tiny_tokenizer(), suite, ["w2", "w3", ""], show_progress=False)


def test_saes_of_another_width_or_too_many_layers_end_in_a_misfit(model: Any, tmp_path: Path) -> None:
    folder = write_saes(tmp_path / "saes", [0, NUM_LAYERS])
    torch.save(torch.load(write_saes(tmp_path / "wide", [1], d_model=48) / "layer1.sae.pt"), folder / "layer1.sae.pt")
    saes = SAESuite.from_pretrained(folder, k=K)
    result = diagnose(model, tiny_tokenizer(), saes, TEXTS, show_progress=False)
    assert result.exit_code == 3
    assert [fit.layer for fit in result.layers] == [0]
    beyond, wide = [finding for finding in result.findings if finding.check == "shape"]
    assert beyond.what == f"There are SAEs for layer {NUM_LAYERS}, but the model has layers 0-{NUM_LAYERS - 1}."
    assert "count entries of `hidden_states`" in beyond.why
    assert wide.what == "The SAEs of layer 1 read residuals of width 48, the model's are 32 wide."
