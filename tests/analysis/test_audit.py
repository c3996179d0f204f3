"""Versions of a model of which is known what became of habit and features, and every figure against another way."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from qscope_trl.activations.sampling import Sampling, generate
from qscope_trl.analysis.audit import detectors
from qscope_trl.analysis.audit.result import Audit, DetectorRow
from qscope_trl.analysis.texts import prepare_group
from qscope_trl.errors import DataError, FeatureSetError, ModelStructureError
from tests.analysis.audit_world import (
    BEHAVIOUR,
    HABIT,
    OTHER,
    World,
    blind,
    blocked,
    make_world,
    rotated,
    texts,
)
from tests.analysis.dense import decoded, dense, unexplained
from tests.tiny import tiny_model, tiny_tokenizer

POSITIVE, NEGATIVE, NEUTRAL = texts(HABIT, 1, 80), texts(OTHER, 2, 80), texts(OTHER, 3, 30)
PROMPTS = texts(OTHER, 4, 120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    # The choice among strengths is most of an audit's time here; test_audit_run.py makes it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "_STRENGTHS", (0.01,))
        yield make_world(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def of_rotated(world: World) -> Audit:
    return world.audited(rotated(world.base))


def detector(result: Audit, kind: str, name: str, layer: int | None = None) -> DetectorRow:
    [row] = [row for row in result.detectors if (row.kind, row.name, row.layer) == (kind, name, layer)]
    return row


@torch.no_grad()
def residual(model: Any, text: str, layer: int) -> torch.Tensor:
    """Output of a layer at the tokens of a text but the first, the text alone."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    return model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:]


def num_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def acts(world: World, model: Any, rows: list[str], layer: int, index: int) -> list[np.ndarray]:
    sae = world.saes.load(layer)
    return [dense(sae, residual(model, row, layer))[:, index] for row in rows]


# What is planted


def test_an_untouched_model_has_not_changed(world: World) -> None:
    result = world.audited(copy.deepcopy(world.base))
    assert result.verdict == "nothing changed"
    assert result.behaviour is not None
    assert result.behaviour.base == result.behaviour.tuned > 0.3
    assert result.behaviour.difference == result.behaviour.difference_low == result.behaviour.difference_high == 0
    assert all(row.base == row.tuned for row in [*result.activity, *result.detectors])
    assert result.collateral.kl == pytest.approx(0, abs=1e-6)
    assert result.collateral.loss_difference == 0
    assert [fit.jaccard for fit in result.fits] == [1.0]
    assert result.notes == []


def test_a_behaviour_that_cannot_be_written_went_away_while_its_feature_stays(world: World) -> None:
    result = world.audited(blocked(world.base))
    assert result.verdict == "behaviour went away"
    assert result.behaviour is not None
    assert result.behaviour.tuned == 0
    [on_positive] = [row for row in result.activity if (row.kind, row.where) == ("trained on", "positive texts")]
    assert on_positive.left == on_positive.left_low == 1
    assert detector(result, "probe", "logistic probe", 2).tuned_low > 0.9
    assert result.collateral.kl > 1
    assert any("does not say by what" in note for note in result.notes)


def test_a_feature_turned_out_of_sight_is_silent_while_the_behaviour_stays(of_rotated: Audit) -> None:
    assert of_rotated.verdict == "feature silent, behaviour stayed"
    assert of_rotated.behaviour is not None
    assert of_rotated.behaviour.base == of_rotated.behaviour.tuned
    assert all(sample.base == sample.tuned for sample in of_rotated.samples)
    left = {(row.kind, row.where): row.left for row in of_rotated.activity}
    assert left["trained on", "positive texts"] == left["monitors", "positive texts"] == 0
    assert left["trained on", "own generations that show it"] == 0
    assert detector(of_rotated, "old", "trained on").tuned == 0.5
    assert detector(of_rotated, "probe", "logistic probe", 2).tuned_low > 0.9
    # The direction of the means turns with the residuals, so what it tells is the same.
    means = detector(of_rotated, "probe", "difference of means", 2)
    assert means.tuned == pytest.approx(means.base, abs=1e-6)
    assert of_rotated.collateral.loss_difference == pytest.approx(0, abs=1e-5)
    assert any("layer 2: fvu" in note for note in of_rotated.notes)


def test_without_prompts_a_silent_feature_is_told_decodable_or_not(world: World) -> None:
    silent = {"prompts": None, "behaviour": None, "monitors": None}
    seen = world.audited(rotated(world.base), **silent)
    assert seen.verdict == "feature silent, still decodable"
    assert seen.behaviour is None
    assert any("No monitors were given" in note for note in seen.notes)
    assert world.audited(blind(world.base), **silent).verdict == "feature silent, not decodable"
    assert world.audited(world.base, **silent).verdict == "feature active, behaviour not decided"


