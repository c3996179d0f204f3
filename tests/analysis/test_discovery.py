"""Discovery against a brute-force computation in numpy that shares no code with it."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.analysis.discovery import find_features
from qscope_trl.analysis.find_run import format_table
from qscope_trl.analysis.texts import prepare_group
from qscope_trl.errors import CheckpointError, ConfigError, DataError, ModelStructureError
from qscope_trl.hooks.layers import find_layers
from tests.tiny import D_MODEL, D_SAE, NUM_LAYERS, K, random_sae, tiny_model, tiny_tokenizer, write_saes

LAYERS = [1, 3]
RANGES = {"zh": (60, 96), "en": (2, 40), "de": (30, 70)}


def texts(name: str, count: int = 16) -> list[str]:
    draw = random.Random(name)
    low, high = RANGES[name]
    return [" ".join(f"w{draw.randrange(low, high)}" for _ in range(draw.randrange(2, 12))) for _ in range(count)]


GROUPS = {name: texts(name) for name in RANGES}


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes")), k=K)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def find(model: Any, saes: SAESuite, groups: dict[str, list[str]] | None = None, **settings: Any) -> FeatureSet:
    settings = {"target": "zh", "layers": LAYERS, "top": 5, "show_progress": False, **settings}
    return find_features(model, tiny_tokenizer(), saes, groups or GROUPS, **settings)


def dense_figures(model: Any, layer: int, ids: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Activations and pre-activations per text, `(tokens, D_SAE)` each, one text at a time in fp64."""
    weights = random_sae(100 + layer)
    W, b = weights["W_enc"].double().numpy(), weights["b_enc"].double().numpy()
    figures = []
    for row in ids:
        seen: list[torch.Tensor] = []
        handle = find_layers(model)[layer].register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([row]))
        handle.remove()
        f = seen[0][0, 1:].double().numpy() @ W.T + b
        kept = np.argsort(-f, axis=1, kind="stable")[:, :K]
        acts = np.zeros_like(f)
        np.put_along_axis(acts, kept, np.maximum(np.take_along_axis(f, kept, 1), 0), 1)
        figures.append((acts, f))
    return figures


@functools.cache
def brute_force(model: Any, layer: int, heldout: bool) -> dict[str, np.ndarray]:
    """Every figure of every feature, on the texts that are held out or on the others."""
    acts, pre, maxima, pre_maxima = {}, {}, {}, {}
    for name, group_texts in GROUPS.items():
        group = prepare_group(name, group_texts, tiny_tokenizer())
        ids = [row for row, out in zip(group.token_ids, group.heldout, strict=True) if out is heldout]
        figures = dense_figures(model, layer, ids)
        acts[name] = np.concatenate([a for a, _ in figures])
        pre[name] = np.concatenate([f for _, f in figures])
        maxima[name] = np.stack([a.max(0) for a, _ in figures])
        pre_maxima[name] = np.stack([f.max(0) for _, f in figures])
    others = [name for name in GROUPS if name != "zh"]
    other_acts = np.concatenate([acts[name] for name in others])
    other_maxima = np.concatenate([maxima[name] for name in others])
    truth = [1] * len(maxima["zh"]) + [0] * len(other_maxima)

    def auroc(values: dict[str, np.ndarray]) -> np.ndarray:
        joined = np.concatenate([values["zh"], *(values[name] for name in others)])
        return np.array([roc_auc_score(truth, joined[:, s]) for s in range(D_SAE)])

    a, b = ((m > 0).sum(0) + 0.5 for m in (maxima["zh"], other_maxima))
    c, d = ((m == 0).sum(0) + 0.5 for m in (maxima["zh"], other_maxima))
    fires = (maxima["zh"] > 0).any(0) | (other_maxima > 0).any(0)

    return {
        "mean_act": acts["zh"].mean(0),
        "mean_act_others": other_acts.mean(0),
        "token_rate": (acts["zh"] > 0).mean(0),
        "token_rate_others": (other_acts > 0).mean(0),
        "text_rate": (maxima["zh"] > 0).mean(0),
        "text_rate_others": (other_maxima > 0).mean(0),
        "mean_difference": acts["zh"].mean(0) - other_acts.mean(0),
        "delta": (maxima["zh"] > 0).mean(0) - (other_maxima > 0).mean(0),
        "log_odds": np.where(fires, np.log(a * d / (b * c)), 0.0),
        "monolinguality": acts["zh"].mean(0) - np.mean([acts[name].mean(0) for name in others], axis=0),
        "auroc": auroc(maxima),
        "auroc_pre_act": auroc(pre_maxima),
        "threshold": np.concatenate([pre[name] for name in others]).mean(0),
        **{f"threshold_{name}": pre[name].mean(0) for name in GROUPS},
    }


