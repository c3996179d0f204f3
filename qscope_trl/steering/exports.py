"""Steering vectors as files that other programs read.

Every format holds, for each layer, one fp32 vector `strength * (W_dec columns @ weights)` that is added to the output
of that decoder layer at every token: `steer(..., mode="add")` at all phases and positions. Left out: steering that is
no constant vector (`ablate`, `clamp`, `unit="norm"`, a gate, strengths by row); it is refused with the reason.

Layers are counted from 0 in all of them, and `resid_post` of layer N is what is edited.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope_trl._version import __version__
from qscope_trl.activations.opening import require_fit
from qscope_trl.config.steer import EXPORTS
from qscope_trl.errors import CheckpointError, ConfigError, ModelStructureError
from qscope_trl.features import Features, FeatureSet
from qscope_trl.files import write_whole
from qscope_trl.hooks.layers import find_layers, text_config, unwrap
from qscope_trl.sae.suite import SAESuite
from qscope_trl.steering.direction import LayerDirection
from qscope_trl.steering.span import PHASES, Positions

FORMAT_VERSION = 1
_FORMAT = "qscope_trl.steering_vectors"


@dataclass(frozen=True, kw_only=True)
class SteeringVectors:
    """What to add after which layer, and where it comes from.

    Args:
        vectors: Vector `(d_model,)` in fp32 by layer from 0, already times the strength.
        strength: That strength.
        features: Weight of each feature, by name.
        sae: Hub id or path of the SAEs.
        sae_revision: Their commit, if they are from the Hub.
        sae_fingerprints: Fingerprint of each layer's SAE.
        model: Name of the model, where it is known.
        num_layers: Decoder layers of the model, where it is known.
    """

    vectors: Mapping[int, Tensor]
    strength: float
    features: Mapping[str, float]
    sae: str
    sae_revision: str | None
    sae_fingerprints: Mapping[int, str]
    model: str | None
    num_layers: int | None

    def to_dict(self) -> dict[str, Any]:
        """All but the vectors, for JSON."""
        facts = asdict(self)
        vectors = facts.pop("vectors")
        facts["sae_fingerprints"] = {str(layer): value for layer, value in self.sae_fingerprints.items()}
        return {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "written_by": f"qscope_trl {__version__}",
            **facts,
            "layers": list(vectors),
            "d_model": next(iter(vectors.values())).numel(),
            "added_to": "output of the decoder layer, every token",
        }


def export(
    path: str | os.PathLike[str],
    format: str,
    saes: SAESuite | str | os.PathLike[str],
    features: Features,
    *,
    strength: float = 1.0,
    mode: str = "add",
    unit: str = "raw",
    phases: Sequence[str] = PHASES,
    positions: Positions = None,
    gate: object = None,
    model: nn.Module | None = None,
    overwrite: bool = False,
    sae_revision: str | None = None,
    sae_k: int | None = None,
) -> Path:
    """Write steering vectors to a file of a format that another program reads.

    Args:
        path: File to write; its ending must be the format's.
        format: `safetensors`: this package's own, read by `load_vectors`. `gguf`: llama.cpp's control vector.
            `lm_eval`: steered model of lm-evaluation-harness. `easysteer`: the vLLM engine EasySteer.
        saes: As of `steer`.
        features: As of `steer`.
        strength: As of `steer`, one number in the unit `raw`.
        mode: As of `steer`; only `add` is a constant vector.
        unit: As of `steer`; only `raw` is.
        phases: As of `steer`; the readers add at every token.
        positions: As of `steer`; likewise.
        gate: As of `steer`; not to be exported.
        model: The model, if it is at hand: features are checked against it, and its name and layout are written.
        overwrite: Whether a file that is there already is replaced, also the `.json` beside a `.safetensors`.
        sae_revision: Commit, tag or branch of a Hub repository.
        sae_k: Active features per token; not needed for any format.

    Returns:
        The file.

    Raises:
        ConfigError: If the format is unknown, does not hold such steering, or the file is there already.
        ModelStructureError: If the model has another width or no such layer.
        FeatureSetError: If the features were made for other SAEs, or an index is out of range.
        SteeringError: If the weighted directions of a layer cancel.
        CheckpointError: If an SAE cannot be read.
    """
    if format not in FORMATS:
        raise ConfigError(f"`format` is {format!r}; choose one of {', '.join(FORMATS)}.")
    writer, (ending, *beside) = FORMATS[format]
    path = Path(path)
    if path.suffix != ending:
        raise ConfigError(f"The format `{format}` is read from files that end in `{ending}`, not from '{path}'.")
    for file in (path, *map(path.with_suffix, beside)):
        if file.exists() and not overwrite:
            raise ConfigError(f"'{file}' is there already. Choose another name, or pass `overwrite=True`.")
    _refuse_inconstant(strength, mode, unit, phases, positions, gate)
    suite = SAESuite.from_pretrained(saes, revision=sae_revision, k=sae_k)
    found = steering_vectors(suite, FeatureSet.load(features), float(strength), model)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer(path, found, model)
    return path


def steering_vectors(
    suite: SAESuite, chosen: FeatureSet, strength: float, model: nn.Module | None = None
) -> SteeringVectors:
    """The vectors that `steer(..., mode="add")` adds. Errors as `export`."""
    require_fit(model, suite, chosen)
    directions = {
        layer: LayerDirection.open(suite, layer, chosen.for_layer(layer), "add", "raw") for layer in chosen.layers
    }
    return SteeringVectors(
        vectors={layer: strength * direction.vector_D for layer, direction in directions.items()},
        strength=strength,
        features={str(feature.id): feature.weight for feature in chosen.features},
        sae=suite.source,
        sae_revision=suite.revision,
        sae_fingerprints={layer: suite.fingerprint(layer) for layer in chosen.layers},
        model=(None if model is None else _name_of(model)) or chosen.model,
        num_layers=chosen.num_layers if model is None else len(find_layers(model)),
    )


def _name_of(model: nn.Module) -> str | None:
    return getattr(unwrap(model).config, "_name_or_path", None)


def write_safetensors(path: Path, found: SteeringVectors, _model: nn.Module | None) -> None:
    """This package's own format.

    A safetensors file with one fp32 tensor `layer.N` of shape `(d_model,)` for each layer N; its metadata has one
    entry `steering`, a JSON text with `features` (name to weight), `strength` (the vectors contain it), `sae`,
    `sae_revision`, `sae_fingerprints`, `model`, `num_layers`, `layers`, `d_model`. The same text is written beside
    it, with the ending `.json`, for readers that have no safetensors; nothing reads it back.
    """
    from safetensors.torch import save_file

    text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False)
    tensors = {f"layer.{layer}": vector.contiguous() for layer, vector in found.vectors.items()}
    _write(path, lambda file: save_file(tensors, file, metadata={"steering": text}))
    write_whole(path.with_suffix(".json"), text + "\n")


def load_vectors(path: str | os.PathLike[str]) -> SteeringVectors:
    """Read what the format `safetensors` holds.

    Raises:
        CheckpointError: If the file is missing, or is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No steering vectors at '{path}'. `export(path, 'safetensors', ...)` writes them.")
    try:
        with safe_open(path, "pt") as opened:
            facts = json.loads((opened.metadata() or {}).get("steering", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as err:
        raise CheckpointError(f"'{path}' is no safetensors file: {err}") from err
    if facts.get("format") != _FORMAT or facts.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' holds no steering vectors of version {FORMAT_VERSION}. `export(path, 'safetensors', ...)` "
            f"writes them."
        )
    return SteeringVectors(
        vectors={layer: tensors[f"layer.{layer}"] for layer in facts["layers"]},
        sae_fingerprints={int(layer): value for layer, value in facts["sae_fingerprints"].items()},
        **{name: facts[name] for name in ("strength", "features", "sae", "sae_revision", "model", "num_layers")},
    )


def write_llama_cpp(path: Path, found: SteeringVectors, model: nn.Module | None) -> None:
    """Control vector of llama.cpp, for `--control-vector FILE` or `--control-vector-scaled FILE:SCALE`.

    GGUF of architecture `controlvector` with fp32 tensors `direction.N`, which llama.cpp adds to the output of its
    block N, counted from 0: the same N as ours. It has no direction for block 0, so features of layer 0 are refused.

    Raises:
        ConfigError: If a feature is of layer 0, or the package `gguf` is missing.

    References:
        llama.cpp, `common/common.cpp`, `common_control_vector_load_one`: `direction.N` goes to offset
        `n_embd * (N - 1)` of a buffer, and N = 0 is an error; `src/llama-adapter.cpp`, `llama_adapter_cvec::apply`:
        block `il` takes offset `n_embd * (il - 1)`, for `il` from 1. So N = `il`. `build_cvec` adds it after the
        feed-forward's residual sum (`l_out`), which is our `resid_post`.
    """
    if 0 in found.vectors:
        raise ConfigError(
            "llama.cpp's control vectors have no direction for layer 0, so features of layer 0 cannot be exported to "
            "`gguf`. Leave them out, or choose another format."
        )
    _write_gguf(path, found, model)


def write_easysteer(path: Path, found: SteeringVectors, model: nn.Module | None) -> None:
    """Vector file of EasySteer, a steering engine for vLLM: `VectorSpec(source=FILE, algorithm="direct", scale=1.0)`.

    The same GGUF as llama.cpp's; `direction.N` is added to the output of vLLM's decoder layer N, counted from 0, and
    layer 0 is allowed. Pass `apply=ApplySpec(prompt="all", generation="all")`, `normalize=False`, and no `layers`.

    Raises:
        ConfigError: If the package `gguf` is missing.

    References:
        EasySteer (arXiv:2509.25175), `vllm/steer_vectors/algorithms/loading.py`, `read_gguf_directions`, and
        `docs/user-guide/steering.md`; layers are "keyed by true layer id" (`payloads.py`, `DirectionVector`).
    """
    _write_gguf(path, found, model)


def write_lm_eval(path: Path, found: SteeringVectors, model: nn.Module | None) -> None:
    """Steered model of lm-evaluation-harness, for `--model steered --model_args pretrained=...,steer_path=FILE.pt`.

    A dict from hook point to `steering_vector`, `steering_coefficient`, `action`, `bias` and `head_index`, by
    `torch.save`. Hook points are names of modules inside `model.base_model`: `layers.N` for text models, which is
    written if no model is given; for others (GPT-2, multimodal classes, PEFT) give the model as the harness loads it.
    The coefficient is 1, since the vector holds the strength. `action` is `add`: the harness adds the vector, rounded
    to the model's dtype, to the module's output at every position, as `steer` does. Its `clamp` is something else
    than ours: it sets the residual's projection on the direction, not the feature's activation.

    References:
        lm-evaluation-harness 0.4.13, `lm_eval/models/hf_steered.py`, `SteeredModel`.
    """
    config = {
        hook_point(layer, model): {
            "steering_vector": vector.clone(),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer, vector in found.vectors.items()
    }
    _write(path, lambda file: torch.save(config, file))


def hook_point(layer: int, model: nn.Module | None) -> str:
    """Name of a decoder layer inside `model.base_model`, as lm-evaluation-harness looks it up.

    Raises:
        ModelStructureError: If the layer lies outside of it.
    """
    if model is None:
        return f"layers.{layer}"
    inner = unwrap(model)
    wanted = find_layers(model)[layer]
    base = getattr(inner, "base_model", inner)
    for name, module in base.named_modules():
        if module is wanted:
            return str(name)
    raise ModelStructureError(
        f"Decoder layer {layer} of `{type(inner).__name__}` is not inside its `base_model`, where "
        f"lm-evaluation-harness looks for it. Choose another format."
    )


Writer = Callable[[Path, SteeringVectors, nn.Module | None], None]
FORMATS: dict[str, tuple[Writer, tuple[str, ...]]] = {
    "safetensors": (write_safetensors, EXPORTS["safetensors"]),
    "gguf": (write_llama_cpp, EXPORTS["gguf"]),
    "lm_eval": (write_lm_eval, EXPORTS["lm_eval"]),
    "easysteer": (write_easysteer, EXPORTS["easysteer"]),
}
"""Writer by name of the format, the ending of its file, and of what is written beside it."""


def _refuse_inconstant(
    strength: object, mode: str, unit: str, phases: Sequence[str], positions: Positions, gate: object
) -> None:
    named = {phases} if isinstance(phases, str) else set(phases)
    reasons = (
        (mode != "add", f"`mode={mode!r}` depends on the features' activations"),
        (unit != "raw", f"`unit={unit!r}` depends on the residual's norm"),
        (gate is not None, "a gate depends on the text"),
        (named != set(PHASES), f"`phases={phases!r}` leaves tokens out"),
        (positions is not None, f"`positions={positions!r}` leaves tokens out"),
        (not isinstance(strength, int | float), "`strength` by row depends on the batch"),
        (isinstance(strength, float) and not math.isfinite(strength), f"`strength` is {strength}"),
    )
    for holds, reason in reasons:
        if holds:
            raise ConfigError(
                f"An exported vector is one and the same at every token, but {reason}. Export `mode='add'` with a "
                f"raw strength, all phases and positions and no gate, or steer with this package."
            )


def _write_gguf(path: Path, found: SteeringVectors, model: nn.Module | None) -> None:
    try:
        from gguf import GGUFWriter
    except ImportError as err:
        raise ConfigError(
            "Writing GGUF needs the package `gguf`, which is not installed. Install it with "
            "`pip install 'qscope-trl[export]'`."
        ) from err
    arch = "controlvector"

    def write(file: Path) -> None:
        writer = GGUFWriter(file, arch)
        # No reader requires it; repeng and llama.cpp's own generator write the model's architecture.
        writer.add_string(f"{arch}.model_hint", "unknown" if model is None else str(text_config(model).model_type))
        writer.add_uint32(f"{arch}.layer_count", len(found.vectors))
        writer.add_string("qscope.steering", json.dumps(found.to_dict(), ensure_ascii=False))
        for layer, vector in found.vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    _write(path, write)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name beside it, and rename."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
