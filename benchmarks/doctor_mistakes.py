"""What `qscope doctor` says of mistakes planted in the bundled SAEs, and of tuned versions of the bundled model.

python benchmarks/doctor_mistakes.py [--texts 200] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, environment, write
from torch import Tensor

from qscope_trl import SAESuite
from qscope_trl.analysis.doctor.alternatives import AS_READ
from qscope_trl.analysis.doctor.diagnosis import diagnose
from qscope_trl.analysis.doctor.findings import geometric_mean, span
from qscope_trl.analysis.doctor.result import Diagnosis
from qscope_trl.bundled import MODEL, saes
from qscope_trl.demo import assets

State = dict[str, Tensor]
K = 16
TUNING_STEPS = 100


def released() -> dict[int, State]:
    paths = sorted(saes().glob("layer*.sae.pt"))
    return {n: {k: v.float() for k, v in torch.load(path).items()} for n, path in enumerate(paths)}


def every(change: Callable[[State], State]) -> Callable[[dict[int, State]], dict[int, State]]:
    return lambda all_of: {layer: {**sae, **change(sae)} for layer, sae in all_of.items()}


def unrelated(sae: State) -> State:
    """Random directions of the same lengths, the decoder tied to them."""
    d_sae, d_model = sae["W_enc"].shape
    W_enc = torch.randn(d_sae, d_model, generator=torch.Generator().manual_seed(0)) / d_model**0.5
    W_enc = W_enc * sae["W_enc"].norm(dim=1).mean()
    W_dec = W_enc.T / W_enc.norm(dim=1).square()
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_model)}


def turned(sae: State) -> State:
    """The same SAE in another basis: as good as ever, on a model whose residual stream is turned alike."""
    d_model = sae["W_enc"].shape[1]
    Q = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0)))[0]
    return {"W_enc": sae["W_enc"] @ Q.T, "W_dec": Q @ sae["W_dec"], "b_dec": Q @ sae["b_dec"]}


def mistakes() -> dict[str, tuple[Callable[[dict[int, State]], dict[int, State]], int]]:
    """By name: what is done to the SAEs, and the k that is stated."""

    def same(all_of: dict[int, State]) -> dict[int, State]:
        return all_of

    def bias(sign: float) -> Callable[[State], State]:
        return lambda sae: {"b_enc": sae["b_enc"] + sign * sae["W_enc"] @ sae["b_dec"]}

    def scale(factor: float) -> Callable[[State], State]:
        return lambda sae: {
            "W_enc": sae["W_enc"] * factor, "W_dec": sae["W_dec"] / factor, "b_dec": sae["b_dec"] / factor,
        }  # fmt: skip

    def kill(every_nth: int) -> Callable[[State], State]:
        return lambda sae: {"b_enc": sae["b_enc"] - 1e4 * (torch.arange(len(sae["b_enc"])) % every_nth == 0)}

    return {
        "none": (same, K),
        "file n holds the SAE of layer n - 1": (lambda a: {n + 1: a[n] for n in range(len(a) - 1)}, K),
        "file n holds the SAE of layer n + 1": (lambda a: {n - 1: a[n] for n in range(1, len(a))}, K),
        **{f"k stated as {k}, trained with {K}": (same, k) for k in (4, 8, 12, 20, 32, 64)},
        "trained with `b_dec` subtracted from the input, read without": (every(bias(1.0)), K),
        "trained without, read with `b_dec` subtracted": (every(bias(-1.0)), K),
        "trained on inputs a third as large": (every(scale(3.0)), K),
        "`W_dec` reshaped instead of transposed": (
            every(lambda sae: {"W_dec": sae["W_dec"].T.reshape(sae["W_dec"].shape)}), K,
        ),
        "decoders of another layer": (lambda a: {n: {**a[n], "W_dec": a[(n + 1) % len(a)]["W_dec"]} for n in a}, K),
        "another model's SAEs (the same ones in a turned basis)": (every(turned), K),
        "random SAEs": (every(unrelated), K),
        "all features dead": (every(kill(1)), K),
        "every second feature dead": (every(kill(2)), K),
    }  # fmt: skip


def write_saes(folder: Path, states: dict[int, State]) -> Path:
    folder.mkdir()
    for layer, sae in states.items():
        torch.save({name: value.contiguous() for name, value in sae.items()}, folder / f"layer{layer}.sae.pt")
    return folder


def noisy(model: Any, share: float) -> Any:
    """The model with noise on every matrix, of that share of its entries' standard deviation."""
    torch.manual_seed(0)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.parameters():
            if weight.dim() == 2:
                weight.add_(share * weight.std() * torch.randn_like(weight))
    return changed