@pytest.mark.parametrize("rank_by", ["mean_difference", "delta", "log_odds", "monolinguality", "auroc"])
def test_choice_evidence_and_thresholds_equal_a_brute_force_computation(
    model: Any, saes: SAESuite, rank_by: str
) -> None:
    # `top` of 13 makes the shortlist of `auroc` all of the 128 features that favour the target.
    found = find(model, saes, top=13, rank_by=rank_by, layers=[3])
    inside, outside = brute_force(model, 3, heldout=False), brute_force(model, 3, heldout=True)
    ranked = inside[rank_by]
    best = np.sort(ranked)[::-1][: len(found)]
    assert len(found) == 13
    np.testing.assert_allclose([f.evidence[rank_by] for f in found.features], best, rtol=1e-4, atol=1e-6)
    for feature in found.features:
        for name, value in feature.evidence.items():
            wanted = outside[name.removeprefix("heldout_")] if name.startswith("heldout_") else inside[name]
            # The model runs in fp32, padded here and alone there.
            assert value == pytest.approx(wanted[feature.index], rel=1e-4, abs=1e-5), (feature.id, name)
        assert feature.threshold == pytest.approx(inside["threshold"][feature.index], rel=1e-4, abs=1e-5)
        for name, value in feature.group_thresholds.items():
            assert value == pytest.approx(inside[f"threshold_{name}"][feature.index], rel=1e-4, abs=1e-5)
        assert feature.weight == 1.0


def test_batch_size_and_order_of_texts_change_nothing(model: Any, saes: SAESuite) -> None:
    one = find(model, saes, batch_size=1)
    other = find(model, saes, {name: group[::-1] for name, group in GROUPS.items()}, batch_size=7)
    assert one.ids == other.ids
    for a, b in zip(one.features, other.features, strict=True):
        assert a.evidence == pytest.approx(dict(b.evidence), rel=1e-4, abs=1e-5)
        assert a.threshold == pytest.approx(b.threshold, rel=1e-4, abs=1e-5)


def plant(model: Any, folder: Path, groups: dict[str, list[str]], layer: int, index: int) -> SAESuite:
    """SAEs in which one feature reads the word w95 off the residual: the linear discriminant from all other words."""
    weights = random_sae(100 + layer)
    marked: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for text in [text for group in groups.values() for text in group]:
        ids = torch.tensor(tiny_tokenizer()(text)["input_ids"])
        seen: list[torch.Tensor] = []
        handle = find_layers(model)[layer].register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model.eval()(input_ids=ids[None])
        handle.remove()
        marked.append(seen[0][0, 1:][ids[1:] == 95])
        others.append(seen[0][0, 1:][ids[1:] != 95])
    high, low = torch.cat(marked).mean(0), torch.cat(others).mean(0)
    spread = torch.cat([torch.cat(marked) - high, torch.cat(others) - low]).T.cov() + 1e-3 * torch.eye(D_MODEL)
    direction = torch.linalg.solve(spread, high - low)
    direction = 20 * direction / direction.norm()
    weights["W_enc"][index] = direction
    weights["b_enc"][index] = -direction @ (high + low) / 2
    torch.save(weights, folder / f"layer{layer}.sae.pt")
    return SAESuite.from_pretrained(folder, k=K)


@pytest.mark.parametrize("rank_by", ["mean_difference", "delta", "log_odds", "monolinguality", "auroc"])
def test_planted_feature_is_found_first_and_holds_on_texts_held_out(model: Any, tmp_path: Path, rank_by: str) -> None:
    groups = {
        "marked": [" w95 ".join(text.split()) for text in texts("en", 30)],
        "plain": [" w41 ".join(text.split()) for text in texts("en", 30)],
    }
    saes = plant(model, write_saes(tmp_path, [0, 1]), groups, 0, 0)
    found = find(model, saes, groups, target="marked", layers=[0, 1], rank_by=rank_by, select="overall", top=4)
    best = found.features[0]
    assert str(best.id) == "L0F0"  # Ties go to the lower name.
    assert best.evidence["heldout_auroc"] > 0.95
    assert best.threshold < best.group_thresholds["marked"]


def test_planted_feature_is_significant_and_stable(model: Any, tmp_path: Path) -> None:
    groups = {
        "marked": [" w95 ".join(text.split()) for text in texts("en", 40)],
        "plain": [" w41 ".join(text.split()) for text in texts("en", 40)],
    }
    saes = plant(model, write_saes(tmp_path, [0]), groups, 0, 0)
    settings: dict[str, Any] = {"target": "marked", "layers": [0], "top": 3, "rank_by": "auroc"}
    found = find(model, saes, groups, **settings, permutations=200, splits=5, bootstrap=100)
    best = found.features[0].evidence
    assert str(found.features[0].id) == "L0F0"
    assert best["p_value"] == pytest.approx(1 / 201)
    assert best["familywise_p"] == pytest.approx(1 / 201)
    assert best["q_value"] < 0.05
    assert best["selection_rate"] == 1.0
    assert best["heldout_auroc_low"] > 0.9
    # The search itself is the same as without.
    plain = find(model, saes, groups, **settings)
    assert plain.ids == found.ids
    for a, b in zip(plain.features, found.features, strict=True):
        assert a.evidence == {name: b.evidence[name] for name in a.evidence}


