"""FeatureSets survive a round trip, refuse what does not fit, and leave no half file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qscope_trl import Feature, FeatureId, FeatureSet
from qscope_trl.errors import FeatureSetError


def full_set() -> FeatureSet:
    return FeatureSet(
        features=(
            Feature(layer=3, index=7, weight=0.5, threshold=-0.25, group_thresholds={"en": -1.5}, label="切换",
                    evidence={"auroc": 0.9}),
            Feature(layer=1, index=2),
        ),
        model="base", sae="saes", sae_revision="abc", sae_fingerprints={1: "00ff", 3: "12ab"}, d_model=8, d_sae=64,
        num_layers=4, target_group="zh", origin={"command": "qscope find", "texts": 10},
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_saving_and_loading_gives_an_equal_set(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "deep" / f"set.{suffix}"
    full_set().save(path)
    assert FeatureSet.load(path) == full_set()
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.yaml"
    path.write_text("old")

    def no_rename(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        full_set().save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["set.yaml"]


def test_names_make_a_set_and_layers_are_sorted() -> None:
    chosen = FeatureSet.load(["L3F7", "L1F2", "L3F1"])
    assert chosen.layers == (1, 3)
    assert [str(i) for i in chosen.ids] == ["L3F7", "L1F2", "L3F1"]
    assert [f.index for f in chosen.for_layer(3)] == [7, 1]
    assert FeatureId.parse("L3F7") == chosen.features[0].id


def test_group_threshold_falls_back_to_the_default() -> None:
    feature = full_set().features[0]
    assert (feature.threshold_for("en"), feature.threshold_for("de"), feature.threshold_for(None)) == (
        -1.5,
        -0.25,
        -0.25,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("features: [L1F2]\nweigth: 3", r"Unknown key `weigth` in the FeatureSet. Known: features"),
        ("features: [{layer: 1, index: 2, wieght: 3}]", r"Unknown key `wieght` in a feature"),
        ("features: [{layer: 1}]", r"lacks `index`"),
        ("features: [L1G2]", r"`L1G2` is not a feature name. Write layer and index as in `L12F345`"),
        ("features: [7]", r"a mapping or a name like `L12F345`, got 7"),
        ("features: [L1F2, L1F2]", r"L1F2 appears twice"),
        ("features: []", r"at least one feature, got none"),
        ("model: x", r"`features` is missing"),
        ("features: [{layer: -1, index: 2}]", r"`layer` is a whole number from 0, got -1"),
        ("features: [{layer: 1, index: 2, weight: .nan}]", r"`weight` of feature L1F2 is a finite number, got nan"),
        ("features: [{layer: 1, index: 2, threshold: high}]", r"`threshold` of feature L1F2 is a finite number"),
        ("features: [L1F2]\nd_sae: 2", r"L1F2 is out of range: the set says `d_sae: 2`"),
        ("features: [L1F2]\nnum_layers: 1", r"L1F2 is out of range: the set says `num_layers: 1`"),
        ("features: [L1F2]\nformat_version: 9", r"`format_version` is 9, but this version of qscope_trl reads 1"),
        ("- L1F2", r"holds a list, not a mapping"),
        ("{", r"is neither YAML nor JSON"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(FeatureSetError, match=message) as error:
        FeatureSet.load(path)
    assert "bad.yaml" in str(error.value)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(FeatureSetError, match=r"No feature file at .* Write one with `qscope find`"):
        FeatureSet.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"d_model": 16}, r"made for `d_model=8`"),
        ({"num_layers": 5}, r"made for `num_layers=4`"),
        ({"d_sae": 65}, r"made for `d_sae=64`"),
        ({"fingerprints": {3: "ffff"}}, r"SAE of layer 3 .* fingerprint ffff, expected 12ab"),
    ],
)
def test_a_set_of_another_model_or_sae_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureSetError, match=message):
        full_set().check_fits(**facts)
    full_set().check_fits(d_model=8, num_layers=4, d_sae=64, fingerprints={3: "12ab", 2: "any"})
