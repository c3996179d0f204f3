"""Penalties against their formulas, their gradients against finite differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qscope_trl import Feature, SAESuite
from qscope_trl.training.penalty import LayerFeatures, open_layer, preact_hinge, topk_act
from tests.tiny import D_MODEL, K, random_sae, write_saes

FEATURES = [
    Feature(layer=1, index=3, weight=1.0, threshold=0.1, group_thresholds={"en": -0.5}),
    Feature(layer=1, index=90, weight=2.5, threshold=-0.2),
]


@pytest.fixture
def suite(tmp_path: Path) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path / "saes"), k=K)


def residuals(rows: int = 3, length: int = 40) -> torch.Tensor:
    return 2 * torch.randn(rows, length, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_hinge_is_the_published_formula(suite: SAESuite) -> None:
    x, sae = residuals(), {k: v.double() for k, v in random_sae(101).items()}
    groups = torch.randint(0, 2, x.shape[:2], generator=torch.Generator().manual_seed(1))
    features = open_layer(suite, 1, FEATURES, ("en",), "preact_hinge")
    terms = preact_hinge(x, features, groups)
    for row in range(3):
        for t in range(40):
            wanted = 0.0
            for feature in FEATURES:
                f = float(sae["W_enc"][feature.index] @ x[row, t] + sae["b_enc"][feature.index])
                wanted += feature.weight * max(0.0, f - feature.threshold_for("en" if groups[row, t] else None))
            assert float(terms.penalty_BT[row, t]) == pytest.approx(wanted, abs=1e-6)


def test_topk_act_equals_the_dense_sae(suite: SAESuite) -> None:
    x, sae = residuals().float(), suite.load(1, decoder=False)
    features = open_layer(suite, 1, FEATURES, (), "topk_act")
    terms = topk_act(x, features)
    dense = sae.feature_acts(x)
    torch.testing.assert_close(terms.values_BTS[..., 0], dense[..., 3])
    torch.testing.assert_close(terms.penalty_BT, dense[..., 3] + 2.5 * dense[..., 90])
    assert 0 < int(terms.active_BTS.sum()) < terms.active_BTS.numel()
    assert torch.equal(terms.active_BTS[..., 1], dense[..., 90] > 0)


@pytest.mark.parametrize("function", [preact_hinge, topk_act])
def test_gradient_equals_finite_differences(suite: SAESuite, function: object) -> None:
    features = open_layer(suite, 1, FEATURES, (), "topk_act")
    double = LayerFeatures(
        features.ids,
        *(t.double() for t in features[1:5]),
        features.jump_S,
        features.sae.double(),  # type: ignore
    )
    x = residuals(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, double).penalty_BT, (x,))  # type: ignore[operator]


def test_bf16_residuals_are_read_in_fp32_under_autocast(suite: SAESuite) -> None:
    features = open_layer(suite, 1, FEATURES, (), "preact_hinge")
    x = residuals().bfloat16()
    wanted = preact_hinge(x.float(), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = preact_hinge(x, features)
    assert found.values_BTS.dtype == torch.float32
    assert torch.equal(found.values_BTS, wanted.values_BTS)


def test_only_the_chosen_rows_are_opened_for_the_hinge(suite: SAESuite) -> None:
    features = open_layer(suite, 1, FEATURES, (), "preact_hinge")
    assert features.sae is None
    assert features.W_SD.shape == (2, D_MODEL)


@pytest.mark.parametrize(
    ("asked", "residual", "wanted"),
    [
        (None, torch.float32, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_a_whole_encoder_follows_the_layers_dtype_unless_one_is_asked_for(
    tmp_path: Path, asked: torch.dtype | None, residual: torch.dtype, wanted: torch.dtype
) -> None:
    suite = SAESuite.from_pretrained(write_saes(tmp_path / "saes"), k=K, dtype=asked)
    assert SAESuite.from_pretrained(suite, layers=[1]).dtype == asked
    opened = open_layer(suite, 1, FEATURES, (), "topk_act")
    x = residuals().to(residual)
    used = opened.for_residual(x)
    assert used.sae is not None
    assert used.sae.W_enc.dtype == wanted
    assert used.W_SD.dtype == used.b_S.dtype == used.sae.b_enc.dtype == torch.float32
    assert used.for_residual(x) is used
    # The rounded encoder decides which features are active, and gives their values.
    sae = random_sae(101)
    f = x.float() @ sae["W_enc"].to(wanted).float().T + sae["b_enc"]
    kth = f.topk(K).values[..., -1:]
    columns = [feature.index for feature in FEATURES]
    chosen = f[..., columns]
    acts = torch.where((chosen >= kth) & (chosen > 0), chosen, 0)
    assert acts.any()
    torch.testing.assert_close(topk_act(x, used).values_BTS, acts, atol=1e-5, rtol=1e-5)


def test_a_whole_encoder_stays_in_its_file_until_it_is_used_otherwise(suite: SAESuite) -> None:
    opened = open_layer(suite, 1, FEATURES, (), "topk_act")
    assert opened.for_residual(residuals().float()) is opened
    assert opened.for_residual(residuals().bfloat16()) is not opened