def test_p_and_q_values_equal_scipys_over_every_feature_of_both_layers(model: Any, saes: SAESuite) -> None:
    found = find(model, saes, rank_by="delta", permutations=50)
    p: dict[tuple[int, int], float] = {}
    for layer in LAYERS:
        fires = {
            name: np.stack(
                [a.max(0) > 0 for a, _ in dense_figures(model, layer, prepare_group(name, t, tiny_tokenizer()).kept())]
            )
            for name, t in GROUPS.items()
        }
        mine, others = fires["zh"], np.concatenate([fires["en"], fires["de"]])
        for f in range(D_SAE):
            a, b = int(mine[:, f].sum()), int(others[:, f].sum())
            if a + b:
                table = [[a, len(mine) - a], [b, len(others) - b]]
                p[layer, f] = float(stats.fisher_exact(table, alternative="greater").pvalue)
    q = dict(zip(p, stats.false_discovery_control(list(p.values())), strict=True))
    assert found.origin["search"]["tested_features"] == len(p)
    assert found.origin["search"]["features_with_q_up_to_0.05"] == sum(value <= 0.05 for value in q.values())
    for feature in found.features:
        assert feature.evidence["p_value"] == pytest.approx(p[feature.layer, feature.index], rel=1e-9)
        assert feature.evidence["q_value"] == pytest.approx(q[feature.layer, feature.index], rel=1e-9)


@pytest.mark.parametrize("rank_by", ["mean_difference", "auroc", "log_odds"])
def test_groups_that_differ_by_chance_alone_give_nothing_significant_or_stable(
    model: Any, saes: SAESuite, rank_by: str
) -> None:
    pool = texts("en", 80)
    groups = {"one": pool[:40], "other": pool[40:]}
    found = find(model, saes, groups, target="one", rank_by=rank_by, permutations=200, splits=10)
    assert min(f.evidence["q_value"] for f in found.features) > 0.05
    assert min(f.evidence["familywise_p"] for f in found.features) > 0.05
    for halves in found.origin["search"]["split_half"].values():
        assert abs(halves["rank_correlation"]) < 0.3
        assert halves["top_overlap"] < 0.3


@pytest.mark.parametrize(("holdout", "prefix"), [(0.4, "heldout_"), (0, "")])
def test_intervals_are_those_of_the_texts_held_out_if_there_are_any(
    model: Any, saes: SAESuite, holdout: float, prefix: str
) -> None:
    found = find(model, saes, layers=[3], holdout=holdout, bootstrap=200)
    for feature in found.features:
        ends = {name for name in feature.evidence if name.endswith(("_low", "_high"))}
        assert all(name.startswith(prefix) and name.startswith("heldout_") is bool(prefix) for name in ends)
        assert len(ends) == 12
        for name in ("mean_difference", "delta", "auroc"):
            value = feature.evidence[f"{prefix}{name}"]
            low, high = (feature.evidence[f"{prefix}{name}_{end}"] for end in ("low", "high"))
            assert low <= value <= high
            assert low < high


def test_tokens_with_an_outlying_norm_are_masked_and_counted(saes: SAESuite) -> None:
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[35] *= 300  # The word w35 of `en` and `de`.
    found = find(model, saes, layers=[1], top=20)
    ids = {name: prepare_group(name, group, tiny_tokenizer()) for name, group in GROUPS.items()}
    count = sum(row[1:].count(35) for group in ids.values() for row in group.token_ids)
    assert count >= 3
    assert found.origin["masked"]["norm_outliers"] == {"L1": count}
    assert found.origin["masked"]["first_positions"] == 48
    assert find(model, saes, layers=[1], max_norm_ratio=0).origin["masked"]["norm_outliers"] == {"L1": 0}
    acts = np.concatenate(
        [
            a[np.array(row[1:]) != 35]
            for name in ("en", "de")
            for row, (a, _) in zip(ids[name].kept(), dense_figures(model, 1, ids[name].kept()), strict=True)
        ]
    )
    assert found.origin["tokens"]["en"] + found.origin["tokens"]["de"] == len(acts)
    for feature in found.features:
        assert feature.evidence["mean_act_others"] == pytest.approx(acts[:, feature.index].mean(), rel=1e-4, abs=1e-5)