def fine_tuned(model: Any, tokenizer: Any, learning_rate: float) -> Any:
    """The model after `TUNING_STEPS` plain steps of 8 texts on the demo's fine-tuning data."""
    torch.manual_seed(0)
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate)
    rows = [row["prompt"] + row["completion"] for row in assets.rows("sft_train")]
    for step in range(TUNING_STEPS):
        texts = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=160)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        tuned(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def leading(result: Diagnosis) -> str:
    """The findings that decide the verdict."""
    names = [finding.check for finding in result.findings if finding.severity in ("fail", "warn")]
    return ", ".join(dict.fromkeys(names)) or "-"


def figures_of(result: Diagnosis) -> dict[str, Any]:
    """Verdict, findings that decide it, and the figures by layer that it rests on, to four places."""

    def rounded(values: dict[Any, float]) -> dict[str, float]:
        return {str(name): round(value, 4) for name, value in values.items()}

    read = {
        fit.layer: {
            "fvu": round(fit.fvu, 4), "chance": round(fit.chance, 4), "l0": round(fit.l0, 2),
            "places": rounded(fit.places), "readings": rounded(fit.readings),
        }
        for fit in result.layers
    }  # fmt: skip
    tuned = {one.layer: {"fvu": round(one.fvu, 4), "jaccard": round(one.jaccard, 4)} for one in result.tuned}
    return {
        "verdict": result.verdict,
        "found": leading(result),
        "layers": tuned or read,
    }


def best_other(result: Diagnosis) -> str:
    """What another reading leaves of the variance that the stated one leaves, mean over layers, the least."""
    ratios: dict[str, list[float]] = {}
    for fit in result.layers:
        told = {name: value for name, value in fit.readings.items() if name != AS_READ}
        told |= {f"layer n{place - fit.layer:+d}": value for place, value in fit.places.items() if place != fit.layer}
        for name, value in told.items():
            ratios.setdefault(name, []).append(value / fit.readings[AS_READ])
    means = {name: geometric_mean(values) for name, values in ratios.items() if 2 * len(values) > len(result.layers)}
    name = min(means, key=lambda name: means[name])
    return f"{name}: {means[name]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [row["text"] for row in assets.rows("rules_test")[: options.texts]]
    all_of = released()
    figures: dict[str, Any] = {}
    rows = []
    for name, (change, k) in mistakes().items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            suite = SAESuite.from_pretrained(write_saes(Path(folder) / "saes", change(all_of)), k=k)
            result = diagnose(model, tokenizer, suite, texts, show_progress=False)
        figures[name] = {"seconds": round(time.perf_counter() - start, 2), **figures_of(result)}
        share = [fit.fvu / min(1.0, fit.chance) for fit in result.layers]
        rows.append(
            [name, span(fit.fvu for fit in result.layers), span(share, 2), best_other(result), leading(result),
             f"{result.verdict} ({result.exit_code})"]
        )  # fmt: skip
    environment_found = environment("transformers")
    report = {
        "what": f"Mistakes planted in the SAEs of the bundled model, {result.num_texts} texts of `demo:rules_test`, "
        f"{result.num_tokens} tokens, fp32. Chance: fvu of noise with the residuals' mean and covariance.",
        "environment": environment_found,
        "diagnoses": figures,
    }
    header = ["mistake", "fvu by layer", "share of chance", "best other reading, share of fvu", "found", "verdict"]
    print(write(options.output, "doctor_mistakes", report, header, rows))

    suite = SAESuite.from_pretrained(write_saes(Path(tempfile.mkdtemp()) / "saes", all_of), k=K)
    versions = {"the model itself": model}
    versions |= {f"noise of {share:.0%} on every matrix": noisy(model, share) for share in (0.01, 0.03, 0.1, 0.3, 1.0)}
    versions |= {
        f"{TUNING_STEPS} steps of fine-tuning at {rate:g}": fine_tuned(model, tokenizer, rate)
        for rate in (1e-4, 1e-3, 5e-3)
    }
    figures, rows = {}, []
    for name, tuned in versions.items():
        result = diagnose(model, tokenizer, suite, texts, tuned=tuned, show_progress=False)
        figures[name] = {"kl": result.kl, **figures_of(result)}
        rows.append(
            [name, f"{result.kl:.3f}", span(one.fvu_base for one in result.tuned),
             span(one.fvu for one in result.tuned), span((one.residual_cosine for one in result.tuned), 3),
             span((one.jaccard for one in result.tuned), 2), leading(result), f"{result.verdict} ({result.exit_code})"]
        )  # fmt: skip
    report = {
        "what": f"The bundled model and tuned versions of it through the same SAEs, {result.num_texts} texts of "
        f"`demo:rules_test`, {result.num_tokens} tokens, fp32.",
        "environment": environment_found,
        "diagnoses": figures,
    }
    header = ["tuned version", "KL, nats", "fvu base", "fvu tuned", "residual cosine", "jaccard", "found", "verdict"]
    print(write(options.output, "doctor_tuned", report, header, rows))


if __name__ == "__main__":
    main()
