"""Running statistics equal direct means, also over several processes and after a restart."""

from __future__ import annotations

import pytest
import torch

from qscope_trl import FeatureId
from qscope_trl.monitor.statistics import FeatureStatistics

IDS = (FeatureId(1, 3), FeatureId(4, 0), FeatureId(1, 9))
CPU = torch.device("cpu")


def batch(seed: int, tokens: int, features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, features, generator=generator)
    return values, values > 0, values.relu().sum(1), torch.rand(tokens, generator=generator) < 0.6


def test_means_equal_a_direct_computation_over_masked_tokens() -> None:
    statistics = FeatureStatistics(IDS, "mean_act")
    seen = {1: [batch(0, 20, 2), batch(1, 7, 2)], 4: [batch(2, 20, 1)]}
    for layer, batches in seen.items():
        for values, active, penalty, mask in batches:
            statistics.update(layer, values, active, penalty, mask)
    found = statistics.metrics(None, CPU)
    values, active, penalty, mask = (torch.cat(parts) for parts in zip(*seen[1], strict=True))
    assert found["L1F3/mean_act"] == pytest.approx(float(values[mask][:, 0].mean()), abs=1e-6)
    assert found["L1F9/mean_act"] == pytest.approx(float(values[mask][:, 1].mean()), abs=1e-6)
    assert found["L1F9/firing_rate"] == pytest.approx(float(active[mask][:, 1].double().mean()))
    assert found["L1/penalty"] == pytest.approx(float(penalty[mask].mean()), abs=1e-6)
    assert found["penalty"] == pytest.approx(found["L1/penalty"] + found["L4/penalty"])


def test_nan_at_a_masked_token_does_not_count() -> None:
    statistics = FeatureStatistics(IDS[:1], "mean_act")
    values, active, penalty, mask = batch(0, 5, 1)
    mask = torch.tensor([True, True, False, True, True])
    values[2], penalty[2] = float("nan"), float("nan")
    statistics.update(1, values, active, penalty, mask)
    assert statistics.metrics(None, CPU)["L1F3/mean_act"] == pytest.approx(float(values[mask].mean()), abs=1e-6)


def test_processes_with_different_data_reduce_to_the_whole_and_each_reduces_once() -> None:
    halves, whole = [FeatureStatistics(IDS, "mean_act") for _ in range(2)], FeatureStatistics(IDS, "mean_act")
    halves[0].update(1, *batch(0, 20, 2))
    whole.update(1, *batch(0, 20, 2))
    whole.update(4, *batch(1, 9, 1))
    halves[1].update(4, *batch(1, 9, 1))  # the first process never sees layer 4, the second never layer 1
    sums = torch.stack([torch.tensor(half.state()) for half in halves]).sum(0)
    calls = []

    def reduce_fn(mine: torch.Tensor) -> torch.Tensor:
        calls.append(mine)
        return sums.to(mine)

    assert halves[0].metrics(reduce_fn, CPU) == pytest.approx(whole.metrics(None, CPU))
    assert FeatureStatistics(IDS, "mean_act").metrics(reduce_fn, CPU) == pytest.approx(whole.metrics(None, CPU))
    assert len(calls) == 2
    # A checkpoint holds the sums of all, also from a process without data.
    assert FeatureStatistics(IDS, "mean_act").state(reduce_fn, CPU) == pytest.approx(whole.state())
    assert len(calls) == 3


def test_state_goes_on_where_it_stopped_and_reset_forgets() -> None:
    one, two = FeatureStatistics(IDS, "mean_act"), FeatureStatistics(IDS, "mean_act")
    one.update(1, *batch(0, 20, 2))
    two.load_state(one.state(), CPU)
    assert two.metrics(None, CPU) == one.metrics(None, CPU) != {}
    two.load_state([1.0], CPU)  # of another feature set
    assert two.metrics(None, CPU) == one.metrics(None, CPU)
    two.reset()
    assert two.metrics(None, CPU) == {}
    assert two.state() is None