def test_a_group_of_outliers_alone_is_refused(saes: SAESuite) -> None:
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[35] *= 300
    groups = {"plain": texts("zh", 30), "odd": ["w5 w35 w35", "w6 w35"]}
    with pytest.raises(DataError, match=r"No token of group `odd` is left in layer 1: .* longer than 10 times"):
        find(model, saes, groups, target="plain", layers=[1])


def test_top_counts_per_layer_or_overall(model: Any, saes: SAESuite) -> None:
    per_layer, overall = find(model, saes, top=3), find(model, saes, top=3, select="overall")
    assert [f.layer for f in per_layer.features] == [1, 1, 1, 3, 3, 3]
    assert len(overall) == 3
    scores = [f.evidence["mean_difference"] for f in overall.features]
    assert scores == sorted(scores, reverse=True)
    assert set(overall.ids) <= set(per_layer.ids)


def test_last_positions_read_only_the_last_token(model: Any, saes: SAESuite) -> None:
    found = find(model, saes, positions="last", layers=[3])
    assert found.origin["tokens"] == found.origin["texts"]
    group = prepare_group("zh", GROUPS["zh"], tiny_tokenizer())
    acts = np.stack([a[-1] for a, _ in dense_figures(model, 3, group.kept())])
    for feature in found.features:
        assert feature.evidence["mean_act"] == pytest.approx(acts[:, feature.index].mean(), rel=1e-4, abs=1e-5)
        assert feature.evidence["token_rate"] == feature.evidence["text_rate"]


def test_set_records_where_it_comes_from_and_survives_a_file(model: Any, saes: SAESuite, tmp_path: Path) -> None:
    found = find(model, saes, model_name="tiny")
    assert (found.model, found.sae, found.target_group) == ("tiny", saes.source, "zh")
    assert (found.d_model, found.d_sae, found.num_layers) == (D_MODEL, D_SAE, NUM_LAYERS)
    assert found.sae_fingerprints == {layer: saes.fingerprint(layer) for layer in LAYERS}
    assert found.origin["texts"] == dict.fromkeys(GROUPS, 13)
    assert found.origin["heldout_texts"] == dict.fromkeys(GROUPS, 3)
    assert found.origin["settings"]["holdout"] == 0.2
    for name in ("zh.yaml", "zh.json"):
        found.save(tmp_path / name)
        assert FeatureSet.load(tmp_path / name) == found
    table = format_table(found).splitlines()
    assert len(table) == 1 + len(found)
    assert len({len(line) for line in table}) == 1
    assert table[1].split()[0] == str(found.features[0].id)


def test_without_holdout_there_is_no_held_out_evidence(model: Any, saes: SAESuite) -> None:
    found = find(model, saes, holdout=0)
    assert not any(name.startswith("heldout") for f in found.features for name in f.evidence)
    assert " - " in format_table(found)
    assert all(math.isfinite(value) for f in found.features for value in f.evidence.values())


def test_nothing_is_left_on_the_model(model: Any, saes: SAESuite) -> None:
    model.train()
    with pytest.raises(DataError):
        find(model, saes, {"zh": ["w2"], "en": GROUPS["en"]})
    find(model, saes)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_equal_groups_have_no_feature(model: Any, saes: SAESuite) -> None:
    with pytest.raises(DataError, match="positive `mean_difference` for `zh`"):
        find(model, saes, {"zh": GROUPS["en"], "en": GROUPS["en"]})
    with pytest.raises(DataError, match=r"No feature has a `auroc` that favours|No feature of layers"):
        find(model, saes, {"zh": GROUPS["en"], "en": GROUPS["en"]}, rank_by="auroc")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": "fr"}, ConfigError, "The target group `fr` and at least one other"),
        ({"rank_by": "size"}, ConfigError, "`rank_by` is 'size'; choose one of"),
        ({"select": "all"}, ConfigError, "`select` is 'all'"),
        ({"top": 0}, ConfigError, "`top` is 0"),
        ({"holdout": 1.0}, ConfigError, "`holdout` is 1.0"),
        ({"permutations": -1}, ConfigError, "`permutations` is -1; it is 0 for none, or a number above"),
        ({"max_norm_ratio": 0.5}, ConfigError, "`max_norm_ratio` is 0.5; it is above 1"),
        ({"layers": [7]}, ModelStructureError, "No decoder layer 7"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    model: Any, saes: SAESuite, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find(model, saes, **settings)


def test_saes_of_another_model_or_without_the_layer_are_refused(model: Any, tmp_path: Path) -> None:
    wide = SAESuite.from_pretrained(write_saes(tmp_path / "wide", [1], d_model=D_MODEL + 8), k=K)
    with pytest.raises(ModelStructureError, match=f"width {D_MODEL + 8}, but .* `hidden_size={D_MODEL}`"):
        find(model, wide, layers=[1])
    with pytest.raises(CheckpointError, match="No SAE for layer 2"):
        find(model, wide, layers=[2])
