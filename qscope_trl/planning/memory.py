"""From counts and traces to the bytes on one GPU, moment by moment of a training step.

A step has few moments at which memory can peak: the end of the forward, the backward of the loss, of each decoder
layer and of the embeddings, and the optimizer step. Each is a sum of parts; the plan is the largest. All of this is
arithmetic. Left out: what the allocator adds (the margin's business) and the host's memory.

Legend: `N` tokens of a micro-batch, `D` d_model, `V` vocabulary, `S` chosen features of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qscope_trl.planning.engines import Engine
from qscope_trl.planning.model import ModelFacts, Unit
from qscope_trl.planning.optimizers import Parameter, scratch_bytes, state_bytes
from qscope_trl.planning.trace import LayerTrace

PARTS = (
    "weights", "gradients", "optimizer", "communication", "activations", "loss", "penalty", "reference model",
    "generation",
)  # fmt: skip

# TRL's fused output head projects tiles of so many tokens and vocabulary entries, in one buffer that a Triton kernel
# works on in place: `TOKEN_CHUNK_SIZE` of `trl.kernels.chunked_logprob`, `_CHUNKED_LOGPROB_CHUNK_SIZE` of
# `trl.trainer.utils`, in 1.16.
TILE_TOKENS, TILE_VOCAB = 4096, 32768
# DeepSpeed's defaults: elements that ZeRO-3 keeps gathered; transformers sets the buckets to D^2 by "auto".
ZERO3_LIVE_ELEMENTS = 1_000_000_000
ZERO_BUCKET_ELEMENTS = 500_000_000


class Precision(NamedTuple):
    """Mixed precision of a run."""

    itemsize: int
    """Bytes of the dtype that layers compute in."""

    is_mixed: bool


class Traces(NamedTuple):
    """Traced bytes of a micro-batch through the decoder."""

    layers: Sequence[LayerTrace]
    norm: LayerTrace | None
    embedded: int
    """Output of the embeddings."""

    shared: int = 0
    """Mask that all layers share."""

    unpacked: int = 0
    """Largest weight that a quantised model unpacks at a time."""


class Scratch(NamedTuple):
    """Bytes of the loss, or of the penalty."""

    resident: int = 0
    """There for the whole run."""

    held: int = 0
    """From the forward to its own backward."""

    forward: int = 0
    """Most during its forward, what it holds included."""

    backward: int = 0
    """Most during its backward, what it holds included."""

    gradients: int = 0
    """Gradients it leaves for later in the backward."""


class Moment(NamedTuple):
    """The bytes of each part at one moment."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


class States(NamedTuple):
    """What the run keeps between steps, and how gradients lie, on one GPU."""

    weights: int
    optimizer: int
    optimizer_scratch: int
    buckets: int
    gathered: int
    """Weights of other GPUs' shards that are there during forward and backward."""

    reduced: int
    """Copies that gradients are reduced from, at a layer's backward."""

    gradient_factor: float
    """Bytes a GPU keeps of each byte of a unit's gradients."""


def states(facts: ModelFacts, engine: Engine, precision: Precision, optim: str) -> States:
    """Weights, optimizer states and communication buffers on one GPU.

    What is kept: one process and DDP keep weights and gradients in the dtype they were loaded in, and AdamW's states
    in the same; a model loaded in bf16 has bf16 states. FSDP2 under mixed precision keeps trainable parameters as
    sharded fp32, gathered in the compute dtype. DeepSpeed under mixed precision keeps weights in 16 bits, with fp32
    copies of the trainable ones and their states sharded.
    """
    parameters = [p for unit in facts.units for p in unit.trainable]
    # Text gives the tower no gradient, so PyTorch's optimizers make no states; DeepSpeed's flat buffers hold all.
    updated = (
        parameters if engine.is_deepspeed else [p for u in facts.units if u is not facts.aside for p in u.trainable]
    )
    frozen = sum(unit.frozen_bytes for unit in facts.units)
    count = sum(p.numel for p in parameters)
    processes = engine.num_processes
    stored = frozen + sum(unit.trainable_bytes for unit in facts.units)
    master = 0
    if precision.is_mixed and engine.name == "fsdp2":
        stored = frozen + 4 * count
        updated = [Parameter(p.shape, 4) for p in updated]
    elif precision.is_mixed and engine.is_deepspeed:
        stored = sum(_compute_bytes(unit, precision) for unit in facts.units)
        master = 4 * count
        updated = [Parameter(p.shape, 4) for p in updated]
    sharded = processes if engine.shards_optimizer else 1
    optimizer = (state_bytes(optim, updated) + master) // sharded
    scratch = scratch_bytes(optim, updated) // sharded
    if engine.is_deepspeed:
        scratch += 4 * count // processes  # the fp32 copy of the gradients that the step works on
    weights = stored // (processes if engine.shards_weights else 1)
    gradients = sum(unit.trainable_bytes for unit in facts.units)
    buckets, gathered, reduced = _communication(facts, engine, precision, gradients)
    gradient_width = 1.0
    if precision.is_mixed and engine.name == "fsdp2":
        gradient_width = 4 * count / max(1, gradients)
    elif precision.is_mixed and engine.is_deepspeed:
        gradient_width = precision.itemsize * count / max(1, gradients)
    return States(
        weights=0 if engine.offloads_weights else weights,
        optimizer=0 if engine.offloads_optimizer else optimizer,
        optimizer_scratch=0 if engine.offloads_optimizer else scratch,
        buckets=buckets,
        gathered=gathered,
        reduced=reduced,
        gradient_factor=gradient_width / (processes if engine.shards_gradients else 1),
    )


