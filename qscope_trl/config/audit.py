"""Settings of `qscope audit`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.find import POSITIONS
from qscope_trl.config.values import at_least, layer_list, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

_LEAST = {
    "max_texts": 4,
    "max_prompts": 1,
    "max_new_tokens": 1,
    "temperature": 0,
    "resamples": 100,
    "permutations": 1,
}


@dataclass(frozen=True, kw_only=True)
class AuditConfig(EncodingConfig):
    """Settings of `qscope audit`."""

    model: str = field(
        default="",
        metadata={"help": "Model before fine-tuning: Hub id, folder, or `demo`. By default that of the run's record."},
    )
    saes: str = field(
        default="",
        metadata={"help": "SAEs of that model: Hub id, folder, single file, or `demo`. By default the record's."},
    )
    layers: str = field(
        default="all", metadata={"help": "Features of these layers count: `26,27`, `20-27`, or `all` that are named."}
    )
    tuned: str | None = field(
        default=None,
        metadata={
            "help": "Model after fine-tuning: Hub id or folder, of a checkpoint or of a PEFT adapter, which is put on "
            "`--model`. By default what the run's folder holds."
        },
    )
    tuned_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of that."})
    features: str | None = field(
        default=None,
        metadata={
            "help": "Features that were trained on: file as `qscope find` writes it, or names such as L5F23,L5F4. By "
            "default the record's."
        },
    )
    monitors: str | None = field(
        default=None,
        metadata={"help": "Features of the same behaviour that were not trained on, in the same form."},
    )
    run_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the training run. What its record knows need not be said again, and the audit is "
            "written into the record and the model card."
        },
    )
    positive: str | None = field(
        default=None,
        metadata={
            "help": "Texts that show the behaviour: Hub id, file (.jsonl, .json, .parquet, .csv, .txt, also .gz), "
            "folder, or `demo:NAME`. Other ones than features were found on."
        },
    )
    negative: str | None = field(default=None, metadata={"help": "Texts that do not show it."})
    text_column: str = field(
        default="text", metadata={"help": "Column of these texts; `prompt+completion` joins several."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Prompts that both models go on from, for the text-level detector."}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column of the prompts; conversations go through the chat template."},
    )
    behaviour: str | None = field(
        default=None,
        metadata={
            "help": "What shows it in a text by itself: `chinese`, `repetition` or `regex:PATTERN`. Needed with "
            "`--prompts`."
        },
    )
    neutral: str | None = field(
        default=None,
        metadata={
            "help": "Texts that the model should write as before, for perplexity; by default the negative ones."
        },
    )
    neutral_column: str | None = field(
        default=None, metadata={"help": "Column of the neutral texts; by default `--text-column`."}
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of each dataset, if it has several."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of each Hub dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of each Hub dataset."})
    positions: str = field(
        default="all",
        metadata={
            "help": "Tokens of positive and negative texts to look at: `all`, or the `last` of each.",
            "choices": list(POSITIONS),
        },
    )
    max_texts: int = field(default=400, metadata={"help": "Take the first texts of each dataset, this many."})
    max_prompts: int = field(default=400, metadata={"help": "Take the first prompts, this many."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of each generation at most."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from."})
    holdout: float = field(
        default=0.5,
        metadata={"help": "Share of positive and negative texts that retrained detectors are tested on."},
    )
    permutations: int = field(
        default=20, metadata={"help": "Times that probes are trained on shuffled labels, to show what chance gives."}
    )
    resamples: int = field(
        default=1000, metadata={"help": "Bootstrap resamples of each interval, which holds in 95 of 100 cases."}
    )
    seed: int = field(default=0, metadata={"help": "Decides samples, which texts are held out, and resamples."})
    output: str | None = field(default=None, metadata={"help": "Write the report to this file as HTML."})
    json: str | None = field(default=None, metadata={"help": "Write every figure to this file as JSON."})

    def __post_init__(self) -> None:
        self._check_reading()
        if self.layers.strip() != "all":
            layer_list(self.layers, ())
        one_of("positions", self.positions, POSITIONS)
        for name, least in _LEAST.items():
            at_least(name, getattr(self, name), least)
        for name in ("output", "json"):
            check_output(name, getattr(self, name))
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` is {self.top_p}; it is a share above 0 and up to 1.")
        if not 0 < self.holdout < 1:
            raise ConfigError(
                f"`holdout` is {self.holdout}; it is a share between 0 and 1, as detectors are trained on some texts "
                f"and tested on others."
            )
        if not self.positive or not self.negative:
            missing = "positive" if not self.positive else "negative"
            raise ConfigError(
                f"`--{missing}` is missing: whether features and probes still tell the behaviour is measured on texts "
                f"that show it and texts that do not. Give both."
            )
        if bool(self.prompts) is not bool(self.behaviour):
            raise ConfigError(
                "`--prompts` and `--behaviour` come together: what both models write is judged by a detector that "
                "reads text. Got one of them."
            )
        if not self.run_dir:
            given = {"model": self.model, "saes": self.saes, "tuned": self.tuned, "features": self.features}
            absent = [f"`--{name}`" for name, value in given.items() if not value]
            if absent:
                raise ConfigError(
                    f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing. Say what was trained, or "
                    f"give `--run-dir` of a run that left a record."
                )
