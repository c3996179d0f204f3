"""Base against tuned model on the same tokens: does the SAE still reconstruct, and do its features still say the same?

The two questions have different answers: a tuned model can be reconstructed as well as its base by other features.

Shape legend: `N` tokens of a batch, `F` d_sae, `V` vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from qscope_trl.activations.opening import open_model
from qscope_trl.analysis.doctor.fit import Run, Survey
from qscope_trl.analysis.doctor.reading import longest_first, read
from qscope_trl.analysis.doctor.result import TunedFit
from qscope_trl.errors import ConfigError, ModelStructureError
from qscope_trl.hooks.layers import d_model, find_layers, text_config
from qscope_trl.monitor.fit_sums import FitSums, codes, jaccard
from qscope_trl.sae.topk_sae import TopKSAE

CHANGE = 2.0
"""Factor by which a firing rate has changed."""

MIN_FIRINGS = 20
"""Firings below which a rate is not compared: doubling from 20 is four standard errors of a count."""


def open_tuned(name: str, adapter: str | None, *, revision: str | None, dtype: str, device: str | None) -> nn.Module:
    """The tuned model: a checkpoint of its own, or one with a PEFT adapter on it.

    Args:
        name: Hub id or folder of the model, or of what the adapter belongs on.
        adapter: Hub id or folder of the adapter, or None.
        revision: Commit, tag or branch of the model.
        dtype: Of its weights; `auto` is the checkpoint's.
        device: By default a GPU if there is one.

    Raises:
        ConfigError: If either cannot be loaded, or `peft` is missing.
    """
    model, _ = open_model(name, revision=revision, dtype=dtype, device=device)
    if adapter is None:
        return model  # type: ignore[no-any-return]
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as err:
        raise ConfigError("`--adapter` needs PEFT: pip install 'qscope-trl[peft]'.") from err
    try:
        return peft.PeftModel.from_pretrained(model, adapter)  # type: ignore[no-any-return]
    except (OSError, ValueError, RuntimeError) as err:
        raise ConfigError(f"The adapter '{adapter}' cannot be put on '{name}': {err}") from err


def check_same_shape(base: nn.Module, tuned: nn.Module, token_ids: Sequence[Sequence[int]]) -> None:
    """Refuse a tuned model that cannot be a version of the base.

    Raises:
        ModelStructureError: If width or number of layers differ, or a token is not in its vocabulary.
    """
    for what, mine, theirs in (
        ("`hidden_size`", d_model(base), d_model(tuned)),
        ("layers", len(find_layers(base)), len(find_layers(tuned))),
    ):
        if mine != theirs:
            raise ModelStructureError(
                f"The tuned model has {theirs} for {what}, the base model {mine}: it is no version of it. Give the "
                f"model it was tuned from as `--model`."
            )
    size = int(text_config(tuned).vocab_size)
    largest = max((max(row) for row in token_ids if row), default=0)
    if largest >= size:
        raise ModelStructureError(
            f"The texts have the token {largest} by the base model's tokenizer, but the tuned model knows {size} "
            f"tokens. It was made with another tokenizer."
        )


def compare_tuned(
    base: nn.Module, tuned: nn.Module, saes: Mapping[int, TopKSAE], run: Run, survey: Survey
) -> list[TunedFit]:
    """Both models through the same SAEs, token by token, per layer; position 0 and outliers of either left out.

    Residuals that are not finite are left out with the outliers: `fit.survey` of both models tells of them.

    Args:
        base: The model the SAEs are for.
        tuned: Its tuned version.
        saes: SAEs by layer, with decoders.
        run: Texts and settings.
        survey: The base model's norms.
    """
    sums = {layer: (FitSums(sae), FitSums(sae)) for layer, sae in saes.items()}
    same, alike = dict.fromkeys(saes, 0.0), dict.fromkeys(saes, 0.0)
    keep = [range(1, len(row)) for row in run.token_ids]
    readings = (
        read(
            model,
            run.token_ids,
            tuple(saes),
            keep=keep,
            order=longest_first(run.token_ids),
            batch_size=run.batch_size,
            show_progress=run.show_progress and model is base,
            description="base and tuned",
        )
        for model in (base, tuned)
    )
    for before, after in zip(*readings, strict=True):
        for layer, sae in saes.items():
            pair = [states.at[layer].to(sae.W_enc.device).float() for states in (before, after)]
            near = torch.stack([x_ND.norm(dim=1) <= survey.limit(layer) for x_ND in pair]).all(0)
            if not bool(near.any()):
                continue
            pair = [x_ND[near] for x_ND in pair]
            acts = [codes(sae, x_ND) for x_ND in pair]
            for side, x_ND, one in zip(sums[layer], pair, acts, strict=True):
                side.update(x_ND, one, sae.decode(one))
            same[layer] += float(jaccard(*acts).sum())
            alike[layer] += float(cosine_similarity(pair[0], pair[1], dim=1).double().sum())
    found = []
    for layer, (mine, theirs) in sorted(sums.items()):
        num_tokens = max(1, mine.num_tokens)
        found.append(
            TunedFit(
                layer=layer,
                num_tokens=mine.num_tokens,
                fvu_base=mine.fvu(),
                fvu=theirs.fvu(),
                cosine_base=mine.cosine,
                cosine=theirs.cosine,
                l0=theirs.l0,
                jaccard=same[layer] / num_tokens,
                residual_cosine=alike[layer] / num_tokens,
                changed_share=_changed_share(mine, theirs),
            )
        )
    return found


def _changed_share(mine: FitSums, theirs: FitSums) -> float:
    high, low = torch.maximum(mine.fired_F, theirs.fired_F), torch.minimum(mine.fired_F, theirs.fired_F)
    counted = high >= MIN_FIRINGS
    return float((high[counted] > CHANGE * low[counted]).double().mean()) if bool(counted.any()) else float("nan")


@torch.no_grad()
def divergence(base: nn.Module, tuned: nn.Module, run: Run) -> float | None:
    """Mean KL(base || tuned) of next-token distributions over the sample, nats; one text at a time.

    Returns:
        None if the two have vocabularies of different size; NaN if either model's logits are.
    """
    total, count = 0.0, 0
    for i in sorted(run.probe_texts):
        log_p, log_q = (log_probabilities(model, run.token_ids[i]) for model in (base, tuned))
        if log_p.shape != log_q.shape:
            return None
        total += summed_divergence(log_p, log_q)
        count += log_p.shape[0]
    return total / max(1, count)


def summed_divergence(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> float:
    """Sum over tokens of KL(p || q), nats."""
    log_q_NV = log_q_NV.to(log_p_NV.device)
    # A token that the base rules out (logit -inf) adds nothing, whatever the tuned model says of it.
    terms = torch.where(log_p_NV == -torch.inf, 0.0, log_p_NV.exp() * (log_p_NV - log_q_NV))
    return float(terms.sum(1).double().sum())


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the token after each token of one text, fp32. Shape `(N, V)`."""
    device = next(find_layers(model)[0].parameters()).device
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)
