"""FeatureSet: the chosen features, what they were chosen on, and the SAE they belong to.

A FeatureSet is what travels between the parts of the package: discovery writes it; penalties, rewards, steering, rules
and dashboards read it. It is a small YAML or JSON file a person can read and edit. This module imports neither torch
nor transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qscope_trl.errors import FeatureSetError
from qscope_trl.features import hub
from qscope_trl.features.feature import Feature, FeatureId
from qscope_trl.features.values import require_mapping, require_text, unquote
from qscope_trl.files import write_whole

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Chosen features with weights, thresholds, evidence and origin.

    Args:
        features: The features, each at most once.
        model: Name of the model they were found on. Informative: a set made on a base model serves its tuned versions.
        sae: SAE repository or folder name they index.
        sae_revision: Commit or tag of that repository.
        sae_fingerprints: Per layer, the fingerprint that `SAESuite.fingerprint` gives; compared before use.
        d_model: Width of the residual stream; compared before use.
        d_sae: Number of features of each SAE; compared before use.
        num_layers: Number of decoder layers of the model; compared before use.
        target_group: Group that the features stand for; samples of that group are exempt from a penalty.
        origin: How the set was made: command, data, counts, settings.
    """

    features: tuple[Feature, ...]
    model: str | None = None
    sae: str | None = None
    sae_revision: str | None = None
    sae_fingerprints: Mapping[int, str] = field(default_factory=dict)
    d_model: int | None = None
    d_sae: int | None = None
    num_layers: int | None = None
    target_group: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.features:
            raise FeatureSetError("A FeatureSet needs at least one feature, got none.")
        self._check_origin()
        seen: set[FeatureId] = set()
        for feature in self.features:
            if not isinstance(feature, Feature):
                raise FeatureSetError(f"`features` holds {feature!r}; each is a `Feature`. `from_names` takes names.")
            if feature.id in seen:
                raise FeatureSetError(f"Feature {feature.id} appears twice; merge its entries into one.")
            seen.add(feature.id)
            if self.d_sae is not None and feature.index >= self.d_sae:
                raise FeatureSetError(
                    f"Feature {feature.id} is out of range: the set says `d_sae: {self.d_sae}`, so indices end at "
                    f"{self.d_sae - 1}."
                )
            if self.num_layers is not None and feature.layer >= self.num_layers:
                raise FeatureSetError(
                    f"Feature {feature.id} is out of range: the set says `num_layers: {self.num_layers}`, so layers "
                    f"end at {self.num_layers - 1}."
                )

    def _check_origin(self) -> None:
        """Raise for a field of another type than declared; in YAML an unquoted value easily becomes one."""
        for name in ("model", "sae", "sae_revision", "target_group"):
            if getattr(self, name) is not None:
                require_text(f"`{name}` is", getattr(self, name))
        for name in ("d_model", "d_sae", "num_layers"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise FeatureSetError(f"`{name}` is {size!r}; it is a whole number from 1.{unquote(size)}")
        require_mapping("`origin`", self.origin, "name to value, as in {command: qscope find}")
        prints = self.sae_fingerprints
        if not isinstance(prints, Mapping) or not all(type(key) is int and key >= 0 for key in prints):
            raise FeatureSetError(
                f"`sae_fingerprints` is {prints!r}; it is a mapping from layer to fingerprint, as in {{12: '0a1b'}}."
            )
        for layer, value in prints.items():
            require_text(f"`sae_fingerprints.{layer}` is", value)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that carry at least one feature, ascending."""
        return tuple(sorted({feature.layer for feature in self.features}))

    @property
    def ids(self) -> tuple[FeatureId, ...]:
        """Addresses in the order of the set."""
        return tuple(feature.id for feature in self.features)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that any feature has a threshold for, sorted."""
        return tuple(sorted({group for feature in self.features for group in feature.group_thresholds}))

    def for_layer(self, layer: int) -> tuple[Feature, ...]:
        """Features of one layer, in the order of the set."""
        return tuple(feature for feature in self.features if feature.layer == layer)

    def with_features(self, features: Iterable[Feature]) -> FeatureSet:
        """The same origin with other features (a subset, or re-weighted ones)."""
        return replace(self, features=tuple(features))

    @classmethod
    def from_names(cls, names: Iterable[str | FeatureId], **origin: Any) -> FeatureSet:
        """Build a set from names such as `L12F345`, weight 1 and threshold 0.

        Args:
            names: Feature names or ids.
            **origin: Other fields of `FeatureSet`, such as `sae` or `d_sae`.
        """
        ids = [name if isinstance(name, FeatureId) else FeatureId.parse(name) for name in names]
        return cls(features=tuple(Feature(layer=i.layer, index=i.index) for i in ids), **origin)

    @classmethod
    def load(cls, source: Features) -> FeatureSet:
        """Read a set from a YAML or JSON file, or take it as it is.

        Args:
            source: A `FeatureSet`, a path ending in `.yaml`, `.yml` or `.json`, a Hub repository `owner/name` that
                `push_to_hub` wrote, a list of names like `L12F345`, or a mapping from such names to weights.

        Raises:
            FeatureSetError: If the file is missing, unreadable, or has unknown or ill-typed entries.
        """
        if isinstance(source, FeatureSet):
            return source
        if isinstance(source, Mapping):
            ids = {FeatureId.parse(name): weight for name, weight in source.items()}
            return cls(features=tuple(Feature(layer=i.layer, index=i.index, weight=w) for i, w in ids.items()))
        if not isinstance(source, str | os.PathLike):
            return cls.from_names(source)
        if isinstance(source, str) and hub.is_hub_id(source):
            return cls.from_hub(source)
        path = Path(source)
        if not path.is_file():
            raise FeatureSetError(
                f"No feature file at '{path}'. Write one with `qscope find`, or pass a list such as ['L12F345']."
            )
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            raise FeatureSetError(f"'{path}' is neither YAML nor JSON: {err}") from err
        if not isinstance(data, dict):
            raise FeatureSetError(f"'{path}' holds a {type(data).__name__}, not a mapping with a `features` list.")
        try:
            return cls.from_dict(data)
        except FeatureSetError as err:
            raise FeatureSetError(f"'{path}': {err}") from err

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> FeatureSet:
        """Read a set from the Hub repository that `push_to_hub` wrote.

        Args:
            repo_id: `owner/name`.
            revision: Commit, tag or branch.
            token: Access token; by default the one of `hf auth login`.

        Raises:
            FeatureSetError: If there is no such set, or the Hub cannot be reached.
        """
        return cls.load(hub.download(repo_id, revision=revision, token=token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload features",
        license: str | None = None,
    ) -> str:
        """Push the set and a card with evidence, origin and the note on the SAEs' licence to the Hub.

        Of paths in it, such as those of the texts it was found on, only the last part is pushed.

        Args:
            repo_id: `owner/name`; made if there is none.
            private: Whether a new repository is private.
            token: Access token; by default the one of `hf auth login`.
            revision: Branch to commit to.
            commit_message: Message of the commit.
            license: Identifier of the licence of this set, for the card.

        Returns:
            Address of the commit.

        Raises:
            FeatureSetError: If the Hub refuses or cannot be reached.
        """
        mine = self.to_dict()
        shown = mine | {key: hub.without_paths(mine[key]) for key in ("model", "sae", "origin") if key in mine}
        return hub.upload(
            repo_id,
            FeatureSet.from_dict(shown)._yaml(),
            hub.card(repo_id, shown, licence=license),
            token=token,
            private=private,
            revision=revision,
            message=commit_message,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeatureSet:
        """Build a set from the mapping that `to_dict` gives.

        Raises:
            FeatureSetError: If a key is unknown or missing, a value has the wrong type, or the format version is
                newer than this package.
        """
        data = _without_empty(data, ("sae_fingerprints", "origin"))
        version = data.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise FeatureSetError(
                f"`format_version` is {version!r}, but this version of qscope_trl reads {FORMAT_VERSION}. Update the "
                f"package."
            )
        _refuse_unknown(data, cls, "the FeatureSet")
        entries = data.pop("features", None)
        if not isinstance(entries, list):
            raise FeatureSetError("`features` is missing or not a list.")
        prints = data.get("sae_fingerprints")
        if isinstance(prints, Mapping):
            # JSON has no keys but strings.
            digits = {key: int(key) for key in prints if isinstance(key, str) and key.isdecimal()}
            data["sae_fingerprints"] = {digits.get(key, key): value for key, value in prints.items()}
        return cls(features=tuple(_feature(entry) for entry in entries), **data)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for YAML or JSON; `from_dict` reads it back to an equal set."""
        data = {"format_version": FORMAT_VERSION, **asdict(self)}
        data["features"] = [
            {k: v for k, v in asdict(feature).items() if v not in ({}, "")} for feature in self.features
        ]
        return {k: v for k, v in data.items() if v not in (None, {})}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to `path` (`.json`, otherwise YAML), under a temporary name first so no half file is left."""
        path = Path(path)
        text = (
            json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n" if path.suffix == ".json" else self._yaml()
        )
        write_whole(path, text)

    def _yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def check_fits(
        self,
        *,
        d_model: int | None = None,
        num_layers: int | None = None,
        d_sae: int | None = None,
        sae: str | None = None,
        fingerprints: Mapping[int, str] | None = None,
    ) -> None:
        """Refuse the set if it was made for another model or another SAE.

        Every argument that is given is compared with the set's own figure, where the set has one.

        Args:
            d_model: Width of the model at hand.
            num_layers: Decoder layers of the model at hand.
            d_sae: Width of the SAEs at hand.
            sae: Name of the SAEs at hand, for the message.
            fingerprints: Fingerprints of the SAEs at hand, per layer.

        Raises:
            FeatureSetError: If any figure differs.
        """
        for name, mine, theirs in [
            ("d_model", self.d_model, d_model),
            ("num_layers", self.num_layers, num_layers),
            ("d_sae", self.d_sae, d_sae),
        ]:
            if mine is not None and theirs is not None and mine != theirs:
                raise FeatureSetError(
                    f"This FeatureSet was made for `{name}={mine}` (model '{self.model}', SAE '{self.sae}'), but here "
                    f"`{name}={theirs}`. Its indices mean other features here; find features with this model and SAE."
                )
        for feature in self.features:
            if d_sae is not None and feature.index >= d_sae:
                raise FeatureSetError(
                    f"Feature {feature.id} is out of range: the SAE has `d_sae={d_sae}` features, so indices end at "
                    f"{d_sae - 1}."
                )
            if num_layers is not None and feature.layer >= num_layers:
                raise FeatureSetError(
                    f"Feature {feature.id} is out of range: the model has {num_layers} decoder layers, so layers end "
                    f"at {num_layers - 1}."
                )
        for layer, value in (fingerprints or {}).items():
            mine_value = self.sae_fingerprints.get(layer)
            if mine_value is not None and mine_value != value:
                raise FeatureSetError(
                    f"The SAE of layer {layer} in '{sae}' is not the one this FeatureSet was made with "
                    f"('{self.sae}'): fingerprint {value}, expected {mine_value}. Its indices mean other features "
                    f"here."
                )


Features = FeatureSet | Mapping[str, float] | Sequence[str] | str | os.PathLike[str]
"""What stands for a FeatureSet where features are asked for; `FeatureSet.load` reads it."""


def _feature(entry: Any) -> Feature:
    if isinstance(entry, str):
        parsed = FeatureId.parse(entry)
        return Feature(layer=parsed.layer, index=parsed.index)
    if not isinstance(entry, dict):
        raise FeatureSetError(f"An entry of `features` is a mapping or a name like `L12F345`, got {entry!r}.")
    _refuse_unknown(entry, Feature, "a feature")
    missing = {"layer", "index"} - entry.keys()
    if missing:
        raise FeatureSetError(f"An entry of `features` lacks `{'`, `'.join(sorted(missing))}`: {entry!r}.")
    return Feature(**_without_empty(entry, ("group_thresholds", "label", "evidence")))


def _without_empty(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The mapping without those keys of `names` that a file leaves blank."""
    return {key: value for key, value in data.items() if value is not None or key not in names}


def _refuse_unknown(data: Mapping[str, Any], kind: type, where: str) -> None:
    known = [item.name for item in fields(kind)]
    unknown = [key for key in data if key not in known]
    if unknown:
        raise FeatureSetError(f"Unknown key `{unknown[0]}` in {where}. Known: {', '.join(known)}.")
