"""Step time and peak memory of SFT with `SAEPenaltyCallback` against plain TRL, in one run.

A Qwen3 of about 100M parameters, 512 tokens a step, so that the step is compute-bound on a CPU. The variants take
turns step by step inside one process and one thread, in an order shuffled anew each round; ratios are taken within the
round. "plain again" is a second plain trainer: how far its ratio is from 1 is the error of the measurement. Memory:
each variant in a fresh process, peak resident size.

    pip install greenlet
    python benchmarks/step_overhead.py [--rounds 40] [--memory-runs 3] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIANTS = ("plain", "measure only", "preact_hinge", "plain again")
LAYERS, PER_LAYER, TOKENS, WARM_UP = (10, 11), 10, 512, 3


def build(variant: str, folder: Path, steps: int) -> Any:
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
        names = [f"L{layer}F{n}" for layer in LAYERS for n in range(PER_LAYER)]
        weight = 0.0 if variant == "measure only" else 0.1
        callbacks = [SAEPenaltyCallback(saes, names, weight, sae_k=50)]
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
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            bf16=False, logging_steps=5, learning_rate=1e-4,
        )  # fmt: skip
    return SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                      callbacks=callbacks)  # fmt: skip


def measure_memory(variant: str, folder: Path) -> None:
    trainer = build(variant, folder, steps=4)
    trainer.train()
    report_peak()


def report_peak() -> None:
    """Write this process's peak resident size where `peaks_of` reads it."""
    # Not ru_maxrss: a child process starts with its parent's peak there.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    sys.stderr.write(f"PEAK {int(peak) / 1024:.1f}\n")


def peaks_of(script: str, variants: Iterable[str], runs: int, folder: Path) -> dict[str, list[float]]:
    """Peak resident size in MiB of each variant, each run in a fresh process of `script`."""
    peaks: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(runs):
        for variant, found in peaks.items():
            command = [sys.executable, script, "--memory-of", variant, "--folder", str(folder)]
            text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stderr
            found.append(float(text.rsplit("PEAK ", 1)[1].split()[0]))
    return peaks


def measure_time(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds a step per variant.

    Every trainer runs in a greenlet of one thread and yields after each step: threads would each get an OpenMP team of
    their own, whose idle workers spin beside the step being timed.
    """
    from greenlet import getcurrent, greenlet
    from transformers import TrainerCallback

    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}

    class TakeTurns(TrainerCallback):
        def __init__(self, variant: str) -> None:
            self.variant = variant

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            getcurrent().parent.switch()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds[self.variant].append(time.perf_counter() - self.start)

    turns = {}
    for variant in VARIANTS:
        trainer = build(variant, folder, steps=rounds + WARM_UP)
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


def median_interval(values: list[float], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-runs", type=int, default=3)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of, options.folder)
        return
    import platform

    import torch
    import transformers
    import trl

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = measure_time(options.rounds, folder)
        peaks = peaks_of(__file__, VARIANTS, options.memory_runs, folder)
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
        "what": "SFT step with 2 layers x 10 features against plain TRL, Qwen3 of about 100M parameters, 512 tokens",
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "rounds": options.rounds,
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "step_overhead.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = ["| variant | step, s | time ratio (95 %) | peak, MiB | memory ratio |", "|---|---|---|---|---|"]
    for r in rows:
        low, high = r["time_ratio_interval"]
        lines.append(
            f"| {r['variant']} | {r['step_seconds_median']:.3f} | {r['time_ratio_median']:.3f} ({low:.3f}-{high:.3f}) "
            f"| {r['peak_mib_median']:.0f} | {r['memory_ratio']:.3f} |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    head = f"{report['what']}; {report['hardware']}; {versions}; {options.rounds} rounds."
    text = f"{head}\n\n" + "\n".join(lines) + "\n"
    (options.output / "step_overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
