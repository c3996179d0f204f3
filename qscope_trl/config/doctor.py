"""Settings of `qscope doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import DTYPES, at_least, one_of
from qscope_trl.files import check_output


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(EncodingConfig):
    """Settings of `qscope doctor`."""

    model: str = field(metadata={"help": "Model the SAEs are said to be for: Hub id, folder, or `demo`."})
    layers: str = field(default="all", metadata={"help": "Layers to check, from 0: `26,27`, `20-27`, or `all`."})
    data: str = field(
        metadata={
            "help": "Texts like those you will use: Hub id, local file (.jsonl, .json, .parquet, .csv, .txt, also "
            ".gz), folder, or `demo:NAME`."
        }
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text; `a+b` joins two."})
    data_split: str | None = field(default=None, metadata={"help": "Split, if the dataset has several."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of a Hub dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub dataset."})
    max_texts: int = field(default=200, metadata={"help": "Take the first texts, this many."})
    probe_tokens: int = field(
        default=2048,
        metadata={
            "help": "Tokens, about, on which other readings of an SAE are tried (layers beside it, conventions, k, "
            "dtypes, BOS, chat template). The table itself takes all tokens."
        },
    )
    scan: int = field(default=1, metadata={"help": "Layers to either side that each SAE is tried on too."})
    layers_at_once: int = field(
        default=4, metadata={"help": "SAEs in memory at a time; the texts run through the model once for each lot."}
    )
    tuned: str | None = field(
        default=None, metadata={"help": "Also compare this fine-tuned version of the model: Hub id or folder."}
    )
    tuned_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of that."})
    tuned_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of that; by default as `--dtype`.", "choices": list(DTYPES)},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "PEFT adapter that makes the tuned version, put on `--tuned` if given, else on `--model`."},
    )
    features: str | None = field(
        default=None, metadata={"help": "Also check a FeatureSet: file as `qscope find` writes it."}
    )
    seed: int = field(default=0, metadata={"help": "Decides the noise that chance is measured with."})
    json: str | None = field(default=None, metadata={"help": "Write every figure to this file as JSON."})
    report: str | None = field(default=None, metadata={"help": "Write the report to this file as HTML."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_texts", 1), ("probe_tokens", 2), ("scan", 0), ("layers_at_once", 1)):
            at_least(name, getattr(self, name), least)
        for name in ("json", "report"):
            check_output(name, getattr(self, name))
        if self.tuned_dtype is not None:
            one_of("tuned_dtype", self.tuned_dtype, DTYPES)
