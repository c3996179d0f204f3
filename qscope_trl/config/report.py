"""Settings of `qscope report`."""

from __future__ import annotations

from dataclasses import dataclass, field

from qscope_trl.config.values import at_least
from qscope_trl.files import check_output


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `qscope report`."""

    run_dir: str = field(
        metadata={"help": "`output_dir` of a run, finished or not, or one of its checkpoints.", "is_positional": True}
    )
    output: str | None = field(
        default=None, metadata={"help": "Write the page to this file, by default `report.html` in the run's folder."}
    )
    samples: int = field(
        default=12, metadata={"help": "Generations, fixed texts and rollouts to show, of each kind this many."}
    )

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 0)
        check_output("output", self.output)
