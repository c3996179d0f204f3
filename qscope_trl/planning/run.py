"""`qscope plan`: from a training configuration to the memory it needs on each GPU, before anything is downloaded.

The configuration is parsed by the command it is for, so it is refused here if it would be there. Left out: the host's
memory, and the moment in which weights are loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qscope_trl.config.plan import PlanConfig
from qscope_trl.errors import ConfigError
from qscope_trl.hooks.layers import find_layers, text_config
from qscope_trl.planning.engines import Engine, read_engine
from qscope_trl.planning.memory import (
    Moment,
    Precision,
    Scratch,
    Traces,
    fused_loss,
    held_bytes,
    router_bytes,
    states,
    step_moments,
    whole_logits_loss,
)
from qscope_trl.planning.model import ModelFacts, build_model, count, largest_linear
from qscope_trl.planning.rollouts import add_vllm, rollout_moments
from qscope_trl.planning.saes import SAEFacts, chosen_layers, merged, penalty_scratch, sae_facts
from qscope_trl.planning.settings import detect_method, quiet, refuse_engine_of_training, settings_of
from qscope_trl.planning.trace import trace_layers, without_data

CUDA_CONTEXT = 0.75 * 2**30
"""CUDA context, cuBLAS and NCCL workspaces of a process: an allowance, not computed."""

FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator loses between blocks: an allowance, not computed."""


class Plan(NamedTuple):
    """The memory of a run on one GPU."""

    method: str
    model: str
    facts: ModelFacts
    engine: Engine
    settings: dict[str, Any]
    moments: list[Moment]
    margin: int
    gpu_memory: int
    saes: SAEFacts | None
    notes: list[str]
    held: int
    """Bytes that a micro-batch's forward keeps for its backward: activations, loss and penalty."""

    @property
    def peak(self) -> Moment:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """Bytes at the peak, the margin included."""
        return self.peak.total + self.margin

    @property
    def fits(self) -> bool:
        """Whether that is within the GPU's memory."""
        return self.total <= self.gpu_memory


def run(options: PlanConfig, overrides: Sequence[str] = ()) -> Plan:
    """Plan a run.

    Args:
        options: What to plan.
        overrides: Flags of the training command, such as `--max_length 32768`.

    Raises:
        QScopeError: If the configuration would be refused, or something needed for the plan is not known.
    """
    engine = read_engine(options.accelerate_config, options.num_processes)
    refuse_engine_of_training(options, overrides)
    method = detect_method(options, overrides)
    settings = settings_of(method, options, overrides, num_processes=engine.num_processes)
    return plan(settings, method, options, engine)


