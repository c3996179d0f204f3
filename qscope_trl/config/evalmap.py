"""Settings of `qscope evalmap`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import DTYPES, at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

POOLS = ("last", "max")
PER_SET = ("data_split", "data_config", "data_revision", "text_column", "by")
"""Settings that hold for all data sets, or with `NAME=` before the value for one."""


class SetSpec(NamedTuple):
    """A data set to map, as the command line names it."""

    name: str
    place: str
    split: str | None
    config: str | None
    revision: str | None
    text_column: str
    filters: tuple[tuple[str, str], ...]
    by: str | None


@dataclass(frozen=True, kw_only=True)
class EvalmapConfig(EncodingConfig):
    """Settings of `qscope evalmap`."""

    output: str = field(metadata={"help": "Folder to make, for the report, the tables and the figures."})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "`NAME=DATA`, or DATA alone: local file or folder, Hub id, `demo:NAME`, or a store of `qscope "
            "index`. One evaluation set; repeatable."
        },
    )
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness, as in `gsm8k,mmlu`; each is a set, by the harness's own prompts."
        },
    )
    task_path: str | None = field(default=None, metadata={"help": "Folder with your own task YAML files."})
    text_column: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Column of the text, `text` by default; `question+answer` joins several. `NAME=COLUMN`: of one "
            "set. Repeatable, as the next ones."
        },
    )
    data_split: list[str] = field(default_factory=list, metadata={"help": "Split, or `NAME=SPLIT`."})
    data_config: list[str] = field(default_factory=list, metadata={"help": "Configuration, or `NAME=CONFIG`."})
    data_revision: list[str] = field(default_factory=list, metadata={"help": "Revision, or `NAME=REVISION`."})
    filter: list[str] = field(
        default_factory=list,
        metadata={"help": "`COLUMN=VALUE`, or `NAME:COLUMN=VALUE`: only rows that have it. Repeatable."},
    )
    by: list[str] = field(
        default_factory=list,
        metadata={"help": "COLUMN, or `NAME=COLUMN`: make a set of each of its values, `NAME/VALUE`."},
    )
    max_samples: int | None = field(default=None, metadata={"help": "Take the first samples of each set, this many."})
    model: str = field(
        default="", metadata={"help": "Model to encode with: Hub id, folder, or `demo`. Not needed for stores alone."}
    )
    saes: str = field(default="", metadata={"help": "SAEs of that model: Hub id, folder, single file, or `demo`."})
    layers: str = field(
        default="",
        metadata={
            "help": "Layers whose features count, side by side: `26`, `20-27`, or `all`. Default for stores alone: "
            "all of the first."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the model. With `bfloat16` or `auto` it needs half the memory, and a few features in a "
            "thousand depend on the batch that a text is in.",
            "choices": list(DTYPES),
        },
    )
    max_length: int = field(
        default=2048, metadata={"help": "Tokens kept of each text: its last ones, with `--pool max` its first."}
    )
    pool: str = field(
        default="last",
        metadata={
            "help": "Features of a sample: those active at its `last` token, as published, or at any token (`max`).",
            "choices": list(POOLS),
        },
    )
    subset: int | None = field(
        default=None, metadata={"help": "Samples of the subset to choose of each set. Default: 10 % of it."}
    )
    cluster_overlap: float = field(
        default=0.5, metadata={"help": "Mean overlap from which sets are of one cluster, 0 to 1."}
    )
    near: float = field(
        default=0.8, metadata={"help": "Jaccard similarity from which two samples are near; 0: do not look for any."}
    )
    near_samples: int | None = field(
        default=1000,
        metadata={"help": "Samples of each set that are looked up among all others; 0: every one."},
    )
    near_pairs: int = field(default=100, metadata={"help": "Near pairs to list of each two sets, the nearest ones."})
    ngram: int = field(default=8, metadata={"help": "Tokens of the n-grams that near samples are compared by."})
    train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "`NAME=DATA`, or DATA alone: training texts to look for near ones of the samples in. Repeatable."
        },
    )
    train_column: str = field(default="text", metadata={"help": "Column of the training texts."})
    train_split: str | None = field(default=None, metadata={"help": "Split of the training texts."})
    train_config: str | None = field(default=None, metadata={"help": "Configuration of the training texts."})
    train_rows: int | None = field(default=None, metadata={"help": "Read the first training texts, this many."})
    scores: str | None = field(
        default=None,
        metadata={"help": "CSV of scores: a row per model; columns are sets, or samples as `gsm8k/0`."},
    )
    given: str | None = field(
        default=None, metadata={"help": "Set whose scores are taken out of the others', such as `mmlu`."}
    )
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the intervals of what is said of scores."})
    seed: int = field(default=0, metadata={"help": "Decides random subsets of scores, and resamples."})
    examples: int = field(default=5, metadata={"help": "Near pairs of each two sets that the report shows."})

    def __post_init__(self) -> None:
        if self.layers:
            super().__post_init__()
        else:
            self._check_reading()
        check_output("output", self.output, is_folder=True)
        one_of("pool", self.pool, POOLS)
        for name in ("max_samples", "subset", "ngram", "train_rows", "bootstrap"):
            at_least(name, getattr(self, name), 1)
        for name in ("near_samples", "near_pairs", "examples"):
            at_least(name, getattr(self, name), 0)
        for name in ("near", "cluster_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it is a share, 0 to 1.")
        if self.train and not self.near:
            raise ConfigError("`train` was given, but `near` is 0, so nothing is looked for in it.")
        if self.given and not self.scores:
            raise ConfigError(f"`given` is {self.given!r}, a set to take out of scores, but no `scores` are given.")
        if not self.data and not self.task_names:
            raise ConfigError("No set is given: name some by `--data NAME=DATA` or `--tasks`.")
        names = [*(name for name, _ in map(_named, self.data)), *self.task_names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"Two sets are called `{twice[0]}`. Give them names, as in `--data first={twice[0]}`.")
        self._check_train(names)
        self.specs()

    def _check_train(self, sets: Sequence[str]) -> None:
        """Refuse training sets of one name, or of a set's: what is found in them is told apart by it."""
        names = [name for name, _ in self.train_sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"Two training sets are called `{twice[0]}`. Give them names, as in `--train first={twice[0]}`."
            )
        for name in names:
            if name in sets:
                raise ConfigError(
                    f"A training set and an evaluation set are both called `{name}`. Give one another name, as in "
                    f"`--train {name}_train=DATA`."
                )

    @property
    def task_names(self) -> tuple[str, ...]:
        """Tasks of lm-evaluation-harness."""
        return tuple(part.strip() for part in (self.tasks or "").split(",") if part.strip())

    @property
    def train_sets(self) -> list[tuple[str, str]]:
        """Name and place of the training sets."""
        return [_named(entry) for entry in self.train]

    def specs(self) -> list[SetSpec]:
        """The data sets, with what holds for each.

        Raises:
            ConfigError: If a setting names a set that is not there, or is not of its form.
        """
        sets = [_named(entry) for entry in self.data]
        names = [name for name, _ in sets]
        found = {setting: _per_set(setting, getattr(self, setting), names) for setting in PER_SET}
        filters = [_filter(entry, names) for entry in self.filter]
        return [
            SetSpec(
                name,
                place,
                found["data_split"].get(name),
                found["data_config"].get(name),
                found["data_revision"].get(name),
                found["text_column"].get(name) or "text",
                tuple((column, value) for of, column, value in filters if of in (None, name)),
                found["by"].get(name),
            )
            for name, place in sets
        ]


