"""Settings of `qscope find`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

RANK_BY = ("mean_difference", "delta", "auroc", "log_odds", "monolinguality")
POSITIONS = ("all", "last")
SELECT = ("layer", "overall")

_LEAST = {
    "top": 1,
    "max_tokens": 1,
    "generate_tokens": 0,
    "permutations": 0,
    "splits": 0,
    "bootstrap": 0,
    "examples": 1,
}


@dataclass(frozen=True, kw_only=True)
class FindConfig(EncodingConfig):
    """Settings of `qscope find`."""

    output: str = field(metadata={"help": "File to write, .yaml or .json; one that is there is overwritten."})
    positive: str | None = field(
        default=None,
        metadata={
            "help": "Texts that show the behaviour: Hub id, file (.jsonl, .json, .parquet, .csv, .txt, also .gz), "
            "folder, or `demo:NAME` for a bundled set."
        },
    )
    negative: str | None = field(default=None, metadata={"help": "Texts that do not show it."})
    group: list[str] = field(
        default_factory=list,
        metadata={"help": "Instead of positive and negative: `name=file`, repeated, one per group."},
    )
    data: str | None = field(
        default=None, metadata={"help": "Instead: one dataset with all groups, told apart by the group column."}
    )
    group_column: str | None = field(default=None, metadata={"help": "Column of `--data` that names the group."})
    repetition: str | None = field(
        default=None,
        metadata={"help": "Instead: a dataset of texts that loop; finds what grows from the first round to the last."},
    )
    generate_tokens: int = field(
        default=0,
        metadata={"help": "With `--repetition`: tokens the model adds to each text by greedy decoding before."},
    )
    target: str | None = field(
        default=None,
        metadata={"help": "Group the features stand for. Needed with `--group` and `--data`; else the positive one."},
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column of the text; `prompt+completion` joins several. One that holds conversations, such as "
            "`messages`, goes through the chat template."
        },
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of each dataset, if it has several."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of each Hub dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of each Hub dataset."})
    top: int = field(default=10, metadata={"help": "Features to choose."})
    select: str = field(
        default="layer",
        metadata={"help": "Choose `--top` features in each `layer`, or `overall`.", "choices": list(SELECT)},
    )
    rank_by: str = field(
        default="mean_difference",
        metadata={
            "help": "Score that ranks the features. `mean_difference`: mean activation, target minus all others. "
            "`delta`: share of texts where it fires, target minus others. `log_odds`: of firing in a text. "
            "`monolinguality`: as the first, every other group counting alike. `auroc`: of the largest activation "
            "per text, among a shortlist.",
            "choices": list(RANK_BY),
        },
    )
    positions: str = field(
        default="all",
        metadata={
            "help": "Tokens to look at: `all`, or the `last` of each text (texts that end just before a decision).",
            "choices": list(POSITIONS),
        },
    )
    max_length: int = field(
        default=512,
        metadata={"help": "Tokens kept of each text: its first ones, or with `--positions last` its last."},
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Stop taking texts of a group at this many tokens."}
    )
    holdout: float = field(
        default=0.2,
        metadata={"help": "Share of each group's texts kept out of the choice, for the `heldout_` evidence; 0: none."},
    )
    seed: int = field(
        default=0, metadata={"help": "Decides which texts are held out, permutations, halves and resamples."}
    )
    max_norm_ratio: float = field(
        default=10.0,
        metadata={
            "help": "Leave out tokens whose residual is longer than this many times the layer's median; 0: none. Not "
            "with `--repetition`."
        },
    )
    permutations: int = field(
        default=0,
        metadata={"help": "Shuffle the groups so often, for p-values and false discovery rates; 1000 is a start."},
    )
    splits: int = field(
        default=0, metadata={"help": "Halve the texts so often, to see how stable the choice is; 10 is a start."}
    )
    bootstrap: int = field(
        default=0,
        metadata={
            "help": "Resamples for intervals of the held-out figures, which hold in 95 of 100 cases; 1000 is a start."
        },
    )
    baselines: bool = field(
        default=False,
        metadata={"help": "Also measure probes on the raw residual, random features and a keyword classifier."},
    )
    report: str | None = field(
        default=None, metadata={"help": "HTML report to write, with the top texts of each feature token by token."}
    )
    examples: int = field(
        default=5, metadata={"help": "Texts of the target to show for each feature in the report, and as many others."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("rank_by", RANK_BY), ("positions", POSITIONS), ("select", SELECT)):
            one_of(name, getattr(self, name), allowed)
        for name, least in _LEAST.items():
            at_least(name, getattr(self, name), least)
        for name in ("output", "report"):
            check_output(name, getattr(self, name))
        if self.max_norm_ratio and not self.max_norm_ratio > 1:
            raise ConfigError(
                f"`max_norm_ratio` is {self.max_norm_ratio!r}; it is above 1, as half of all tokens exceed the "
                f"median, or 0 to keep all."
            )
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"`holdout` is {self.holdout!r}; it is a share from 0 up to, not including, 1.")
        ways = [bool(self.positive or self.negative), bool(self.group), bool(self.data), bool(self.repetition)]
        if sum(ways) != 1 or bool(self.positive) is not bool(self.negative):
            raise ConfigError(
                "Give the texts in exactly one way: `--positive FILE --negative FILE`, or `--group NAME=FILE` at "
                "least twice, or `--data FILE --group-column COLUMN`, or `--repetition FILE`."
            )
        if bool(self.data) is not bool(self.group_column):
            raise ConfigError("`--data` and `--group-column` come together; got one of them.")
        if self.generate_tokens and not self.repetition:
            raise ConfigError("`--generate-tokens` is for `--repetition`; contrasts use the texts as they are.")
        extras = [
            name for name in ("permutations", "splits", "bootstrap", "baselines", "report") if getattr(self, name)
        ]
        if self.repetition and extras:
            raise ConfigError(
                f"`--{extras[0]}` is for contrasts of groups; `--repetition` compares each text with itself. Leave it "
                f"out."
            )
        if self.baselines and not self.holdout:
            raise ConfigError("`--baselines` are measured on texts held out, and `holdout` is 0. Set it above 0.")
        if self.bootstrap == 1:
            raise ConfigError("`bootstrap` is 1; an interval needs 2 resamples or more, and 1000 for steady ends.")
        if not self.positive and not self.repetition and not self.target:
            raise ConfigError("`--target` is missing: name the group that the features should stand for.")
