"""Time, memory and exactness of the Top-K encoder against the bare matrix product, torch, and other packages.

Every round runs all variants once, in an order shuffled anew; ratios are to the bare `torch.mm` of the same round and
dtype, which is the floor of anything that multiplies everything. `exact` is the share of 256 tokens whose set of
features is that of fp64 on the same inputs. Memory is what a call adds at its peak, its results included: on a GPU by
torch's allocator, on a CPU by the resident size of a fresh process. Other packages are measured where installed:

    pip install eai-sparsify sae-lens
    python benchmarks/encoder.py [--device cpu|cuda] [--rounds 15] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, environment, median_interval, peak_mib, peaks_of, report_peak, write
from torch import Tensor

from qscope_trl.ops import backend
from qscope_trl.ops.feature_rank import count_above, feature_rank
from qscope_trl.ops.topk_encode import topk_encode

SHAPES = {
    "cpu": [(512, 1024, 16384, 50), (1024, 2048, 32768, 50)],
    "cuda": [(4096, 2048, 32768, 50), (8192, 2048, 131072, 100), (8192, 4096, 65536, 50), (4096, 5120, 81920, 100)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_FEATURES = 20
FLOOR = "bare mm"


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    T, d, F, _ = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(T, d, generator=generator, device=device)
    W = torch.randn(F, d, generator=generator, device=device) / d**0.5
    b = torch.randn(F, generator=generator, device=device) / 8
    return x.to(dtype), W.to(dtype), b.to(dtype)


def bare(x: Tensor, W: Tensor, *_rest: Any) -> Tensor:
    return torch.mm(x, W.T)


def eager(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acts, indices = torch.nn.functional.linear(x, W, b).topk(k, dim=-1)
    return acts.relu(), indices


def ours(kernel: str) -> Callable[..., Any]:
    def run(x: Tensor, W: Tensor, b: Tensor, k: int) -> Any:
        os.environ[backend.SWITCH] = kernel
        return topk_encode(x, W, b, k)

    return run


def rank(x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    os.environ[backend.SWITCH] = x.device.type
    feature_rank(x, W, b, k, chosen(W))


def chosen(W: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(W.shape[0], generator=generator)[:NUM_FEATURES].to(W.device)


def variants(device: str) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        FLOOR: bare,
        "eager linear + topk": eager,
        "torch.compile of eager": torch.compile(eager),
        "topk_encode": ours(device),
        "topk_encode, plain torch": ours("torch"),
        f"feature_rank, {NUM_FEATURES} features": rank,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from sparsify.fused_encoder import fused_encoder

            found["sparsify, fused encoder"] = lambda x, W, b, k: fused_encoder(x, W, b, k, "topk")[:2]
        except ImportError:
            sys.stderr.write("sparsify is not installed\n")
        try:
            found["SAELens, TopK encode"] = sae_lens_encoder()
        except ImportError:
            sys.stderr.write("sae-lens is not installed\n")
    return found


def sae_lens_encoder() -> Callable[..., Any]:
    from sae_lens import TopKSAE, TopKSAEConfig

    made: dict[Any, Any] = {}

    def run(x: Tensor, W: Tensor, b: Tensor, k: int) -> Any:
        # Built once for a matrix, outside the clock: the warm-up call makes it.
        key = (W.data_ptr(), W.dtype, W.shape)
        if key not in made:
            made.clear()
            dtype, device = str(W.dtype).removeprefix("torch."), str(W.device)
            config = TopKSAEConfig(
                k=k, d_in=W.shape[1], d_sae=8, apply_b_dec_to_input=False, dtype=dtype, device=device
            )
            sae = TopKSAE(config)
            sae.W_enc = torch.nn.Parameter(W.T.contiguous(), requires_grad=False)
            sae.b_enc = torch.nn.Parameter(b, requires_grad=False)
            made[key] = sae
        return made[key].encode(x)

    return run


def share_exact(result: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> float | None:
    """Share of the first tokens whose set of features is that of fp64; None for results of another form."""
    if not (isinstance(result, tuple) and len(result) == 2):
        return None
    num = min(256, x.shape[0])
    f = torch.nn.functional.linear(x[:num].double(), W.double(), b.double())
    wanted = f.topk(k, dim=-1).indices.sort(-1).values
    return float((result[1][:num].sort(-1).values == wanted).all(-1).float().mean())


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(shape: tuple[int, int, int, int], dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    x, W, b = operands(shape, DTYPES[dtype], device)
    k = shape[3]
    functions = variants(device)
    exact, memory = {}, {}
    for name, function in functions.items():
        # Twice: compilation, caches, and the allocator's first blocks.
        result = function(x, W, b, k)
        exact[name] = share_exact(result, x, W, b, k)
        del result
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        function(x, W, b, k)
        if device == "cuda":
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for done in range(rounds):
        shuffle(order)
        for name in order:
            synchronise(device)
            start = time.perf_counter()
            functions[name](x, W, b, k)
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
        sys.stderr.write(f"{shape} {dtype}: round {done + 1} of {rounds}\n")
    if device == "cpu":
        known = list(functions)
        for name, found in peaks_of(__file__, known, 1, ["--shape", *map(str, shape), "--dtype", dtype]).items():
            memory[name] = found[0]
    os.environ[backend.SWITCH] = device
    work = count_above(device, x, W, b.float(), k, chosen(W))[2] / (shape[0] * shape[2])
    rows = []
    for name, values in seconds.items():
        ratios = [a / c for a, c in zip(values, seconds[FLOOR], strict=True)]
        rows.append(
            {
                "shape": shape,
                "dtype": dtype,
                "variant": name,
                "milliseconds_median": 1000 * statistics.median(values),
                "ratio_median": statistics.median(ratios),
                "ratio_interval": median_interval(ratios),
                "extra_mib": memory[name],
                "exact": exact[name],
                "share_of_dense_work": work if name.startswith("feature_rank") else None,
            }
        )
    return rows


@torch.no_grad()
def measure_memory(name: str, shape: tuple[int, int, int, int], dtype: str) -> None:
    x, W, b = operands(shape, DTYPES[dtype], "cpu")
    function = variants("cpu")[name]
    # Libraries, thread pools and compiled code come with a first call on a few tokens.
    function(x[:8], W[:4096], b[:4096], shape[3])
    if name == "SAELens, TopK encode":
        function(x[:8], W, b, shape[3])
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    result = function(x, W, b, shape[3])
    report_peak(above=before)
    del result


def measure_demo() -> dict[str, Any]:
    """`feature_rank` on residuals of the bundled model: one chosen layer, its chosen features and random ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qscope_trl.activations.encode import residual_batches, tokenize
    from qscope_trl.demo import assets
    from qscope_trl.sae.suite import SAESuite

    layer = 4
    model = AutoModelForCausalLM.from_pretrained(assets.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL)
    texts = [row["text"] for row in assets.rows("monitor_en")[:128]]
    ids = tokenize(tokenizer, texts, max_length=128)
    batches = residual_batches(model, ids, [layer], show_progress=False)
    x = torch.cat([batch.residuals[layer] for batch in batches]).float()
    sae = SAESuite.from_pretrained(assets.saes()).load(layer, decoder=False)
    features = chosen(sae.W_enc)
    os.environ[backend.SWITCH] = "cpu"
    functions = {
        FLOOR: lambda: torch.mm(x, sae.W_enc.T),
        "topk_encode": lambda: topk_encode(x, sae.W_enc, sae.b_enc, sae.k),
        "feature_rank": lambda: feature_rank(x, sae.W_enc, sae.b_enc, sae.k, features),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(41):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - start)
    work = count_above("cpu", x, sae.W_enc, sae.b_enc.float(), sae.k or 0, features)[2] / (x.shape[0] * sae.d_sae)
    return {
        "tokens": x.shape[0],
        "d_sae": sae.d_sae,
        "k": sae.k,
        "share_of_dense_work": work,
        "milliseconds_median": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=4, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of, tuple(options.shape), options.dtype)
        return
    device = options.device
    rows = []
    for shape in SHAPES[device]:
        for dtype in DTYPES if device == "cpu" else ("bf16",):
            rows += measure(shape, dtype, device, options.rounds)
    report: dict[str, Any] = {
        "what": f"Top-K encoder on {device}, {options.rounds} rounds.",
        "environment": environment("eai-sparsify", "sae-lens"),
        "rows": rows,
    }
    if device == "cpu":
        report["demo"] = measure_demo()
    header = ["T, d, F, k", "dtype", "variant", "ms", "of bare mm (95 %)", "extra MiB", "exact", "share of dense work"]
    cells = [
        [
            ", ".join(map(str, r["shape"])),
            r["dtype"],
            r["variant"],
            f"{r['milliseconds_median']:.2f}",
            f"{r['ratio_median']:.3f} ({r['ratio_interval'][0]:.3f} to {r['ratio_interval'][1]:.3f})",
            f"{r['extra_mib']:.0f}",
            "" if r["exact"] is None else f"{100 * r['exact']:.1f} %",
            "" if r["share_of_dense_work"] is None else f"{100 * r['share_of_dense_work']:.1f} %",
        ]
        for r in rows
    ]
    text = write(options.output, f"encoder_{device}", report, header, cells)
    if "demo" in report:
        demo = report["demo"]
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in demo["milliseconds_median"].items())
        text += (
            f"\n{NUM_FEATURES} features of the demo's layer 4, {demo['tokens']} tokens of English text, "
            f"d_sae {demo['d_sae']}, k {demo['k']}: {100 * demo['share_of_dense_work']:.1f} % of the dense work; "
            f"{times}.\n"
        )
        (options.output / "encoder_cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