def test_shuffled_labels_are_told_by_chance(of_rotated: Audit) -> None:
    row = detector(of_rotated, "shuffled labels", "best probe")
    assert 0.35 < row.tuned < 0.65
    assert row.tuned_low < row.tuned < row.tuned_high < 0.75


# Every figure by another way


def test_scores_of_the_old_features_are_those_of_dense_activations(world: World, of_rotated: Audit) -> None:
    for model, end in ((world.base, "base"), (rotated(world.base), "tuned")):
        groups = [acts(world, model, rows, 2, 5) for rows in (POSITIVE, NEGATIVE)]
        scores = [one.mean() for group in groups for one in group]
        truth = [True] * len(POSITIVE) + [False] * len(NEGATIVE)
        assert getattr(detector(of_rotated, "old", "trained on"), end) == pytest.approx(roc_auc_score(truth, scores))
        tokens = [np.concatenate(group) for group in groups]
        [row] = [row for row in of_rotated.features if row.feature == "L2F5"]
        assert getattr(row, f"mean_{end}") == pytest.approx(tokens[0].mean(), rel=1e-4)
        assert getattr(row, f"rate_{end}") == pytest.approx((tokens[0] > 0).mean(), rel=1e-5)
        assert getattr(row, f"rate_negative_{end}") == pytest.approx((tokens[1] > 0).mean(), rel=1e-5)
        largest = [one.max() for group in groups for one in group]
        assert getattr(row, f"auroc_{end}") == pytest.approx(roc_auc_score(truth, largest))
        [on_positive] = [
            row for row in of_rotated.activity if (row.kind, row.where) == ("trained on", "positive texts")
        ]
        assert getattr(on_positive, end) == pytest.approx(tokens[0].mean(), rel=1e-4)


def test_weights_of_the_set_weigh_its_score(world: World) -> None:
    plain = world.audited(world.base, features="L2F5,L2F9", monitors=None)
    file = world.folder / "weighed.yaml"
    file.write_text("features:\n- {layer: 2, index: 5, weight: 3.0}\n- {layer: 2, index: 9, weight: 0.5}\n")
    weighed = world.audited(world.base, features=str(file), monitors=None)
    mean = {row.feature: row.mean_base for row in plain.features}
    assert plain.activity[0].base == pytest.approx(mean["L2F5"] + mean["L2F9"], rel=1e-6)
    assert weighed.activity[0].base == pytest.approx(3 * mean["L2F5"] + 0.5 * mean["L2F9"], rel=1e-6)


def test_generations_are_judged_and_read_without_their_prompts(world: World, of_rotated: Audit) -> None:
    settings = Sampling(max_new_tokens=12, batch_size=64, max_length=512)
    written = generate(world.base, tiny_tokenizer(), PROMPTS, settings)
    shown = [re.search(BEHAVIOUR.removeprefix("regex:"), one.text) is not None for one in written]
    assert of_rotated.behaviour is not None
    assert of_rotated.behaviour.num_prompts == len(PROMPTS)
    assert of_rotated.behaviour.base == pytest.approx(sum(shown) / len(shown))
    total = {True: [], False: []}  # type: dict[bool, list[float]]
    sae = world.saes.load(2)
    for one, is_shown in zip(written, shown, strict=True):
        ids = torch.tensor([[*one.prompt_ids, *one.ids]])
        with torch.no_grad():
            states = world.base(input_ids=ids, output_hidden_states=True).hidden_states[3][0]
        total[is_shown].extend(dense(sae, states[len(one.prompt_ids) :])[:, 5])
    rows = {row.where: row for row in of_rotated.activity if row.kind == "trained on"}
    assert rows["own generations"].base == pytest.approx(np.mean(total[True] + total[False]), rel=1e-3)
    assert rows["own generations that show it"].base == pytest.approx(np.mean(total[True]), rel=1e-3)
    assert rows["own generations that show it"].num_texts_base == sum(shown)


def test_perplexity_and_divergence_are_those_of_the_models_own_losses(world: World) -> None:
    tuned = tiny_model(seed=1).eval()
    found = world.audited(tuned, prompts=None, behaviour=None).collateral
    losses, kl, tokens, predicted = np.zeros(2), 0.0, 0, 0
    for text in NEUTRAL:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            both = [model(input_ids=ids, labels=ids) for model in (world.base, tuned)]
        losses += [float(one.loss) * (ids.shape[1] - 1) for one in both]
        p, q = (torch.distributions.Categorical(logits=one.logits[0].double()) for one in both)
        kl += float(torch.distributions.kl_divergence(p, q).sum())
        tokens, predicted = tokens + ids.shape[1], predicted + ids.shape[1] - 1
    assert found.num_tokens == predicted
    assert [found.perplexity_base, found.perplexity_tuned] == pytest.approx(np.exp(losses / predicted), rel=1e-5)
    difference = (losses[1] - losses[0]) / predicted
    assert found.loss_difference == pytest.approx(difference, rel=1e-4)
    assert found.loss_difference_low < difference < found.loss_difference_high
    assert found.kl == pytest.approx(kl / tokens, rel=1e-5)


