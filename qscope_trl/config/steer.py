"""Settings of `qscope steer`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

MODES = ("add", "ablate", "clamp")
UNITS = ("raw", "norm")
GATE_READS = ("prompt", "text")
PHASES = ("prompt", "generation")
EXPORTS = {
    "safetensors": (".safetensors", ".json"),
    "gguf": (".gguf",),
    "lm_eval": (".pt",),
    "easysteer": (".gguf",),
}
"""Formats of `export`: the ending of the file, and of what is written beside it."""
_LEAST = {
    "max_prompts": 1,
    "max_new_tokens": 1,
    "num_generations": 1,
    "temperature": 0,
    "control_draws": 0,
}


@dataclass(frozen=True, kw_only=True)
class SteerConfig(EncodingConfig):
    """Settings of `qscope steer`."""

    features: list[str] = field(
        metadata={"help": "Features to steer along: a feature file, or names such as L5F23,L4F1740. Repeatable."}
    )
    prompt: list[str] = field(default_factory=list, metadata={"help": "A prompt. Repeatable."})
    data: str | None = field(
        default=None,
        metadata={"help": "Instead: prompts from a dataset: Hub id, local file or folder, or `demo:NAME`."},
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of `--data`."})
    text_column: str = field(default="prompt", metadata={"help": "Column of `--data` that holds the prompt."})
    max_prompts: int = field(default=8, metadata={"help": "Prompts taken of `--data`: its first ones."})
    layers: str = field(
        default="all", metadata={"help": "Steer the features of these layers alone: `26,27`, `20-27`, or `all`."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens kept of each prompt: its last ones."})
    strength: float = field(default=1.0, metadata={"help": "Strength; what it means depends on mode and unit."})
    mode: str = field(
        default="add",
        metadata={
            "help": "`add`: strength times the features' directions. `ablate`: the features' contribution taken away, "
            "all of it at strength 1. `clamp`: the features held at strength times weight.",
            "choices": list(MODES),
        },
    )
    unit: str = field(
        default="raw",
        metadata={
            "help": "Of `add`: `raw`, times the decoder column; `norm`, relative to the residual's norm at each "
            "token.",
            "choices": list(UNITS),
        },
    )
    phases: str = field(
        default="prompt,generation",
        metadata={"help": "Where: `prompt`, `generation`, or both. The prompt's last position is generation."},
    )
    skip_first: bool = field(
        default=False, metadata={"help": "Leave position 0 of each prompt as it is, where many models have a sink."}
    )
    gate: str | None = field(
        default=None, metadata={"help": "Steer only where this rule holds: a rule file, or the text of a rule."}
    )
    gate_reads: str = field(
        default="prompt",
        metadata={
            "help": "What the gate reads: the `prompt`, once, or the `text` so far, at every token.",
            "choices": list(GATE_READS),
        },
    )
    calibrate: float | None = field(
        default=None,
        metadata={
            "help": "Instead of `--strength`: find the one whose mean KL divergence from the unsteered model is so "
            "many nats, such as 0.5. Its sign is that of `--strength`."
        },
    )
    calibrate_data: str | None = field(
        default=None,
        metadata={"help": "Texts to calibrate on. Default: the prompts with what the unsteered model makes of them."},
    )
    calibrate_column: str = field(default="text", metadata={"help": "Column of `--calibrate-data`."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of each generation at most."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0: the most probable token each time."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from so much of the probability's top."})
    num_generations: int = field(default=1, metadata={"help": "Generations of each prompt."})
    seed: int = field(default=0, metadata={"help": "Of sampling, controls and intervals."})
    sweep: str | None = field(
        default=None,
        metadata={
            "help": 'Strengths to compare, such as "-8,-4,0,4,8": behaviour and perplexity at each, with controls.'
        },
    )
    behaviour: str | None = field(
        default=None,
        metadata={
            "help": "What a sweep counts in the generations: `chinese`, `repetition`, `regex:PATTERN`, or `rule:RULE` "
            "over features that the unsteered model has on them."
        },
    )
    control_draws: int = field(
        default=3,
        metadata={"help": "Control of a sweep: so many sets of random features that fire as often; 0: none."},
    )
    figure: str | None = field(default=None, metadata={"help": "Figure of the sweep to write, .png or .svg."})
    report: str | None = field(
        default=None, metadata={"help": "HTML report to write: plain and steered texts, the features on each token."}
    )
    json: str | None = field(default=None, metadata={"help": "File to write everything to, as JSON."})
    export: str | None = field(
        default=None,
        metadata={
            "help": "Also write the steering vector for another program: safetensors, gguf, lm_eval, easysteer."
        },
    )
    output: str | None = field(default=None, metadata={"help": "File of `--export`."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the file of `--export` if there is one already."}
    )

    @property
    def phase_list(self) -> tuple[str, ...]:
        """The phases by name."""
        return tuple(part.strip() for part in self.phases.split(",") if part.strip())

    @property
    def export_files(self) -> tuple[Path, ...]:
        """What `export` writes: `output`, and a file beside it, if the format has one."""
        if not self.export or not self.output:
            return ()
        return (Path(self.output), *map(Path(self.output).with_suffix, EXPORTS[self.export][1:]))

    @property
    def sweep_list(self) -> tuple[float, ...]:
        """The sweep's strengths, ascending, each once, 0 and one of the other sign among them."""
        found = {0.0, *_numbers(self.sweep or "")}
        largest = max(found, key=abs)
        if min(found) == 0 or max(found) == 0:
            found.add(-largest)
        return tuple(sorted(found))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("mode", MODES), ("unit", UNITS), ("gate_reads", GATE_READS)):
            one_of(name, getattr(self, name), allowed)
        for name, least in _LEAST.items():
            at_least(name, getattr(self, name), least)
        for name in ("figure", "report", "json", "output"):
            check_output(name, getattr(self, name))
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` is {self.top_p!r}; it is a share above 0, up to 1.")
        for name in ("strength", "temperature"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}; it is a finite number.")
        if bool(self.prompt) is bool(self.data) and not (self.export and not self.prompt):
            raise ConfigError("Give the prompts in exactly one way: `--prompt TEXT`, repeated, or `--data FILE`.")
        if self.unit == "norm" and self.mode != "add":
            raise ConfigError(f"`--unit norm` is for `--mode add`; in `{self.mode}` strengths are of the activations.")
        if not self.phase_list or not set(self.phase_list) <= set(PHASES):
            raise ConfigError(
                f"`phases` is {self.phases!r}; write `prompt`, `generation`, or both with a comma between."
            )
        self._check_calibrate()
        self._check_sweep()
        self._check_export()
        self._check_files()

    def _check_calibrate(self) -> None:
        if self.calibrate is None:
            if self.calibrate_data:
                raise ConfigError("`--calibrate-data` is for `--calibrate`, which is not given.")
            return
        if not (math.isfinite(self.calibrate) and self.calibrate > 0):
            raise ConfigError(f"`calibrate` is {self.calibrate!r}; it is a divergence in nats above 0, such as 0.5.")
        if self.mode != "add" or self.sweep:
            other = "`--sweep` names its strengths" if self.sweep else f"`--mode {self.mode}` adds no direction"
            raise ConfigError(f"`--calibrate` finds the strength of `--mode add`, but {other}. Leave one of them out.")
        if not (self.prompt or self.data or self.calibrate_data):
            raise ConfigError("`--calibrate` needs texts: give prompts, or `--calibrate-data FILE`.")

    def _check_sweep(self) -> None:
        if self.sweep is None:
            for name in ("behaviour", "figure"):
                if getattr(self, name):
                    raise ConfigError(f"`--{name}` is for `--sweep`, which is not given.")
            return
        _numbers(self.sweep)
        if self.behaviour is None:
            raise ConfigError(
                "`--sweep` needs a `--behaviour` to count: `chinese`, `repetition`, `regex:PATTERN` or `rule:RULE`."
            )
        if self.report:
            raise ConfigError("`--report` shows one strength; leave out `--sweep`, or take `--figure` and `--json`.")
        if self.export:
            raise ConfigError("`--export` writes one strength; leave out `--sweep`, and export once one is chosen.")

    def _check_export(self) -> None:
        if bool(self.export) is not bool(self.output):
            raise ConfigError("`--export FORMAT` and `--output FILE` come together; got one of them.")
        if not self.export or not self.output:
            return
        one_of("export", self.export, tuple(EXPORTS))
        ending = EXPORTS[self.export][0]
        if Path(self.output).suffix != ending:
            raise ConfigError(f"`output` is '{self.output}', but the ending of a `{self.export}` file is `{ending}`.")
        reasons = (
            (self.mode != "add", f"`--mode {self.mode}` depends on the features' activations"),
            (self.unit != "raw", f"`--unit {self.unit}` depends on the residual's norm"),
            (set(self.phase_list) != set(PHASES), f"`--phases {self.phases}` leaves tokens out"),
            (self.skip_first, "`--skip-first` leaves tokens out"),
            (self.gate is not None, "`--gate` depends on the text"),
        )
        for holds, reason in reasons:
            if holds:
                raise ConfigError(
                    f"An exported vector is one and the same at every token, but {reason}. Leave it out, or leave out "
                    f"`--export`."
                )

    def _check_files(self) -> None:
        """No file is written twice, and none is written over what is read."""
        read = [("features", name) for name in self.features]
        read += [(name, getattr(self, name) or "") for name in ("data", "calibrate_data", "gate")]
        taken = {os.path.realpath(path): f"which `{name}` reads" for name, path in read if os.path.isfile(path)}
        written = [(name, getattr(self, name)) for name in ("figure", "report", "json")]
        for name, path in [*written, *(("output", str(file)) for file in self.export_files)]:
            if not path:
                continue
            use = taken.setdefault(os.path.realpath(path), f"which `{name}` writes")
            if use != f"which `{name}` writes":
                raise ConfigError(f"`{name}` would write '{path}', {use}. Choose another name for one of them.")


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)) or (text and not any(found)):
        raise ConfigError(f"`sweep` is {text!r}; write strengths as `-8,-4,0,4,8`, at least one of them not 0.")
    return found
