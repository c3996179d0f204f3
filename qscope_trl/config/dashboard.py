"""Settings of `qscope dashboard`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output


@dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    """Settings of `qscope dashboard`."""

    entity: str | None = field(
        default=None, metadata={"help": "wandb user or team that owns the project; needed without `--json`."}
    )
    project: str = field(metadata={"help": "wandb project whose runs are shown."})
    run_dir: str | None = field(
        default=None,
        metadata={
            "help": "`output_dir` of a run: its features, layers and rewards get panels of their own. By default the "
            "panels take what their names match."
        },
    )
    name: str = field(default="SAE features", metadata={"help": "Name of the workspace."})
    json: str | None = field(
        default=None, metadata={"help": "Write the workspace to this file instead, without an account or network."}
    )

    def __post_init__(self) -> None:
        for name in ("project", "name"):
            if not getattr(self, name).strip():
                raise ConfigError(f"`{name}` is empty; it is a name.")
        if self.json is None and not (self.entity or "").strip():
            raise ConfigError(
                "`entity` is missing: name the wandb user or team that owns the project, or write the workspace to a "
                "file by `--json`."
            )
        if self.run_dir is not None and not Path(self.run_dir).is_dir():
            raise ConfigError(f"`run_dir` is '{self.run_dir}', which is no folder. It is a run's `output_dir`.")
        check_output("json", self.json)
