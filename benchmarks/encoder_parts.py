"""Where the encoder's time goes: products of chunks, selection from the slab, sorting, and the backward's gather-sum.

Each part alone on the encoder's own chunk sizes, 20 runs, median; ratios are to the bare product of the whole.
Backward: `(T, k)` weights on rows drawn evenly, and by Zipf's law (exponent 1.1), as features fire.

    python benchmarks/encoder_parts.py [--device cpu|cuda] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoder import DTYPES, SHAPES, operands, synchronise
from reporting import RESULTS, environment, write
from torch import Tensor

from qscope_trl.ops import build
from qscope_trl.ops import topk_encode as encoder
from qscope_trl.ops.sparse import gather_sum

RUNS = 20


def median_ms(function: Callable[[], Any], device: str) -> float:
    times = []
    for number in range(RUNS + 2):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if number >= 2:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def chunked_products(x: Tensor, W: Tensor, device: str) -> None:
    slab = torch.empty(encoder._SLAB[device], dtype=torch.float32 if device == "cuda" else x.dtype, device=device)
    for chunk in encoder.feature_chunks(device, x.shape[0], W):
        for rows in encoder.token_blocks(device, x.shape[0], chunk.stop - chunk.start):
            if device == "cuda":
                encoder.fill_slab(slab, x[rows], W[chunk])
            else:
                view = slab[: (rows.stop - rows.start) * (chunk.stop - chunk.start)].view(rows.stop - rows.start, -1)
                torch.mm(x[rows], W[chunk].T, out=view)


def selections(x: Tensor, W: Tensor, b: Tensor, k: int, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Selecting from slabs that are ready, and sorting what was selected."""
    ops = getattr(torch.ops, f"qscope_trl_{device}")
    T = x.shape[0]
    chunk = next(encoder.feature_chunks(device, T, W))
    rows = encoder.token_blocks(device, T, chunk.stop)[0]
    num_chunks = W.shape[0] // chunk.stop
    slabs = [
        torch.mm(x[rows].float(), W[n * chunk.stop : (n + 1) * chunk.stop].float().T)
        for n in range(min(num_chunks, 64))
    ]
    if device == "cpu":
        slabs = [slab.to(x.dtype) for slab in slabs]
    acts = torch.empty(rows.stop, k, device=device)
    indices = torch.empty(rows.stop, k, dtype=torch.int64, device=device)
    state: dict[str, Tensor] = {}
    b = b.float()

    def select() -> None:
        if device == "cuda":
            state["keys"] = torch.zeros(rows.stop, k, dtype=torch.int64, device=device)
            rest: tuple[Tensor, ...] = ()
        else:
            state["keys"] = torch.empty(rows.stop, 2 * k + 16, dtype=torch.int64)
            state["counts"] = torch.zeros(rows.stop, dtype=torch.int32)
            rest = (state["counts"], torch.zeros(rows.stop, dtype=torch.int64))
        for n, slab in enumerate(slabs):
            first = n * chunk.stop
            ops.select_chunk(slab, b[first : first + chunk.stop], first, state["keys"], *rest, k)

    def sort() -> None:
        if device == "cuda":
            ops.finish(state["keys"], acts, indices)
        else:
            ops.finish(state["keys"].clone(), state["counts"], k, acts, indices)

    return select, sort


def measure(shape: tuple[int, int, int, int], dtype: str, device: str) -> dict[str, Any]:
    T, _, F, k = shape
    x, W, b = operands(shape, DTYPES[dtype], device)
    select, sort = selections(x, W, b, k, device)
    chunk = next(encoder.feature_chunks(device, T, W))
    blocks = encoder.token_blocks(device, T, chunk.stop)
    # What `select` covers, scaled to all tokens and features.
    scale = T / blocks[0].stop * F / (chunk.stop * min(F // chunk.stop, 64))
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(T, k, generator=generator).to(device)
    even = torch.randint(F, (T, k), generator=generator).to(device)
    zipf = torch.multinomial(torch.arange(1, F + 1).float().pow(-1.1), T * k, replacement=True, generator=generator)
    zipf = zipf.view(T, k).to(device)
    dense = torch.mm(x, W.T)
    return {
        "shape": shape,
        "dtype": dtype,
        "slab": [blocks[0].stop, chunk.stop],
        "bare mm": median_ms(lambda: torch.mm(x, W.T), device),
        "chunked products": median_ms(lambda: chunked_products(x, W, device), device),
        "select": scale * median_ms(select, device),
        "sort": T / blocks[0].stop * median_ms(sort, device),
        "torch.topk of all": median_ms(lambda: dense.topk(k, dim=1), device),
        "backward, even": median_ms(lambda: gather_sum(weights, even, W), device),
        "backward, Zipf": median_ms(lambda: gather_sum(weights, zipf, W), device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = options.device
    build.load(device)
    dtypes = DTYPES if device == "cpu" else ["bf16"]
    with torch.no_grad():
        rows = [measure(shape, dtype, device) for shape in SHAPES[device] for dtype in dtypes]
    report = {
        "what": f"Parts of the Top-K encoder on {device}, milliseconds, in brackets of the bare product; {RUNS} runs.",
        "environment": environment(),
        "rows": rows,
    }
    parts = [name for name in rows[0] if name not in ("shape", "dtype", "slab")]
    cells = [
        [
            ", ".join(map(str, r["shape"])),
            r["dtype"],
            " x ".join(map(str, r["slab"])),
            *(f"{r[part]:.2f} ({r[part] / r['bare mm']:.3f})" for part in parts),
        ]
        for r in rows
    ]
    print(write(options.output, f"encoder_parts_{device}", report, ["T, d, F, k", "dtype", "slab", *parts], cells))


if __name__ == "__main__":
    main()
