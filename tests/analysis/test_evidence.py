from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from qscope_trl.activations.active import active_features
from qscope_trl.analysis import evidence
from qscope_trl.analysis.evidence import GroupSums, auroc
from qscope_trl.analysis.text_scores import KEEP, TextScores
from qscope_trl.ops import reference
from qscope_trl.sae.topk_sae import TopKSAE
from tests.tiny import D_MODEL, D_SAE, K, random_sae


def make_sae(activation: str) -> TopKSAE:
    weights = random_sae(5)
    extra = {"k": K} if activation == "topk" else {}
    if activation == "jumprelu":
        extra["jump"] = torch.full((D_SAE,), 0.3)
    return TopKSAE(W_enc=weights["W_enc"], b_enc=weights["b_enc"], activation=activation, **extra)


def tokens(count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, D_MODEL, generator=generator)
    return x, torch.arange(count) // 7


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_sklearn_and_the_count_of_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that ties are common.
    positive = torch.randint(0, 6, (23,), generator=generator).double()
    negative = torch.randint(0, 5, (31,), generator=generator).double()
    pairs = positive[:, None] - negative[None, :]
    counted = float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    truth = [1] * 23 + [0] * 31
    assert auroc(positive, negative) == pytest.approx(counted, abs=1e-15)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(truth, torch.cat([positive, negative])), abs=1e-12)


def test_auroc_of_silent_features_is_one_half() -> None:
    assert auroc(torch.zeros(4), torch.zeros(9)) == 0.5


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("chunk_tokens", [1000, 3])
def test_sums_equal_the_dense_ones_in_any_chunking(
    activation: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", chunk_tokens * D_SAE)
    sae, (x, text) = make_sae(activation), tokens()
    sums = GroupSums(sae)
    # Texts 0-2, then 3-7: all tokens of a text come in one batch.
    for rows in (text < 3, text >= 3):
        sums.update(x[rows], text[rows])
    dense = sae.feature_acts(x).double()
    per_text = torch.stack([dense[text == t].amax(0) for t in text.unique()])
    # fp32 products of other shapes may round differently; how differently depends on the processor.
    torch.testing.assert_close(sums.act_sum, dense.sum(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(sums.token_count, (dense > 0).sum(0))
    assert torch.equal(sums.text_count, (per_text > 0).sum(0))
    assert (sums.num_tokens, sums.num_texts) == (50, 8)
    chosen = torch.tensor([3, 90])
    wanted = sae.pre_acts(x.double())[:, chosen].double().mean(0)
    torch.testing.assert_close(sums.mean_pre_act(chosen), wanted, rtol=1e-5, atol=1e-6)


def test_dense_kinds_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 4 * D_SAE)
    seen: list[int] = []
    original = reference.pre_activations

    def spy(x, W, b):
        if W.shape[0] == D_SAE:
            seen.append(x.shape[0])
        return original(x, W, b)

    monkeypatch.setattr(reference, "pre_activations", spy)
    monkeypatch.setattr("qscope_trl.sae.topk_sae.pre_activations", spy)
    list(active_features(make_sae("relu"), tokens()[0]))
    assert sum(seen) == 50
    assert max(seen) == 4


def test_text_figures_equal_the_dense_ones() -> None:
    sae, (x, text) = make_sae("topk"), tokens()
    chosen = torch.tensor([100, 7, 31])
    figures = evidence.TextFigures(sae, chosen, 9)
    for rows in (text < 3, text >= 3):
        figures.update(x[rows], text[rows])
    dense, pre = sae.feature_acts(x).double()[:, chosen], sae.pre_acts(x).double()[:, chosen]
    for t in range(8):
        torch.testing.assert_close(figures.act_sum_XS[t], dense[text == t].sum(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(figures.act_max_XS[t], dense[text == t].amax(0), rtol=1e-6, atol=0)
        # Three rows of the product are rounded in another order than all of them.
        torch.testing.assert_close(figures.pre_act_max_XS[t], pre[text == t].amax(0), rtol=1e-5, atol=1e-6)
    assert figures.tokens_X.tolist() == [7] * 7 + [1, 0]


@pytest.mark.parametrize("keep", ["sum", "max"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_kept_entries_are_what_each_text_comes_to(
    keep: evidence.Keep, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dense kinds come in chunks that cut texts in two.
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 5 * D_SAE)
    sae, (x, text) = make_sae(activation), tokens()
    sums = GroupSums(sae, keep)
    for rows in (text < 3, text >= 3):
        sums.update(x[rows], text[rows])
    found = sums.entries()
    matrix = torch.zeros(8, D_SAE)
    matrix[found.text.long(), found.feature.long()] = found.value
    dense = sae.feature_acts(x)
    wanted = torch.stack([dense[text == t].sum(0) if keep == "sum" else dense[text == t].amax(0) for t in range(8)])
    torch.testing.assert_close(matrix, wanted, rtol=1e-5, atol=1e-6)
    assert found.value.numel() == int((wanted > 0).sum())
    assert sums.text_tokens(9).tolist() == [7] * 7 + [1, 0]
    assert GroupSums(sae).entries().value.numel() == 0


@pytest.mark.parametrize("rank_by", ["mean_difference", "delta", "log_odds", "monolinguality", "auroc"])
def test_scores_text_by_text_equal_those_of_the_running_sums(rank_by: str) -> None:
    sae = make_sae("topk")
    groups, figures = {}, {}
    every = torch.arange(D_SAE)
    for seed, name in enumerate(("target", "one", "two")):
        x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(seed))
        groups[name], figures[name] = GroupSums(sae, KEEP[rank_by]), evidence.TextFigures(sae, every, 9)
        for sink in (groups[name], figures[name]):
            sink.update(x, torch.arange(50) // 7)
    found = TextScores.of(rank_by, list(groups.values()), [9] * 3).observed()
    if rank_by == "auroc":
        positive, *others = [figure.act_max_XS[:8] for figure in figures.values()]
        wanted = torch.tensor([auroc(positive[:, f], torch.cat(others)[:, f]) for f in every], dtype=torch.float64)
    else:
        wanted = evidence.scores(groups, "target")[rank_by]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
