"""Coverage and readings against numpy on single texts, without padding, chunks or batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from qscope_trl.activations.opening import Opened
from qscope_trl.activations.sources import open_source
from qscope_trl.analysis.synthesis.coverage import Coverage, matched_features, survey, survey_store
from qscope_trl.analysis.synthesis.journal import Journal
from qscope_trl.analysis.synthesis.plan import Candidate
from qscope_trl.analysis.synthesis.reading import FeatureReader, readable
from qscope_trl.analysis.synthesis.verify import Verifier
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureId
from qscope_trl.sae.topk_sae import TopKSAE
from tests.analysis.dense import dense
from tests.analysis.synthesis_world import LAYERS, MIN_ACTIVATION, World, make_world, residuals, texts, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def surveyed(world: World, path: Path, **settings: Any) -> Any:
    return survey(
        world.model,
        world.tokenizer,
        world.saes,
        open_source(str(path)),
        min_activation=MIN_ACTIVATION,
        show_progress=False,
        **settings,
    )


@pytest.mark.parametrize("batch_size", [1, 7])
def test_counts_equal_those_of_single_texts(world: World, batch_size: int) -> None:
    found = surveyed(world, world.folder / "others.jsonl", batch_size=batch_size, max_length=10)
    assert found.num_texts == len(world.others)
    for layer in LAYERS:
        wanted = np.zeros(world.saes[layer].d_sae, dtype=int)
        for text in world.others:
            short = " ".join(text.split()[:10])
            acts = dense(world.saes[layer], residuals(world.model, world.tokenizer, short)[layer])
            wanted += (acts[1:] > MIN_ACTIVATION).any(0)
        assert found.counts[layer].tolist() == wanted.tolist()
        assert 0 < wanted.max() < len(world.others)


def test_conversations_are_counted_as_the_template_renders_them(world: World, tmp_path: Path) -> None:
    texts = world.others[:12]
    chats = [{"text": [{"role": "user", "content": text}]} for text in texts]
    rendered = [{"text": f"{text} w2 "} for text in texts]
    found = surveyed(world, write_rows(tmp_path / "chat.jsonl", chats), num_beginnings=1)
    wanted = surveyed(world, write_rows(tmp_path / "text.jsonl", rendered), num_beginnings=1)
    assert found.beginnings == wanted.beginnings
    for layer in LAYERS:
        assert found.counts[layer].tolist() == wanted.counts[layer].tolist()
        assert found.counts[layer].any()


def test_top_texts_are_different_strongest_first_with_the_place_of_the_peak(world: World, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "twice.jsonl", [{"text": text} for text in [*world.others, *world.others[:30]]])
    found = surveyed(world, path, features=world.targets, num_examples=3, batch_size=4)
    largest = world.largest(world.others)
    for place, feature in enumerate(world.targets):
        order = np.argsort(-largest[:, place], kind="stable")[:3]
        examples = found.examples[feature]
        assert [one.text for one in examples] == [world.others[i] for i in order]
        for one, i in zip(examples, order, strict=True):
            # The float32 forward differs between batch sizes by rounding.
            assert one.activation == pytest.approx(largest[i, place], rel=1e-4)
            assert one.place == world.acts(one.text)[1:, place].argmax() + 1


def test_first_texts_that_are_not_blank_are_kept(world: World, tmp_path: Path) -> None:
    rows = [{"text": text} for text in [" ", *world.data[:3], "", world.data[3]]]
    found = surveyed(world, write_rows(tmp_path / "data.jsonl", rows), num_beginnings=4, max_rows=5)
    assert found.num_texts == 5
    assert found.beginnings == world.data[:3]


def test_a_dataset_without_rows_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows, so there is nothing to measure"):
        surveyed(world, write_rows(tmp_path / "empty.jsonl", []))


def test_coverage_is_the_share_of_targets_with_a_text() -> None:
    one, two, three, four = (FeatureId(0, index) for index in range(4))
    coverage = Coverage({one: 0, two: 4, three: 5, four: 9}, num_texts=10, weak_below=5)
    assert coverage.value == 3 / 4
    assert coverage.missing == (one,)
    assert coverage.weak == (one, two)
    after = coverage.plus({one: 5, three: 1, FeatureId(0, 9): 3}, 6)
    assert dict(after.counts) == {one: 5, two: 4, three: 6, four: 9}
    assert (after.value, after.num_texts, after.missing, after.weak) == (1.0, 16, (), (two,))


def test_a_store_is_counted_like_its_matrices(world: World) -> None:
    generator = np.random.default_rng(0)
    matrices = {layer: [sparse.random(9, 128, 0.2, format="csr", rng=generator) for _ in range(2)] for layer in LAYERS}

    def stored(num_rows: int) -> Any:
        return SimpleNamespace(
            path="store",
            num_rows=num_rows,
            d_sae=lambda layer: 128,
            iter_csr=lambda layer, aggregation: iter(matrices[layer] if aggregation == "max" else []),
        )

    found = survey_store(stored(18), LAYERS, min_activation=0.5)
    for layer in LAYERS:
        whole = np.concatenate([matrix.toarray() for matrix in matrices[layer]])
        assert found.counts[layer].tolist() == (whole > 0.5).sum(0).tolist()
    assert found.num_texts == 18
    with pytest.raises(DataError, match="'store' has no rows"):
        survey_store(stored(0), LAYERS)


def test_matched_features_are_those_of_the_layer_that_fire_as_often() -> None:
    counts = torch.tensor([5, 5, 5, 5, 9, 0, 4, 6])
    second = torch.tensor([2, 7, 2, 3, 2, 2, 2, 2])
    target, other = FeatureId(3, 0), FeatureId(3, 2)
    drawn = matched_features([target], [target, other], [{3: counts}, {3: second}], per_target=4, seed=1)[target]
    # Equal counts first, the nearer second count first among them, then the next nearest counts in any order.
    assert [one.index for one in drawn[:2]] == [3, 1]
    assert {one.index for one in drawn[2:]} == {6, 7}
    assert all(one.layer == 3 for one in drawn)
    assert matched_features([target], [target], [{3: counts}], per_target=99)[target].__len__() == 7


def test_only_tokens_of_the_response_count(world: World) -> None:
    reader = FeatureReader(world.saes, world.targets)
    pairs = list(zip(world.others[:20], texts(20, seed=3), strict=True))
    read = reader.read(
        world.model,
        [readable(world.tokenizer, before + " ", after, max_length=99) for before, after in pairs],
        batch_size=6,
    )
    wanted = world.largest([f"{before} {after}" for before, after in pairs], start=20)
    assert np.allclose(read.largest, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted > 0).any(0).all()
    assert (wanted == 0).any(0).all()
    whole = world.largest([f"{before} {after}" for before, after in pairs])
    assert (whole > wanted).any()
    place = read.place.numpy()
    assert (place[wanted > 0] >= 20).all()
    assert (place[wanted == 0] == -1).all()


def test_a_response_beyond_the_length_is_not_read(world: World) -> None:
    cut = readable(world.tokenizer, "w3 w4 w5 ", "w6 w7 w8", max_length=5)
    assert (len(cut.token_ids), cut.start, cut.stop) == (5, 3, 5)
    beyond = readable(world.tokenizer, "w3 w4 w5 ", "w6", max_length=3)
    assert beyond.stop <= beyond.start
    empty = readable(world.tokenizer, "w3 w4 ", "", max_length=9)
    read = FeatureReader(world.saes, world.targets).read(world.model, [beyond, empty])
    assert read.largest.abs().max() == 0


def test_a_slow_tokenizer_reads_both_parts_one_after_the_other() -> None:
    class Slow:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    text = readable(Slow(), "ab", "cde", max_length=4)
    assert text.token_ids == [97, 98, 99, 100]
    assert (text.start, text.stop) == (2, 4)


def test_verification_rejects_texts_in_which_the_feature_is_silent(world: World, tmp_path: Path) -> None:
    feature = world.missing[0]
    config = world.config(tmp_path / "out", mode="instruct")
    opened = Opened(world.model, world.tokenizer, None, LAYERS)  # type: ignore[arg-type]
    others = matched_features([feature], world.targets, [surveyed(world, world.folder / "data.jsonl").counts])
    verifier = Verifier(
        config, world.targets, {str(feature): [str(one) for one in others[feature]]}, opened, world.saes
    )
    prompt = world.data[0][:11]
    found = [Candidate(f"{feature}/response {i}", str(feature), prompt, text) for i, text in enumerate(world.others)]
    journal = Journal(tmp_path / "journal.jsonl", {})
    verdicts = [verdict for _, verdict in verifier.verdicts(found, journal)]
    journal.close()
    # Prompt and response are read as one text, and only the response's tokens count.
    start = len(prompt.split())
    wanted = world.largest([f"{prompt}\n\n{text}" for text in world.others], start=start)
    assert [verdict.activation for verdict in verdicts] == pytest.approx(list(wanted[:, 0]), rel=1e-4, abs=1e-4)
    assert 0 < sum(verdict.activation > MIN_ACTIVATION for verdict in verdicts) < len(verdicts)
    for verdict, row, text in zip(verdicts, wanted, world.others, strict=True):
        firing = [str(one) for one, value in zip(world.targets, row, strict=True) if value > MIN_ACTIVATION]
        assert list(verdict.fires) == firing
        acts = world.acts(f"{prompt}\n\n{text}", others[feature])[start:]
        assert verdict.matched == pytest.approx((acts > MIN_ACTIVATION).any(0).mean())
        assert verdict.tokens == 20


def test_dense_saes_are_read_alike_in_chunks_of_any_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = {
        layer: TopKSAE(W_enc=sae.W_enc, b_enc=sae.b_enc - 0.5, activation="relu") for layer, sae in world.saes.items()
    }
    whole = [readable(world.tokenizer, "", text, max_length=99) for text in world.others[:12]]
    reader = FeatureReader(saes, world.targets)
    wanted = reader.read(world.model, whole, batch_size=5)
    # A chunk of 3 tokens ends in the middle of texts.
    monkeypatch.setattr("qscope_trl.ops.reference._CHUNK_ELEMENTS", 3 * 128)
    found = reader.read(world.model, whole, batch_size=5)
    assert torch.equal(found.place, wanted.place)
    # Matrix products of other sizes round otherwise.
    assert torch.allclose(found.largest, wanted.largest, atol=1e-5)
    for i, text in enumerate(world.others[:12]):
        x = residuals(world.model, world.tokenizer, text)
        for slot, one in enumerate(world.targets):
            acts = dense(saes[one.layer], x[one.layer])[1:, one.index]
            assert float(found.largest[i, slot]) == pytest.approx(acts.max(), abs=1e-4)
            assert int(found.place[i, slot]) == (acts.argmax() + 1 if acts.max() > 0 else -1)
