"""A compiled rule: one object that filters, rewards, gates and monitors.

`compile_rule` reads text, `load_rule` a file; `check` compares with the SAEs, `evaluate` decides, `score` ranks,
`explain` says why. What brings activations to it: `activations.feature_table` for texts and stores,
`activations.running` token by token, `training.rule_reward` in GRPO.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qscope_trl.errors import DataError, FeatureSetError, RuleError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.rules.evaluate import holds, margin
from qscope_trl.rules.explain import Explanation, OneDocument, explain
from qscope_trl.rules.files import FIELDS, read_rule_file, rule_file_mapping, write_rule_file
from qscope_trl.rules.grammar import located, parse
from qscope_trl.rules.tree import Node, Term, terms, to_text, without_sets
from qscope_trl.rules.values import FeatureValues, TokenValues, require_aggregation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

_FILE_KINDS = (".yaml", ".yml", ".json")


class SAESizes(Protocol):
    """What `Rule.check` asks of SAEs; an `SAESuite` is one."""

    source: str
    layers: tuple[int, ...]

    def spec(self, layer: int) -> Any:
        """Facts of a layer's SAE, `d_sae` among them."""

    def fingerprint(self, layer: int) -> str:
        """Fingerprint of a layer's SAE."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition on the features of a text. `str(rule)` is its canonical text.

    Args:
        tree: What it says.
        text: What it was compiled from; errors show their place in it.
        sets: The FeatureSets its `set:NAME` stand for.
        name: What it is called in reports and metrics.
        model: Name of the model it was made on. Informative.
        sae: SAE repository or folder whose features it names.
        sae_revision: Commit or tag of that repository.
        sae_fingerprints: Per layer, the fingerprint that `SAESuite.fingerprint` gives; compared by `check`.
        evidence: How it was made and what it reaches on which data.
    """

    tree: Node
    text: str = field(default="", compare=False)
    sets: Mapping[str, FeatureSet] = field(default_factory=dict, compare=False)
    name: str | None = None
    model: str | None = None
    sae: str | None = None
    sae_revision: str | None = None
    sae_fingerprints: Mapping[int, str] = field(default_factory=dict, hash=False)
    evidence: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return to_text(self.tree)

    # --- what it needs -------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[tuple[FeatureId, str]]:
        """Which feature is read in which aggregation."""
        return frozenset((part.features[0], part.aggregation) for part in self._terms())

    @property
    def features(self) -> tuple[FeatureId, ...]:
        """Every feature it reads, once, by layer and index."""
        return tuple(sorted({part.features[0] for part in self._terms()}))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers it reads, ascending."""
        return tuple(sorted({feature.layer for feature in self.features}))

    @property
    def labels(self) -> dict[FeatureId, str]:
        """What its features stand for, as far as its sets say it."""
        return {
            feature.id: feature.label for chosen in self.sets.values() for feature in chosen.features if feature.label
        }

    def without_sets(self) -> Rule:
        """The same rule with the features of its sets written out; it needs no file but its own."""
        tree = without_sets(self.tree)
        return replace(self, tree=tree, text=to_text(tree), sets={})

    def _terms(self) -> list[Term]:
        return [part for term in terms(self.tree) for part in term.parts()]

    # --- checking ------------------------------------------------------------------------------------------------

    def check(self, saes: SAESizes | Mapping[int, int]) -> None:
        """Refuse the rule if a feature is not there, or if it was made for other SAEs.

        Args:
            saes: An open `SAESuite`, or the number of features by layer.

        Raises:
            RuleError: If a layer has no SAE, an index is out of range, or a fingerprint differs. The message shows
                the first place in the rule.
            FeatureSetError: If one of its sets was made for other SAEs.
            CheckpointError: If an SAE cannot be read.
        """
        sizes: dict[int, int] = dict(saes) if isinstance(saes, Mapping) else {}
        source = "the SAEs" if isinstance(saes, Mapping) else f"'{saes.source}'"
        available = sorted(saes) if isinstance(saes, Mapping) else list(saes.layers)
        for term in self._terms():
            feature = term.features[0]
            if feature.layer not in available:
                listed = ", ".join(map(str, available))
                raise located(
                    self.text,
                    term.position,
                    f"{feature} is not there: {source} have no layer {feature.layer}, but layers {listed}.",
                )
            if feature.layer not in sizes and not isinstance(saes, Mapping):
                sizes[feature.layer] = int(saes.spec(feature.layer).d_sae)
            if feature.index >= sizes[feature.layer]:
                raise located(
                    self.text,
                    term.position,
                    f"{feature} is not there: the SAE of layer {feature.layer} has {sizes[feature.layer]} features, "
                    f"so indices end at {sizes[feature.layer] - 1}.",
                )
        if not isinstance(saes, Mapping):
            self._check_fingerprints(saes)

    def _check_fingerprints(self, saes: SAESizes) -> None:
        wanted = {
            layer
            for layer in self.layers
            if layer in self.sae_fingerprints or any(layer in s.sae_fingerprints for s in self.sets.values())
        }
        found = {layer: saes.fingerprint(layer) for layer in sorted(wanted)}
        for layer, value in found.items():
            mine = self.sae_fingerprints.get(layer)
            if mine is not None and mine != value:
                raise RuleError(
                    f"The SAE of layer {layer} in '{saes.source}' is not the one this rule was made with "
                    f"('{self.sae}'): fingerprint {value}, expected {mine}. Its features mean something else here."
                )
        for name, chosen in self.sets.items():
            try:
                chosen.check_fits(sae=saes.source, fingerprints=found)
            except FeatureSetError as err:
                raise FeatureSetError(f"Set `{name}`: {err}") from err

    # --- deciding ------------------------------------------------------------------------------------------------

    def evaluate(self, values: FeatureValues) -> Any:
        """Whether the rule holds, document by document.

        Args:
            values: Values of the features in `needs`, such as a `FeatureTable`.

        Returns:
            `(num_documents,)`, bool: a NumPy array; a torch tensor on its device if `values` gives tensors.

        Raises:
            DataError: If a feature is missing there, or (NumPy) a value is not finite.
        """
        return holds(self.tree, values)

    def score(self, values: FeatureValues) -> NDArray[np.float64]:
        """By what margin the rule holds: a number to rank documents by.

        `v > t` and `v >= t` give `v - t`, `v < t` and `v <= t` give `t - v`; `not` changes the sign, `and` and
        `all` take the least of their parts, `or` and `any` the largest, `atleast(k, ...)` the k-th largest. So a
        positive score means that the rule holds and a negative one that it does not; 0 is decided by `evaluate`.
        Margins are in the units of the activations, which grow from layer to layer and differ between features: the
        score ranks documents well for rules whose comparisons are of like size, and is no probability.

        Args:
            values: Values of the features in `needs`, as NumPy arrays.

        Returns:
            `(num_documents,)`, float64.

        Raises:
            DataError: If a feature is missing there, or a value is not finite.
        """
        return margin(self.tree, values)

    def evaluate_tokens(self, acts: ArrayLike, features: Sequence[FeatureId] | None = None) -> NDArray[np.bool_]:
        """Whether the rule holds after each token of one text: what a gate decides by while a text grows.

        Equal at every token to `evaluate` on the text up to it.

        Args:
            acts: Activations after TopK and ReLU at the kept tokens, `(tokens, features)`.
            features: Features of the columns; by default `self.features`.

        Returns:
            `(tokens,)`, bool.
        """
        found: NDArray[np.bool_] = self.evaluate(TokenValues(self.features if features is None else features, acts))
        return found

    def explain(self, values: FeatureValues, document: int) -> Explanation:
        """Why the rule holds for one document, or does not.

        Args:
            values: Values of the features in `needs`, as NumPy arrays.
            document: Place of the document, from 0.

        Raises:
            DataError: If there is no such document.
        """
        if not 0 <= document < values.num_documents:
            raise DataError(
                f"There is no document {document}: documents are counted from 0 to {values.num_documents - 1}."
            )
        return explain(self.tree, OneDocument(values, document), self.labels)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rule with its sets to a file (`.json`, otherwise YAML); `load_rule` reads it to an equal rule."""
        write_rule_file(Path(path), rule_file_mapping(self))


