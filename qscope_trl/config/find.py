"""Settings of `qscope find`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError

RANK_BY = ("mean_difference", "delta", "auroc", "monolinguality")
POSITIONS = ("all", "last")
SELECT = ("layer", "overall")


@dataclass(frozen=True, kw_only=True)
class FindConfig(EncodingConfig):
    """Settings of `qscope find`."""

    output: str = field(metadata={"help": "File to write, .yaml or .json."})
    positive: str | None = field(
        default=None,
        metadata={"help": "Texts that show the behaviour: .jsonl, .json, .parquet or .txt (one a line), also .gz."},
    )
    negative: str | None = field(default=None, metadata={"help": "Texts that do not show it."})
    group: list[str] = field(
        default_factory=list,
        metadata={"help": "Instead of positive and negative: `name=file`, repeated, one per group."},
    )
    data: str | None = field(
        default=None, metadata={"help": "Instead: one file with all groups, told apart by the group column."}
    )
    group_column: str | None = field(default=None, metadata={"help": "Column of `--data` that names the group."})
    repetition: str | None = field(
        default=None,
        metadata={"help": "Instead: one file of texts that loop; finds what grows from the first round to the last."},
    )
    generate_tokens: int = field(
        default=0,
        metadata={"help": "With `--repetition`: tokens the model adds to each text by greedy decoding before."},
    )
    target: str | None = field(
        default=None,
        metadata={"help": "Group the features stand for. Needed with `--group` and `--data`; else the positive one."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    top: int = field(default=10, metadata={"help": "Features to choose."})
    select: str = field(
        default="layer",
        metadata={"help": "Choose `--top` features in each `layer`, or `overall`.", "choices": list(SELECT)},
    )
    rank_by: str = field(
        default="mean_difference",
        metadata={
            "help": "Score that ranks the features. `mean_difference`: mean activation, target minus all others. "
            "`delta`: share of texts where it fires, target minus others. `monolinguality`: as the first, every "
            "other group counting alike. `auroc`: of the largest activation per text, among a shortlist.",
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
    seed: int = field(default=0, metadata={"help": "Decides which texts are held out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("rank_by", RANK_BY), ("positions", POSITIONS), ("select", SELECT)):
            one_of(name, getattr(self, name), allowed)
        for name, least in (("top", 1), ("max_tokens", 1), ("generate_tokens", 0)):
            at_least(name, getattr(self, name), least)
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
        if not self.positive and not self.repetition and not self.target:
            raise ConfigError("`--target` is missing: name the group that the features should stand for.")
