"""The section of a model card that says what was trained on: from a run's record, into the README that TRL writes.

Left out: the rest of the card, which is TRL's; and figures that the record does not hold.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qscope_trl.errors import QScopeError, QScopeWarning
from qscope_trl.features import FeatureSet
from qscope_trl.features.hub import LICENCE, cell, code, public_name, table
from qscope_trl.files import write_whole
from qscope_trl.monitor.html import figure
from qscope_trl.monitor.run_record import RunRecord

BEGIN, END = "<!-- qscope_trl: begin -->", "<!-- qscope_trl: end -->"
"""Marks around the section, by which a later one replaces it."""

_TAG = "qscope_trl"
_MOST = 30


def update(output_dir: str | os.PathLike[str]) -> bool:
    """Put the section into `OUTPUT_DIR/README.md`, in place of an earlier one.

    Returns:
        Whether there was a card and a record to take it from.

    Raises:
        DataError: If the record is damaged.
    """
    from huggingface_hub import ModelCard

    path, record = Path(output_dir) / "README.md", RunRecord(output_dir)
    if not path.is_file() or record.get("run") is None:
        return False
    card = ModelCard.load(path, ignore_metadata_errors=True)
    tags = list(card.data.tags or [])
    card.data.tags = tags if _TAG in tags else [*tags, _TAG]
    body = re.sub(f"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n\n", card.text, flags=re.DOTALL)
    card.text = f"{body.rstrip()}\n\n{BEGIN}\n{section(record)}\n{END}\n"
    write_whole(path, str(card))
    return True


def update_if_possible(output_dir: str | os.PathLike[str]) -> None:
    """The same at the end of long work, which must not be lost for it: a warning says why there is no section."""
    try:
        update(output_dir)
    except (QScopeError, OSError, ValueError, yaml.YAMLError) as err:
        reason = " ".join(str(err).split()).rstrip(".")
        warnings.warn(
            f"The model card in '{output_dir}' gets no new section on features ({reason}); all else goes on.",
            QScopeWarning,
            stacklevel=2,
        )


def section(record: RunRecord) -> str:
    """The section as Markdown.

    Raises:
        DataError: If the record is damaged.
    """
    run = record.get("run") or {}
    parts = ["## Sparse autoencoder features", _what(run)]
    parts += [_features(title, run.get(key)) for key, title in (("features", "Penalised"), ("monitors", "Held out"))]
    parts += [_rewards(run), _course(record, run), _drift(record), _alarms(record), _audit(record.get("audit"))]
    return "\n\n".join(part for part in [*parts, LICENCE] if part)


def _what(run: Mapping[str, Any]) -> str:
    sae, penalty = run.get("sae") or {}, run.get("penalty") or {}
    name = sae.get("name")
    text = "Trained with [qscope_trl](https://pypi.org/project/qscope-trl/)"
    text += f" and the sparse autoencoders {code(public_name(str(name)))}." if name else "."
    if penalty.get("penalty_weight"):
        text += (
            f" A penalty (`{penalty['penalty_kind']}`, weight {penalty['penalty_weight']:g}) on the features below "
            f"joined the loss."
        )
    if run.get("control"):
        given = run["control"]
        kind = given.get("kind") if isinstance(given, Mapping) else given
        text += f" **Control run**: the penalty was put on {kind} features instead of the named ones."
    return text


def _features(title: str, data: Mapping[str, Any] | None) -> str:
    if not data:
        return ""
    features = FeatureSet.from_dict(data).features
    evidence = sorted({key for feature in features for key in feature.evidence})[:3]
    lines = table(
        ["feature", "stands for", "weight", "threshold", *evidence],
        [
            [
                str(feature.id),
                cell(feature.label) or "-",
                f"{feature.weight:g}",
                f"{feature.threshold:g}",
                *(figure(feature.evidence.get(key)) for key in evidence),
            ]
            for feature in features[:_MOST]
        ],
    )
    more = f"\n\nand {len(features) - _MOST} more." if len(features) > _MOST else ""
    return f"### {title} features\n\n{lines}{more}"


def _rewards(run: Mapping[str, Any]) -> str:
    rewards, policy = run.get("rewards") or [], run.get("policy")
    # A rollout policy reads its features by a reward function of scale 0.
    lines = [
        f"- {'Reward' if reward['scale'] else 'Read without a reward:'} {code(reward['name'])}: "
        f"{len(reward['features']['features'])} features, scale {reward['scale']:g}, read on the {reward['reader']} "
        f"model."
        for reward in rewards
    ]
    if policy:
        lines.append(f"- Rollout policy `{policy['kind']}`, strength {policy['strength']:g}.")
    return "### Rewards\n\n" + "\n".join(lines) if lines else ""


def _course(record: RunRecord, run: Mapping[str, Any]) -> str:
    """First and last value of what was trained on and of what was held out."""
    named = {}
    for key, prefix, kind in (("features", "sae", "penalised"), ("monitors", "sae/monitor", "held out")):
        for feature in (FeatureSet.from_dict(run[key]).ids if run.get(key) else ())[:_MOST]:
            named[f"{prefix}/{feature}/firing_rate"] = [str(feature), kind]
    ends: dict[str, tuple[float, float]] = {}
    # One row at a time: the log of a long run is large.
    for row in record.each("log"):
        for name in named.keys() & row.keys():
            rate = float(row[name])
            ends[name] = (ends[name][0] if name in ends else rate, rate)
    rows = [[*told, *map(figure, ends[name])] for name, told in named.items() if name in ends]
    if not rows:
        return ""
    head = ["feature", "kind", "firing rate at first", "at last"]
    return f"### Course\n\n{table(head, rows)}\n\nShare of the measured training tokens."


def _drift(record: RunRecord) -> str:
    rows = record.rows("drift")
    if not rows:
        return ""
    last = rows[-1]
    names = ["fvu", "jaccard", "residual_cosine"]
    lines = [
        [f"layer {layer}", *(figure(values.get(name)) for name in names)]
        for layer, values in sorted(last["layers"].items(), key=lambda item: int(item[0]))
    ]
    found = table(["", "fvu", "same active features (Jaccard)", "residual cosine"], lines)
    kl = last.get("kl")
    tail = "" if kl is None else f" KL divergence from the model before training: {figure(float(kl))} nats a token."
    return f"### Drift on fixed texts, step {last['step']}\n\n{found}\n\n{tail}".rstrip()


def _alarms(record: RunRecord) -> str:
    rows = record.rows("alarms")
    lines = "\n".join(f"- Step {row['step']}: {cell(row['message'])}" for row in rows[:_MOST])
    return f"### Alarms\n\n{lines}" if rows else ""


def _audit(audit: Mapping[str, Any] | None) -> str:
    if not audit:
        return ""
    return f"### Audit\n\n{cell(str(audit.get('verdict', '')))}. {cell(str(audit.get('reason', '')))}".rstrip()
