"""Time of `qscope index` over that of the bare model, for one layer of a 100M-parameter model.

The bare model runs its decoder (no language-model head) over the same batches, the same padding, without gradient;
`qscope index` reads the rows, tokenises, runs the decoder, encodes with the SAE, sums up by document and writes shards
to disk. Opening of model and SAE lies before the clock of both. Variants are interleaved; every round gives one ratio.

    python benchmarks/store_time.py                    # about 8 minutes on two cores
    python benchmarks/store_time.py --rows 16 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from reporting import RESULTS, environment, median_interval, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from qscope_trl.activations.encode import tokenize
from qscope_trl.activations.index_run import _Job, _Plan
from qscope_trl.activations.opening import open_all
from qscope_trl.activations.sources import open_source
from qscope_trl.activations.writing import begin, finish
from qscope_trl.config.index import IndexConfig
from qscope_trl.hooks.layers import find_decoder

D_MODEL, LAYERS, D_SAE, K, VOCAB = 768, 12, 16 * 768, 50, 32_000
LAYER = 8


def make(folder: Path, rows: int, length: int) -> None:
    """A random model of 100M parameters, an SAE of one layer, and texts of uneven length."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=2048, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    words = {f"w{n}": n for n in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(folder / "model")
    (folder / "saes").mkdir()
    W_enc = torch.randn(D_SAE, D_MODEL) / D_MODEL**0.5
    biases = {"b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(D_MODEL)}
    torch.save({"W_enc": W_enc, "W_dec": W_enc.T.contiguous(), **biases}, folder / "saes" / f"layer{LAYER}.sae.pt")
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(rows):
            count = int(torch.randint(length // 2, length + 1, (1,)))
            text = " ".join(f"w{n}" for n in torch.randint(1, VOCAB, (count,)).tolist())
            file.write(json.dumps({"text": text}) + "\n")


def bare(job: _Job, texts: list[str], batch_size: int) -> float:
    """Seconds of the decoder over the batches that index makes."""
    ids = tokenize(job.opened.tokenizer, texts, max_length=job.config.max_length)
    batches = []
    for start in range(0, len(ids), job.group_size):
        group = sorted(ids[start : start + job.group_size], key=len, reverse=True)
        for first in range(0, len(group), batch_size):
            chosen = group[first : first + batch_size]
            width = len(chosen[0])
            tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in chosen])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
            batches.append((tokens, mask))
    decoder = find_decoder(job.opened.model)
    begun = time.perf_counter()
    with torch.no_grad():
        for tokens, mask in batches:
            decoder(input_ids=tokens, attention_mask=mask, use_cache=False)
    return time.perf_counter() - begun


def indexed(job: _Job, rows: int, folder: Path) -> float:
    """Seconds of writing a store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    manifest = job.manifest()
    begun = time.perf_counter()
    plan = _Plan(frozenset(begin(folder, manifest)), rows)
    job.write(folder, plan, PartialState(), show_progress=False)
    finish(folder, manifest, rows)
    return time.perf_counter() - begun


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, options.rows, options.length)
        texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]
        jobs = {}
        for name, changes in {
            "per document: max, mean, last, rate": {},
            "per token": {"per": "token"},
        }.items():
            config = IndexConfig(
                model=str(folder / "model"), saes=str(folder / "saes"), sae_k=K, layers=str(LAYER), device="cpu",
                data=str(folder / "texts.jsonl"), output=str(folder / "store"), batch_size=options.batch_size,
                dtype=options.dtype, **changes,
            )  # fmt: skip
            opened = open_all(config)
            jobs[name] = _Job(config, open_source(config.data), opened, ("text",))
        parameters = sum(p.numel() for p in opened.model.parameters())
        first = next(iter(jobs.values()))
        bare(first, texts[:16], options.batch_size)  # warm up
        indexed(first, 16, folder / "warm")
        ratios: dict[str, list[float]] = {name: [] for name in ("bare again", *jobs)}
        seconds: list[float] = []
        for number in range(options.rounds):
            plain = bare(first, texts, options.batch_size)
            seconds.append(plain)
            for name, job in jobs.items():
                ratios[name].append(indexed(job, options.rows, folder / "store") / plain)
            ratios["bare again"].append(bare(first, texts, options.batch_size) / plain)
            print(number, {name: round(values[-1], 3) for name, values in ratios.items()}, flush=True)
        tokens = sum(len(text.split()) for text in texts)
        what = (
            f"`qscope index` over the bare decoder: {parameters / 1e6:.0f}M parameters, d_model {D_MODEL}, {LAYERS} "
            f"layers, {options.dtype}; one layer's SAE of {D_SAE} features, k = {K}; {options.rows} texts, {tokens} "
            f"tokens, batches of {options.batch_size}; {options.rounds} rounds. The bare decoder runs "
            f"{tokens / statistics.median(seconds):.0f} tokens a second."
        )
        report: dict[str, Any] = {
            "what": what,
            "environment": environment("transformers", "accelerate", "pyarrow"),
            "settings": vars(options),
            "ratios": ratios,
            "bare_seconds": seconds,
        }
        rows = [
            [name, f"{statistics.median(values):.3f}", "{:.3f} to {:.3f}".format(*median_interval(values))]
            for name, values in ratios.items()
        ]
        header = ["variant", "time over the bare decoder, median", "95 % interval"]
        print(write(RESULTS, "store_time", report, header, rows))


if __name__ == "__main__":
    main()
