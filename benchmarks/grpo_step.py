"""Seconds and memory of a GRPO step with feature scoring against plain TRL, in one run, and forwards counted.

A Qwen3 of about 25M parameters, 16 rollouts of 96 new tokens a step. The variants take turns step by step inside one
process and one thread, in an order shuffled anew each round; ratios are taken within the round. "again" rows are
second trainers of the same kind: how far their ratio is from 1 is the error of the measurement. Memory: each variant
in a fresh process, peak resident size.

    pip install greenlet peft
    python benchmarks/grpo_step.py [--rounds 30] [--memory-runs 3] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from reporting import RESULTS, environment, median_interval, peaks_of, report_peak, write

LAYERS, PER_LAYER, ROWS, NEW, WARM_UP = (4, 5), 10, 16, 96, 2
VARIANTS = {
    # name: (GRPO settings, whether features are scored, LoRA, what it is compared with)
    "plain, beta 0": ({}, False, True, "plain, beta 0"),
    "plain, beta 0, again": ({}, False, True, "plain, beta 0"),
    "scored, beta 0": ({}, True, True, "plain, beta 0"),
    "plain, beta 0.05": ({"beta": 0.05}, False, True, "plain, beta 0.05"),
    "plain, beta 0.05, again": ({"beta": 0.05}, False, True, "plain, beta 0.05"),
    "scored, beta 0.05": ({"beta": 0.05}, True, True, "plain, beta 0.05"),
}


def build(variant: str, folder: Path, steps: int) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
    from trl import GRPOConfig, GRPOTrainer

    from qscope_trl import FeatureReward

    changes, scored, _, _ = VARIANTS[variant]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
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
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, 8192)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rewards: list[Any] = [lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]]
    if scored:
        names = [f"L{layer}F{n}" for layer in LAYERS for n in range(PER_LAYER)]
        rewards.append(FeatureReward(names, saes, sae_k=50))
    rewards[0].__name__ = "parity"
    prompts = [{"prompt": " ".join(f"w{2 + (7 * n + i) % 8000}" for i in range(32))} for n in range(64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = GRPOConfig(
            output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=ROWS, num_generations=8,
            max_completion_length=NEW, gradient_checkpointing=False, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1, learning_rate=1e-5,
            generation_kwargs={"min_new_tokens": NEW}, **{"beta": 0.0, **changes},
        )  # fmt: skip
        return GRPOTrainer(
            model, reward_funcs=rewards, args=args, train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip


def measure_time(rounds: int, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a step, and forwards of whole rollouts without gradient a step, per variant."""
    import torch
    from greenlet import getcurrent, greenlet
    from transformers import TrainerCallback

    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    forwards = dict.fromkeys(VARIANTS, 0)

    class TakeTurns(TrainerCallback):
        def __init__(self, variant: str) -> None:
            self.variant = variant

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds[self.variant].append(time.perf_counter() - starts[self.variant])
            getcurrent().parent.switch()

    def count(variant: str) -> Any:
        def hook(_module: Any, _args: Any, kwargs: Any) -> None:
            forwards[variant] += not torch.is_grad_enabled() and not kwargs.get("use_cache")

        return hook

    starts: dict[str, float] = {}
    turns = {}
    for variant in VARIANTS:
        trainer = build(variant, folder, steps=rounds + WARM_UP)
        trainer.add_callback(TakeTurns(variant))
        trainer.model.get_decoder().register_forward_pre_hook(count(variant), with_kwargs=True)
        turns[variant] = greenlet(trainer.train)
    order, shuffle = list(VARIANTS), random.Random(0).shuffle
    for done in range(rounds + WARM_UP):
        shuffle(order)
        for variant in order:
            starts[variant] = time.perf_counter()
            turns[variant].switch()
        if done % 5 == 0:
            sys.stderr.write(f"round {done + 1} of {rounds + WARM_UP}\n")
    total = rounds + WARM_UP
    return {v: values[WARM_UP:] for v, values in seconds.items()}, {v: n / total for v, n in forwards.items()}


def measure_memory(variant: str, folder: Path) -> None:
    build(variant, folder, steps=2).train()
    report_peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--memory-runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of, options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds, forwards = measure_time(options.rounds, folder)
        peaks = peaks_of(__file__, VARIANTS, options.memory_runs, ["--folder", str(folder)])
    rows = []
    for variant, (_, _, _, base) in VARIANTS.items():
        ratios = [a / b for a, b in zip(seconds[variant], seconds[base], strict=True)]
        rows.append(
            {
                "variant": variant,
                "step_seconds_median": statistics.median(seconds[variant]),
                "time_ratio_median": statistics.median(ratios),
                "time_ratio_interval": median_interval(ratios),
                "scoring_forwards_per_step": forwards[variant],
                "peak_mib_median": statistics.median(peaks[variant]),
                "memory_ratio": statistics.median(peaks[variant]) / statistics.median(peaks[base]),
            }
        )
    report = {
        "what": f"GRPO step, {ROWS} rollouts of {NEW} tokens, LoRA, frozen reader, 2 layers x 10 features, Qwen3 of "
        f"25M parameters; {options.rounds} rounds.",
        "environment": environment("transformers", "trl", "accelerate", "peft"),
        "rows": rows,
    }
    header = [
        "variant",
        "step, s",
        "time ratio (95 %)",
        "no-gradient forwards a step",
        "peak, MiB",
        "memory ratio",
    ]
    cells = [
        [
            r["variant"],
            f"{r['step_seconds_median']:.3f}",
            f"{r['time_ratio_median']:.3f} ({r['time_ratio_interval'][0]:.3f} to {r['time_ratio_interval'][1]:.3f})",
            f"{r['scoring_forwards_per_step']:.2f}",
            f"{r['peak_mib_median']:.0f}",
            f"{r['memory_ratio']:.3f}",
        ]
        for r in rows
    ]
    print(write(options.output, "grpo_step", report, header, cells))


if __name__ == "__main__":
    main()
