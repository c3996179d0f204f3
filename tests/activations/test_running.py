"""Values over the prefixes of growing texts: as those of each text token by token, however many come at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qscope_trl import FeatureId
from qscope_trl.activations.running import RunningValues
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.rules import TokenValues

FEATURES = (FeatureId(0, 1), FeatureId(0, 2))


@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (3, 1, 2, 1)], ids=str)
def test_values_of_prefixes_equal_those_of_texts_token_by_token(chunks: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(3, 7, 2, generator=generator) * (torch.rand(3, 7, 2, generator=generator) > 0.4)
    keep = torch.rand(3, 7, generator=generator) > 0.3
    values = RunningValues(FEATURES)
    found: dict[str, list[Tensor]] = {name: [] for name in ("max", "mean", "last", "rate")}
    start = 0
    for size in chunks:
        values.extend(acts[:, start : start + size], keep[:, start : start + size])
        for name, parts in found.items():
            parts.append(torch.stack([values.values(feature, name) for feature in FEATURES], dim=-1))
        start += size
    for name, parts in found.items():
        whole = torch.cat(parts, dim=1)
        for row in range(3):
            kept = TokenValues(FEATURES, acts[row, keep[row]].numpy())
            wanted = torch.tensor([list(kept.values(f, name)) for f in FEATURES]).T
            # A token that does not count leaves what was before it.
            count = keep[row].cumsum(0)
            expected = torch.stack([wanted[c - 1] if c else torch.zeros(2).double() for c in count.tolist()])
            assert torch.allclose(whole[row], expected, rtol=1e-7)


def test_other_texts_can_take_the_places() -> None:
    running = RunningValues(FEATURES)
    running.extend(torch.tensor([[[1.0, 2.0]], [[0.0, 5.0]]]))
    running.select(torch.tensor([1, 1]))
    running.extend(torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]]))
    assert running.values(FEATURES[0], "max").tolist() == [[3.0], [0.0]]
    assert running.values(FEATURES[1], "mean").tolist() == [[2.5], [2.5]]


def test_what_does_not_fit_is_refused() -> None:
    running = RunningValues(FEATURES)
    with pytest.raises(ConfigError, match=r"`acts` has the shape \(2, 3\); it is \(texts, tokens, 2 features\)"):
        running.extend(torch.ones(2, 3))
    running.extend(torch.ones(2, 1, 2))
    with pytest.raises(ConfigError, match="`median` is no aggregation"):
        running.values(FEATURES[0], "median")
    with pytest.raises(DataError, match="L9F9 is not among"):
        running.values(FeatureId(9, 9), "max")
