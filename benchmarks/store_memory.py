"""Memory of `qscope index` and of reading its store, as the number of documents grows to 100,000.

A tiny random model, so that the model's own memory does not hide the rest; documents of about 24 tokens. The resident
size is read every 2,000 rows while indexing; `VmHWM` of a fresh process is the peak of reading.

    python benchmarks/store_memory.py                    # 100,000 documents, about 10 minutes on two cores
    python benchmarks/store_memory.py --rows 5000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, environment, peak_mib, peaks_of, report_peak, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def make(folder: Path, rows: int) -> None:
    """Model, SAEs and documents."""
    from tests.tiny import sentence, tiny_model, tiny_tokenizer, write_saes

    tiny_model().eval().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_saes(folder / "saes", d_sae=2048)
    generator = torch.Generator().manual_seed(0)
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(rows):
            length = int(torch.randint(8, 41, (1,), generator=generator))
            file.write(json.dumps({"text": sentence(generator, length)}) + "\n")


def resident_mib() -> float:
    """Present resident size of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def index(folder: Path, every: int) -> list[tuple[int, float]]:
    """Index all documents; returns (rows so far, resident size)."""
    from qscope_trl.activations import index_run
    from qscope_trl.config.index import IndexConfig

    seen, curve = 0, [(0, resident_mib())]
    write_shard = index_run.write_shard

    def watched(path: Path, number: int, schema: Any, tables: Any) -> None:
        nonlocal seen

        def counted() -> Any:
            nonlocal seen
            for table in tables:
                seen += len(table)
                yield table

        write_shard(path, number, schema, counted())
        if seen - curve[-1][0] >= every:
            curve.append((seen, resident_mib()))

    index_run.write_shard = watched  # type: ignore[assignment]
    config = IndexConfig(
        model=str(folder / "model"), saes=str(folder / "saes"), sae_k=16, layers="1,2", device="cpu", dtype="float32",
        data=str(folder / "texts.jsonl"), output=str(folder / "store"), batch_size=64,
    )  # fmt: skip
    index_run.run(config)
    curve.append((seen, resident_mib()))
    return curve


def read(variant: str, folder: Path) -> None:
    """Read a store in one of the ways, and say the peak above what opening takes."""
    from scipy import sparse  # noqa: F401 - not part of what reading takes

    from qscope_trl import FeatureId
    from qscope_trl.activations.store import FeatureStore

    store = FeatureStore.open(folder / "store")
    store.csr(1, stop=1)
    before = peak_mib()
    if variant == "iter_csr":
        total = sum(piece.nnz for piece in store.iter_csr(1))
    elif variant == "iter_arrow":
        total = sum(table.num_rows for table in store.iter_arrow())
    elif variant == "values":
        total = int((store.values([FeatureId(1, 7), FeatureId(2, 9)]) > 0).sum())
    else:
        total = store.csr(1).nnz
    assert total > 0
    report_peak(before)


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--memory-of")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.memory_of:
        read(options.memory_of, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, options.rows)
        curve = index(folder, max(1024, options.rows // 50))
        size = sum(path.stat().st_size for path in (folder / "store").iterdir()) / 2**20
        variants = ("iter_csr", "iter_arrow", "values", "csr")
        peaks = peaks_of(__file__, variants, 1, ["--folder", str(folder)])
    settled = [(rows, mib) for rows, mib in curve if rows >= options.rows // 10]
    growth = settled[-1][1] - settled[0][1]
    report = {
        "what": f"`qscope index` and reading: {options.rows} documents, 2 layers, a store of {size:.0f} MiB.",
        "environment": environment("transformers", "pyarrow", "scipy"),
        "settings": {"rows": options.rows},
        "curve": curve,
        "peaks": peaks,
    }
    rows = [[f"index: resident size after {at} rows", f"{mib:.0f}"] for at, mib in curve[:: max(1, len(curve) // 8)]]
    rows.append([f"index: growth from {settled[0][0]} to {settled[-1][0]} rows", f"{growth:+.0f}"])
    names = {
        "iter_csr": "read all, `iter_csr`",
        "iter_arrow": "read all, `iter_arrow`",
        "values": "`values`, 2 features",
    }
    names["csr"] = "`csr`: one layer as a whole"
    rows += [[f"{names[name]}: peak above opening", f"{found[0]:.0f}"] for name, found in peaks.items()]
    print(write(RESULTS, "store_memory", report, ["what", "MiB"], rows))


if __name__ == "__main__":
    main()
