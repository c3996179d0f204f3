"""Step time and peak memory of SFT with `SAEPenaltyCallback` against plain TRL, in one run.

A Qwen3 of about 100M parameters, 512 tokens a step, so that the step is compute-bound on a CPU. Variants take turns,
step by step, on one model each with the same data; the ratio of a round is taken within the round. Memory: each
variant in a fresh process, peak resident size.

    python benchmarks/step_overhead.py [--rounds 12] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

VARIANTS = ("plain", "measure only", "preact_hinge", "plain again")
LAYERS, PER_LAYER, TOKENS = (10, 11), 10, 512


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
    # Not ru_maxrss: a child process starts with its parent's peak there.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    sys.stderr.write(f"PEAK {int(peak) / 1024:.1f}\n")


def measure_time(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds a step per variant: the trainers run in threads that hand one lock round, one step each."""
    import threading

    from transformers import TrainerCallback

    turns = {v: threading.Semaphore(0) for v in VARIANTS}
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}

    class TakeTurns(TrainerCallback):
        def __init__(self, variant: str) -> None:
            self.variant = variant

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns[self.variant].acquire()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds[self.variant].append(time.perf_counter() - self.start)
            following = VARIANTS[(VARIANTS.index(self.variant) + 1) % len(VARIANTS)]
            turns[following].release()

    trainers = {v: build(v, folder, steps=rounds + 2) for v in VARIANTS}
    for variant, trainer in trainers.items():
        trainer.add_callback(TakeTurns(variant))
    threads = [threading.Thread(target=trainer.train) for trainer in trainers.values()]
    for thread in threads:
        thread.start()
    turns[VARIANTS[0]].release()
    for thread in threads:
        thread.join()
    return {v: values[2:] for v, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
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
        peaks: dict[str, list[float]] = {v: [] for v in VARIANTS}
        for _ in range(options.memory_runs):
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--memory-of", variant, "--folder", name]
                text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stderr
                peaks[variant].append(float(text.rsplit("PEAK ", 1)[1].split()[0]))
    rows = []
    for variant in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "variant": variant,
                "step_seconds_median": statistics.median(seconds[variant]),
                "time_ratio_median": statistics.median(ratios),
                "time_ratio_quartiles": [quartiles[0], quartiles[2]],
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
    lines = ["| variant | step, s | time ratio (quartiles) | peak, MiB | memory ratio |", "|---|---|---|---|---|"]
    for r in rows:
        low, high = r["time_ratio_quartiles"]
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
