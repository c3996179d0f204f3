"""`qscope curate`: read a dataset once, decide what leaves, write what stays and a report of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from tqdm.auto import tqdm

from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import open_source, text_of
from qscope_trl.analysis.curation.equal import TextKeys, source_keys
from qscope_trl.analysis.curation.examples import collect_examples
from qscope_trl.analysis.curation.features import Block, Features, ModelReader, Needs, join_blocks
from qscope_trl.analysis.curation.report import build_report, format_report, write_report
from qscope_trl.analysis.curation.rows import RowReader
from qscope_trl.analysis.curation.sets import ActiveSets, sparse
from qscope_trl.analysis.curation.steps import Decision, Rules, added_columns, decide
from qscope_trl.analysis.curation.stored import StoreReader, is_store, reference_sets
from qscope_trl.analysis.curation.writing import output_folder, refuse_output, write_removed, write_rows
from qscope_trl.config.curate import CurateConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureSet
from qscope_trl.rules import Rule, load_rule


class Curated(NamedTuple):
    """What came of a curation."""

    output: Path | None
    """The folder that was written; `None` after a dry run."""

    report: dict[str, Any]
    """The figures, as in `report.json`."""

    decision: Decision
    """Which rows stay, and why the others do not."""


def run(config: CurateConfig, *, show_progress: bool = True) -> Curated:
    """`qscope curate`: read the data, take the steps, write the output folder unless it is a dry run.

    Args:
        config: The settings.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        ConfigError: If a setting does not fit the data, or the output is there already.
        DataError: If the data cannot be read, has changed meanwhile, a quota cannot be met, or no row is left.
        RuleError: If a rule is none, or names features that are not there.
    """
    refuse_output(config)
    if config.needs_sets:
        sparse()
    rules = _rules(config)
    source = open_source(
        config.data, split=config.data_split, config=config.data_config, revision=config.data_revision
    )
    needs = Needs.of(config, rules.all())
    reader = _reader(config, rules.all(), needs, source)
    wanted = [name for name in config.balance if name not in config.tags]
    rows = RowReader(
        source,
        seed=config.seed,
        wanted=wanted,
        added=added_columns(config),
        text_column=config.text_column,
        hashes_texts=needs.compares_sets,
    )
    features = _read(config, source, rows, reader, show_progress)
    facts = rows.facts()
    if isinstance(reader, StoreReader) and reader.store.num_rows != facts.num_rows:
        raise DataError(
            f"The store '{config.store}' holds {reader.store.num_rows} rows, but '{source.name}' has "
            f"{facts.num_rows}. Index all of it."
        )

    def reference(name: str) -> ActiveSets:
        # Asked for when rows are compared, and then something reads them.
        return reference_sets(name, cast("ModelReader | StoreReader", reader), config, needs.value)

    def reference_texts(name: str) -> TextKeys | None:
        if is_store(name):
            return None
        others = open_source(name, split=config.reference_split, config=config.reference_config)
        return source_keys(others, config.reference_column or config.text_column)

    decision = decide(config, rules, facts, features, reference, reference_texts, show_progress=show_progress)
    report = build_report(config, source, rules, facts, features, decision, reader)
    if config.dry_run or config.output is None:
        return Curated(None, report, decision)
    if not report["rows_after"]:
        most = max(report["steps"], key=lambda step: int(step["removed"]))
        raise DataError(
            f"No row is left of {facts.num_rows}, so nothing is written. `{most['setting']}` removed "
            f"{most['removed']} of them; `--dry-run` shows every step."
        )
    output = Path(config.output)
    with output_folder(output) as folder:
        write_rows(folder, source, facts, decision, config.seed)
        write_removed(folder, decision, features.table)
        examples = collect_examples(config, source, facts, decision, reader, features.table)
        write_report(folder, report, decision, examples)
    return Curated(output, report, decision)


def format_result(result: Curated) -> str:
    """The figures, and where the output is."""
    kept = f"{result.report['rows_after']} of {result.report['rows_before']} rows"
    where = f"{kept} written to {result.output}" if result.output else f"{kept} would stay; nothing was written"
    return f"{format_report(result.report)}{where}\n"


def _rules(config: CurateConfig) -> Rules:
    sets = {name: FeatureSet.load(file) for name, file in config.sets.items()}

    def compiled(texts: Sequence[str]) -> list[Rule]:
        return [load_rule(text, sets=sets) for text in texts]

    tags, scores = config.tags, config.scores
    return Rules(
        dict(zip(tags, compiled(list(tags.values())), strict=True)),
        dict(zip(scores, compiled(list(scores.values())), strict=True)),
        compiled(config.keep),
        compiled(config.drop),
    )


def _reader(
    config: CurateConfig, rules: Sequence[Rule], needs: Needs, source: RowSource
) -> ModelReader | StoreReader | None:
    if not needs.features and not needs.compares_sets:
        return None
    if config.store:
        return StoreReader(config, rules, needs, source)
    return ModelReader(config, rules, needs)


def _read(
    config: CurateConfig,
    source: RowSource,
    rows: RowReader,
    reader: ModelReader | StoreReader | None,
    show_progress: bool,
) -> Features:
    """Go through all rows once."""
    blocks: list[Block] = []
    done = 0
    bar = tqdm(total=source.expected_rows, desc="reading", unit="row", disable=not show_progress, leave=False)
    with bar:
        for block in rows.blocks():
            if isinstance(reader, ModelReader):
                texts = [
                    text_of(
                        row, text_column=config.text_column, source_name=source.name, index=done + i, chat=reader.chat
                    )
                    for i, row in enumerate(block)
                ]
                blocks.append(reader.read(texts, advance=bar.update))
            else:
                bar.update(len(block))
            done += len(block)
    if isinstance(reader, ModelReader):
        return join_blocks(blocks, reader.needs)
    return Features(None, None, None) if reader is None else reader.read()
