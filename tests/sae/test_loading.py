from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qscope_trl.errors import CheckpointError
from qscope_trl.sae import loading
from qscope_trl.sae.loading import (
    convert,
    open_qwen_scope,
    open_saelens,
    open_sparsify,
    parse_qwen_scope_name,
    saelens_layer,
    sparsify_layer,
)
from qscope_trl.sae.suite import SAESuite
from tests.sae.sae_files import (
    D_MODEL,
    D_SAE,
    QWEN_NAME,
    K,
    random_weights,
    residuals,
    saelens_config,
    topk_relu,
    write_qwen,
    write_saelens,
    write_sparsify,
)

# fp32 against fp64, sums of 12 to 1024 products.
TOLERANCE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-4}


def assert_is(folder: Path, layer: int, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
    """The SAE of a folder gives these activations and reconstructions; its rows give the same pre-activations."""
    suite, x = SAESuite.from_pretrained(folder), residuals()
    sae = suite.load(layer)
    found = sae.feature_acts(x)
    assert torch.equal(found > 0, acts > 0)
    torch.testing.assert_close(found.double(), acts, **TOLERANCE)
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=1e-4, atol=2e-3)
    index = [0, 700, 3, 3, D_SAE - 1]
    rows = suite.encoder_rows(layer, index)
    torch.testing.assert_close(x @ rows.W.T + rows.b, sae.pre_acts(x)[:, index], **TOLERANCE)
    columns = suite.decoder_columns(layer, index)
    assert sae.W_dec is not None
    # Stored values are equal bit for bit; rescaled ones are divided in fp64 here and in fp32 there.
    torch.testing.assert_close(columns, sae.W_dec[:, index], rtol=1e-6, atol=0)
    if rows.jump is not None:
        assert sae.jump is not None
        assert torch.equal(rows.jump, sae.jump[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_qwen_scope_file_encodes_and_decodes_without_centring(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = random_weights().to(dtype)
    write_qwen(tmp_path / QWEN_NAME, 3, stored)
    w = stored.to(torch.float64)
    acts = topk_relu(residuals().double() @ w.W_enc.T + w.b_enc, K)
    assert_is(tmp_path / QWEN_NAME, 3, acts, acts @ w.W_dec.T + w.b_dec)


@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "rescaled", "standard", "jumprelu", "log_threshold"])
def test_saelens_folder_follows_saelens_definition(tmp_path: Path, architecture: str, is_centred: bool) -> None:
    weights = random_weights()
    config = saelens_config(apply_b_dec_to_input=is_centred)
    changes: dict[str, torch.Tensor] = {}
    if architecture == "rescaled":
        config["rescale_acts_by_decoder_norm"] = True
    elif architecture != "topk":
        del config["k"]
        config["architecture"] = "jumprelu" if architecture == "log_threshold" else architecture
    if architecture == "jumprelu":
        changes["threshold"] = weights.threshold
    if architecture == "log_threshold":
        changes["log_threshold"] = weights.threshold.log()
    write_saelens(tmp_path, weights, config, **changes)

    w = weights.to(torch.float64)
    f = (residuals().double() - (w.b_dec if is_centred else 0)) @ w.W_enc.T + w.b_enc
    norm = w.W_dec.norm(dim=0) if architecture == "rescaled" else torch.ones(D_SAE).double()
    if architecture in ("topk", "rescaled"):
        acts = topk_relu(f * norm, K)
    else:
        acts = f.relu() * (1 if architecture == "standard" else f > w.threshold)
    assert_is(tmp_path, 5, acts, acts / norm @ w.W_dec.T + w.b_dec)


def test_feature_without_decoder_vector_never_fires_under_rescaling(tmp_path: Path) -> None:
    weights = random_weights()
    weights.W_dec[:, 7] = 0
    write_saelens(tmp_path, weights, saelens_config(rescale_acts_by_decoder_norm=True))
    suite = SAESuite.from_pretrained(tmp_path)
    sae = suite.load(5)
    assert not bool(sae.feature_acts(residuals())[:, 7].any())
    assert not bool(suite.decoder_columns(5, [7]).any())
    assert bool(sae(residuals()).isfinite().all())


def test_saelens_configuration_from_before_version_6_is_read(tmp_path: Path) -> None:
    weights = random_weights()
    config = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "hook_name": "blocks.5.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    write_saelens(tmp_path, weights, config, scaling_factor=torch.ones(D_SAE))
    w = weights.to(torch.float64)
    acts = topk_relu((residuals().double() - w.b_dec) @ w.W_enc.T + w.b_enc, K)
    assert_is(tmp_path, 4, acts, acts @ w.W_dec.T + w.b_dec)


@pytest.mark.parametrize("sizes", [{}, {"num_latents": D_SAE, "expansion_factor": 1}])
def test_sparsify_folder_follows_sparsify_definition(tmp_path: Path, sizes: dict[str, int]) -> None:
    weights = random_weights()
    write_sparsify(tmp_path / "layers.9", weights, **sizes)
    w = weights.to(torch.float64)
    f = ((residuals().double() - w.b_dec) @ w.W_enc.T + w.b_enc).relu()
    values, indices = f.topk(K, dim=-1)
    acts = torch.zeros_like(f).scatter(-1, indices, values)
    assert_is(tmp_path, 9, acts, acts @ w.W_dec.T + w.b_dec)
    assert_is(tmp_path / "layers.9", 9, acts, acts @ w.W_dec.T + w.b_dec)


def test_conversion_keeps_values_k_and_fingerprint(tmp_path: Path) -> None:
    weights = random_weights()
    source = write_qwen(tmp_path / QWEN_NAME, 3, weights)
    path = convert(source, tmp_path / "converted")
    assert path == tmp_path / "converted" / "layer3.sae.safetensors"
    old, new = (SAESuite.from_pretrained(item) for item in (source, path))
    assert new.spec(3).k == K
    assert new.fingerprint(3) == old.fingerprint(3)
    for name, value in old.load(3).named_buffers():
        assert torch.equal(new.load(3).get_buffer(name), value)
    assert oct(path.stat().st_mode)[-3:] == "644"


def test_conversion_in_place_takes_the_place_of_the_old_file(tmp_path: Path) -> None:
    source = write_qwen(tmp_path / "nameless", 3, random_weights())
    path = convert(source, k=5)
    source.write_bytes(b"")
    assert SAESuite.from_pretrained(path.parent).spec(3).k == 5


def test_interrupted_conversion_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_qwen(tmp_path / QWEN_NAME, 3, random_weights())

    def fail(_: Any, path: str, __: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "converted")
    assert os.listdir(tmp_path / "converted") == []


def test_names_state_width_and_k() -> None:
    assert parse_qwen_scope_name("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_100") == (81920, 100)
    cached = "/c/models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/snapshots/0123/layer0.sae.pt"
    assert parse_qwen_scope_name(cached) == (32768, 50)
    assert parse_qwen_scope_name("/data/SAE-Res-A-W1K-L0_1/SAE-Res-B-W2K-L0_2/layer0.sae.pt") == (2048, 2)
    assert parse_qwen_scope_name("/data/scope") is None


def test_hooks_name_layers() -> None:
    assert saelens_layer({"hook_name": "blocks.7.hook_resid_post"}, "") == 7
    assert saelens_layer({"metadata": {"hook_name": "blocks.7.hook_resid_pre"}}, "") == 6
    assert saelens_layer({"hook_point": "blocks.1.hook_resid_pre"}, "") == 0
    for hook in ("blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "hook_embed"):
        with pytest.raises(CheckpointError, match=f"reads `{hook}`, which is not the output of a decoder layer"):
            saelens_layer({"hook_name": hook}, "folder")
    assert [sparsify_layer(name) for name in ("layers.3", "h.4", "model.layers.5", "gpt_neox.layers.6")] == [
        3,
        4,
        5,
        6,
    ]
    for folder in ("layers.3.mlp", "embed_tokens", "sae"):
        with pytest.raises(CheckpointError, match=f"sparsify folder '{folder}' does not name a decoder layer"):
            sparsify_layer(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": None}, "`W_dec` is missing in '.*layer3.sae.pt': found `W_enc`, `b_dec`, `b_enc`"),
        ({"W_enc": random_weights().W_enc.T.contiguous()}, "`W_enc` in '.*' is transposed: it holds 1024 features of"),
        ({"W_dec": random_weights().W_dec.T.contiguous()}, "`W_dec` in '.*' is transposed"),
        (
            {"b_dec": torch.zeros(13)},
            "holds 1024 features of width 12, but the biases say `d_sae=1024` and `d_model=13`",
        ),
        ({"b_enc": torch.zeros(1, D_SAE)}, r"`b_enc` in '.*' has the shape \(1, 1024\), expected 1 dimension"),
    ],
)
def test_qwen_scope_files_with_wrong_tensors_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_qwen(tmp_path / QWEN_NAME, 3, random_weights(), **changes)
    with pytest.raises(CheckpointError, match=message):
        open_qwen_scope(path)


def test_name_that_states_another_width_is_refused(tmp_path: Path) -> None:
    path = write_qwen(tmp_path / f"SAE-Res-Tiny-W32K-L0_{K}", 3, random_weights())
    with pytest.raises(CheckpointError, match=r"`d_sae=32768` \(W32K\), but `W_enc` in '.*' has `d_sae=1024`"):
        open_qwen_scope(path)


def test_file_without_layer_in_its_name_is_refused(tmp_path: Path) -> None:
    path = write_qwen(tmp_path, 3, random_weights()).rename(tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"Cannot tell the layer of '.*sae.pt'"):
        open_qwen_scope(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "has the architecture `gated` with activation `relu`"),
        ({"architecture": "batchtopk"}, "SAELens saves BatchTopK SAEs as `jumprelu` for inference"),
        ({"k": None}, "`k` is missing in the cfg.json"),
        ({"k": D_SAE + 1}, "`k=1025` for '.*' is outside 1 to `d_sae=1024`"),
        (
            {"normalize_activations": "layer_norm"},
            "has `normalize_activations: layer_norm`, so its features depend on",
        ),
        ({"reshape_activations": "hook_z"}, "has `reshape_activations: hook_z`"),
        ({"d_in": 13}, "says `d_in=13`, but the tensors have 12"),
        ({"d_sae": 2}, "says `d_sae=2`, but the tensors have 1024"),
        ({"architecture": "jumprelu"}, "`threshold` is missing"),
    ],
)
def test_saelens_folders_without_an_exact_equivalent_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = saelens_config(**changes)
    path = write_saelens(tmp_path, random_weights(), config)
    with pytest.raises(CheckpointError, match=message):
        open_saelens(path, config)