def compile_rule(text: str, *, sets: Mapping[str, FeatureSet] | None = None, default_aggregation: str = "max") -> Rule:
    """Read a rule.

    ```python
    rule = compile_rule("any(L12: 31, 407 > 0.5) and not L20F99 or atleast(2, set:toxic)", sets={"toxic": features})
    ```

    Args:
        text: The rule; the language is described in `docs/rules.md`.
        sets: FeatureSets, or paths to them, by the name that the rule uses.
        default_aggregation: Aggregation of features that are written without one. The canonical text writes it out,
            except `max`.

    Raises:
        RuleError: If the text is no rule; the message shows the place.
        FeatureSetError: If a set cannot be read.
        ConfigError: If the aggregation is unknown, or lark is not installed.
    """
    require_aggregation(default_aggregation)
    opened = {name: FeatureSet.load(chosen) for name, chosen in (sets or {}).items()}
    tree = parse(text, opened, default_aggregation)
    used = {term.name for term in terms(tree)}
    return Rule(tree=tree, text=text, sets={name: chosen for name, chosen in opened.items() if name in used})


def load_rule(source: Rule | str | os.PathLike[str], *, sets: Mapping[str, FeatureSet] | None = None) -> Rule:
    """A rule from a file, or from text.

    Args:
        source: Path of a rule file (`.yaml`, `.yml` or `.json`), the text of a rule, or a `Rule`, which is given back.
        sets: FeatureSets by name; those a file holds itself come first.

    Raises:
        RuleError: If the file is missing, unreadable or no rule, or the text is no rule.
        FeatureSetError: If a set cannot be read.
    """
    if isinstance(source, Rule):
        return source
    if not isinstance(source, os.PathLike) and not source.strip().endswith(_FILE_KINDS):
        return compile_rule(source, sets=sets)
    path = Path(source)
    data = read_rule_file(path)
    try:
        rule = compile_rule(data["rule"], sets={**(sets or {}), **data.get("sets", {})})
    except RuleError as err:
        raise RuleError(f"'{path}': {err}") from err
    return replace(rule, **{key: value for key, value in data.items() if key in FIELDS})
