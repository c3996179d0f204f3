"""The model of a run without its weights: built from `config.json` alone, adapters put on, parameters counted.

The class is the one TRL's trainers load: the first of `architectures`, so Qwen3.5's multimodal class comes with its
vision tower. Left out: parameters that a checkpoint has and the class does not (Qwen3.5's prediction head).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from qscope_trl.errors import ConfigError
from qscope_trl.hooks.layers import d_model, find_decoder, find_layers, text_config
from qscope_trl.planning.engines import Engine
from qscope_trl.planning.optimizers import Parameter

# Bytes for each weight of a linear layer under bitsandbytes: NF4 with one fp32 scale for 64, the scales quantised
# again in blocks of 256 (double quantisation), or one byte and a scale for each row.
_BYTES_4BIT, _BYTES_4BIT_NESTED, _BYTES_8BIT = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256), 1.0


class Unit(NamedTuple):
    """Parameters that are gathered together and get their gradients together."""

    frozen_bytes: int
    frozen_elements: int
    trainable: tuple[Parameter, ...]

    @property
    def elements(self) -> int:
        """All parameters."""
        return self.frozen_elements + sum(p.numel for p in self.trainable)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the trainable parameters, as loaded."""
        return sum(p.numel * p.itemsize for p in self.trainable)


class ModelFacts(NamedTuple):
    """What a model is made of."""

    class_name: str
    layers: tuple[Unit, ...]
    embeddings: Unit
    """Input embeddings; with tied weights the output head too."""

    head: Unit
    """Output head; empty with tied weights."""

    rest: Unit
    """Final norm and what else the decoder has."""

    aside: Unit
    """Parameters that text never reaches, such as a vision tower; they get no gradient."""

    tied: bool
    d_model: int
    vocab_size: int

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units."""
        return (*self.layers, self.embeddings, self.head, self.rest, self.aside)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model and its adapters; tied ones once, all experts."""
        return sum(unit.elements for unit in self.units)

    @property
    def num_trainable(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel for unit in self.units for p in unit.trainable)


def build_model(settings: Any, args: Any, engine: Engine, peft_config: Any = None) -> nn.Module:
    """The model on the meta device, as the trainer would load it.

    Args:
        settings: `trl.ModelConfig`.
        args: The trainer's configuration.
        engine: Decides the adapters' dtype.
        peft_config: Adapters to put on, or None.

    Raises:
        ConfigError: If `config.json` cannot be read, or the adapters do not fit the model.
    """
    transformers: Any = importlib.import_module("transformers")
    config = read_config(settings, args)
    if hasattr(config, "architectures") and config.architectures:
        model_class = getattr(transformers, config.architectures[0], None)
    else:
        model_class = None
    options = {"dtype": _dtype(settings.dtype, config), "attn_implementation": _attention(settings)}
    with torch.device("meta"):
        if model_class is None:
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
        else:
            model = model_class._from_config(config, **options)
    model.train()
    if peft_config is None:
        return model  # type: ignore[no-any-return]
    is_quantised = settings.load_in_4bit or settings.load_in_8bit
    peft: Any = importlib.import_module("peft")
    keeps_dtype = engine.name == "zero3" and not is_quantised
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=not keeps_dtype)
    except (ValueError, TypeError, RuntimeError) as err:
        raise ConfigError(
            f"The adapters do not fit `{config.model_type}`: {err} Set `lora_target_modules` to linear layers it has."
        ) from err
    if is_quantised:
        # As TRL does: the magnitude of DoRA stays fp32.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model  # type: ignore[no-any-return]


def read_config(settings: Any, args: Any) -> Any:
    """The model's configuration; of a Hub repository nothing else is downloaded.

    Raises:
        ConfigError: If it cannot be read.
    """
    transformers: Any = importlib.import_module("transformers")
    name = settings.model_name_or_path
    try:
        return transformers.AutoConfig.from_pretrained(
            name,
            revision=settings.model_revision,
            trust_remote_code=getattr(settings, "trust_remote_code", getattr(args, "trust_remote_code", False)),
        )
    except (OSError, ValueError) as err:
        first = str(err).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"`config.json` of '{name}' cannot be read, and the plan is computed from it: {first}. Without a "
            f"connection, put that one file into a folder and pass `--model_name_or_path FOLDER`."
        ) from err


def count(model: nn.Module, settings: Any) -> ModelFacts:
    """Count the parameters of a model by where they are.

    Args:
        model: From `build_model`.
        settings: `trl.ModelConfig`, for quantisation.
    """
    decoder, layers = find_decoder(model), find_layers(model)
    quantised = _quantised(model, settings)
    seen: set[int] = set()

    def unit(parameters: Iterable[nn.Parameter]) -> Unit:
        frozen_bytes, frozen, trainable = 0.0, 0, []
        for parameter in parameters:
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                trainable.append(Parameter(tuple(parameter.shape), parameter.element_size()))
            else:
                frozen += parameter.numel()
                frozen_bytes += parameter.numel() * quantised.get(id(parameter), float(parameter.element_size()))
        return Unit(int(frozen_bytes), frozen, tuple(trainable))

    inputs: Any = model.get_input_embeddings()  # type: ignore[operator]
    outputs: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = outputs is not None and inputs.weight is outputs.weight
    of_layers = tuple(unit(layer.parameters()) for layer in layers)
    embeddings = unit(inputs.parameters())
    head = unit(() if outputs is None else outputs.parameters())
    rest = unit(decoder.parameters())
    return ModelFacts(
        class_name=type(getattr(model, "get_base_model", lambda: model)()).__name__,
        layers=of_layers,
        embeddings=embeddings,
        head=head,
        rest=rest,
        aside=unit(model.parameters()),
        tied=tied,
        d_model=d_model(model),
        vocab_size=int(text_config(model).vocab_size),
    )


def largest_linear(model: nn.Module) -> int:
    """Elements of the largest linear layer in the decoder layers; a quantised model unpacks one at a time."""
    sizes = [m.weight.numel() for layer in find_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
    return max(sizes, default=0)


def _quantised(model: nn.Module, settings: Any) -> dict[int, float]:
    """Bytes for each element of every weight that bitsandbytes packs: linear layers but the output head."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    width = _BYTES_8BIT
    if settings.load_in_4bit:
        width = _BYTES_4BIT_NESTED if settings.use_bnb_nested_quant else _BYTES_4BIT
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return {id(m.weight): width for m in linear if not m.weight.requires_grad}


def _dtype(name: Any, config: Any) -> torch.dtype:
    if name in (None, "auto"):
        found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        name = found or torch.float32
    return name if isinstance(name, torch.dtype) else getattr(torch, str(name))


def _attention(settings: Any) -> str:
    # FlashAttention keeps what PyTorch's own efficient attention keeps, and does not run without a GPU.
    return "eager" if settings.attn_implementation == "eager" else "sdpa"
