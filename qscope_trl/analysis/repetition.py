"""Features of repetition: what grows inside the model while it loops.

In texts that loop, the same token is read again and again. A feature's activation at its last repeat minus that at its
first occurrence tells the loop from the words it is made of. Left out: loops with variations, such as counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qscope_trl._version import __version__
from qscope_trl.activations.active import active_features
from qscope_trl.activations.encode import residual_batches
from qscope_trl.activations.opening import load_encoders
from qscope_trl.analysis.discovery import make_set
from qscope_trl.analysis.texts import TextGroup, prepare_group
from qscope_trl.errors import DataError
from qscope_trl.features import Feature, FeatureSet
from qscope_trl.sae.suite import SAESuite
from qscope_trl.sae.topk_sae import TopKSAE

MIN_REPEATS, MIN_PERIOD, MAX_PERIOD, MIN_TOKENS = 3, 2, 64, 9
"""A loop: 2 to 64 tokens that occur 3 times or more in direct succession, 9 tokens or more in all."""


class Loop(NamedTuple):
    """A stretch of a text that repeats itself."""

    start: int
    """Position of its first token."""

    period: int
    """Tokens of one round."""

    repeats: int
    """Whole rounds, the first included."""


def find_loops(ids: Sequence[int]) -> list[Loop]:
    """The loops of a text, shortest period first; later ones do not overlap earlier ones."""
    tokens, loops = torch.tensor(ids), []
    taken = torch.zeros(len(ids), dtype=torch.bool)
    for period in range(MIN_PERIOD, min(MAX_PERIOD, len(ids) // MIN_REPEATS) + 1):
        same = torch.cat([tokens[period:] == tokens[:-period], torch.tensor([False])]).tolist()
        start = None
        for place, equal in enumerate(same):
            if equal and start is None:
                start = place
            elif not equal and start is not None:
                repeats = (place - start) // period + 1
                span = slice(start, start + repeats * period)
                constant = len(set(ids[span])) == 1
                if (
                    repeats >= MIN_REPEATS
                    and repeats * period >= MIN_TOKENS
                    and not constant
                    and not bool(taken[span].any())
                ):
                    loops.append(Loop(start, period, repeats))
                    taken[span] = True
                start = None
    return loops


class _Sums:
    """Activations at first occurrences and last repeats, summed over the tokens of loops."""

    def __init__(self, sae: TopKSAE) -> None:
        self.sae = sae
        device = sae.W_enc.device
        self.act = torch.zeros(2, sae.d_sae, dtype=torch.float64, device=device)
        self.x_first = torch.zeros(sae.d_model, dtype=torch.float64, device=device)
        self.growing = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        self.num_tokens = 0
        self.num_loops = 0

    def update(self, x_ND: Tensor, loop: Loop, offset: int) -> None:
        """Add one loop; `offset` is the row of the text's position 0."""
        # Position 0 has no row: a loop that begins there is read from its second round on.
        begin = loop.start if loop.start > 0 else loop.start + loop.period
        first = offset + begin + torch.arange(loop.period)
        last = offset + loop.start + (loop.repeats - 1) * loop.period + torch.arange(loop.period)
        pair = torch.zeros_like(self.act)
        for row, places in enumerate((first, last)):
            for active in active_features(self.sae, x_ND[places.to(x_ND.device)]):
                pair[row].index_add_(0, active.feature, active.value)
        self.act += pair
        self.growing += (pair[1] > pair[0]).double()
        self.x_first += x_ND[first.to(x_ND.device)].double().sum(0)
        self.num_tokens += loop.period
        self.num_loops += 1

    @property
    def increase(self) -> Tensor:
        """Mean activation at the last repeat minus that at the first occurrence, `(F,)`."""
        return (self.act[1] - self.act[0]) / max(1, self.num_tokens)


