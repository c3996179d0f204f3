"""A penalty on one sequence of 32,768 tokens: time and memory of its forward and backward on one layer.

Residuals as Qwen3-1.7B's, in bf16, and an SAE of the release's width. Each variant is the penalty of 10 features on
these residuals and the gradient that reaches them; "gradient alone" is what training holds in any case. The eager
variants are the same formula in plain torch: residuals copied to fp32, for `topk_act` all pre-activations at once.
Time: the variants take turns. Memory, twice: the largest sum of live tensors, counted operation by operation (not
inside compiled operations, so not for `topk_act`); and the peak resident size of a fresh process, which has the
libraries' buffers and the allocator's leftovers in it, 100 MiB and more from one kind of operation to another.

    python benchmarks/long_sequence.py [--tokens 32768] [--rounds 3] [--memory-runs 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reporting import RESULTS, environment, peaks_of, report_peak, write

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.planning.live_bytes import LiveTensors

D_MODEL, D_SAE, K, NUM_FEATURES = 2048, 32768, 50, 10
VARIANTS = ("gradient alone", "preact_hinge", "preact_hinge, eager", "topk_act", "topk_act, eager")


def build(tokens: int) -> dict[str, Callable[[], None]]:
    """For each variant a function that runs it forwards and backwards."""
    from qscope_trl import FeatureId, TopKSAE
    from qscope_trl.ops import reference
    from qscope_trl.training.penalty import LayerFeatures, preact_hinge, topk_act

    generator = torch.Generator().manual_seed(0)
    # As in training, the residuals are no leaf: their gradient passes on, and is not kept.
    below = torch.zeros(D_MODEL, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(1, tokens, D_MODEL, generator=generator, dtype=torch.bfloat16) + below
    direction = torch.randn(D_MODEL, generator=generator, dtype=torch.bfloat16)
    W = torch.empty(D_SAE, D_MODEL, dtype=torch.bfloat16).normal_(std=D_MODEL**-0.5, generator=generator)
    sae = TopKSAE(W_enc=W, b_enc=torch.zeros(D_SAE), k=K)
    index = torch.arange(NUM_FEATURES)
    features = LayerFeatures(
        ids=tuple(FeatureId(0, n) for n in range(NUM_FEATURES)), W_SD=W[index].float(), b_S=torch.zeros(NUM_FEATURES),
        thresholds_GS=torch.zeros(1, NUM_FEATURES), weights_S=torch.ones(NUM_FEATURES), jump_S=None, sae=sae,
    )  # fmt: skip

    def eager_hinge() -> torch.Tensor:
        return reference.pre_activations(x, features.W_SD, features.b_S).relu().sum()

    def eager_topk() -> torch.Tensor:
        values, found = (x @ W.T).topk(K)
        return torch.where(found < NUM_FEATURES, values.relu(), 0).float().sum()

    losses: dict[str, Callable[[], torch.Tensor]] = {
        "gradient alone": lambda: (x @ direction).sum(),
        "preact_hinge": lambda: preact_hinge(x, features).penalty_BT.sum(),
        "preact_hinge, eager": eager_hinge,
        "topk_act": lambda: topk_act(x, features).penalty_BT.sum(),
        "topk_act, eager": eager_topk,
    }

    def run(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward(retain_graph=True)

    return {name: lambda loss=loss: run(loss) for name, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-runs", type=int, default=3)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        build(options.tokens)[options.memory_of]()
        report_peak()
        return
    variants = build(options.tokens)
    # Kernels are compiled on first use.
    small = build(16)
    for variant in small.values():
        variant()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
            sys.stderr.write(f"{name}: {seconds[name][-1]:.2f} s\n")
    peaks = peaks_of(__file__, VARIANTS, options.memory_runs, ["--tokens", str(options.tokens)])
    live: dict[str, float] = {}
    for name in VARIANTS:
        with LiveTensors([]) as tensors:
            variants[name]()
        live[name] = tensors.most / 2**20
    floor = statistics.median(peaks["gradient alone"])
    rows = [
        {
            "variant": name,
            "seconds_median": statistics.median(seconds[name]),
            "seconds": seconds[name],
            "live_above_gradient_alone_mib": None if name == "topk_act" else live[name] - live["gradient alone"],
            "peak_mib": statistics.median(peaks[name]),
            "above_gradient_alone_mib": statistics.median(peaks[name]) - floor,
        }
        for name in VARIANTS
    ]
    size = options.tokens * D_MODEL * 2 / 2**20
    report = {
        "what": f"One sequence of {options.tokens} tokens of width {D_MODEL} in bf16 ({size:.0f} MiB), {NUM_FEATURES} "
        f"features of an SAE of width {D_SAE}, k {K}: forward and backward of the penalty of one layer.",
        "environment": environment(),
        "rows": rows,
    }
    cells = [
        [
            r["variant"],
            f"{r['seconds_median']:.2f}",
            "-" if (above := r["live_above_gradient_alone_mib"]) is None else f"{above:.0f}",
            f"{r['peak_mib']:.0f}",
            f"{r['above_gradient_alone_mib']:.0f}",
        ]
        for r in rows
    ]
    header = ["variant", "time, s", "live above gradient alone, MiB", "peak, MiB", "peak above gradient alone, MiB"]
    print(write(options.output, "long_sequence", report, header, cells))


if __name__ == "__main__":
    main()