def test_saelens_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = random_weights()
    path = write_saelens(tmp_path / "a", weights, saelens_config(), W_enc=weights.W_enc)
    with pytest.raises(CheckpointError, match=r"`W_enc` in '.*' is transposed"):
        open_saelens(path, saelens_config())
    path = write_saelens(tmp_path / "b", weights, saelens_config(), scaling_factor=torch.full((D_SAE,), 2.0))
    with pytest.raises(CheckpointError, match="carries a fine-tuned `scaling_factor`"):
        open_saelens(path, saelens_config())
    jump = saelens_config(architecture="jumprelu")
    path = write_saelens(tmp_path / "c", weights, jump, threshold=torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"`threshold` in '.*' has the shape \(3,\), expected \(1024,\)"):
        open_saelens(path, jump)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "has `transcode: true`, which this package cannot express"),
        ({"signed": True}, "has `signed: true`"),
        ({"skip_connection": True}, "has `skip_connection: true`"),
        ({"activation": "groupmax"}, 'has `activation: "groupmax"`'),
        ({"k": None}, "`k` is missing in the cfg.json"),
        ({"d_in": 13}, "says `d_in=13`, but the tensors have 12"),
        ({"num_latents": 2}, "says `d_sae=2`, but the tensors have 1024"),
    ],
)
def test_sparsify_folders_without_an_exact_equivalent_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_sparsify(tmp_path / "layers.3", random_weights(), **changes)
    config = {"k": K, "d_in": D_MODEL} | changes
    with pytest.raises(CheckpointError, match=message):
        open_sparsify(path, config)
