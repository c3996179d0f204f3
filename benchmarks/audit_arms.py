"""What `qscope audit` says of versions of the bundled model whose truth is known, and of the demo's fine-tuned arms.

    python benchmarks/audit_arms.py --output benchmarks/results

Known by construction: the model itself; Chinese tokens blocked at the output (the habit is gone, everything inside is
as before); the same function on a turned basis of the residual stream (the habit is exactly as before, no feature
reads it). Fine-tuned, 60 steps as in `qscope demo`: plain, with the penalty, with a hundred times its weight, and with
it on matched random features.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback
from transformers.trainer_utils import set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.reporting import environment, write
from qscope_trl import SAEPenaltyCallback, SAESuite
from qscope_trl.analysis.audit.result import Audit
from qscope_trl.analysis.audit.run import audit
from qscope_trl.analysis.audit.setup import read_inputs
from qscope_trl.analysis.audit.verdict import NEGATIVE_TEXTS, OWN, POSITIVE_TEXTS
from qscope_trl.config.audit import AuditConfig
from qscope_trl.demo import assets
from qscope_trl.demo.arms import load_model
from qscope_trl.demo.files import find_all
from qscope_trl.demo.judge import unwanted_tokens
from qscope_trl.demo.recipe import RECIPE


@torch.no_grad()
def blocked(model: Any, tokenizer: Any) -> Any:
    """No token that begins a Chinese character can be written."""
    head = nn.Linear(model.config.hidden_size, model.lm_head.weight.shape[0])
    head.weight = nn.Parameter(model.lm_head.weight.clone())
    head.bias.zero_()
    head.bias[: len(tokenizer)][unwanted_tokens(tokenizer)] = -50.0
    model.lm_head = head
    return model


@torch.no_grad()
def turned(model: Any) -> Any:
    """The same function on another basis: norms' weights go into what reads them, then everything is turned."""
    width = model.config.hidden_size
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q

    def read(linear: nn.Linear, norm: Any) -> None:
        linear.weight = nn.Parameter((linear.weight * norm.weight) @ turn)

    head = nn.Linear(width, model.lm_head.weight.shape[0], bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.clone())
    read(head, model.model.norm)
    model.lm_head = head
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight @ turn)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            read(linear, layer.input_layernorm)
        for linear in (mlp.gate_proj, mlp.up_proj):
            read(linear, layer.post_attention_layernorm)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight = nn.Parameter(turn.T @ linear.weight)
        layer.input_layernorm.weight.fill_(1.0)
        layer.post_attention_layernorm.weight.fill_(1.0)
    model.model.norm.weight.fill_(1.0)
    return model


def fine_tuned(folder: Path, seed: int, callbacks: list[Any]) -> Any:
    """The demo's recipe."""
    set_seed(seed)
    model, tokenizer = load_model()
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=RECIPE.steps, per_device_train_batch_size=RECIPE.batch_size,
        learning_rate=RECIPE.learning_rate, warmup_steps=RECIPE.steps // 10, weight_decay=0.0,
        max_length=RECIPE.max_length, gradient_checkpointing=False, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, bf16=False, seed=seed,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(assets.rows("sft_train")),
                         processing_class=tokenizer, callbacks=callbacks)  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def row(name: str, found: Audit) -> list[str]:
    """One line of the table."""
    shown = found.behaviour
    assert shown is not None
    places = {one.where: one for one in found.activity if one.kind == "trained on"}
    probe = max((one for one in found.detectors if one.kind == "probe"), key=lambda one: one.tuned)
    chance = next(one for one in found.detectors if one.kind == "shuffled labels")

    def left(where: str) -> str:
        one = places.get(where)
        return "-" if one is None else f"{one.left:.0%} ({one.left_low:.0%} to {one.left_high:.0%})"

    fits = found.fits
    return [
        name,
        f"{shown.tuned:.1%} ({shown.tuned_low:.1%} to {shown.tuned_high:.1%})",
        f"{shown.left:.0%} ({shown.left_low:.0%} to {shown.left_high:.0%})",
        left(NEGATIVE_TEXTS),
        left(POSITIVE_TEXTS),
        left(OWN),
        f"{probe.tuned:.2f} / {chance.tuned:.2f}",
        f"{found.collateral.loss_difference:+.3f}",
        f"{found.collateral.kl:.3f}",
        f"{min(one.jaccard for one in fits):.2f} to {max(one.jaccard for one in fits):.2f}",
        found.verdict,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        features, control, _ = find_all(folder, RECIPE)
        config = AuditConfig(
            model="demo", saes="demo", tuned="demo", features=str(folder / "features.yaml"),
            monitors=str(folder / "monitors.yaml"), positive="demo:monitor_zh", negative="demo:monitor_en",
            prompts="demo:prompts", behaviour="chinese", neutral="demo:sft_validation",
            neutral_column="prompt+completion", max_prompts=options.prompts, max_new_tokens=48, max_length=128,
            batch_size=64, seed=options.seed,
        )  # fmt: skip
        inputs = read_inputs(config)
        base, tokenizer = load_model()
        suite = SAESuite.from_pretrained(assets.saes())

        def arm(chosen: Any, weight: float) -> Any:
            callbacks = [] if chosen is None else [SAEPenaltyCallback(assets.saes(), chosen, weight)]
            return fine_tuned(folder / "run", options.seed, callbacks)

        weight = RECIPE.penalty_weight
        versions: dict[str, Callable[[], Any]] = {
            "the model itself": lambda: load_model()[0],
            "Chinese tokens blocked at the output": lambda: blocked(load_model()[0], tokenizer),
            "the same function on a turned basis": lambda: turned(load_model()[0]),
            "fine-tuned, plain": lambda: arm(None, 0.0),
            f"fine-tuned, penalty {weight:g}": lambda: arm(features, weight),
            f"fine-tuned, penalty {100 * weight:g}": lambda: arm(features, 100 * weight),
            f"fine-tuned, penalty {weight:g} on random features": lambda: arm(control, weight),
        }
        found, seconds = {}, {}
        for name, make in versions.items():
            tuned = make().eval()
            begun = time.process_time()
            found[name] = audit(base, tuned, tokenizer, suite, inputs, show_progress=False)
            seconds[name] = time.process_time() - begun
            sys.stderr.write(f"{' | '.join(row(name, found[name]))} | {seconds[name]:.0f} s of CPU\n")
    first = found["the model itself"].behaviour
    assert first is not None
    header = ["tuned version", "generations in Chinese", "left of the base's", "features left, English texts",
              "Chinese texts", "own Chinese generations", "best probe / on shuffled labels",
              "loss, neutral, nats", "KL", "Jaccard", "verdict"]  # fmt: skip
    what = (
        f"`qscope audit` of versions of the bundled model, of whose {options.prompts} generations {first.base:.1%} "
        f"hold Chinese. Intervals are 95 %. CPU time of an audit: {min(seconds.values()):.0f} to "
        f"{max(seconds.values()):.0f} s."
    )
    report = {
        "what": what,
        "environment": environment("transformers", "trl", "scikit-learn"),
        "seconds": seconds,
        "audits": {name: {k: v for k, v in asdict(one).items() if k != "samples"} for name, one in found.items()},
    }
    table = [row(name, one) for name, one in found.items()]
    if options.output:
        sys.stdout.write(write(options.output, "audit_arms", report, header, table))
    else:
        sys.stdout.write("\n".join(" | ".join(cells) for cells in [header, *table]) + "\n")


if __name__ == "__main__":
    main()
