"""Run by `test_index.py`: `qscope index` on tiny things; also under torchrun, and until it kills itself.

python index_setting.py FOLDER OUTPUT KILL

KILL is `never`, or the number of the shard in whose middle the process dies.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from qscope_trl.activations import index_run, writing
from qscope_trl.config.index import IndexConfig

ROWS = 37


def config(folder: Path, output: Path, **changes: Any) -> IndexConfig:
    settings: dict[str, Any] = {
        "model": str(folder / "model"), "saes": str(folder / "saes"), "sae_k": 8, "layers": "1,2",
        "data": str(folder / "texts.jsonl"), "output": str(output), "shard_size": 5, "batch_size": 3,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    return IndexConfig(**{**settings, **changes})


def main() -> None:
    folder, output, kill = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kill != "never" and os.environ.get("RANK", "0") == os.environ.get("KILLED_RANK", "0"):
        write = writing.write_shard

        def write_shard(path: Path, index: int, schema: Any, tables: Any) -> None:
            def cut() -> Any:
                if index == int(kill):
                    # The file was begun under its temporary name.
                    os.kill(os.getpid(), signal.SIGKILL)
                yield from tables

            write(path, index, schema, cut())

        index_run.write_shard = write_shard
    result = index_run.run(config(folder, output), show_progress=False)
    if result.is_main_process:
        sys.stdout.write(f"{result.new_rows} new, {result.num_processes} processes\n")
    sys.stdout.flush()
    # Without any teardown (pytorch/pytorch#190489).
    os._exit(0)


if __name__ == "__main__":
    main()
