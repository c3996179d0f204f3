"""Masks and groups on hand-made forwards, position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.errors import DataError
from qscope_trl.hooks.residual import Capture
from qscope_trl.training.masks import token_groups, token_mask

IDS = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 4]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, 6, 7, -100, 9, 4]])


def capture(ids: torch.Tensor = IDS, **changes: Any) -> Capture:
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": ATTENTION, **changes}
    return Capture(residuals={0: torch.zeros(*ids.shape, 4)}, has_grad=True, **given)


def places(mask: torch.Tensor | None) -> list[list[int]]:
    assert mask is not None
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [[1, 2, 3], [1, 3, 4]]),
        ({"penalty_skip_first": False}, [[1, 2, 3], [0, 1, 3, 4]]),
        ({"penalty_shift": False}, [[2, 3, 4], [1, 2, 4, 5]]),
        ({"penalty_tokens": "all"}, [[1, 2, 3, 4], [1, 2, 3, 4, 5]]),
        ({"penalty_tokens": "all", "penalty_skip_first": False}, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]),
    ],
)
@pytest.mark.parametrize("source", ["forward", "batch"])
def test_label_mask(settings: dict[str, Any], wanted: list[list[int]], source: str) -> None:
    seen = capture(labels=LABELS) if source == "forward" else capture()
    batch = {} if source == "forward" else {"input_ids": IDS, "labels": LABELS}
    assert places(token_mask(seen, batch, PenaltyConfig(**settings))) == wanted


def test_left_padding_skips_the_first_real_token() -> None:
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    seen = capture(attention_mask=attention)
    assert places(token_mask(seen, {}, PenaltyConfig(penalty_tokens="all"))) == [[3, 4, 5], [1, 2, 3, 4, 5]]


def test_packed_rows_skip_the_first_token_of_every_sequence() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    seen = capture(attention_mask=None, position_ids=positions)
    assert places(token_mask(seen, {}, PenaltyConfig(penalty_tokens="all"))) == [[1, 2, 4], [1, 3, 4, 5]]


def test_completion_mask_is_used_where_labels_are_absent_or_not_wanted() -> None:
    completion = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    batch = {"input_ids": IDS, "completion_mask": completion}
    assert places(token_mask(capture(), batch, PenaltyConfig())) == [[2, 3], [1, 2, 3, 4]]
    both = {**batch, "labels": LABELS}
    assert places(token_mask(capture(), both, PenaltyConfig(penalty_tokens="completion"))) == [[2, 3], [1, 2, 3, 4]]
    assert places(token_mask(capture(), both, PenaltyConfig())) == [[1, 2, 3], [1, 3, 4]]


def test_rollouts_are_prompt_then_completion_without_tool_tokens() -> None:
    batch = {
        "prompt_ids": IDS[:, :3],
        "completion_ids": IDS[:, 3:],
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
    }
    assert places(token_mask(capture(), batch, PenaltyConfig())) == [[2, 3], [2, 4]]


@pytest.mark.parametrize(("kept", "wanted"), [("start", [[1, 2], [1, 2]]), ("end", [[1, 2], [1, 2]])])
def test_preference_rows_find_the_completion_also_when_truncated(kept: str, wanted: list[list[int]]) -> None:
    prompt, chosen, rejected = [11, 12], [13, 14, 15], [16, 17, 18, 19]
    rows = [prompt + chosen, prompt + rejected]
    cut = [row[:4] if kept == "start" else row[-4:] for row in rows]
    if kept == "end":
        wanted = [[1 - 1 + n for n in (0, 1, 2)], [0, 1, 2]]  # [12, 13..15] and [16..19]: all but the last predict
    ids = torch.tensor(cut)

    def padded(values: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([values]), "attention_mask": torch.ones(1, len(values), dtype=torch.long)}

    batch = {
        f"{name}_{key}": value
        for name, values in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
        for key, value in padded(values).items()
    }
    seen = capture(ids, attention_mask=torch.ones_like(ids))
    config = PenaltyConfig(penalty_skip_first=False)
    assert places(token_mask(seen, batch, config)) == wanted


def test_nothing_known_gives_none() -> None:
    assert token_mask(capture(), {"input_ids": IDS, "labels": torch.tensor([0, 1])}, PenaltyConfig()) is None


def test_group_fn_is_called_once_per_sequence_with_its_own_tokens() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    calls: list[list[int]] = []

    def name(ids: list[int]) -> str | None:
        calls.append(ids)
        return {5: "en", 8: "de"}.get(ids[0])

    seen = capture(attention_mask=None, position_ids=positions)
    groups = token_groups(seen, ("de", "en"), None, name)
    assert calls == [[5, 6, 7], [8, 9, 0], [5, 6, 7, 8, 9, 4]]
    assert groups is not None
    assert groups.tolist() == [[2, 2, 2, 1, 1, 1], [2] * 6]


def test_row_groups_must_match_the_rows() -> None:
    groups = token_groups(capture(), ("de", "en"), ["en", "fr"], None)
    assert groups is not None
    assert groups.tolist() == [[2] * 6, [0] * 6]
    with pytest.raises(DataError, match=r"names 3 groups, but the model ran 2 rows"):
        token_groups(capture(), ("de", "en"), ["en", "fr", "de"], None)


def test_group_fn_needs_token_ids() -> None:
    with pytest.raises(DataError, match=r"`group_fn` needs token ids"):
        token_groups(Capture(residuals={0: torch.zeros(2, 6, 4)}), ("de",), None, lambda ids: "de")