def plan(settings: Any, method: str, options: PlanConfig, engine: Engine) -> Plan:
    """Plan a run from parsed settings.

    Args:
        settings: `SFTRun` or `GRPORun`.
        method: `sft` or `grpo`.
        options: GPU memory, and features that are not found yet.
        engine: From `read_engine`.

    Raises:
        QScopeError: If something does not fit, or is not known.
    """
    args, sae, penalty = settings.training, settings.sae, settings.penalty
    model = _model(settings, engine)
    facts = count(model, settings.model)
    precision = _precision(args)
    batch = args.per_device_train_batch_size
    length = _length(args, method, options)
    checkpoints = args.gradient_checkpointing or engine.checkpoints
    accumulates = args.gradient_accumulation_steps > 1
    decides = engine.is_deepspeed or engine.name == "fsdp2"
    compute = torch.float16 if args.fp16 else torch.bfloat16
    padded = batch > 1 and not getattr(args, "packing", False) and not getattr(args, "padding_free", False)

    features = chosen_layers(sae.sae_features, options)
    monitors = chosen_layers(settings.monitor.monitor_features, options)
    rewarded = _rewarded(settings, options) if method == "grpo" else {}
    needs_whole = penalty.penalty_kind == "topk_act" and bool(features)
    scores_whole = method == "grpo" and settings.reward.reward_kind == "topk_act" and bool(rewarded)
    saes = None
    together = merged([features, monitors, rewarded])
    if together:
        whole = needs_whole or scores_whole
        saes = sae_facts(sae, together, facts.d_model, len(facts.layers), whole=whole)

    with quiet(), FakeTensorMode():
        without_data(model, compute if precision.is_mixed and decides else None)
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        autocast = compute if precision.is_mixed and not engine.is_deepspeed else None
        layers, norm, dtype = trace_layers(model, batch, length, autocast, accumulates=accumulates, padded=padded)
        encoder_dtype = dtype if sae.sae_dtype == "auto" else getattr(torch, sae.sae_dtype)
        scratch = penalty_scratch(
            features, monitors if method == "sft" else {}, (batch, length, facts.d_model), dtype,
            saes if needs_whole and saes is not None and saes.whole_encoders else None, encoder_dtype,
            has_gradient=penalty.penalty_weight > 0,
        )  # fmt: skip
        scoring = penalty_scratch(
            {}, rewarded, (batch, length, facts.d_model), dtype, None, encoder_dtype, has_gradient=False
        )
    tokens = batch * (length - 1 if method == "sft" else args.max_completion_length)
    router = _router(model, args, batch * length, dtype.itemsize)
    mask = batch * length * length if padded else 0
    unpacked = 2 * largest_linear(model) if settings.model.load_in_4bit or settings.model.load_in_8bit else 0
    traces = Traces(layers, norm, batch * length * facts.d_model * dtype.itemsize, mask + router, unpacked)
    loss = _loss(args, facts, tokens, precision, dtype.itemsize)
    kept = states(facts, engine, precision, str(getattr(args.optim, "value", args.optim)))
    reference = 0
    if method == "grpo" and args.beta != 0 and not settings.model.use_peft:
        reference = sum(u.frozen_bytes + u.trainable_bytes for u in facts.units)
        reference //= engine.num_processes if engine.shards_weights else 1
    vllm = 0
    moments = step_moments(
        facts, kept, traces, loss, _plus(scratch, scoring), accumulates=accumulates, reference=reference
    )
    if method == "grpo":
        whole_bytes = (
            len(rewarded) * saes.d_sae * (encoder_dtype.itemsize * facts.d_model + 4) if scores_whole and saes else 0
        )
        moments = [
            moment._replace(parts={**moment.parts, "penalty": moment.parts["penalty"] + whole_bytes})
            for moment in moments
        ]
        moments += rollout_moments(
            model, facts, engine, kept, traces, loss, scoring, args,
            batch=batch, prompt=options.prompt_length, itemsize=dtype.itemsize, layers_read=len(rewarded),
            resident=scratch.resident + whole_bytes, reference=reference,
        )  # fmt: skip
        moments, vllm = add_vllm(moments, args, options.gpu_memory)
    notes = _notes(model, settings, engine, facts, padded)
    peak = max(moments, key=lambda moment: moment.total)
    moving = peak.total - kept.weights - kept.optimizer - vllm
    return Plan(
        method=method,
        model=settings.model.model_name_or_path,
        facts=facts,
        engine=engine,
        settings={
            "dtype": str(settings.model.dtype),
            "precision": ("fp16" if args.fp16 else "bf16") if precision.is_mixed else "no",
            "batch": batch,
            "length": length,
            "gradient_checkpointing": checkpoints,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "optim": str(getattr(args.optim, "value", args.optim)),
            "use_peft": settings.model.use_peft,
            "quantised": bool(settings.model.load_in_4bit or settings.model.load_in_8bit),
            "max_length": getattr(args, "max_length", None),
            "max_completion_length": getattr(args, "max_completion_length", None),
        },
        moments=moments,
        margin=int(CUDA_CONTEXT + FRAGMENTATION * moving),
        gpu_memory=int(options.gpu_memory * 2**30),
        saes=saes,
        notes=notes,
        held=held_bytes(traces, loss, scratch),
    )


