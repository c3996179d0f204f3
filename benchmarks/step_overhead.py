"""Step time and peak memory of SFT with `SAEPenaltyCallback` against plain TRL, in one run.

A Qwen3 of about 100M parameters, 512 tokens a step, so that the step is compute-bound on a CPU. The variants take
turns step by step inside one process and one thread, in an order shuffled anew each round; ratios are taken within the
round. "plain again" is a second plain trainer: how far its ratio is from 1 is the error of the measurement. Memory:
each variant in a fresh process, peak resident size (on a GPU: what its allocator gave out).

    pip install greenlet
    python benchmarks/step_overhead.py [--device cpu|cuda] [--rounds 40] [--memory-runs 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting import RESULTS, environment, median_interval, peaks_of, report_peak, write

VARIANTS = ("plain", "measure only", "preact_hinge", "plain again")
LAYERS, PER_LAYER, TOKENS, WARM_UP = (10, 11), 10, 512, 3
FEATURES = [f"L{layer}F{n}" for layer in LAYERS for n in range(PER_LAYER)]


def build(
    variant: str, folder: Path, steps: int, device: str = "cpu", prepare: Callable[[Any], None] = lambda _args: None
) -> Any:
    """An `SFTTrainer`; `prepare` sees its arguments before it is made."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
    from trl import SFTConfig, SFTTrainer

    from qscope_trl import SAEPenaltyCallback

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16384, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float()
    saes = folder / "saes"
    if not saes.is_dir():
        saes.mkdir()
        d, F = config.hidden_size, 16 * config.hidden_size
        for layer in LAYERS:
            W = torch.randn(F, d) / d**0.5
            torch.save(
                {"W_enc": W, "W_dec": W.T.clone(), "b_enc": torch.zeros(F), "b_dec": torch.zeros(d)},
                saes / f"layer{layer}.sae.pt",
            )
    callbacks = []
    if not variant.startswith("plain"):
        weight = 0.0 if variant == "measure only" else 0.1
        callbacks = [SAEPenaltyCallback(saes, FEATURES, weight, sae_k=50)]
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": (ids := torch.randint(2, 16384, (TOKENS,), generator=generator).tolist()), "labels": ids}
        for _ in range(steps)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = SFTConfig(
            output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=1, max_length=TOKENS,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=device == "cpu", bf16=device != "cpu", logging_steps=5, learning_rate=1e-4,
        )  # fmt: skip
    prepare(args)
    return SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                      callbacks=callbacks)  # fmt: skip


def measure_memory(variant: str, folder: Path, device: str) -> None:
    import torch

    build(variant, folder, 4, device).train()
    if device == "cuda":
        sys.stderr.write(f"PEAK {torch.cuda.max_memory_allocated() / 2**20:.1f}\n")
    else:
        report_peak()


def measure_time(rounds: int, folder: Path, device: str) -> dict[str, list[float]]:
    """Seconds a step per variant.

    Every trainer runs in a greenlet of one thread and yields after each step: threads would each get an OpenMP team of
    their own, whose idle workers spin beside the step being timed.
    """
    import torch
    from greenlet import getcurrent, greenlet
    from transformers import TrainerCallback

    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}

    class TakeTurns(TrainerCallback):
        def __init__(self, variant: str) -> None:
            self.variant = variant

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            getcurrent().parent.switch()
            synchronise()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            seconds[self.variant].append(time.perf_counter() - self.start)

    turns = {}
    for variant in VARIANTS:
        trainer = build(variant, folder, rounds + WARM_UP, device)
        trainer.add_callback(TakeTurns(variant))
        turns[variant] = greenlet(trainer.train)
        turns[variant].switch()
    order, shuffle = list(VARIANTS), random.Random(0).shuffle
    for done in range(rounds + WARM_UP):
        shuffle(order)
        for variant in order:
            turns[variant].switch()
        if sys.stderr.isatty() or done % 10 == 0:
            sys.stderr.write(f"round {done + 1} of {rounds + WARM_UP}\n")
    assert all(turn.dead for turn in turns.values())
    return {v: values[WARM_UP:] for v, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory-runs", type=int, default=3)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of, options.folder, options.device)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = measure_time(options.rounds, folder, options.device)
        peaks = peaks_of(
            __file__, VARIANTS, options.memory_runs, ["--folder", str(folder), "--device", options.device]
        )
    rows = []
    for variant in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)]
        rows.append(
            {
                "variant": variant,
                "step_seconds_median": statistics.median(seconds[variant]),
                "time_ratio_median": statistics.median(ratios),
                "time_ratio_interval": median_interval(ratios),
                "peak_mib_median": statistics.median(peaks[variant]),
                "memory_ratio": statistics.median(peaks[variant]) / statistics.median(peaks["plain"]),
            }
        )
    report = {
        "what": "SFT step with 2 layers x 10 features against plain TRL, Qwen3 of about 100M parameters, 512 tokens; "
        f"{options.rounds} rounds on {options.device}.",
        "environment": environment("transformers", "trl", "accelerate"),
        "rows": rows,
    }
    header = ["variant", "step, s", "time ratio (95 %)", "peak, MiB", "memory ratio"]
    cells = [
        [
            r["variant"],
            f"{r['step_seconds_median']:.3f}",
            f"{r['time_ratio_median']:.3f} ({r['time_ratio_interval'][0]:.3f} to {r['time_ratio_interval'][1]:.3f})",
            f"{r['peak_mib_median']:.0f}",
            f"{r['memory_ratio']:.3f}",
        ]
        for r in rows
    ]
    name = "step_overhead" if options.device == "cpu" else f"step_overhead_{options.device}"
    print(write(options.output, name, report, header, cells))


if __name__ == "__main__":
    main()
