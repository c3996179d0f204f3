"""One plain function per checkpoint format, and the conversion of Qwen-Scope files to safetensors.

Each function opens one layer and states the format's conventions; none reads a big matrix. Left out on purpose:
formats whose features cannot be written as `x @ W_enc.T + b_enc` (gated SAEs, normalised inputs, transcoders); they
are refused with the reason rather than read approximately.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qscope_trl.errors import CheckpointError
from qscope_trl.sae.checkpoint import Checkpoint
from qscope_trl.sae.tensors import StoredMatrix, TensorFile, open_tensors
from qscope_trl.sae.topk_sae import Activation

QWEN_SCOPE_FILE = re.compile(r"layer(\d+)\.sae\.(pt|safetensors)")
_QWEN_SCOPE_NAME = re.compile(r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(post|pre)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks?)\.(\d+)")


def parse_qwen_scope_name(name: str) -> tuple[int, int] | None:
    """`d_sae` and `k` that a Qwen-Scope repository's or folder's name states, or `None` if it is not such a name.

    `SAE-Res-Qwen3-8B-Base-W64K-L0_50` means `d_sae = 64 * 1024` and `k = 50`. Of a path, the last part
    that fits counts.
    """
    for part in reversed(re.split(r"[/\\]|--", name)):
        match = _QWEN_SCOPE_NAME.search(part)
        if match is not None:
            return 1024 * int(match[2]), int(match[3])
    return None


def open_qwen_scope(path: Path, *, name: str = "") -> Checkpoint:
    """Open `layer{n}.sae.pt`, or the `layer{n}.sae.safetensors` that `convert` wrote.

    Four tensors: `W_enc (d_sae, d_model)`, `W_dec (d_model, d_sae)`, `b_enc (d_sae,)`, `b_dec (d_model,)`; no
    centring. `k` comes from the safetensors metadata, else from `name`.

    Args:
        path: The file.
        name: Repository or folder name to read `d_sae` and `k` from; by default the path.

    Raises:
        CheckpointError: If the file is damaged or unsafe, a tensor is missing or transposed, or the name states
            another width than the tensors have.

    References:
        Qwen-Scope, arXiv:2605.11887.
    """
    match = QWEN_SCOPE_FILE.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"Cannot tell the layer of '{path}'. Name the file `layer{{n}}.sae.pt`, n from 0.")
    file = open_tensors(path)
    _require(file, path, {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1})
    stated = parse_qwen_scope_name(name or str(path.absolute()))
    k = int(file.metadata["k"]) if "k" in file.metadata else stated[1] if stated else None
    checkpoint = Checkpoint(
        layer=int(match[1]),
        path=path,
        W_enc=StoredMatrix(path, "W_enc", file.shapes["W_enc"], has_feature_rows=True),
        W_dec=StoredMatrix(path, "W_dec", file.shapes["W_dec"], has_feature_rows=False),
        b_enc=file.vector("b_enc"),
        b_dec=file.vector("b_dec"),
        activation="topk",
        k=k,
    )
    if stated is not None and stated[0] != checkpoint.d_sae:
        raise CheckpointError(
            f"The name says `d_sae={stated[0]}` (W{stated[0] // 1024}K), but `W_enc` in '{path}' has "
            f"`d_sae={checkpoint.d_sae}`. Is the file from another repository?"
        )
    return checkpoint


def saelens_layer(config: Mapping[str, Any], where: str) -> int:
    """Layer whose output a SAELens SAE reads, from its hook name.

    `blocks.N.hook_resid_post` is the output of layer N, `blocks.N.hook_resid_pre` that of layer N - 1.

    Raises:
        CheckpointError: If the hook is another one, such as an MLP or attention output.
    """
    metadata = config.get("metadata") or {}
    hook = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    match = _HOOK.fullmatch(str(hook))
    layer = -1 if match is None else int(match[1]) - (match[2] == "pre")
    if layer < 0:
        raise CheckpointError(
            f"The SAE in '{where}' reads `{hook}`, which is not the output of a decoder layer. "
            "Only `blocks.N.hook_resid_post`, and `blocks.N.hook_resid_pre` from N = 1, are."
        )
    return layer


def open_saelens(path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Open the `sae_weights.safetensors` of a SAELens folder.

    Stored the other way round: `W_enc (d_model, d_sae)`, `W_dec (d_sae, d_model)`. `b_dec` is subtracted from the
    input unless `apply_b_dec_to_input` is false. With `rescale_acts_by_decoder_norm`, pre-activations carry the
    decoder norms. Both are folded exactly.

    Args:
        path: The weights file.
        config: What `cfg.json` beside it says; the flat form before SAELens 6 and the one with `metadata` after.

    Raises:
        CheckpointError: If the architecture, hook or normalisation has no exact equivalent here, a tensor is missing
            or transposed, or the sizes differ from the configuration's.
    """
    layer = saelens_layer(config, str(path.parent))
    activation, k = _saelens_activation(config, path)
    normalisation = config.get("normalize_activations") or "none"
    if normalisation != "none":
        raise CheckpointError(
            f"'{path.parent}' has `normalize_activations: {normalisation}`, so its features depend on a scaling that "
            "the weights do not contain. Save it with the scaling folded in (SAELens does so after training)."
        )
    if config.get("reshape_activations", "none") != "none":
        raise CheckpointError(
            f"'{path.parent}' has `reshape_activations: {config['reshape_activations']}`, which residuals never need."
        )
    file = open_tensors(path)
    threshold = "log_threshold" if "log_threshold" in file.shapes else "threshold"
    jump_key = {threshold: 1} if activation == "jumprelu" else {}
    _require(file, path, {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1, **jump_key})
    if "scaling_factor" in file.shapes and not bool((file.vector("scaling_factor") == 1).all()):
        raise CheckpointError(
            f"'{path}' carries a fine-tuned `scaling_factor` per feature, which SAELens dropped in version 6. "
            "Multiply the rows of `W_dec` by it and remove it."
        )
    jump = file.vector(threshold) if jump_key else None
    checkpoint = Checkpoint(
        layer=layer,
        path=path,
        W_enc=StoredMatrix(path, "W_enc", file.shapes["W_enc"], has_feature_rows=False),
        W_dec=StoredMatrix(path, "W_dec", file.shapes["W_dec"], has_feature_rows=True),
        b_enc=file.vector("b_enc"),
        b_dec=file.vector("b_dec"),
        jump=jump.exp() if jump is not None and threshold == "log_threshold" else jump,
        activation=activation,
        k=k,
        is_centred=bool(config.get("apply_b_dec_to_input", True)),
        is_rescaled=bool(config.get("rescale_acts_by_decoder_norm", False)),
    )
    _check_sizes(checkpoint, config.get("d_in"), config.get("d_sae"))
    return checkpoint


