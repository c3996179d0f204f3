"""What a synthesis starts from: sources, coverage before, controls, examples; and the targets made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_trl.activations.opening import Opened
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import open_source
from qscope_trl.activations.store import FeatureStore
from qscope_trl.activations.store_checks import (
    model_reading,
    refuse_other_reading,
    sae_reading,
    settings_reading,
    store_reading,
)
from qscope_trl.analysis.synthesis.coverage import Coverage, Example, Survey, matched_features, survey, survey_store
from qscope_trl.analysis.synthesis.plan import PLAIN, Recipe, Target
from qscope_trl.analysis.synthesis.prompts import (
    Template,
    beginning,
    describe,
    normalised,
    opening_of,
    read_prompts,
    shown_examples,
)
from qscope_trl.config.synthesize import MAY_CHANGE, SynthesizeConfig
from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.sae.topk_sae import TopKSAE


@dataclass(frozen=True)
class Sources:
    """Datasets that the settings name, opened.

    Args:
        data: What is to be covered; `None` with a store.
        store: Its feature store.
        examples: Where examples are looked for.
        prompts: Prompts that are given.
    """

    data: RowSource | None
    store: FeatureStore | None
    examples: RowSource | None
    prompts: RowSource | None

    @classmethod
    def open(cls, config: SynthesizeConfig) -> Sources:
        """Open them, without reading their rows.

        Raises:
            ConfigError: If a split or the like does not fit.
            DataError: If one is not there.
        """
        data = None
        if config.data is not None:
            data = open_source(
                config.data,
                split=config.data_split,
                config=config.data_config,
                revision=config.data_revision,
                streaming=config.streaming,
            )
        return cls(
            data,
            FeatureStore.open(config.store) if config.store is not None else None,
            open_source(config.examples) if config.examples is not None else None,
            open_source(config.prompts) if config.prompts is not None else None,
        )

    def fingerprints(self) -> dict[str, str]:
        """One for each that is given; they change when its content does."""
        prints = {
            name: source.fingerprint()
            for name, source in (("data", self.data), ("examples", self.examples), ("prompts", self.prompts))
            if source is not None
        }
        if self.store is not None:
            prints["store"] = _digest(self.store.manifest)
        return prints


@dataclass(frozen=True)
class Start:
    """What was measured before anything is generated; it goes to the journal as it is.

    Args:
        counts: Texts of the data that fire each target, by name.
        num_texts: Texts of the data.
        matched: Names of each filled feature's matched random features.
        examples: Top texts of each filled feature.
        openings: First texts of the data.
    """

    counts: dict[str, int]
    num_texts: int
    matched: dict[str, list[str]]
    examples: dict[str, list[dict[str, Any]]]
    openings: list[str]

    def coverage(self, config: SynthesizeConfig) -> Coverage:
        """The coverage before."""
        counts = {FeatureId.parse(name): count for name, count in self.counts.items()}
        return Coverage(counts, self.num_texts, config.weak_below)

    def to_fill(self, config: SynthesizeConfig) -> tuple[FeatureId, ...]:
        """The features to generate for."""
        coverage = self.coverage(config)
        return coverage.missing if config.fill == "missing" else coverage.weak


def chosen_features(config: SynthesizeConfig) -> FeatureSet:
    """The features of the file that are of the chosen layers.

    Raises:
        ConfigError: If there is none.
        FeatureSetError: If the file is missing or malformed.
    """
    return config.of_layers(FeatureSet.load(config.features))


def check_store(
    config: SynthesizeConfig, store: FeatureStore, features: FeatureSet, opened: Opened | None = None
) -> None:
    """Refuse a store of other SAEs, or one whose texts were read otherwise than the texts that are made here.

    Args:
        config: The settings.
        store: The store.
        features: The targets.
        opened: The model and its SAEs, if they are opened; then they are compared too.

    Raises:
        ConfigError: If it lacks a layer of the targets.
        DataError: If it was read in another way.
        FeatureSetError: If the targets were made for other SAEs.
    """
    store.check_fits(features)
    wanted = settings_reading(config.max_length)
    if opened is not None:
        wanted |= sae_reading(opened.saes, features.layers) | model_reading(opened.model, opened.tokenizer)
    mine = store_reading(store, features.layers)
    refuse_other_reading(f"The store '{store.path}'", mine, wanted, than="this run")


def journal_settings(
    config: SynthesizeConfig, features: FeatureSet, template: Template, sources: Sources
) -> dict[str, Any]:
    """What a resumed run must share: settings that decide what comes out, and fingerprints of what they name."""
    settings = {name: value for name, value in vars(config).items() if name not in MAY_CHANGE}
    prints = {f"content of --{name}": value for name, value in sources.fingerprints().items()}
    content = {
        "content of --features": _digest(features.to_dict()["features"]),
        "content of --template": template.digest,
    }
    return {**settings, "mode": config.writing_mode, **content, **prints}


def measure(
    config: SynthesizeConfig,
    features: FeatureSet,
    sources: Sources,
    opened: Opened | None,
    saes: Mapping[int, TopKSAE],
    *,
    show_progress: bool = True,
) -> Start:
    """Count the data, and find controls and examples for what is to be filled.

    Args:
        config: The settings.
        features: The targets.
        sources: The datasets.
        opened: Model and tokenizer; `None` if only a store is counted.
        saes: One SAE a layer.
        show_progress: Whether to show progress bars on stderr.
    """
    num_openings = max(config.attempts, config.control_requests)

    def go_through(source: RowSource, column: str, max_rows: int | None, **more: Any) -> Survey:
        if opened is None:
            raise ConfigError("Reading a dataset needs the model.")
        return survey(
            opened.model,
            opened.tokenizer,
            saes,
            source,
            text_column=column,
            max_rows=max_rows,
            min_activation=config.min_activation,
            max_length=config.max_length,
            batch_size=config.batch_size,
            model_name=config.model,
            show_progress=show_progress,
            **more,
        )

    if sources.data is not None:
        counted = go_through(sources.data, config.text_column, config.max_rows, num_beginnings=num_openings)
    elif sources.store is not None:
        counted = survey_store(sources.store, features.layers, min_activation=config.min_activation)
    else:
        raise ConfigError("Give `--data` or `--store`.")
    start = Start({str(one): counted.count(one) for one in features.ids}, counted.num_texts, {}, {}, [])
    fill = start.to_fill(config)
    if config.generator == "none" or not fill:
        return start
    tables = [counted.counts]
    examples: dict[FeatureId, list[Example]] = {}
    if sources.examples is not None:
        found = go_through(
            sources.examples,
            config.examples_column,
            config.max_example_rows,
            features=fill,
            num_examples=config.num_examples,
        )
        tables.append(found.counts)
        examples = found.examples
    matched = matched_features(fill, features.ids, tables, seed=config.seed)
    return Start(
        start.counts,
        start.num_texts,
        {str(one): [str(other) for other in others] for one, others in matched.items()},
        {str(one): [vars(example) for example in texts] for one, texts in examples.items()},
        [text[:10_000] for text in counted.beginnings],
    )


def make_targets(
    config: SynthesizeConfig,
    features: FeatureSet,
    start: Start,
    recipe: Recipe,
    tokenizer: Any,
    prompts: RowSource | None,
) -> tuple[dict[str, Target], dict[str, str]]:
    """The targets by name, the plain one first, and where the prompts of each come from.

    Raises:
        ConfigError: If a feature has nothing to be asked for with.
        DataError: If the file of prompts has none.
    """
    fill = start.to_fill(config)
    labels = {one.id: one.label for one in features.features if one.id in set(fill)}
    examples = {one: [Example(**entry) for entry in start.examples.get(str(one), [])] for one in fill}
    common, own = read_prompts(prompts, config.prompt_column) if prompts is not None else ([], {})
    strange = [one for one in own if one.layer in features.layers and one not in set(features.ids)]
    if strange:
        raise ConfigError(
            f"'{config.prompts}' has prompts for {strange[0]}, which is not in '{config.features}'. Correct its "
            f"column `feature`, or add the feature to the file."
        )
    openings = [opening_of(tokenizer, text, config.prefix_tokens) for text in start.openings]
    cut = {
        one: [beginning(tokenizer, text, config.prefix_tokens) for text in texts] for one, texts in examples.items()
    }
    given: dict[FeatureId, tuple[str, Sequence[str]]] = {}
    for one in fill:
        ways = [("prompts", own.get(one) or common)]
        if not recipe.is_instruct:
            ways += [("examples", [prefix for prefix, _ in cut[one]]), ("data", openings)]
        given[one] = next(((name, texts) for name, texts in ways if texts), ("asked", []))
    asked = [one for one in fill if given[one][0] == "asked"]
    if asked and not recipe.is_instruct:
        raise ConfigError(
            f"There is nothing to go on from for {asked[0]}: a store holds no texts. Name a dataset in which the "
            f"features fire by `--examples`, or beginnings by `--prompts`."
        )
    described = describe({one: labels[one] for one in asked}, examples)
    targets = {}
    if config.control_requests and fill and (recipe.is_instruct or openings):
        targets[PLAIN] = Target(
            PLAIN,
            recipe,
            accept=config.control_requests,
            attempts=config.control_requests,
            description="anything",
            prompts=[] if recipe.is_instruct else openings,
        )
    for one in fill:
        targets[str(one)] = Target(
            str(one),
            recipe,
            accept=config.accept,
            attempts=config.attempts,
            description=described.get(one, labels[one]),
            examples=shown_examples(examples[one], [peak for _, peak in cut[one]]),
            prompts=given[one][1],
            copies=[normalised(example.text) for example in examples[one]],
        )
    return targets, {str(one): name for one, (name, _) in given.items()}


def check_output(output: str, *, resume: bool, journal: str) -> Path:
    """The folder to write to, which is not there, is empty, or is resumed.

    Raises:
        ConfigError: If it holds something else.
    """
    folder = Path(output)
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    if not (folder / journal).is_file():
        raise ConfigError(f"'{output}' is not empty, and nothing is overwritten. Choose another `--output`.")
    if not resume:
        raise ConfigError(
            f"'{output}' holds a synthesis. Go on with it by `--resume`, or choose another `--output`: nothing is "
            f"overwritten."
        )
    return folder


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
