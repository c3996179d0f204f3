"""Settings of `qscope index`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

PER = ("document", "token")
AGGREGATIONS = ("max", "mean", "last", "rate")


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EncodingConfig):
    """Settings of `qscope index`."""

    data: str = field(
        metadata={
            "help": "Texts: Hub id, file (.jsonl, .json, .parquet, .csv, .txt, also .gz), folder, or `demo:NAME`."
        }
    )
    output: str = field(
        metadata={"help": "Folder to write. An unfinished store there is gone on with, if the settings are the same."}
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column of the text; `prompt+completion` joins several. One that holds conversations, such as "
            "`messages`, goes through the chat template."
        },
    )
    data_split: str | None = field(default=None, metadata={"help": "Split, if the dataset has several."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub dataset as it is downloaded."})
    max_rows: int | None = field(default=None, metadata={"help": "Take the first rows, this many."})
    per: str = field(
        default="document",
        metadata={"help": "One row per `document`, summed up over its tokens, or per `token`.", "choices": list(PER)},
    )
    aggregations: str = field(
        default=",".join(AGGREGATIONS),
        metadata={"help": "What a document's activations are summed up to. Not for `--per token`."},
    )
    skip_first: bool = field(
        default=True,
        metadata={"help": "Leave out position 0 of each text, an attention sink outside the SAEs' training data."},
    )
    shard_size: int = field(
        default=1024, metadata={"help": "Dataset rows in a file of the store; what a kill can lose of each process."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output("output", self.output, is_folder=True)
        one_of("per", self.per, PER)
        for name in ("max_rows", "shard_size"):
            at_least(name, getattr(self, name), 1)
        chosen = [part.strip() for part in self.aggregations.split(",")]
        unknown = [part for part in chosen if part not in AGGREGATIONS]
        if unknown or len(set(chosen)) < len(chosen):
            raise ConfigError(
                f"`aggregations` is {self.aggregations!r}; write some of {', '.join(AGGREGATIONS)}, each once, as in "
                f"`max,rate`."
            )

    @property
    def aggregation_list(self) -> tuple[str, ...]:
        """The aggregations, in the order of the store's columns; none for tokens."""
        chosen = {part.strip() for part in self.aggregations.split(",")}
        return tuple(name for name in AGGREGATIONS if name in chosen and self.per == "document")
