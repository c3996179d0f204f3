"""Edited residuals: only the chosen rows and positions, only without gradient, and nothing afterwards."""

from __future__ import annotations

import pytest
import torch

from qscope_trl.errors import ModelStructureError
from qscope_trl.hooks.edit import ResidualAdd
from tests.tiny import D_MODEL, tiny_model


def test_unsteered_rows_are_bit_identical() -> None:
    model = tiny_model().eval()
    ids = torch.randint(2, 90, (3, 7))
    rows = torch.tensor([False, True, False])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with ResidualAdd(model, {1: torch.full((D_MODEL,), 5.0)}, rows) as edit:
            steered = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert edit.num_edits == 1
    assert torch.equal(steered[~rows], plain[~rows])
    assert torch.equal(steered[rows][:, :-1], plain[rows][:, :-1])
    assert not torch.allclose(steered[rows][:, -1], plain[rows][:, -1], atol=1e-2)
    assert torch.equal(again, plain)


def test_training_forwards_are_never_edited() -> None:
    model, ids = tiny_model(), torch.tensor([[3, 4, 5]])
    plain = model(input_ids=ids).logits
    with ResidualAdd(model, {1: torch.full((D_MODEL,), 5.0)}, torch.tensor([True])) as edit:
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert edit.num_edits == 0


def test_steering_one_pass_equals_steering_token_by_token() -> None:
    """The log-probabilities of a steered rollout come from one pass; generation made it token by token."""
    model = tiny_model().eval()
    prompt, vectors = torch.tensor([[3, 4, 5]]), {1: torch.full((D_MODEL,), 0.7), 2: torch.full((D_MODEL,), -0.4)}
    rows = torch.tensor([True])
    with torch.no_grad():
        with ResidualAdd(model, vectors, rows):
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        steps = torch.stack(out.logits, dim=1)
        with ResidualAdd(model, vectors, rows, first_position=prompt.shape[1] - 1):
            whole = model(input_ids=out.sequences).logits[:, prompt.shape[1] - 1 : -1]
    assert torch.allclose(steps, whole[:, : steps.shape[1]], atol=1e-4)


def test_steering_without_a_cache_is_the_same_steering() -> None:
    model = tiny_model().eval()
    prompt, vectors = torch.tensor([[3, 4, 5]]), {1: torch.full((D_MODEL,), 0.7), 2: torch.full((D_MODEL,), -0.4)}
    logits = []
    for use_cache in (True, False):
        with torch.no_grad(), ResidualAdd(model, vectors, torch.tensor([True])):
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
                output_logits=True, return_dict_in_generate=True, use_cache=use_cache,
            )  # fmt: skip
        logits.append(torch.stack(out.logits, dim=1))
    assert torch.allclose(*logits, atol=1e-4)


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_layer_that_does_not_exist_is_refused_and_nothing_is_hooked() -> None:
    model = tiny_model()
    with (
        pytest.raises(ModelStructureError, match=r"No decoder layer 4 in `Qwen3ForCausalLM`: it has layers 0-3"),
        ResidualAdd(model, {1: torch.zeros(D_MODEL), 4: torch.zeros(D_MODEL)}, torch.tensor([True])),
    ):
        pass
    assert hook_count(model) == 0


def test_another_number_of_rows_is_refused_and_nothing_remains() -> None:
    model = tiny_model().eval()
    with (
        pytest.raises(ModelStructureError, match=r"2 rows were to be steered or left alone, but the model ran 3"),
        torch.no_grad(),
        ResidualAdd(model, {1: torch.zeros(D_MODEL)}, torch.tensor([True, False])),
    ):
        model(input_ids=torch.tensor([[3, 4]] * 3))
    assert hook_count(model) == 0