def step_moments(
    facts: ModelFacts,
    kept: States,
    traces: Traces,
    loss: Scratch,
    penalty: Scratch,
    *,
    accumulates: bool,
    reference: int = 0,
) -> list[Moment]:
    """The moments of one optimizer step at which memory can peak.

    Args:
        facts: The model's parameters.
        kept: From `states`.
        traces: Activations of one micro-batch.
        loss: Of the output head and the loss.
        penalty: Of the feature penalty.
        accumulates: Whether several micro-batches make a step: then the gradients of all parameters are there from
            the second on.
        reference: Bytes of a reference model.
    """

    def gradients(units: Sequence[Unit]) -> int:
        return int(sum(unit.trainable_bytes for unit in units) * kept.gradient_factor)

    reached = [unit for unit in facts.units if unit is not facts.aside]
    everything = gradients(reached)

    def moment(name: str, done: int, *, activations: int = 0, loss: int = 0, penalty: int = 0, layer: bool) -> Moment:
        return Moment(
            name,
            {
                "weights": kept.weights,
                "gradients": everything if accumulates else done,
                "optimizer": kept.optimizer,
                "communication": kept.buckets + kept.gathered + (kept.reduced if layer else 0),
                "activations": activations,
                "loss": loss,
                "penalty": penalty,
                "reference model": reference,
                "generation": 0,
            },
        )

    norm = traces.norm
    shared = traces.embedded + traces.shared
    in_forward = shared + sum(t.held_in_forward for t in traces.layers)
    held = shared + sum(t.held for t in traces.layers)
    norm_in_forward, norm_held, norm_peak = (
        (norm.held_in_forward, norm.held, norm.backward_peak) if norm else (0, 0, 0)
    )
    last = traces.layers[-1]
    resident = penalty.resident
    found = [
        moment(
            "forward of the last layer",
            0,
            activations=in_forward - last.held_in_forward + last.forward_peak + traces.unpacked,
            penalty=resident,
            layer=False,
        ),
        moment("loss", 0, activations=in_forward + norm_in_forward, loss=loss.forward, penalty=resident, layer=False),
        moment(
            "penalty",
            0,
            activations=held + norm_held,
            loss=loss.held,
            penalty=resident + max(penalty.forward, penalty.backward),
            layer=False,
        ),
        moment(
            "backward of the loss",
            0,
            activations=held + norm_held,
            loss=loss.backward,
            penalty=resident + penalty.gradients,
            layer=False,
        ),
    ]
    head = [facts.embeddings if facts.tied else facts.head]
    if norm:
        found.append(
            moment(
                "backward of the final norm",
                gradients(head),
                activations=held + norm_peak + norm.output,
                penalty=resident + penalty.gradients,
                layer=False,
            )
        )
    # The output head's gradient of a tied weight waits for that of the embeddings, beside the accumulated one.
    waiting = facts.embeddings.trainable_bytes if facts.tied and accumulates else 0
    below = held
    done = gradients([*head, facts.rest])
    for number in reversed(range(len(traces.layers))):
        layer, unit = traces.layers[number], facts.layers[number]
        below -= layer.held
        own = 0 if accumulates else gradients([unit])
        found.append(
            moment(
                f"backward of layer {number}",
                done + own,
                # The traced peak holds the layer's new gradients; where they stay, they are counted as such.
                activations=below
                + layer.backward_peak
                - (own if kept.gradient_factor == 1 else 0)
                + traces.unpacked
                + waiting,
                penalty=resident + penalty.gradients,
                layer=True,
            )
        )
        done += gradients([unit])
    fresh = (facts.embeddings.trainable_bytes if facts.tied or accumulates else 0) + waiting
    found.append(
        moment(
            "backward of the embeddings",
            everything,
            activations=2 * traces.embedded + fresh,
            penalty=resident,
            layer=True,
        )
    )
    step = moment("optimizer step", everything, penalty=resident, layer=False)
    step.parts["communication"] = kept.buckets
    step.parts["optimizer"] += kept.optimizer_scratch
    return [*found, step]


