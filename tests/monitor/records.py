"""Records of runs made by hand, in the form that `monitor/run_record.py` states."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qscope_trl.features import Feature, FeatureSet
from qscope_trl.monitor.run_record import RunRecord

TOKENS = ["The", " cat", " sat", " on", " the", " 文", "", "件", ".", "\n", "It", " slept", " well", "."]
HOSTILE = (
    '<script>fetch("http://evil.example/x")</script><img src=http://evil.example/y onerror=window.alerted=1>\x00\ud800'
)


def features(count: int, layer: int = 5, label: str = "Chinese text in an English answer") -> FeatureSet:
    return FeatureSet(
        features=tuple(
            Feature(
                layer=layer - n % 2,
                index=10 + n,
                weight=1.0 if n else 2.0,
                threshold=0.1 * n,
                label=label if n % 3 == 0 else "",
                evidence={"heldout_auroc": 0.95 - 0.001 * n, "p_value": 0.001, "mean_difference": 1.5},
            )
            for n in range(count)
        )
    )


def write_full(
    folder: Path, *, steps: int = 60, num_features: int = 3, num_monitors: int = 2, ends: bool = True
) -> RunRecord:
    """A run with every part."""
    record = RunRecord(folder)
    record.begin(0)
    penalised, monitors = features(num_features), features(num_monitors, layer=4, label="Cyrillic")
    record.put("run", run_json(penalised, monitors))
    for step in range(1, steps + 1):
        record.add("log", step, log_row(step, steps, penalised, monitors))
        if step % max(1, steps // 6) == 0:
            record.add("log", step, {"eval_loss": 3.9 - step / steps, "eval_sae/penalty": 0.5 / step})
    for step in (0, steps // 2, steps):
        add_watch(record, step, steps)
    for place in range(0, steps + 1, max(1, steps // 10)):
        record.add("drift", place, drift_row(place / steps))
    record.add("alarms", steps, {"kind": "monitors", "message": "The penalised features fell, the monitors did not."})
    for step in range(10, steps + 1, 10):
        parts = {"penalty": 0.06, "drift": 0.02, "dashboard": 0.01}
        record.add("overhead", step, {"steps": 10, "step_seconds": 2.0, "parts": parts})
    if ends:
        record.put("end", {"step": steps, "seconds": 61.5, "finished": "2026-11-28T12:00:00+00:00", "metrics": {}})
    record.put("audit", audit_json())
    return record


def audit_json() -> dict[str, Any]:
    detector = {"kind": "probe", "name": "logistic", "layer": 5, "base": 0.97, "base_low": 0.95, "base_high": 0.99}
    sample = {"prompt": "Why?", "base": "Because.", "tuned": "So.", "base_shows": True, "tuned_shows": False}
    return {
        "verdict": "feature silent, behaviour stayed",
        "reason": "The text rate is 0.41 (0.3 to 0.5).",
        "behaviour": {"detector": "chinese", "base": 0.4, "base_low": 0.3, "base_high": 0.5, "parts_base": None},
        "detectors": [{**detector, "tuned": 0.52, "tuned_low": None, "tuned_high": None}],
        "collateral": {"kl": 0.03, "perplexity_base": 21.0},
        "samples": [sample],
        "notes": ["Few prompts."],
        "settings": {"seed": 0},
    }


def run_json(penalised: FeatureSet, monitors: FeatureSet) -> dict[str, Any]:
    return {
        "model": "Qwen/Qwen3-1.7B-Base",
        "trainer": "SFTTrainer",
        "sae": {"name": "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "revision": None},
        "penalty": {"penalty_weight": 0.1, "penalty_kind": "preact_hinge", "penalty_tokens": "labels"},
        "features": penalised.to_dict(),
        "monitors": monitors.to_dict(),
        "rewards": [{"name": "zh", "scale": -1.0, "reader": "frozen", "features": features(2).to_dict()}],
        "policy": {"kind": "amplify_negative", "strength": 2.0},
        "uses": {"L5F10": ["penalty"]},
        "drift": {"limits": {"max_fvu_ratio": 2.0, "min_jaccard": 0.5, "max_kl": None}},
        "arguments": {"learning_rate": 2e-5, "hub_token": "hf_abcdef", "max_steps": 60, "run_name": ""},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": "cpu, 2 threads, x86_64",
        "num_processes": 2,
        "started": "2026-11-28T11:00:00+00:00",
        "qscope_trl": "0.1.0",
    }


def log_row(step: int, steps: int, penalised: FeatureSet, monitors: FeatureSet) -> dict[str, float]:
    share = step / steps
    noise = math.sin(step * 12.9898) * 0.15
    row = {"loss": 4 - 1.5 * share + noise, "learning_rate": 2e-5 * (1 - share), "grad_norm": 1 + noise}
    row |= {"sae/penalty": 0.6 * math.exp(-3 * share) * (1 + noise), "sae/penalty_weight": 0.1, "epoch": share}
    row |= {f"sae/L{layer}/penalty": 0.3 * math.exp(-3 * share) for layer in penalised.layers}
    for n, feature in enumerate(penalised.ids):
        row[f"sae/{feature}/firing_rate"] = 0.2 / (1 + n % 17) * math.exp(-3 * share) * (1 + noise)
        row[f"sae/{feature}/mean_pre_act"] = -3 - share
    for n, feature in enumerate(monitors.ids):
        row[f"sae/monitor/{feature}/firing_rate"] = 0.1 / (1 + n) * (1 + noise)
        row[f"sae/monitor/{feature}/mean_pre_act"] = -4.0
    if step % 5 == 0:
        row |= {"sae/text/rate": 0.4 + noise / 3, "reward": share, "rewards/length/mean": share, "sae/zh/score": 0.2}
    return row


def drift_row(share: float) -> dict[str, Any]:
    def layer(n: int) -> dict[str, float]:
        return {
            "fvu": (0.15 + 0.02 * n) * (1 + share),
            "fvu_ratio": 1 + share,
            "l0": 16 + share,
            "dead_rate": 0.03 * share,
            "jaccard": 1 - 0.6 * share,
            "activation_cosine": 1 - 0.3 * share,
            "residual_cosine": 1 - 0.1 * share,
        }

    crossed = ["L5/min_jaccard"] if share > 0.9 else []
    layers = {str(n): layer(n) for n in (4, 5)}
    return {"layers": layers, "kl": 0.3 * share, "crossed": crossed, "action": "warn" if crossed else None,
            "seconds": 0.4}  # fmt: skip


def add_watch(record: RunRecord, step: int, steps: int) -> None:
    """Generations, fixed texts, histograms and rollouts of one step."""
    share = step / steps
    values: dict[str, list[float | None]] = {
        "L5F10": [None, *(max(0.0, 3 * (1 - share) - abs(place - 6)) for place in range(1, len(TOKENS)))],
        "L4F11": [None, *(0.5 if place == 2 else 0.0 for place in range(1, len(TOKENS)))],
    }
    common = {"tokens": TOKENS, "values": values}
    for index in range(4):
        prompt = f"Question {index}: what did the cat do?"
        text = "".join(TOKENS)
        shown = {"is_shown": share < 0.7, "detector": "chinese", "prompt": prompt, "text": text}
        record.add("samples", step, {"index": index, **shown, **common})
        record.add("texts", step, {"index": index, **common})
        rewards = {"length": 0.5, "zh": -0.2 * index}
        rollout = {"prompt": prompt, "score": 0.3 * index, "policy": "amplify_negative"}
        rollout |= {"advantage_before": -0.5, "advantage": -0.5 - 0.5 * (index > 1)}
        record.add("rollouts", step, {**rollout, "rewards": rewards, **common})
    for feature, kind in (("L5F10", "penalised"), ("L4F10", "monitor")):
        counts = [int(200 * math.exp(-n * (1 + share))) for n in range(10)]
        row = {"feature": feature, "kind": kind, "edges": [n / 2 for n in range(11)], "counts": counts}
        record.add("histograms", step, {**row, "num_tokens": 4000})
    silent = {"feature": "L4F11", "kind": "penalised", "edges": [0.0, 1.0], "counts": [0], "num_tokens": 4000}
    record.add("histograms", step, silent)


def write_state(folder: Path, step: int = 20) -> None:
    """What a run of an older version left: checkpoints, and no record."""
    penalised, monitors = features(2), features(1, layer=4)
    history = [{**log_row(n, step, penalised, monitors), "step": n} for n in range(1, step + 1)]
    for last in (step // 2, step):
        checkpoint = folder / f"checkpoint-{last}"
        checkpoint.mkdir(parents=True)
        state = {"global_step": last, "log_history": history[:last]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        penalty = {"config": {"penalty_weight": 0.1, "penalty_kind": "topk_act"}, "features": ["L5F10", "L4F11"]}
        (checkpoint / "sae_penalty_state.json").write_text(json.dumps(penalty))