def _named(entry: str) -> tuple[str, str]:
    """Name and place of `NAME=DATA`, or of DATA alone."""
    match = re.fullmatch(r"([\w.+-]+)=(.+)", entry)
    if match:
        return match[1], match[2]
    last = re.split(r"[/\\:]", entry.rstrip("/\\"))[-1]
    name = re.sub(r"\.(jsonl|json|parquet|csv|txt)(\.gz)?$", "", last)
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"{entry!r} names no set; write it as `NAME=DATA`, the name of letters and digits.")
    return name, entry


def _per_set(setting: str, entries: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """For each set what holds for it; an entry with its name goes before one without."""
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    for entry in entries:
        name, is_named, value = entry.partition("=")
        if is_named and name not in names:
            raise ConfigError(f"`{setting}` is given for `{name}`, but the sets are {', '.join(names)}.")
        if not is_named and common:
            raise ConfigError(f"`{setting}` is given twice for all sets; write `NAME={entry}` for one.")
        if is_named:
            own[name] = value
        else:
            common = dict.fromkeys(names, entry)
    return {**common, **own}


def _filter(entry: str, names: Sequence[str]) -> tuple[str | None, str, str]:
    """Set, or `None` for all, column and value of a filter."""
    column, is_pair, value = entry.partition("=")
    if not is_pair or not column:
        raise ConfigError(f"`filter` is {entry!r}; write `COLUMN=VALUE`, or `NAME:COLUMN=VALUE` for one set.")
    name, is_named, rest = column.partition(":")
    if is_named and name in names:
        return name, rest, value
    return None, column, value
