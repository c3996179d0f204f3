"""Decoding speed under `steer` against plain, in one process.

The bundled model, and a random Qwen3 of about 100M parameters with random SAEs of 16 times its width (TopK, k=50);
greedy decoding of a fixed number of tokens after a prompt of 16, batch 1 and 8. Every round runs each variant once, in
an order shuffled anew; ratios of time are taken within the round. "plain again" is plain a second time: how far its
ratio is from 1 is the error of the measurement. `add` is what the bar of 1.05 is for; `ablate`, `clamp` and the gate
must read the whole SAE of a TopK kind at each token, so they cost what that costs.

    python benchmarks/steer_overhead.py [--rounds 30] [--tokens 64] [--threads 2] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reporting import RESULTS, describe, environment, median_interval, write

BAR = 1.05
PROMPT = 16
VARIANTS = ("plain", "plain again", "add", "add by row", "add norm", "ablate", "clamp", "add gated")


def demo_setting(device: str) -> tuple[Any, Any, list[str]]:
    from qscope_trl.activations.opening import open_model
    from qscope_trl.bundled import saes

    return open_model("demo", dtype="float32", device=device)[0].eval(), saes(), ["L4F1740", "L5F23"]


def qwen3_setting(device: str, folder: Path) -> tuple[Any, Any, list[str]]:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16384, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval().to(device)
    folder.mkdir(exist_ok=True)
    d, F = config.hidden_size, 16 * config.hidden_size
    for layer in (6, 10):
        W = torch.randn(F, d) / d**0.5
        torch.save(
            {"W_enc": W, "W_dec": W.T.clone(), "b_enc": torch.zeros(F), "b_dec": torch.zeros(d)},
            folder / f"layer{layer}.sae.pt",
        )
    return model, folder, ["L6F1", "L6F2", "L10F3"]


def blocks(model: Any, saes: Any, features: list[str], batch: int, k: int | None) -> dict[str, Any]:
    """A context manager for each variant, made once; weak strengths, since only the time counts."""
    from qscope_trl.steering.steer import steer

    def made(**settings: Any) -> Any:
        return steer(model, saes, features, **{"strength": 0.01, "sae_k": k, **settings})

    return {
        "plain": contextlib.nullcontext(),
        "plain again": contextlib.nullcontext(),
        "add": made(),
        "add by row": made(strength=[0.01] * batch),
        "add norm": made(unit="norm"),
        "ablate": made(mode="ablate"),
        "clamp": made(mode="clamp"),
        "add gated": made(gate=f"{features[0]} < 1e9", gate_reads="text"),
    }


def measure(model: Any, found: dict[str, Any], batch: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by variant."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 4000, (batch, PROMPT), generator=generator).to(model.device)
    settings = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "min_new_tokens": tokens,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in found}
    order, shuffle = list(found), random.Random(0).shuffle
    for done in range(rounds + 1):
        shuffle(order)
        for name in order:
            synchronise()
            start = time.perf_counter()
            with found[name]:
                out = model.generate(ids, **settings)
            synchronise()
            if done:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            assert out.shape[1] == PROMPT + tokens
        if sys.stderr.isatty() or done % 10 == 0:
            sys.stderr.write(f"round {done} of {rounds}\n")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=["bundled", "100M"], default=["bundled", "100M"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = list(dict.fromkeys(["plain", *options.variants]))
    results, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            is_demo = name == "bundled"
            opened = demo_setting(options.device) if is_demo else qwen3_setting(options.device, Path(folder) / "saes")
            model, saes, features = opened
            for batch in (1, 8):
                found = blocks(model, saes, features, batch, None if is_demo else 50)
                seconds = measure(model, {v: found[v] for v in chosen}, batch, options.tokens, options.rounds)
                for variant, values in seconds.items():
                    ratios = [a / b for a, b in zip(values, seconds["plain"], strict=True)]
                    low, high = median_interval(ratios)
                    speed = batch * options.tokens / statistics.median(values)
                    results.append(
                        {
                            "model": name, "batch": batch, "variant": variant, "tokens_per_second": speed,
                            "ratio": statistics.median(ratios), "ratio_interval": [low, high], "seconds": values,
                        }
                    )  # fmt: skip
                    ratio = "-" if variant == "plain" else f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
                    rows.append([name, str(batch), variant, f"{speed:.0f}", ratio])
    report = {
        "what": f"Greedy decoding of {options.tokens} tokens under `steer`, {options.rounds} rounds, "
        f"{torch.get_num_threads()} threads, {options.device}. Time over plain: median of the rounds, 95 % bootstrap "
        f"interval. Bar for `add`: {BAR}.",
        "environment": environment("transformers"),
        "results": results,
    }
    header = ["model", "batch", "variant", "tokens/s", "time over plain"]
    sys.stdout.write(write(options.output, "steer_overhead", report, header, rows))
    sys.stderr.write(describe(report["environment"]) + "\n")


if __name__ == "__main__":
    main()
