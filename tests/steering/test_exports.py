"""Exported vectors, read as their readers' documents say, steer as `steer` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qscope_trl import FeatureSet, SAESuite
from qscope_trl.errors import CheckpointError, ConfigError, FeatureSetError, ModelStructureError, SteeringError
from qscope_trl.hooks.layers import find_layers
from qscope_trl.steering.exports import FORMATS, export, hook_point, load_vectors
from qscope_trl.steering.steer import steer
from tests.tiny import D_MODEL, K, random_sae, tiny_model, write_saes

FEATURES = {"L1F3": 1.0, "L1F9": -0.5, "L3F40": 0.7}
STRENGTH = 2.5
ENDINGS = {name: endings[0] for name, (_, endings) in FORMATS.items()}


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_saes(tmp_path_factory.mktemp("saes"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def steered(model: Any, saes: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        plain = model(ids).logits
        with steer(model, saes, FEATURES, strength=STRENGTH, sae_k=K):
            logits = model(ids).logits
    assert (logits - plain).abs().max() > 0.1
    return logits


def wanted() -> dict[int, Tensor]:
    """In fp64, from the checkpoint's matrices."""
    columns = {layer: random_sae(100 + layer)["W_dec"].double() for layer in (1, 3)}
    return {
        1: STRENGTH * (columns[1][:, 3] - 0.5 * columns[1][:, 9]),
        3: STRENGTH * 0.7 * columns[3][:, 40],
    }


def assert_wanted(found: Mapping[int, Tensor]) -> None:
    assert found.keys() == wanted().keys()
    for layer, vector in wanted().items():
        assert found[layer].dtype == torch.float32
        assert (found[layer] - vector).abs().max() < 1e-6