def test_the_saes_fit_is_that_of_dense_reconstructions(world: World, of_rotated: Audit) -> None:
    [fit] = of_rotated.fits
    assert fit.layer == 2
    sae = world.saes.load(2)
    for model, value in ((world.base, fit.fvu_base), (rotated(world.base), fit.fvu)):
        x = torch.cat([residual(model, row, 2) for row in NEUTRAL])
        assert value == pytest.approx(unexplained(x.double().numpy(), decoded(sae, dense(sae, x))), rel=1e-3)


def heldout() -> np.ndarray:
    """Which texts, the positive ones first, are held out."""
    groups = [prepare_group("x", rows, tiny_tokenizer(), holdout=0.5) for rows in (POSITIVE, NEGATIVE)]
    place = {tuple(tiny_tokenizer()(row)["input_ids"]): n for n, row in enumerate(POSITIVE + NEGATIVE)}
    out = np.zeros(len(POSITIVE + NEGATIVE), dtype=bool)
    for group in groups:
        for ids, is_out in zip(group.token_ids, group.heldout, strict=True):
            out[place[tuple(ids)]] = is_out
    return out


def test_retrained_detectors_are_tested_on_texts_they_have_not_seen(world: World, of_rotated: Audit) -> None:
    out, truth = heldout(), np.arange(len(POSITIVE + NEGATIVE)) < len(POSITIVE)
    assert of_rotated.num_heldout == out.sum() == 80
    states = [residual(world.base, row, 2) for row in POSITIVE + NEGATIVE]
    means = np.stack([x.mean(0).numpy() for x in states])
    direction = means[~out & truth].mean(0) - means[~out & ~truth].mean(0)
    wanted = roc_auc_score(truth[out], means[out] @ direction)
    assert detector(of_rotated, "probe", "difference of means", 2).base == pytest.approx(wanted, abs=1e-6)

    sae = world.saes.load(2)
    codes = [dense(sae, x) for x in states]
    high, low = (np.concatenate([codes[n] for n in np.flatnonzero(~out & side)]).mean(0) for side in (truth, ~truth))
    order = [index for index in np.argsort(low - high) if index != 5][:10]
    largest = np.stack([code.max(0) for code in codes])
    best = max(order, key=lambda index: roc_auc_score(truth[~out], largest[~out, index]))
    [found] = [row for row in of_rotated.detectors if row.kind == "new feature" and row.layer == 2]
    assert found.name.split(" / ")[0] == f"L2F{best}"
    assert found.base == pytest.approx(roc_auc_score(truth[out], largest[out, best]))
    assert found.base_low < found.base < found.base_high
    trained = world.audited(world.base, features=f"L2F{best}", monitors=None, prompts=None, behaviour=None)
    assert f"L2F{best}" not in [row.name for row in trained.detectors if row.kind == "new feature"]


def test_nothing_outside_is_changed(world: World) -> None:
    tuned = rotated(world.base).train()
    hooks = num_hooks(tuned)
    before = torch.random.get_rng_state()
    world.audited(tuned)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tuned.training
    assert not world.base.training
    assert num_hooks(tuned) == hooks


def test_another_seed_draws_other_generations(world: World, of_rotated: Audit) -> None:
    again = world.audited(rotated(world.base), seed=1)
    assert [one.base for one in again.samples] != [one.base for one in of_rotated.samples]


def test_last_positions_alone_can_be_looked_at(world: World) -> None:
    result = world.audited(world.base, positions="last", prompts=None, behaviour=None)
    last = [one[-1] for one in acts(world, world.base, POSITIVE, 2, 5)]
    assert result.activity[0].base == pytest.approx(np.mean(last), rel=1e-4)


# Refusals


def test_a_model_of_another_shape_is_refused(world: World) -> None:
    with pytest.raises(ModelStructureError, match="it is no version of it"):
        world.audited(tiny_model(num_hidden_layers=3))
    with pytest.raises(ModelStructureError, match="made with another tokenizer"):
        world.audited(tiny_model(vocab_size=70))


def test_features_outside_the_saes_are_refused(world: World) -> None:
    with pytest.raises(FeatureSetError, match="F999"):
        world.audited(world.base, features="L2F999")


def test_neutral_texts_of_one_token_are_refused(world: World) -> None:
    file = world.folder / "short.jsonl"
    file.write_text('{"text": "w5"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="No neutral text has a token after position 0"):
        world.audited(world.base, neutral=str(file))


def test_a_vocabulary_of_another_size_has_no_divergence(world: World) -> None:
    result = world.audited(tiny_model(vocab_size=100), prompts=None, behaviour=None)
    assert math.isnan(result.collateral.kl)
    assert result.to_dict()["collateral"]["kl"] is None