def sparsify_layer(folder: str) -> int:
    """Layer whose output a sparsify SAE reads, from its folder's name (the hook point), such as `layers.12`.

    Raises:
        CheckpointError: If the name is that of another module.
    """
    match = _MODULE.fullmatch(folder)
    if match is None:
        raise CheckpointError(
            f"The sparsify folder '{folder}' does not name a decoder layer, so its SAE reads something else than a "
            "layer's output. Folders are named after the module, such as `layers.12`."
        )
    return int(match[1])


def open_sparsify(path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Open the `sae.safetensors` of a sparsify folder.

    `encoder.weight (d_sae, d_model)`, `encoder.bias`, `W_dec (d_sae, d_model)`, `b_dec`; `b_dec` is subtracted from
    the input, which is folded. TopK comes after ReLU there, which gives the same dense activations.

    Args:
        path: The weights file.
        config: What `cfg.json` beside it says.

    Raises:
        CheckpointError: If it is a transcoder, has signed activations or group-max, or a skip connection; if a tensor
            is missing or transposed, or the sizes differ from the configuration's.
    """
    layer = sparsify_layer(path.absolute().parent.name)
    for key, plain in [("transcode", False), ("signed", False), ("skip_connection", False), ("activation", "topk")]:
        value = config.get(key, plain)
        if value != plain:
            raise CheckpointError(
                f"'{path.parent}' has `{key}: {json.dumps(value)}`, which this package cannot express as a TopK SAE "
                f"of a layer's output. Only `{key}: {json.dumps(plain)}` is read."
            )
    file = open_tensors(path)
    _require(file, path, {"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1})
    if not isinstance(config.get("k"), int):
        raise CheckpointError(f"`k` is missing in the cfg.json of '{path.parent}', got {config.get('k')!r}.")
    checkpoint = Checkpoint(
        layer=layer,
        path=path,
        W_enc=StoredMatrix(path, "encoder.weight", file.shapes["encoder.weight"], has_feature_rows=True),
        W_dec=StoredMatrix(path, "W_dec", file.shapes["W_dec"], has_feature_rows=True),
        b_enc=file.vector("encoder.bias"),
        b_dec=file.vector("b_dec"),
        activation="topk",
        k=config["k"],
        is_centred=True,
    )
    _check_sizes(checkpoint, config.get("d_in"), config.get("num_latents") or None)
    return checkpoint


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str] | None = None, *, k: int | None = None
) -> Path:
    """Write a Qwen-Scope `layer{n}.sae.pt` as safetensors, values unchanged; `SAESuite` reads it back.

    The file appears under its own name only when it is complete. One layer's tensors are held in memory meanwhile.

    Args:
        source: `layer{n}.sae.pt`.
        target: Folder to write `layer{n}.sae.safetensors` to; by default the folder of `source`.
        k: Active features per token, stored in the file; by default what the folder's name states, if anything.

    Returns:
        Path of the new file.

    Raises:
        CheckpointError: As `open_qwen_scope`.
    """
    source = Path(source)
    checkpoint = open_qwen_scope(source)
    folder = source.parent if target is None else Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"layer{checkpoint.layer}.sae.safetensors"
    file = open_tensors(source)
    k = checkpoint.k if k is None else k
    metadata = {"format": "qwen-scope", "layer": str(checkpoint.layer)} | ({} if k is None else {"k": str(k)})
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    os.close(handle)
    try:
        tensors: dict[str, torch.Tensor] = {name: file.read(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _saelens_activation(config: Mapping[str, Any], path: Path) -> tuple[Activation, int | None]:
    architecture = str(config.get("architecture") or "standard")
    function = str(config.get("activation_fn") or config.get("activation_fn_str") or "relu")
    options = config.get("activation_fn_kwargs") or {}
    if architecture == "topk" or (architecture == "standard" and function == "topk"):
        k = config.get("k", options.get("k"))
        if not isinstance(k, int):
            raise CheckpointError(f"`k` is missing in the cfg.json of '{path.parent}', got {k!r}.")
        return "topk", k
    if architecture == "jumprelu":
        return "jumprelu", None
    if architecture == "standard" and function == "relu":
        return "relu", None
    raise CheckpointError(
        f"'{path.parent}' has the architecture `{architecture}` with activation `{function}`. Read are `topk`, "
        "`jumprelu` and `standard` with ReLU; SAELens saves BatchTopK SAEs as `jumprelu` for inference."
    )


def _check_sizes(checkpoint: Checkpoint, d_model: int | None, d_sae: int | None) -> None:
    for key, said, found in [("d_in", d_model, checkpoint.d_model), ("d_sae", d_sae, checkpoint.d_sae)]:
        if said is not None and said != found:
            raise CheckpointError(
                f"The cfg.json of '{checkpoint.path.parent}' says `{key}={said}`, but the tensors have {found}. "
                "Configuration and weights are not of one SAE."
            )


def _require(file: TensorFile, path: Path, wanted: Mapping[str, int]) -> None:
    for name, dimensions in wanted.items():
        if name not in file.shapes:
            found = ", ".join(f"`{key}`" for key in sorted(file.shapes)) or "no tensors"
            raise CheckpointError(f"`{name}` is missing in '{path}': found {found}. Is it an SAE of this format?")
        if len(file.shapes[name]) != dimensions:
            raise CheckpointError(
                f"`{name}` in '{path}' has the shape {file.shapes[name]}, expected {dimensions} dimension(s)."
            )