def _model(settings: Any, engine: Engine) -> Any:
    trl: Any = importlib.import_module("trl")
    if (settings.model.load_in_4bit or settings.model.load_in_8bit) and not settings.model.use_peft:
        raise ConfigError("`load_in_4bit` and `load_in_8bit` train only adapters. Set `use_peft: true` too.")
    adapters = trl.get_peft_config(settings.model) if settings.model.use_peft else None
    with quiet():
        return build_model(settings.model, settings.training, engine, adapters)


def _precision(args: Any) -> Precision:
    return Precision(2, True) if args.bf16 or args.fp16 else Precision(4, False)


def _length(args: Any, method: str, options: PlanConfig) -> int:
    if method == "grpo":
        if args.max_completion_length is None:
            raise ConfigError(
                "`max_completion_length` is null, so completions are as long as the model makes them. Plan with the "
                "longest one: `--max_completion_length 4096`."
            )
        return int(options.prompt_length + args.max_completion_length)
    if args.max_length is None:
        raise ConfigError(
            "`max_length` is null, so samples are as long as the data has them, and that is not looked at. Plan with "
            "the longest sample: `--max_length 4096`."
        )
    return int(args.max_length)


def _loss(args: Any, facts: ModelFacts, tokens: int, precision: Precision, itemsize: int) -> Scratch:
    utilities: Any = importlib.import_module("trl.trainer.utils")
    if hasattr(utilities, "add_fused_lm_head") and not args.label_smoothing_factor:
        head = facts.embeddings if facts.tied else facts.head
        return fused_loss(tokens, facts.d_model, facts.vocab_size, head, precision, itemsize)
    return whole_logits_loss(tokens, facts.vocab_size, precision.itemsize)


def _router(model: Any, args: Any, tokens: int, itemsize: int) -> int:
    config = text_config(model)
    coefficient = getattr(args, "router_aux_loss_coef", None)
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    if not coefficient or not hasattr(config, "output_router_logits"):
        return 0
    return router_bytes(config.num_hidden_layers, tokens, int(config.num_experts), itemsize)


def _rewarded(settings: Any, options: PlanConfig) -> dict[int, int]:
    """Features that rollouts are scored by: of the reward, the policy and the monitors."""
    reward, rollout = settings.reward, settings.rollout
    of_policy = rollout.rollout_features if rollout.rollout_policy else None
    if rollout.rollout_policy not in (None, "penalise"):
        of_policy = of_policy or reward.reward_features
    named = (reward.reward_features, of_policy, settings.monitor.monitor_features)
    return merged([chosen_layers(entries, options) for entries in named])


def _plus(first: Scratch, second: Scratch) -> Scratch:
    return first._replace(resident=first.resident + second.resident)


def _notes(model: Any, settings: Any, engine: Engine, facts: ModelFacts, padded: bool) -> list[str]:
    notes = []
    if any(hasattr(layer, "linear_attn") for layer in find_layers(model)):
        notes.append("Linear attention is counted as the plain torch code; flash-linear-attention needs less.")
    if facts.aside.elements:
        kept = "and states " if engine.is_deepspeed and facts.aside.trainable else ""
        notes.append(
            f"{facts.class_name} has {facts.aside.elements / 1e6:.0f}M parameters that text never reaches (a vision "
            f"tower); their weights {kept}are counted, gradients are not."
        )
    if padded:
        notes.append("Rows of a micro-batch are taken as padded to the full length; packing would spare the mask.")
    if settings.model.use_peft and any(
        p.requires_grad and p.dim() > 1 and ".experts." in name for name, p in model.named_parameters()
    ):
        notes.append("Adapters on experts make PEFT build each layer's whole expert weights anew: costly.")
    if engine.is_deepspeed:
        notes.append("DeepSpeed's buffers are its defaults, by formula, and were not traced.")
    if engine.name in ("single", "ddp") and not settings.model.use_peft and settings.model.dtype != "float32":
        notes.append("Weights and optimizer states stay in the dtype they are loaded in: no fp32 copy is kept.")
    return notes
