"""`qscope evalmap`: read the sets, map them, compare with scores, write the folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qscope_trl.analysis.curation.writing import output_folder
from qscope_trl.analysis.evalmap.footprints import Footprints
from qscope_trl.analysis.evalmap.mapping import Map, check_subset, make_map
from qscope_trl.analysis.evalmap.near import NearIndex, NearSets
from qscope_trl.analysis.evalmap.rankings import Scores, read_scores
from qscope_trl.analysis.evalmap.samples import Read, encode_sets, gather_sets, train_blocks
from qscope_trl.analysis.evalmap.scoring import ScoreFigures, check_given, compare_scores
from qscope_trl.config.evalmap import EvalmapConfig
from qscope_trl.errors import ConfigError


class Mapped(NamedTuple):
    """What came of a map."""

    output: Path
    """The folder."""

    read: Read
    """What was read."""

    map: Map
    """The figures."""

    near: list[NearSets]
    """Near samples of every two sets."""

    train: list[NearSets]
    """Samples near to training texts."""

    train_texts: dict[str, dict[int, str]]
    """By training set and row, texts of the listed pairs."""

    scores: ScoreFigures | None
    """What scores say."""


def run(config: EvalmapConfig, *, show_progress: bool = True) -> Mapped:
    """`qscope evalmap`: read and map the sets, write the report.

    The figures depend neither on the order of the samples nor on `batch_size`, but for rounding in the model: a
    feature at the edge of the TopK may come or go with it.

    Args:
        config: The settings.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        ConfigError: If settings do not fit, or the output is there already.
        DataError: If data cannot be read, or a set has no active feature.
    """
    from qscope_trl.analysis.evalmap.report import write_report

    _require_scipy()
    output = Path(config.output).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"The output '{output}' is there already, and nothing is written over. Name another folder.")
    gathered = gather_sets(config)
    sizes = {found.name: found.num_samples for found in gathered.sets}
    for name, size in sizes.items():
        check_subset(config.subset, name, size)
    scores = None if config.scores is None else read_scores(config.scores, sizes)
    if scores is not None:
        check_given(config.given, scores)
    read = encode_sets(config, gathered, show_progress=show_progress)
    found = make_map(read.footprints, subset=config.subset, cluster_overlap=config.cluster_overlap)
    compared = None if scores is None else _compared(config, found, read.footprints, scores)
    near, train, train_texts = _near(config, read, show_progress)
    result = Mapped(output, read, found, near, train, train_texts, compared)
    with output_folder(output) as folder:
        write_report(folder, config, result)
    return result


def _compared(config: EvalmapConfig, found: Map, footprints: Footprints, scores: Scores) -> ScoreFigures:
    return compare_scores(found, footprints, scores, given=config.given, draws=config.bootstrap, seed=config.seed)


def _near(
    config: EvalmapConfig, read: Read, show_progress: bool
) -> tuple[list[NearSets], list[NearSets], dict[str, dict[int, str]]]:
    if not config.near:
        return [], [], {}
    rows = read.footprints.row_ids
    texts = {
        found.name: None if found.texts is None else [found.texts[row] for row in rows[found.name].tolist()]
        for found in read.sets
    }
    index = NearIndex(read.footprints, texts, config.near, listed=config.near_pairs)
    near = index.between(config.near_samples or None, show_progress=show_progress)
    train: list[NearSets] = []
    train_texts: dict[str, dict[int, str]] = {}
    for name, place in config.train_sets:
        blocks = train_blocks(config, name, place, read, show_progress=show_progress)
        entries, train_texts[name] = index.train(name, blocks)
        train += entries
    return near, train, train_texts


def _require_scipy() -> None:
    try:
        import scipy.sparse  # noqa: F401
    except ImportError as err:
        raise ConfigError("`evalmap` needs SciPy, which is not installed: pip install 'qscope-trl[data]'.") from err


def format_result(result: Mapped) -> str:
    """The figures as lines."""
    from qscope_trl.analysis.evalmap.table import format_map

    return f"{format_map(result)}Report written to {result.output / 'report.html'}\n"
