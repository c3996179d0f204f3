"""Settings of `qscope rules check`, `explain`, `learn` and `evaluate`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

AGGREGATIONS = ("max", "mean", "last", "rate")
METRICS = ("f1", "f0.5", "f2", "balanced_accuracy", "mcc")
SEARCHES = ("greedy", "beam")
FORMS = ("or", "atleast", "and", "except", "none")
_RULE = "The rule: a rule file (.yaml or .json), or its text, such as 'any(L12: 31, 407 > 0.5) and not L20F99'."
_SET = "`NAME=FILE`: a feature file that the rule names as `set:NAME`. Repeatable."


@dataclass(frozen=True, kw_only=True)
class RulesCheckConfig:
    """Settings of `qscope rules check`."""

    rule: str = field(metadata={"help": _RULE})
    set: list[str] = field(default_factory=list, metadata={"help": _SET})
    saes: str | None = field(
        default=None, metadata={"help": "SAEs to check it against: Hub id, folder, single file, or `demo`."}
    )
    sae_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the SAEs."})
    output: str | None = field(
        default=None,
        metadata={"help": "Rule file to write, with its sets and, given `--saes`, the SAEs' fingerprints."},
    )

    def __post_init__(self) -> None:
        check_output("output", self.output)


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(EncodingConfig):
    """Where labelled texts come from; shared by `learn` and `evaluate`."""

    data: str | None = field(
        default=None,
        metadata={"help": "Labelled texts: Hub id, local file or folder, or `demo:NAME`; with `--label-column`."},
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of `--data`."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of `--data`."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of `--data`."})
    label_column: str | None = field(default=None, metadata={"help": "Column of `--data` that holds the label."})
    positive_label: str = field(
        default="1",
        metadata={"help": "Value of the label column that is positive; every other one is negative. `true` for bool."},
    )
    positive: str | None = field(default=None, metadata={"help": "Instead of `--data`: texts that are positive."})
    negative: str | None = field(default=None, metadata={"help": "Texts that are negative."})
    text_column: str = field(
        default="text", metadata={"help": "Column of the text; `prompt+completion` joins several."}
    )
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Read at most this many rows of `--data`, or of each file given instead: its first ones."},
    )
    store: str | None = field(
        default=None,
        metadata={
            "help": "Feature store of exactly `--data`, made by `qscope index`: features are read from it, and the "
            "model runs for the baselines alone."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Rows that agree in this column, such as a page or an author, are never parted by a split or by "
            "the bootstrap. Default: equal texts."
        },
    )
    random_draws: int = field(
        default=3, metadata={"help": "Baseline: rules of as many random features that fire as often; repetitions."}
    )
    metric: str = field(
        default="f1",
        metadata={"help": "What rules and thresholds make as large as possible.", "choices": list(METRICS)},
    )
    seed: int = field(default=0, metadata={"help": "Decides splits, draws and bootstrap samples."})
    json: str | None = field(default=None, metadata={"help": "File to write all figures to, as JSON."})
    report: str | None = field(default=None, metadata={"help": "HTML report to write."})
    baselines: bool = field(
        default=True, metadata={"help": "Also fit probes on the raw residual, a keyword classifier, and others."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("max_rows", self.max_rows, 2)
        if bool(self.data) is bool(self.positive or self.negative) or bool(self.positive) is not bool(self.negative):
            raise ConfigError(
                "Give the texts in exactly one way: `--data FILE --label-column COLUMN`, or `--positive FILE "
                "--negative FILE`."
            )
        if bool(self.data) is not bool(self.label_column):
            raise ConfigError("`--data` and `--label-column` come together; got one of them.")
        if self.group_column and not self.data:
            raise ConfigError("`--group-column` is a column of `--data`, which is not given.")
        if self.store and not self.data:
            raise ConfigError("`--store` is of one data set, `--data`; it does not go with `--positive`.")
        one_of("metric", self.metric, METRICS)
        at_least("random_draws", self.random_draws, 0)
        for name in ("json", "report"):
            check_output(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RulesLearnConfig(LabelledConfig):
    """Settings of `qscope rules learn`."""

    output: str = field(metadata={"help": "Rule file to write, .yaml or .json; one that is there is overwritten."})
    name: str | None = field(default=None, metadata={"help": "What the rule is called in reports and metrics."})
    layers: str = field(
        default="all",
        metadata={"help": "Layers to search, from 0: `26,27`, `20-27`, or `all`. Each keeps its encoder."},
    )
    test_data: str | None = field(
        default=None,
        metadata={
            "help": "Test set, with the same columns as `--data`. Default: a share of `--data` is held out. "
            "`--max-rows` cuts it too."
        },
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of the test set."})
    test_share: float = field(default=0.2, metadata={"help": "Share held out for the test, without `--test-data`."})
    folds: int = field(
        default=5,
        metadata={"help": "Parts of what is not tested: one is the development split, and each is held out in turn."},
    )
    aggregation: list[str] = field(
        default_factory=list,
        metadata={
            "help": "How a feature's activations are summed up over a text: max, mean, last or rate. Repeatable. "
            "Default: max."
        },
    )
    candidates: int = field(
        default=32,
        metadata={"help": "Features tried: so many by firing rate, so many by mean, for and against the label."},
    )
    thresholds: int = field(
        default=8, metadata={"help": "Thresholds tried for each feature, beside 0: quantiles where it fires."}
    )
    form: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Forms tried: `or`, `and`, `atleast` (k of n), `except` (one of these and not any of others), "
            "`none` (not any). Repeatable. Default: all."
        },
    )
    max_size: int = field(default=10, metadata={"help": "Most features that speak for the label."})
    max_count: int = field(default=3, metadata={"help": "Largest k of `atleast`."})
    max_exceptions: int = field(default=3, metadata={"help": "Most features that speak against it."})
    search: str = field(
        default="beam",
        metadata={"help": "`greedy` adds the best feature in each step, `beam` follows several ways.",
                  "choices": list(SEARCHES)},
    )  # fmt: skip
    beam_width: int = field(default=8, metadata={"help": "Ways that `beam` follows."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output("output", self.output)
        one_of("search", self.search, SEARCHES)
        for name in self.aggregation:
            one_of("aggregation", name, AGGREGATIONS)
        for name in self.form:
            one_of("form", name, FORMS)
        for name, least in (
            ("folds", 3),
            ("candidates", 1),
            ("thresholds", 0),
            ("max_size", 1),
            ("max_count", 2),
            ("max_exceptions", 1),
            ("beam_width", 1),
        ):
            at_least(name, getattr(self, name), least)
        if not 0 < self.test_share < 1:
            raise ConfigError(f"`test_share` is {self.test_share!r}; it is a share between 0 and 1.")
        if self.test_data and not self.data:
            raise ConfigError("`--test-data` has the columns of `--data`; it does not go with `--positive`.")
        if self.test_split and not self.test_data:
            raise ConfigError("`--test-split` is a split of `--test-data`, which is not given.")
        if self.store and self.test_data:
            raise ConfigError("`--store` is of one data set, `--data`; it does not go with `--test-data`.")

    @property
    def all_aggregations(self) -> tuple[str, ...]:
        """Aggregations to try, each once."""
        return tuple(dict.fromkeys(self.aggregation)) or ("max",)

    @property
    def all_forms(self) -> tuple[str, ...]:
        """Forms to try."""
        return tuple(name for name in FORMS if not self.form or name in self.form)

    @property
    def width(self) -> int:
        """Ways the search follows."""
        return 1 if self.search == "greedy" else self.beam_width


@dataclass(frozen=True, kw_only=True)
class RulesEvaluateConfig(LabelledConfig):
    """Settings of `qscope rules evaluate`."""

    rule: str = field(metadata={"help": _RULE})
    set: list[str] = field(default_factory=list, metadata={"help": _SET})
    layers: str = field(
        default="rule", metadata={"help": "Layers of the probes; `rule` are those that the rule reads."}
    )
    fit_data: str | None = field(
        default=None,
        metadata={"help": "Labelled texts, with the same columns, to fit the baselines on. Without: no baselines."},
    )
    fit_split: str | None = field(default=None, metadata={"help": "Split of `--fit-data`."})
    max_fit_rows: int | None = field(
        default=None,
        metadata={
            "help": "Read at most this many rows of `--fit-data`: its first ones. A comparison is fair if the rule "
            "was learned from the same."
        },
    )

    def __post_init__(self) -> None:
        # `rule` is no list of layers; everything else is checked.
        layers = self.layers
        object.__setattr__(self, "layers", "all" if layers == "rule" else layers)
        super().__post_init__()
        object.__setattr__(self, "layers", layers)
        if self.fit_split and not self.fit_data:
            raise ConfigError("`--fit-split` is a split of `--fit-data`, which is not given.")
        at_least("max_fit_rows", self.max_fit_rows, 2)
        if self.max_fit_rows is not None and not self.fit_data:
            raise ConfigError("`--max-fit-rows` is of `--fit-data`, which is not given.")
        if self.fit_data and not self.data:
            raise ConfigError("`--fit-data` has the columns of `--data`; it does not go with `--positive`.")


@dataclass(frozen=True, kw_only=True)
class RulesExplainConfig(EncodingConfig):
    """Settings of `qscope rules explain`."""

    rule: str = field(metadata={"help": _RULE})
    set: list[str] = field(default_factory=list, metadata={"help": _SET})
    layers: str = field(default="all", metadata={"help": "Not used: the rule names its layers."})
    text: list[str] = field(default_factory=list, metadata={"help": "A text to explain the rule on. Repeatable."})
    data: str | None = field(
        default=None, metadata={"help": "Or texts of a data set: Hub id, local file or folder, or `demo:NAME`."}
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of `--data`."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of `--data`."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of `--data`."})
    text_column: str = field(
        default="text", metadata={"help": "Column of the text; `prompt+completion` joins several."}
    )
    rows: str = field(default="0-4", metadata={"help": "Rows of `--data` to explain, from 0: `3,17` or `0-4`."})
    report: str | None = field(
        default=None, metadata={"help": "HTML report to write, which shows the tokens that each feature fires at."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.text) is bool(self.data):
            raise ConfigError("Give texts in one way: `--text TEXT`, or `--data FILE` with `--rows`.")
        check_output("report", self.report)
        if not self.chosen_rows:
            raise ConfigError(f"`rows` is {self.rows!r}, which names no row; ranges run upwards, as in `0-4`.")

    @property
    def chosen_rows(self) -> tuple[int, ...]:
        """Rows to explain, ascending.

        Raises:
            ConfigError: If `rows` is not of the documented form.
        """
        chosen: dict[int, None] = {}
        for part in self.rows.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None:
                raise ConfigError(f"`rows` is {self.rows!r}; write it as `3,17` or `0-4`.")
            chosen.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
        return tuple(sorted(chosen))
