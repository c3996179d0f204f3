"""Features summed up by document, against sums over dense activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qscope_trl.activations.active import document_batches, document_features
from qscope_trl.activations.encode import tokenize
from qscope_trl.activations.opening import load_encoders
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE
from tests.tiny import sentence, tiny_model, tiny_tokenizer, write_saes


def make_sae(activation: str, d_model: int = 8, d_sae: int = 40) -> TopKSAE:
    generator = torch.Generator().manual_seed(1)
    return TopKSAE(
        W_enc=torch.randn(d_sae, d_model, generator=generator),
        b_enc=torch.randn(d_sae, generator=generator),
        k=5 if activation == "topk" else None,
        activation=activation,  # type: ignore[arg-type]
        jump=torch.full((d_sae,), 0.5) if activation == "jumprelu" else None,
    )


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_document_features_equal_sums_over_dense_activations(activation: str) -> None:
    sae = make_sae(activation)
    x = torch.randn(13, 8, generator=torch.Generator().manual_seed(2))
    lengths = {7: 4, 2: 1, 5: 8}
    text_index = torch.tensor([i for i, n in lengths.items() for _ in range(n)])
    found = document_features(sae, x, text_index)
    dense = sae.feature_acts(x).double()
    expected = []
    for document in sorted(lengths):
        rows = dense[text_index == document]
        for feature in (rows > 0).any(0).nonzero().flatten().tolist():
            column = rows[:, feature]
            figures = (column.max(), column.mean(), column[-1], (column > 0).double().mean())
            expected.append([document, feature, *(float(v) for v in figures)])
    ids, values = torch.tensor(expected)[:, :2].long(), torch.tensor(expected)[:, 2:]
    assert torch.equal(found.document, ids[:, 0])
    assert torch.equal(found.feature, ids[:, 1])
    torch.testing.assert_close(torch.stack([found.max, found.mean, found.last, found.rate], 1), values)


def test_tokens_without_any_active_feature_give_no_entry() -> None:
    sae = TopKSAE(W_enc=torch.eye(4), b_enc=torch.full((4,), -10.0), k=2)
    found = document_features(sae, torch.zeros(3, 4), torch.tensor([0, 0, 1]))
    assert [column.numel() for column in found] == [0] * 6


def test_batches_hold_every_document_once_whatever_the_batch_size(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    suite = SAESuite.from_pretrained(write_saes(tmp_path), k=4)
    generator = torch.Generator().manual_seed(0)
    texts = [*(sentence(generator, n) for n in (5, 2, 9, 1)), ""]
    ids = tokenize(tokenizer, [*texts, texts[0]])
    saes = load_encoders(model, suite, (0, 1))
    runs = []
    for batch_size in (1, 3):
        rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for batch in document_batches(model, saes, ids, batch_size=batch_size, show_progress=False):
            for layer, features in batch.layers.items():
                for document, tokens in zip(batch.documents.tolist(), batch.num_tokens.tolist(), strict=True):
                    assert (layer, document) not in rows
                    assert tokens == len(ids[document]) - 1
                    of = features.document == document
                    rows[layer, document] = (features.feature[of], features.max[of])
        runs.append(rows)
    kept = {i for i, row in enumerate(ids) if len(row) > 1}
    assert {document for _, document in runs[0]} == kept
    assert runs[0].keys() == runs[1].keys()
    for key, (features, largest) in runs[0].items():
        assert torch.equal(features, runs[1][key][0])
        torch.testing.assert_close(largest, runs[1][key][1], rtol=1e-5, atol=1e-5)
