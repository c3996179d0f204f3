from __future__ import annotations

from typing import Any

import pytest
import torch

from qscope_trl.activations.encode import ResidualBatch, residual_batches, tokenize
from qscope_trl.analysis.evidence import GroupSums, collect
from qscope_trl.analysis.outliers import NormLimits, norm_limits
from qscope_trl.errors import ConfigError
from qscope_trl.sae.topk_sae import TopKSAE
from tests.tiny import D_MODEL, K, random_sae, tiny_model, tiny_tokenizer

TEXTS = [[" ".join(f"w{2 + (7 * i + j) % 90}" for j in range(3 + i % 5)) for i in range(20)] for _ in range(2)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_limits_are_the_median_norms_of_the_first_texts(model: Any) -> None:
    ids = [tokenize(tiny_tokenizer(), texts) for texts in TEXTS]
    limits = norm_limits(model, ids, [0, 2], ratio=3, show_progress=False)
    assert limits is not None
    assert limits.ratio == 3.0
    sample = [row for texts in ids for row in texts[:16]]
    for layer in (0, 2):
        norms = [
            batch.residuals[layer].norm(dim=-1)
            for batch in residual_batches(model, sample, [layer], batch_size=1, show_progress=False)
        ]
        assert limits.median[layer] == pytest.approx(float(torch.cat(norms).median()), rel=1e-4)


def test_without_a_ratio_there_is_no_limit(model: Any) -> None:
    assert norm_limits(model, [], [0], ratio=0, show_progress=False) is None
    assert norm_limits(model, [], [0], ratio=None, show_progress=False) is None


@pytest.mark.parametrize("ratio", [1.0, 0.5, -3.0, float("nan")])
def test_a_ratio_that_masks_half_of_all_tokens_is_refused(model: Any, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"`max_norm_ratio` is .*; it is above 1"):
        norm_limits(model, [[[1, 2, 3]]], [0], ratio=ratio, show_progress=False)


def test_tokens_beyond_the_limit_are_counted_and_take_no_part() -> None:
    weights = random_sae(3)
    sae = TopKSAE(W_enc=weights["W_enc"], b_enc=weights["b_enc"], k=K)
    x = torch.nn.functional.normalize(torch.randn(12, D_MODEL), dim=-1)
    x[[2, 7, 8]] *= 25
    text = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3] * 3)
    limits = NormLimits({0: 1.0, 1: 3.0}, 10.0)
    sinks, plain = {0: GroupSums(sae), 1: GroupSums(sae)}, {0: GroupSums(sae)}
    masked = collect(iter([ResidualBatch({0: x, 1: x}, text)]), sinks, plain, limits=limits)
    assert masked == {0: 3, 1: 0}
    kept = torch.tensor([i for i in range(12) if i not in (2, 7, 8)])
    wanted = GroupSums(sae)
    wanted.update(x[kept], text[kept])
    for found in (sinks[0], plain[0]):
        assert torch.equal(found.act_sum, wanted.act_sum)
        # Both tokens of text 2 are masked, so it is no text.
        assert (found.num_tokens, found.num_texts) == (9, 3)
        assert found.text_tokens(4).tolist() == [3, 3, 0, 3]
    assert sinks[1].num_tokens == 12
    assert collect(iter([ResidualBatch({0: x}, text)]), {0: GroupSums(sae)}) == {0: 0}