def logits_with(model: Any, ids: Tensor, vectors: Mapping[str, Tensor], root: Any) -> Tensor:
    """Plain forward hooks on modules found by name."""
    modules = dict(root.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _m, _a, out, vector=vector: out + vector)
        for name, vector in vectors.items()
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def gguf_directions(path: Path) -> tuple[dict[int, Tensor], dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        word, number = tensor.name.split(".")
        assert (word, tensor.tensor_type.name, len(tensor.shape)) == ("direction", "F32", 1)
        tensors[int(number)] = torch.from_numpy(tensor.data.copy())
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def test_own_format_is_read_back_whole(model: Any, saes: Path, tmp_path: Path) -> None:
    suite = SAESuite.from_pretrained(saes)
    prints = {1: suite.fingerprint(1)}
    chosen = FeatureSet.from_names(["L1F3", "L3F40"], model="someone/model", sae_fingerprints=prints)
    path = export(tmp_path / "new" / "zh.safetensors", "safetensors", suite, chosen, strength=-3)
    found = load_vectors(path)
    for layer, index in ((1, 3), (3, 40)):
        assert torch.equal(found.vectors[layer], -3 * random_sae(100 + layer)["W_dec"][:, index])
    assert (found.strength, found.features) == (-3.0, {"L1F3": 1.0, "L3F40": 1.0})
    assert (found.sae, found.sae_revision, found.model) == (str(saes), None, "someone/model")
    assert found.sae_fingerprints == {layer: suite.fingerprint(layer) for layer in (1, 3)}
    beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert beside == found.to_dict()
    assert (beside["layers"], beside["d_model"]) == ([1, 3], D_MODEL)
    assert sorted(load_file(path)) == ["layer.1", "layer.3"]
    with_model = export(tmp_path / "b.safetensors", "safetensors", saes, FEATURES, strength=STRENGTH, model=model)
    assert_wanted(load_vectors(with_model).vectors)
    assert load_vectors(with_model).num_layers == 4


def test_llama_cpp_adds_each_direction_after_our_layer(
    model: Any, saes: Path, ids: Tensor, steered: Tensor, tmp_path: Path
) -> None:
    path = export(tmp_path / "v.gguf", "gguf", saes, FEATURES, strength=STRENGTH, model=model)
    directions, fields = gguf_directions(path)
    assert_wanted(directions)
    assert fields["general.architecture"] == "controlvector"
    assert (fields["controlvector.model_hint"], fields["controlvector.layer_count"]) == ("qwen3", 2)
    assert json.loads(fields["qscope.steering"])["features"] == FEATURES
    # As llama.cpp does: `direction.N` goes to row N - 1 of a buffer, and block `il` takes row `il` - 1.
    buffer = torch.zeros(max(directions), D_MODEL)
    for number, vector in directions.items():
        buffer[number - 1] += vector
    by_block = {f"layers.{il}": buffer[il - 1] for il in range(1, 4)}
    assert torch.equal(logits_with(model, ids, by_block, model.model), steered)


def test_llama_cpp_has_no_direction_for_layer_0(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llama.cpp's control vectors have no direction for layer 0"):
        export(tmp_path / "v.gguf", "gguf", saes, ["L0F3", "L1F3"])
    assert not list(tmp_path.iterdir())
    directions, fields = gguf_directions(export(tmp_path / "e.gguf", "easysteer", saes, ["L0F3"]))
    assert torch.equal(directions[0], random_sae(100)["W_dec"][:, 3])
    assert fields["controlvector.model_hint"] == "unknown"


def test_easysteer_reads_directions_by_layer(
    model: Any, saes: Path, ids: Tensor, steered: Tensor, tmp_path: Path
) -> None:
    directions, _ = gguf_directions(export(tmp_path / "v.gguf", "easysteer", saes, FEATURES, strength=STRENGTH))
    assert_wanted(directions)
    by_layer = {f"layers.{number}": vector for number, vector in directions.items()}
    assert torch.equal(logits_with(model, ids, by_layer, model.model), steered)


def test_lm_eval_file_has_the_documented_form(
    model: Any, saes: Path, ids: Tensor, steered: Tensor, tmp_path: Path
) -> None:
    path = export(tmp_path / "v.pt", "lm_eval", saes, FEATURES, strength=STRENGTH)
    found = torch.load(path, weights_only=True)
    keys = {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}
    assert all(entry.keys() == keys for entry in found.values())
    assert all((e["action"], e["bias"], e["head_index"]) == ("add", None, None) for e in found.values())
    assert_wanted({int(name.removeprefix("layers.")): e["steering_vector"] for name, e in found.items()})
    vectors = {name: e["steering_vector"] * e["steering_coefficient"] for name, e in found.items()}
    assert torch.equal(logits_with(model, ids, vectors, model.base_model), steered)


def test_hook_points_follow_the_model() -> None:
    from peft import LoraConfig, get_peft_model

    for kind in ("qwen3", "gpt2"):
        model = tiny_model(kind, **({"n_layer": 2, "n_embd": 32, "n_head": 4} if kind == "gpt2" else {}))
        name = hook_point(1, model)
        assert name == ("h.1" if kind == "gpt2" else "layers.1")
        assert dict(model.base_model.named_modules())[name] is find_layers(model)[1]
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    name = hook_point(2, adapted)
    assert name == "model.model.layers.2"
    assert dict(adapted.base_model.named_modules())[name] is find_layers(adapted)[2]
    lost = tiny_model()
    lost.base_model_prefix = "lm_head"
    with pytest.raises(ModelStructureError, match=r"Decoder layer 1 of `Qwen3ForCausalLM` is not inside its `base_mo"):
        hook_point(1, lost)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"format": "onnx"}, ConfigError, r"`format` is 'onnx'; choose one of safetensors, gguf, lm_eval, easysteer"),
        ({"path": "v.bin"}, ConfigError, r"`safetensors` is read from files that end in `.safetensors`, not from"),
        ({"mode": "ablate"}, ConfigError, r"`mode='ablate'` depends on the features' activations"),
        ({"unit": "norm"}, ConfigError, r"`unit='norm'` depends on the residual's norm"),
        ({"gate": "L1F3 > 1"}, ConfigError, r"a gate depends on the text"),
        ({"phases": ("prompt",)}, ConfigError, r"`phases=\('prompt',\)` leaves tokens out"),
        ({"phases": "generation"}, ConfigError, r"`phases='generation'` leaves tokens out"),
        ({"positions": slice(1, None)}, ConfigError, r"`positions=slice\(1, None, None\)` leaves tokens out"),
        ({"strength": [1.0, 2.0]}, ConfigError, r"`strength` by row depends on the batch"),
        ({"strength": float("nan")}, ConfigError, r"`strength` is nan"),
        ({"features": {"L1F3": 0.0}}, SteeringError, r"directions of L1F3 add up to zero"),
        ({"features": ["L1F999"]}, FeatureSetError, r"999"),
        (
            {"features": FeatureSet.from_names(["L1F3"], sae_fingerprints={1: "0a0a"})},
            FeatureSetError,
            r"fingerprint",
        ),
    ],
)
def test_what_is_no_constant_vector_is_refused(
    saes: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"path": "v.safetensors", "format": "safetensors", "features": FEATURES, **settings}
    with pytest.raises(error, match=message):
        export(tmp_path / given.pop("path"), given.pop("format"), saes, given.pop("features"), **given)
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused(saes: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(ModelStructureError, match=r"reads residuals of width 32, but `Qwen3ForCausalLM` has `hidden"):
        export(path, "safetensors", saes, FEATURES, model=tiny_model(hidden_size=16))
    with pytest.raises(FeatureSetError, match=r"L3F40 is out of range: the model has 2 decoder layers"):
        export(path, "safetensors", saes, FEATURES, model=tiny_model(num_hidden_layers=2))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_replaced_only_when_asked_to(saes: Path, tmp_path: Path, name: str) -> None:
    path = export(tmp_path / f"v{ENDINGS[name]}", name, saes, FEATURES)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"v{ENDINGS[name]}' is there already.*`overwrite=True`"):
        export(path, name, saes, FEATURES, strength=2.0)
    assert path.read_bytes() == before
    export(path, name, saes, FEATURES, strength=2.0, overwrite=True)
    assert path.read_bytes() != before
    assert set(tmp_path.iterdir()) == {path.with_suffix(ending) for ending in FORMATS[name][1]}


def test_a_file_of_features_is_not_replaced_by_what_is_written_beside(saes: Path, tmp_path: Path) -> None:
    FeatureSet.from_names(["L1F3"]).save(tmp_path / "zh.json")
    with pytest.raises(ConfigError, match=r"zh.json' is there already"):
        export(tmp_path / "zh.safetensors", "safetensors", saes, tmp_path / "zh.json")
    assert FeatureSet.load(tmp_path / "zh.json") == FeatureSet.from_names(["L1F3"])


def test_nothing_half_written_is_left(saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_config: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        export(tmp_path / "v.pt", "lm_eval", saes, FEATURES)
    assert not list(tmp_path.iterdir())


def test_a_missing_gguf_package_is_named(saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package `gguf`.*`pip install 'qscope-trl\[export\]'`"):
        export(tmp_path / "v.gguf", "gguf", saes, FEATURES)


def test_files_that_hold_no_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No steering vectors at '.*none.safetensors'"):
        load_vectors(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.safetensors' is no safetensors file"):
        load_vectors(tmp_path / "text.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors' holds no steering vectors of version 1"):
        load_vectors(tmp_path / "other.safetensors")
