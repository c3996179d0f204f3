"""Settings of `qscope curate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

MEASURES = ("jaccard", "weighted_jaccard", "cosine")
AGGREGATIONS = ("max", "mean", "rate")
NEAREST_BY = ("mean", "max")
KEEP_FIRST = ("first", "longest")
OTHERS = "*"
"""Name of a quota that every group without its own one has."""


@dataclass(frozen=True, kw_only=True)
class CurateConfig(EncodingConfig):
    """Settings of `qscope curate`, in the order of its steps."""

    data: str = field(metadata={"help": "Dataset: Hub id, local file or folder, or `demo:NAME`. It is never changed."})
    output: str | None = field(
        default=None, metadata={"help": "Folder to make, for the dataset and the report. Not needed for a dry run."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Show the figures of the report, and write nothing."})
    text_column: str = field(
        default="text", metadata={"help": "Column of the texts; `prompt+completion` joins several."}
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of the dataset."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub dataset."})
    store: str | None = field(
        default=None,
        metadata={"help": "Feature store of exactly this dataset, made by `qscope index`; else it is encoded here."},
    )
    model: str = field(
        default="", metadata={"help": "Model to encode with: Hub id, folder, or `demo`. Not needed with `--store`."}
    )
    saes: str = field(default="", metadata={"help": "SAEs of that model: Hub id, folder, single file, or `demo`."})
    layers: str = field(
        default="",
        metadata={
            "help": "Layers whose features are compared: `26,27`, `20-27`, or `all`. Rules name theirs themselves. "
            "Default with `--store`: all it holds."
        },
    )
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "`NAME=FILE`: a feature file that rules name as `set:NAME`. Repeatable."},
    )
    tag: list[str] = field(
        default_factory=list,
        metadata={"help": "`NAME=RULE`: add a column that says whether the rule holds. Repeatable."},
    )
    score: list[str] = field(
        default_factory=list, metadata={"help": "`NAME=RULE`: add a column with the rule's margin. Repeatable."}
    )
    keep: list[str] = field(
        default_factory=list,
        metadata={"help": "Keep only rows for which this rule, or the one in this file, holds. Repeatable."},
    )
    drop: list[str] = field(
        default_factory=list, metadata={"help": "Drop rows for which this rule holds. Repeatable."}
    )
    exclude_near: list[str] = field(
        default_factory=list,
        metadata={"help": "Drop rows near a row of this dataset, or feature store, such as a benchmark. Repeatable."},
    )
    exclude_similarity: float = field(
        default=0.6, metadata={"help": "Similarity from which `--exclude-near` drops a row."}
    )
    exclude_by: str = field(
        default="weighted_jaccard",
        metadata={"help": "Similarity of `--exclude-near`, see `--deduplicate-by`.", "choices": list(MEASURES)},
    )
    deduplicate: float | None = field(
        default=None,
        metadata={"help": "Drop rows whose similarity to a kept row is this or more, 0 to 1. Equal texts have 1."},
    )
    deduplicate_by: str = field(
        default="jaccard",
        metadata={
            "help": "`jaccard` of the sets of active features; `weighted_jaccard`: rare features count more; `cosine` "
            "of the activations times inverse document frequency.",
            "choices": list(MEASURES),
        },
    )
    deduplicate_keep: str = field(
        default="first",
        metadata={
            "help": "Which of near rows stays: the `first`, the `longest` in tokens, or a `--score` to be high."
        },
    )
    nearest: str | None = field(
        default=None,
        metadata={"help": "Keep the rows nearest to those of this dataset, or feature store, by cosine."},
    )
    nearest_rows: int | None = field(default=None, metadata={"help": "How many rows `--nearest` keeps."})
    nearest_by: str = field(
        default="mean",
        metadata={
            "help": "Rank by the `mean` cosine to all rows of `--nearest`, or by that to the nearest one (`max`).",
            "choices": list(NEAREST_BY),
        },
    )
    balance: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Column or tag whose values are groups; several are combined. Without `--quota` each group is cut "
            "to the smallest one's size. Repeatable."
        },
    )
    quota: list[str] = field(
        default_factory=list,
        metadata={
            "help": "`NAME=N`: keep N rows of a group of `--balance` (`zh`, or `zh/true` of two columns; `*`: of each "
            "other one), or without it N rows of those that have a tag. Repeatable."
        },
    )
    allow_fewer: bool = field(
        default=False,
        metadata={"help": "Go on where there are fewer rows than `--quota` or `--nearest-rows` asks for."},
    )
    max_rows: int | None = field(default=None, metadata={"help": "Keep at most this many rows, a random choice."})
    seed: int = field(default=0, metadata={"help": "Decides which rows of a group stay, together with their content."})
    aggregation: str = field(
        default="max",
        metadata={
            "help": "Activation of a feature in a row that `cosine` compares: its largest, its mean over the tokens, "
            "or the share of tokens where it fires.",
            "choices": list(AGGREGATIONS),
        },
    )
    reference_column: str | None = field(
        default=None,
        metadata={"help": "Column of the texts of `--exclude-near` and `--nearest`. Default: that of the data."},
    )
    reference_split: str | None = field(default=None, metadata={"help": "Split of those datasets."})
    reference_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of them."})
    prefix: str = field(
        default="qscope_",
        metadata={"help": "Begins the names of the columns that are added besides tags and scores, such as the row."},
    )
    examples: int = field(default=5, metadata={"help": "Rows of each step that the report shows."})

    def __post_init__(self) -> None:
        if self.layers:
            super().__post_init__()
        else:
            self._check_reading()
        check_output("output", self.output, is_folder=True)
        one_of("exclude_by", self.exclude_by, MEASURES)
        one_of("deduplicate_by", self.deduplicate_by, MEASURES)
        one_of("nearest_by", self.nearest_by, NEAREST_BY)
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        for name, least in (("nearest_rows", 1), ("max_rows", 1), ("examples", 0)):
            at_least(name, getattr(self, name), least)
        for name in ("deduplicate", "exclude_similarity"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"`{name}` is {value}; it is a similarity above 0 and up to 1.")
        if not self.output and not self.dry_run:
            raise ConfigError("`--output` is missing: name the folder to make, or give `--dry-run`.")
        if (self.nearest is None) is not (self.nearest_rows is None):
            raise ConfigError("`--nearest` and `--nearest-rows` come together; got one of them.")
        if bool(self.model) is not bool(self.saes):
            raise ConfigError("`--model` and `--saes` come together; got one of them.")
        self._check_names()
        self._check_features()

    @property
    def rules(self) -> list[tuple[str, str]]:
        """Every rule with the setting it is of: tags, scores, keep, drop."""
        named = [("tag", text) for text in self.tags.values()] + [("score", text) for text in self.scores.values()]
        return named + [("keep", text) for text in self.keep] + [("drop", text) for text in self.drop]

    @property
    def tags(self) -> dict[str, str]:
        """Rule of each tag."""
        return dict(_named("tag", self.tag, "RULE"))

    @property
    def scores(self) -> dict[str, str]:
        """Rule of each score."""
        return dict(_named("score", self.score, "RULE"))

    @property
    def sets(self) -> dict[str, str]:
        """File of each set."""
        return dict(_named("set", self.set, "FILE"))

    @property
    def quotas(self) -> dict[str, int]:
        """Rows of each quota, in the order given."""
        found = {}
        for name, count in _named("quota", self.quota, "N", last=True):
            if not count.isdecimal():
                raise ConfigError(f"`--quota` is '{name}={count}'; {count!r} is not a number of rows.")
            found[name] = int(count)
        return found

    @property
    def own_columns(self) -> list[str]:
        """Names of the columns that are added besides tags and scores."""
        found = ["row", *["duplicates"] * (self.deduplicate is not None), *["nearness"] * bool(self.nearest)]
        return [self.prefix + name for name in found]

    @property
    def needs_sets(self) -> bool:
        """Whether rows are compared by their features."""
        return bool(self.exclude_near or self.deduplicate or self.nearest)

    @property
    def needs_values(self) -> bool:
        """Whether activations are compared, and not only which features are active."""
        near = bool(self.exclude_near) and self.exclude_by == "cosine"
        return near or bool(self.nearest) or (self.deduplicate is not None and self.deduplicate_by == "cosine")

    def _check_names(self) -> None:
        added = [*_named("tag", self.tag, "RULE"), *_named("score", self.score, "RULE")]
        for pairs in (added, _named("set", self.set, "FILE"), [(name, "") for name in self.quotas]):
            names = [name for name, _ in pairs]
            again = next((name for name in names if names.count(name) > 1), None)
            if again is not None:
                raise ConfigError(
                    f"`{again}` is named twice among tags and scores, sets, or quotas; names are unique."
                )
        own = next((name for name, _ in added if name in self.own_columns), None)
        if own is not None:
            raise ConfigError(
                f"`{own}` is the name of a column that curation adds itself. Give the tag or score another name, or "
                f"the own columns another `--prefix`."
            )
        if len(self.quotas) < len(self.quota):
            raise ConfigError("A group has two quotas; give it one.")
        if self.deduplicate_keep not in (*KEEP_FIRST, *self.scores):
            raise ConfigError(
                f"`deduplicate_keep` is {self.deduplicate_keep!r}; it is `first`, `longest` or the name of a score."
            )
        if not self.balance:
            stray = next((name for name in self.quotas if name not in self.tags), None)
            if stray is not None:
                raise ConfigError(
                    f"`--quota {stray}=...` names no tag. Name a group of a column together with `--balance COLUMN`, "
                    f"or define the tag by `--tag {stray}=RULE`."
                )

    def _check_features(self) -> None:
        what = [f"`--{name}`" for name, _ in self.rules]
        what += [f"`--{name}`" for name in ("exclude-near", "deduplicate", "nearest") if getattr(self, _field(name))]
        if what and not self.store and not self.model:
            raise ConfigError(
                f"{what[0]} reads features: give `--model` and `--saes` to encode with, or a `--store` of the data."
            )
        if self.needs_sets and not self.store and not self.layers:
            raise ConfigError("`--layers` is missing: say which layers' features are compared.")


def _field(name: str) -> str:
    return name.replace("-", "_")


def _named(name: str, entries: list[str], what: str, *, last: bool = False) -> list[tuple[str, str]]:
    """`NAME=...` as pairs; with `last` parted at the last `=`."""
    pairs = []
    for entry in entries:
        left, mark, right = entry.rpartition("=") if last else entry.partition("=")
        if not (left.strip() and mark and right.strip()):
            raise ConfigError(f"`--{name}` is {entry!r}; write it as NAME={what}.")
        pairs.append((left.strip(), right.strip()))
    return pairs
