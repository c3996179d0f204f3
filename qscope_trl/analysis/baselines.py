"""What the chosen features are compared with: probes on the residual, random features, and the words of the texts.

Everything is fitted on the texts that features were chosen on and measured on the texts held out, so a figure says
what to expect of new texts. Left out: a search for the best probe; strengths of penalties are chosen by
cross-validation, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qscope_trl.activations.encode import residual_batches
from qscope_trl.activations.matching import draw_matched
from qscope_trl.analysis.contrast import weighted_auroc
from qscope_trl.analysis.discovery import Discovery
from qscope_trl.analysis.evidence import TextFigures, collect
from qscope_trl.analysis.probes import DifferenceOfMeansProbe, LogisticProbe, ResidualMeans, keyword_scores
from qscope_trl.analysis.significance import bootstrap_interval
from qscope_trl.errors import DataError

DRAWS = 5
"""How many times random features are drawn."""

# Inverse strengths of the L2 penalty that the probe on the residual chooses from, by cross-validation.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)


class Baseline(NamedTuple):
    """How well one classifier tells the target's held-out texts from the others'."""

    layer: int | None
    """Layer it reads; None for the words."""

    name: str
    heldout_auroc: float
    """Probability that a target text's score exceeds another's, ties half; of random features the draws' mean."""

    low: float | None = None
    """Lower end of its 95 % bootstrap interval, if resamples were asked for; of random features the worst draw."""

    high: float | None = None
    """Upper end, or the best draw."""


def compare(discovery: Discovery, model: nn.Module, tokenizer: Any, *, show_progress: bool = True) -> list[Baseline]:
    """Measure the chosen features and what they compete with on the texts held out.

    * `best feature`: the largest activation of the layer's first chosen feature.
    * `chosen features`: logistic regression on the largest activations of all chosen features of the layer.
    * `random features`: the same for as many random features that fire as often at tokens.
    * `best random feature`: of such random ones the one that does best on the texts features were chosen on.
    * `difference of means` and `logistic probe`: on the mean residual of each text.
    * `words`: logistic regression on TF-IDF of words and character n-grams.

    The texts run through the model once more. `4 * texts * d_model` bytes a layer are kept.

    Args:
        discovery: What `discover` gave, with texts held out in every group.
        model: The model it was given, on its device.
        tokenizer: Its tokenizer.
        show_progress: Whether to show progress bars on stderr.

    Raises:
        ConfigError: If scikit-learn is not installed.
        DataError: If a group has no text held out.
    """
    LogisticProbe()  # Raises without scikit-learn, before anything is run.
    search, groups = discovery.settings, discovery.groups
    if not all(any(group.heldout) for group in groups.values()):
        raise DataError("Baselines are measured on texts held out, and there are none. Set `holdout` above 0.")
    layers = discovery.found.layers
    drawn = {layer: _random_features(discovery, layer) for layer in layers}
    means: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    maxima: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for name, group in groups.items():
        count = len(group.token_ids)
        probed = {layer: ResidualMeans(count, discovery.encoders[layer].d_model) for layer in layers}
        random = {layer: TextFigures(discovery.encoders[layer], torch.unique(drawn[layer]), count) for layer in layers}
        batches = residual_batches(
            model,
            group.token_ids,
            layers,
            batch_size=search.batch_size,
            positions=search.positions,
            show_progress=show_progress,
            description=f"comparing `{name}`",
        )
        collect(batches, probed, random, limits=discovery.limits)
        for layer in layers:
            means[layer].append(probed[layer].means)
            maxima[layer].append(random[layer].act_max_XS.cpu())

    sizes = [len(group.token_ids) for group in groups.values()]
    test = _Comparison(
        group_X=torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)]),
        heldout_X=torch.tensor([out for group in groups.values() for out in group.heldout]),
        resamples=search.bootstrap,
        seed=search.seed,
    )
    result: list[Baseline] = []
    for layer in layers:
        chosen_XS = _chosen_maxima(discovery, layer)
        random_XU, residual_XD = torch.cat(maxima[layer]), torch.cat(means[layer])
        draws = [random_XU[:, torch.searchsorted(torch.unique(drawn[layer]), draw).cpu()] for draw in drawn[layer]]
        result += [
            test.one(layer, "best feature", chosen_XS[:, 0]),
            test.one(layer, "chosen features", test.logistic(chosen_XS)),
            test.mean(layer, "random features", [test.logistic(draw_XS) for draw_XS in draws]),
            test.mean(layer, "best random feature", [test.best(draw_XS) for draw_XS in draws]),
            test.one(layer, "difference of means", test.fitted(DifferenceOfMeansProbe(), residual_XD)),
            test.one(layer, "logistic probe", test.fitted(LogisticProbe(_STRENGTHS, seed=search.seed), residual_XD)),
        ]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for group in groups.values() for ids in group.token_ids]
    result.append(test.one(None, "words", test.words(texts)))
    return result


