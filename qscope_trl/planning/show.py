"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qscope_trl._version import __version__
from qscope_trl.errors import ConfigError
from qscope_trl.files import write_whole
from qscope_trl.planning.memory import PARTS
from qscope_trl.planning.run import CUDA_CONTEXT, FRAGMENTATION, Plan
from qscope_trl.planning.suggestions import Suggestion

GIB = 2**30


def format_plan(plan: Plan, suggestions: Sequence[Suggestion] = ()) -> str:
    """The plan as text: the model, the parts at the peak, the verdict, the SAE files, and what is to be known."""
    facts, engine, settings = plan.facts, plan.engine, plan.settings
    trained = "all weights" if not settings["use_peft"] else "adapters"
    number = engine.num_processes
    lines = [
        f"{plan.model}: {facts.class_name}, {_count(facts.num_parameters)} parameters, "
        f"{_count(facts.num_trainable)} trained ({trained})",
        f"{plan.method} on {engine.name}, {number} GPU{'s' if number > 1 else ''}; weights {settings['dtype']}, mixed "
        f"precision {settings['precision']}, {settings['optim']}",
        f"micro-batch {settings['batch']} x {settings['length']} tokens, accumulation "
        f"{settings['gradient_accumulation_steps']}, gradient checkpointing "
        f"{'on' if settings['gradient_checkpointing'] else 'off'}",
        "",
        f"GiB on each GPU, at the peak: {plan.peak.name}",
    ]
    peak = plan.peak.parts
    lines += [f"  {part:<17}{peak[part] / GIB:8.2f}" for part in PARTS if peak[part]]
    lines += [
        f"  {'margin':<17}{plan.margin / GIB:8.2f}   {CUDA_CONTEXT / GIB:.2f} for CUDA, {FRAGMENTATION:.0%} of what "
        f"comes and goes: an allowance, not computed",
        f"  {'total':<17}{plan.total / GIB:8.2f}   of {plan.gpu_memory / GIB:g}: "
        f"{'fits' if plan.fits else 'does not fit'}",
    ]
    if suggestions:
        lines += ["", "What would help most:"]
        lines += [
            f"  {item.flags:<44}{item.total / GIB:8.2f}   {'fits' if item.fits else 'does not fit'}"
            for item in suggestions
        ]
    saes = plan.saes
    if saes is not None:
        place = "local" if saes.is_local else "to download"
        names = ", ".join(f"layer{layer}" for layer in saes.layers)
        read = saes.bytes_read / 2**20
        lines += [
            "",
            f"SAEs {saes.source}: {names}",
            f"  {saes.bytes_on_disk / GIB:.2f} GiB on disk ({place}), of which {read:.2f} MiB are read, by memory map"
            + (": whole encoders" if saes.whole_encoders else f": {saes.num_features} rows"),
        ]
    if plan.notes:
        lines += ["", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def as_dict(plan: Plan, suggestions: Sequence[Suggestion] = ()) -> dict[str, Any]:
    """The plan as plain data; bytes throughout."""
    return {
        "version": __version__,
        "method": plan.method,
        "model": plan.model,
        "class": plan.facts.class_name,
        "num_parameters": plan.facts.num_parameters,
        "num_trainable": plan.facts.num_trainable,
        "engine": plan.engine._asdict(),
        "settings": plan.settings,
        "peak": plan.peak.name,
        "parts": plan.peak.parts,
        "margin": plan.margin,
        "total": plan.total,
        "gpu_memory": plan.gpu_memory,
        "fits": plan.fits,
        "moments": [{"name": moment.name, "total": moment.total, "parts": moment.parts} for moment in plan.moments],
        "saes": None
        if plan.saes is None
        else {
            **plan.saes._asdict(),
            "bytes_on_disk": plan.saes.bytes_on_disk,
            "bytes_read": plan.saes.bytes_read,
        },
        "suggestions": [item._asdict() for item in suggestions],
        "notes": plan.notes,
    }


def write_json(plan: Plan, suggestions: Sequence[Suggestion], path: str) -> None:
    """Write the plan to a file, under a temporary name first.

    Raises:
        ConfigError: If the file cannot be written.
    """
    try:
        write_whole(Path(path), json.dumps(as_dict(plan, suggestions), indent=2) + "\n")
    except OSError as err:
        raise ConfigError(
            f"The plan cannot be written to '{path}': {err.strerror}. Name a file in a folder that can be written to, "
            f"by `--json`."
        ) from err


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{name}"
    return str(number)