def find_repetition_features(
    model: nn.Module,
    tokenizer: Any,
    saes: SAESuite,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    top: int = 10,
    max_length: int = 512,
    batch_size: int = 8,
    holdout: float = 0.2,
    seed: int = 0,
    model_name: str | None = None,
    show_progress: bool = True,
) -> FeatureSet:
    """Choose the features that grow most while a text repeats itself.

    Args:
        model: The model before training, on its device.
        tokenizer: Its tokenizer.
        saes: Its SAEs.
        texts: Texts, some of which loop: best the model's own.
        layers: Layers to search; by default all of `saes`.
        top: Features to choose in each layer.
        max_length: Tokens kept of each text.
        batch_size: Texts in one forward.
        holdout: Share of the looping texts that takes no part in the choice.
        seed: Decides which.
        model_name: Name of the model for the record.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        A set with `threshold` = mean pre-activation at first occurrences, and as evidence `mean_increase` (mean
        activation at the last repeat minus at the first occurrence), `mean_act_first`, `mean_act_last`, `loop_rate`
        (share of loops in which it grows) and the same on texts held out.

    Raises:
        DataError: If no text loops, or no feature grows.
        ModelStructureError: If a layer does not exist in the model.
        CheckpointError: If a layer has no SAE.

    References:
        Qwen-Scope, arXiv:2605.11887, section 8: activation at the last repeated occurrence minus at the first.
    """
    layers = tuple(sorted(set(saes.layers if layers is None else layers)))
    loaded = load_encoders(model, saes, layers)
    group, loops = _looping(texts, tokenizer, max_length, holdout, seed)
    sums = {layer: (_Sums(sae), _Sums(sae)) for layer, sae in loaded.items()}
    batches = residual_batches(
        model, group.token_ids, layers, batch_size=batch_size, show_progress=show_progress, description="reading loops"
    )
    for batch in batches:
        index = batch.text_index
        for text in torch.unique(index).tolist():
            # Rows of a text are its positions from 1 on.
            offset = int((index == text).nonzero()[0]) - 1
            for layer, both in sums.items():
                for loop in loops[text]:
                    both[group.heldout[text]].update(batch.residuals[layer], loop, offset)
    chosen = [feature for layer, (inside, outside) in sums.items() for feature in _choose(layer, inside, outside, top)]
    if not chosen:
        raise DataError("No feature grows over the loops of these texts. Search other layers or give more texts.")
    return make_set(
        chosen,
        model,
        saes,
        loaded,
        model_name=model_name,
        target_group=None,
        origin={
            "made_by": f"qscope_trl {__version__}, find_repetition_features",
            "layers": list(layers),
            "settings": {"top": top, "max_length": max_length, "holdout": holdout, "seed": seed},
            "texts": {"given": len(texts), "looping": len(group.token_ids)},
            "loops": {"chosen_on": sums[layers[0]][0].num_loops, "heldout": sums[layers[0]][1].num_loops},
        },
    )


@torch.no_grad()
def continue_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int, batch_size: int, max_length: int = 512
) -> list[str]:
    """The end of each text with the model's own greedy continuation, which loops sooner or later in many models."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    ids = [tokenizer(text)["input_ids"][-max_length:] for text in texts]
    order = sorted((n for n in range(len(ids)) if ids[n]), key=lambda n: len(ids[n]))
    result = list(texts)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="generating", unit="batch", leave=False):
        places = order[start : start + batch_size]
        width = max(len(ids[n]) for n in places)
        rows = torch.tensor([[pad] * (width - len(ids[n])) + ids[n] for n in places], device=device)
        mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in places], device=device)
        output = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
        )
        for n, row in zip(places, output[:, width:].tolist(), strict=True):
            result[n] = tokenizer.decode(ids[n] + row, skip_special_tokens=True)
    model.train(was_training)
    return result


def _looping(
    texts: Sequence[str], tokenizer: Any, max_length: int, holdout: float, seed: int
) -> tuple[TextGroup, list[list[Loop]]]:
    """The texts that loop, split, and their loops."""
    keep = [
        text for text in texts if any(_usable(loop) for loop in find_loops(tokenizer(text)["input_ids"][:max_length]))
    ]
    if not keep:
        raise DataError(
            f"None of the {len(texts)} texts repeats {MIN_PERIOD} to {MAX_PERIOD} tokens {MIN_REPEATS} times in "
            f"succession. Give texts that loop, or let the model make them with `--generate-tokens`."
        )
    group = prepare_group("loops", keep, tokenizer, max_length=max_length, holdout=holdout, seed=seed)
    return group, [[loop for loop in find_loops(ids) if _usable(loop)] for ids in group.token_ids]


def _usable(loop: Loop) -> bool:
    return loop.start > 0 or loop.repeats > MIN_REPEATS


def _choose(layer: int, inside: _Sums, outside: _Sums, top: int) -> list[Feature]:
    ordered = inside.increase.sort(descending=True, stable=True)
    indices = ordered.indices[:top][ordered.values[:top] > 0]
    W_SD, b_S = inside.sae.W_enc[indices].double(), inside.sae.b_enc[indices].double()
    thresholds = W_SD @ (inside.x_first / max(1, inside.num_tokens)) + b_S
    features = []
    for place, index in enumerate(indices.tolist()):
        evidence = {}
        for sums, prefix in ((inside, ""), (outside, "heldout_")):
            if sums.num_loops:
                evidence[f"{prefix}mean_increase"] = float(sums.increase[index])
                evidence[f"{prefix}mean_act_first"] = float(sums.act[0, index]) / sums.num_tokens
                evidence[f"{prefix}mean_act_last"] = float(sums.act[1, index]) / sums.num_tokens
                evidence[f"{prefix}loop_rate"] = float(sums.growing[index]) / sums.num_loops
        features.append(Feature(layer=layer, index=index, threshold=float(thresholds[place]), evidence=evidence))
    return features
