"""FeatureSets survive a round trip, refuse what does not fit, and leave no half file."""

from __future__ import annotations

import os
from collections.abc import Callable
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
        ("features: [L1F2]\ntarget_group: no", r"`target_group` is False; it is a text. YAML reads a bare no, yes"),
        (
            "features: [L1F2]\ntarget_group: 3",
            r"`target_group` is 3; it is a text. YAML reads a bare number .* quotes",
        ),
        ("features: [L1F2]\nsae_revision: 2026-01-02", r"`sae_revision` is datetime.* bare number or date .* quotes"),
        ("features: [L1F2]\nmodel: [x]", r"`model` is \['x'\]; it is a text\.$"),
        (
            "features: [L1F2]\nd_sae: '2048'",
            r"`d_sae` is '2048'; it is a whole number from 1. Write it",
        ),
        ("features: [L1F2]\nnum_layers: '6'", r"`num_layers` is '6'; it is a whole number from 1"),
        ("features: [L1F2]\nd_model: yes", r"`d_model` is True; it is a whole number from 1"),
        ("features: [L1F2]\nd_model: 0", r"`d_model` is 0; it is a whole number from 1"),
        (
            "features: [L1F2]\nsae_fingerprints: {a: b}",
            r"`sae_fingerprints` is {'a': 'b'}; .*layer to fingerprint",
        ),
        ("features: [L1F2]\nsae_fingerprints: [x]", r"`sae_fingerprints` is \['x'\]; .*from layer to fingerprint"),
        ("features: [L1F2]\nsae_fingerprints: {yes: b}", r"`sae_fingerprints` is {True: 'b'}"),
        ("features: [L1F2]\nsae_fingerprints: {1: 12}", r"`sae_fingerprints.1` is 12; it is a text. .*into quotes"),
        ("features: [L1F2]\norigin: find", r"`origin` is 'find'; it is a mapping from name to value"),
        (
            "features: [{layer: 1, index: 2, group_thresholds: [en]}]",
            r"`group_thresholds` of feature L1F2 is \['en'\]; it is a mapping from group to threshold",
        ),
        (
            "features: [{layer: 1, index: 2, group_thresholds: {no: .5, en: .1}}]",
            r"`group_thresholds` of feature L1F2 has the key False; it is a text. YAML reads a bare no, yes",
        ),
        (
            "features: [{layer: 1, index: 2, group_thresholds: {en: '0.5'}}]",
            r"`group_thresholds.en` of feature L1F2 is a finite number, got '0.5'. Write it without quotes",
        ),
        ("features: [{layer: 1, index: 2, weight: 1e-3}]", r"got '1e-3'. YAML reads 1e-3 as a text: write 1.0e-3"),
        ("features: [{layer: 1, index: 2, label: off}]", r"`label` of feature L1F2 is False; it is a text. .*quotes"),
        ("features: [{layer: 1, index: 2, evidence: .9}]", r"`evidence` of feature L1F2 is 0.9; it is a mapping"),
        (
            "features: [{layer: 1, index: 2, evidence: {auroc: x}}]",
            r"`evidence.auroc` of feature L1F2 is a number",
        ),
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


def test_keys_left_blank_are_as_if_left_out(tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(
        "features: [{layer: 1, index: 2, group_thresholds: , label: , evidence: }]\n"
        "target_group:\nd_sae:\nsae_fingerprints:\norigin:\n"
    )
    assert FeatureSet.load(path) == FeatureSet.from_names(["L1F2"])


def test_a_group_called_no_is_kept_if_quoted(tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    path.write_text("features: [{layer: 1, index: 2, group_thresholds: {'no': .5}}]\ntarget_group: 'no'\n")
    found = FeatureSet.load(path)
    assert found.target_group == "no"
    assert found.groups == ("no",)
    found.save(path)
    assert FeatureSet.load(path) == found


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureSet(features=("L1F2",)), r"`features` holds 'L1F2'; each is a `Feature`. `from_names` takes"),
        (lambda: FeatureSet.load([12]), r"`12` is not a feature name"),
        (lambda: Feature(layer=1, index=2, group_thresholds={3: 0.5}), r"has the key 3; it is a text"),
        (lambda: FeatureSet.from_names(["L1F2"], d_sae=2048.0), r"`d_sae` is 2048.0; it is a whole number"),
    ],
)
def test_ill_typed_values_from_python_are_refused_too(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(FeatureSetError, match=message):
        build()


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
