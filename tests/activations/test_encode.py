from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qscope_trl.activations.encode import num_kept, residual_batches, tokenize
from qscope_trl.errors import ConfigError, DataError, ModelStructureError
from qscope_trl.hooks.layers import find_layers
from tests.tiny import D_MODEL, NUM_LAYERS, VOCAB, tiny_model, tiny_tokenizer

LENGTHS = (5, 1, 9, 2, 7, 12, 3)


def some_ids(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def gathered(model, ids, layers, **settings):
    """Residuals per text and layer, put back in the order of the texts."""
    found = {layer: {} for layer in layers}
    for batch in residual_batches(model, ids, layers, show_progress=False, **settings):
        for layer, x in batch.residuals.items():
            for text in batch.text_index.unique().tolist():
                assert text not in found[layer]
                found[layer][text] = x[batch.text_index == text]
    return found


def alone(model, ids, layer):
    """Output of one layer on one text without padding, by a plain hook."""
    seen = []
    handle = find_layers(model)[layer].register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_padding_changes_no_residual(model_type: str, positions: str) -> None:
    changes = {"n_embd": D_MODEL, "n_layer": NUM_LAYERS, "n_head": 4} if model_type == "gpt2" else {}
    model, ids = tiny_model(model_type, **changes), some_ids()
    found = gathered(model, ids, [1, NUM_LAYERS - 1], batch_size=4, positions=positions)
    for layer, by_text in found.items():
        assert set(by_text) == {i for i, n in enumerate(LENGTHS) if n > 1}
        for text, x in by_text.items():
            wanted = alone(model, ids[text], layer)
            wanted = wanted[1:] if positions == "all" else wanted[-1:]
            # Sums over other lengths are rounded in another order: a few units of fp32 on values near 1.
            torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)


def test_batch_size_and_order_change_nothing() -> None:
    model, ids = tiny_model(), some_ids()
    one = gathered(model, ids, [2], batch_size=1)[2]
    back = gathered(model, ids[::-1], [2], batch_size=3)[2]
    for text, x in one.items():
        torch.testing.assert_close(back[len(ids) - 1 - text], x, rtol=1e-5, atol=1e-5)


def test_first_position_is_kept_on_request() -> None:
    model, ids = tiny_model(), some_ids()
    found = gathered(model, ids, [0], skip_first=False)[0]
    assert [found[i].shape[0] for i in range(len(ids))] == list(LENGTHS)


def test_model_is_left_as_it_was_when_the_loop_ends_early() -> None:
    model = tiny_model()
    batches = residual_batches(model, some_ids(), [1], batch_size=1, show_progress=False)
    next(batches)
    assert not model.training
    batches.close()
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the 2 texts has a token after position 0"):
        next(residual_batches(tiny_model(), [[5], []], [0], show_progress=False))


def test_residuals_that_are_not_finite_are_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        find_layers(model)[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(DataError, match="layer 1 are not finite"):
        next(residual_batches(model, some_ids(), [0, 1], show_progress=False))


def test_unknown_layer_and_settings_are_errors() -> None:
    with pytest.raises(ModelStructureError, match="No decoder layer 9"):
        next(residual_batches(tiny_model(), some_ids(), [9], show_progress=False))
    with pytest.raises(ConfigError, match="`batch_size` is 0"):
        next(residual_batches(tiny_model(), some_ids(), [0], batch_size=0, show_progress=False))


def test_tokenize_cuts_the_end_and_for_last_positions_the_beginning() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["w2 w3 w4 w5 w6", "w7", ""]
    assert tokenize(tokenizer, texts, max_length=3) == [[2, 3, 4], [7], []]
    assert tokenize(tokenizer, texts, max_length=3, positions="last") == [[4, 5, 6], [7], []]


def test_tokenize_keeps_a_bos_token_when_it_cuts_the_beginning() -> None:
    class Tokenizer(SimpleNamespace):
        def __call__(self, texts, **_settings):
            return {"input_ids": [[1, *range(2, 2 + len(text))] for text in texts]}

    assert tokenize(Tokenizer(bos_token_id=1), ["abcde"], max_length=3, positions="last") == [[1, 5, 6]]


def test_num_kept_counts_what_is_handed_on() -> None:
    assert [num_kept(n) for n in (0, 1, 2, 5)] == [0, 0, 1, 4]
    assert [num_kept(n, positions="last") for n in (0, 1, 2, 5)] == [0, 0, 1, 1]
    assert [num_kept(n, skip_first=False) for n in (0, 1, 5)] == [0, 1, 5]