class _Comparison:
    """The parting of the texts, and what is measured on it."""

    def __init__(self, group_X: Tensor, heldout_X: Tensor, resamples: int, seed: int) -> None:
        self.group_X, self.heldout_X = group_X, heldout_X
        self.resamples, self.seed = resamples, seed
        self.is_target_X = group_X == 0

    def fitted(self, probe: DifferenceOfMeansProbe | LogisticProbe, x_XC: Tensor) -> Tensor:
        """Scores of all texts by a probe fitted on those not held out."""
        return torch.from_numpy(probe.fit(x_XC[~self.heldout_X], self.is_target_X[~self.heldout_X]).score(x_XC))

    def logistic(self, x_XC: Tensor) -> Tensor:
        """Scores by logistic regression on a few columns, for which one strength does."""
        return self.fitted(LogisticProbe(), x_XC)

    def best(self, x_XS: Tensor) -> Tensor:
        """The column that does best on the texts not held out."""
        inside = ~self.heldout_X
        return x_XS[:, int(self._auroc(x_XS[inside], self.is_target_X[inside]).argmax())]

    def words(self, texts: Sequence[str]) -> Tensor:
        inside = (~self.heldout_X).tolist()
        train = [text for text, kept in zip(texts, inside, strict=True) if kept]
        return torch.from_numpy(keyword_scores(train, self.is_target_X[~self.heldout_X].numpy(), texts))

    def one(self, layer: int | None, name: str, score_X: Tensor) -> Baseline:
        group_X, score_X1 = self.group_X[self.heldout_X], score_X[self.heldout_X, None].double()
        auroc = float(self._auroc(score_X1, group_X == 0)[0])
        if not self.resamples:
            return Baseline(layer, name, auroc)
        statistic = weighted_auroc(score_X1, group_X == 0)
        low, high = bootstrap_interval(
            lambda times_RX: statistic(times_RX)[:, 0], group_X, resamples=self.resamples, seed=self.seed
        )
        return Baseline(layer, name, auroc, float(low), float(high))

    def mean(self, layer: int, name: str, scores: Sequence[Tensor]) -> Baseline:
        is_target = self.is_target_X[self.heldout_X]
        each = self._auroc(torch.stack(list(scores), dim=1)[self.heldout_X].double(), is_target)
        return Baseline(layer, name, float(each.mean()), float(each.min()), float(each.max()))

    @staticmethod
    def _auroc(values_XS: Tensor, is_target_X: Tensor) -> Tensor:
        once = torch.ones(1, is_target_X.numel(), dtype=torch.float64)
        return weighted_auroc(values_XS, is_target_X)(once)[0]


def _random_features(discovery: Discovery, layer: int) -> Tensor:
    """`DRAWS` draws of features that fire as often as the chosen ones, `(DRAWS, S)`."""
    sums = discovery.sums[layer].values()
    rate_F = (torch.stack([of.token_count for of in sums]).sum(0) / sum(of.num_tokens for of in sums)).double().cpu()
    generator = torch.Generator().manual_seed(discovery.settings.seed)
    chosen = [feature.index for feature in discovery.found.for_layer(layer)]
    drawn = torch.tensor([draw_matched(rate_F, chosen, generator) for _ in range(DRAWS)])
    return drawn.to(discovery.encoders[layer].W_enc.device)


def _chosen_maxima(discovery: Discovery, layer: int) -> Tensor:
    """Largest activation of each chosen feature of a layer in each text, best feature first. Shape `(X, S)`."""
    chosen = [feature.index for feature in discovery.found.for_layer(layer)]
    parts = []
    for figures in discovery.figures[layer].values():
        columns = figures.column_F[torch.tensor(chosen, device=figures.column_F.device)]
        parts.append(figures.act_max_XS[:, columns].cpu())
    return torch.cat(parts)