def held_bytes(traces: Traces, loss: Scratch, penalty: Scratch) -> int:
    """Bytes kept between a micro-batch's forward and its backward, the penalty's rows included."""
    norm = traces.norm.held if traces.norm else 0
    activations = traces.embedded + traces.shared + sum(t.held for t in traces.layers) + norm
    return activations + loss.held + penalty.held + penalty.resident


def fused_loss(
    tokens: int, d_model: int, vocab: int, head: Unit, precision: Precision, hidden_itemsize: int
) -> Scratch:
    """TRL's fused output head: log-probabilities tile by tile, no logits.

    Args:
        tokens: Tokens with a label.
        d_model: Width of the hidden states.
        vocab: Vocabulary.
        head: The output head's parameters.
        precision: Of the run.
        hidden_itemsize: Bytes of an element of the hidden states.
    """
    compute = precision.itemsize if precision.is_mixed else hidden_itemsize
    buffer = min(tokens, TILE_TOKENS) * TILE_VOCAB * compute
    width = head.trainable[0].itemsize if head.trainable else max(1, head.frozen_bytes // max(1, head.frozen_elements))
    copied = 0 if width == compute else min(vocab, TILE_VOCAB) * d_model * compute
    hidden = tokens * d_model * hidden_itemsize
    held = hidden + 6 * 4 * tokens
    # The fp32 sums become gradients of the inputs' dtypes at the end: both are there then, and the buffer still.
    finished = tokens * d_model * 4 + (hidden if hidden_itemsize != 4 else 0)
    if head.trainable:
        finished += vocab * d_model * (4 + (width if width != 4 else 0))
    forward = held + 4 * tokens * 7 + buffer + copied
    return Scratch(held=held, forward=forward, backward=held + finished + buffer + copied)


def whole_logits_loss(tokens: int, vocab: int, itemsize: int) -> Scratch:
    """Loss on whole logits: label smoothing, and TRL before 1.16. Logits, their fp32 copy, log-softmax, gradients."""
    logits = tokens * vocab
    held = logits * (itemsize + 4)
    return Scratch(held=held, forward=held + 4 * logits, backward=held + logits * (4 + itemsize))


def router_bytes(num_layers: int, tokens: int, num_experts: int, itemsize: int) -> int:
    """Router logits of all layers and their softmax, for the load-balancing loss."""
    return num_layers * tokens * num_experts * 2 * itemsize


def _compute_bytes(unit: Unit, precision: Precision) -> int:
    """Bytes of a unit's weights in the compute dtype; packed weights stay as they are."""
    packed = unit.frozen_bytes if unit.frozen_bytes < precision.itemsize * unit.frozen_elements else None
    frozen = precision.itemsize * unit.frozen_elements if packed is None else packed
    return frozen + precision.itemsize * sum(p.numel for p in unit.trainable)


def _communication(facts: ModelFacts, engine: Engine, precision: Precision, gradients: int) -> tuple[int, int, int]:
    """Bytes of buckets for the whole run, of gathered weights, and of copies to reduce from."""
    largest = max((_compute_bytes(unit, precision) for unit in facts.layers), default=0)
    largest_gradient = max(
        (precision.itemsize * sum(p.numel for p in unit.trainable) for unit in facts.layers), default=0
    )
    if engine.name == "ddp":
        # DDP's buckets are copies of all gradients; accelerate leaves `gradient_as_bucket_view` off.
        return gradients, 0, 0
    if engine.name == "fsdp2":
        tail = _compute_bytes(facts.head, precision) + _compute_bytes(facts.rest, precision)
        if facts.tied:
            tail += _compute_bytes(facts.embeddings, precision)
        # A layer is in use while the next one arrives. Blocks of a vision tower are never gathered for text.
        layers = 2 * largest if engine.reshards else sum(_compute_bytes(unit, precision) for unit in facts.layers)
        return 0, tail + layers, 2 * largest_gradient
    if engine.name in ("zero1", "zero2"):
        bucket = min(ZERO_BUCKET_ELEMENTS, facts.num_trainable) * precision.itemsize
        return 2 * bucket, 0, 0
    if engine.name == "zero3":
        gathered = min(facts.num_parameters, ZERO3_LIVE_ELEMENTS) * precision.itemsize
        bucket = min(facts.d_model**2, facts.num_trainable) * precision.itemsize
        return 2 * bucket, max(gathered, largest), 0
    return 0, 0, 0
