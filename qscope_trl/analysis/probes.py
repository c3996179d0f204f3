"""What features are compared with: probes on the raw residual, and a classifier on the words.

A rule or a feature has shown something if it tells texts apart nearly as well as these do, or from fewer labels, or in
a way that can be read and acted on. Probes read the mean of a layer's residuals over the kept tokens of a text. Left
out: probes by token, several classes, and anything trained end to end.

Shape legend: `N` tokens of a batch, `D` d_model, `X` texts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from qscope_trl.activations.encode import Positions, residual_batches
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.hooks.layers import d_model

Floats = NDArray[np.float64]

_KEYWORD_FEATURES = 200_000


class ResidualMeans:
    """Mean residual of each text, one layer; fed batch by batch.

    Args:
        num_texts: Texts there are, encoded or not.
        width: d_model.
    """

    def __init__(self, num_texts: int, width: int) -> None:
        self._sum_XD = torch.zeros(num_texts, width, dtype=torch.float64)
        self._tokens_X = torch.zeros(num_texts, dtype=torch.int64)

    def update(self, x_ND: Tensor, text_index_N: Tensor) -> None:
        """Add the kept tokens of a batch."""
        text_index_N = text_index_N.to(x_ND.device)
        texts, place_N = torch.unique(text_index_N, return_inverse=True)
        sums = torch.zeros(texts.numel(), x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
        sums.index_add_(0, place_N, x_ND.double())
        self._sum_XD.index_add_(0, texts.cpu(), sums.cpu())
        self._tokens_X += torch.bincount(text_index_N.cpu(), minlength=self._tokens_X.numel())

    @property
    def means(self) -> Tensor:
        """Means over kept tokens, fp32, zeros for a text without any. Shape `(X, D)`."""
        return (self._sum_XD / self._tokens_X.clamp(min=1)[:, None]).float()


def residual_means(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    positions: Positions = "all",
    skip_first: bool = True,
    show_progress: bool = True,
    description: str = "probing",
) -> dict[int, Tensor]:
    """Mean residual over the kept tokens of each text: what probes read.

    Args:
        model: A transformers model, wrapped or not, on its device.
        token_ids: Token ids per text, as `encode.tokenize` gives them.
        layers: Layers to read, from 0.
        batch_size: Texts in one forward.
        positions: `all` kept tokens, or the `last` of each text.
        skip_first: Leave out position 0 of each text.
        show_progress: Whether to show a progress bar on stderr.
        description: Label of that bar.

    Returns:
        Per layer the means in the order of the texts, fp32 on the CPU, zeros for a text without a kept token.
        `4 * texts * d_model` bytes a layer.

    Raises:
        DataError: If no token is left, or a residual is not finite.
        ModelStructureError: If a layer does not exist.

    Shape:
        Each `(X, D)`.
    """
    sinks = {layer: ResidualMeans(len(token_ids), d_model(model)) for layer in layers}
    batches = residual_batches(
        model,
        token_ids,
        layers,
        batch_size=batch_size,
        positions=positions,
        skip_first=skip_first,
        show_progress=show_progress,
        description=description,
    )
    for batch in batches:
        for layer, sink in sinks.items():
            sink.update(batch.residuals[layer], batch.text_index)
    return {layer: sink.means for layer, sink in sinks.items()}


class DifferenceOfMeansProbe:
    """The direction from the mean of one class to that of the other: no hyperparameter, nothing to overfit.

    A text's score is its projection on that direction, 0 half-way between the means.
    """

    direction: Floats
    """Mean of the positive texts minus that of the others, `(D,)`."""

    def fit(self, x: Tensor | ArrayLike, labels: Sequence[bool] | ArrayLike) -> DifferenceOfMeansProbe:
        """Take the two means.

        Args:
            x: One row per text `(X, D)`.
            labels: Whether each text is positive; both classes occur.

        Raises:
            DataError: If the shapes do not fit, or a class is missing.
        """
        rows, truth = _checked(x, labels)
        high, low = rows[truth].mean(0), rows[~truth].mean(0)
        self.direction = high - low
        self._middle = (high + low) / 2
        return self

    def score(self, x: Tensor | ArrayLike) -> Floats:
        """Scores of texts, higher for the positive class. Shape `(X,)`."""
        result: Floats = (_floats(x) - self._middle) @ self.direction
        return result


class LogisticProbe:
    """Logistic regression with an L2 penalty on standardised inputs.

    Args:
        C: Inverse strength of the penalty, or several to choose from by AUROC, cross-validated over the texts it is
            fitted on.
        folds: Folds of that choice; fewer if a class has fewer texts.
        seed: Decides the folds.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """

    C: float
    """Inverse strength of the penalty; after `fit` the chosen one."""

    def __init__(self, C: float | Sequence[float] = 1.0, *, folds: int = 5, seed: int = 0) -> None:
        self._candidates = [float(C)] if isinstance(C, int | float) else [float(value) for value in C]
        if not self._candidates or min(self._candidates) <= 0:
            raise ConfigError(f"`C` is {C!r}; give one positive number or several.")
        self.C = self._candidates[0]
        self._folds, self._seed = folds, seed
        self._sklearn = {name: _sklearn(name) for name in ("linear_model", "model_selection", "pipeline")}
        self._scaler = _sklearn("preprocessing").StandardScaler

    def fit(self, x: Tensor | ArrayLike, labels: Sequence[bool] | ArrayLike) -> LogisticProbe:
        """Fit to texts.

        Args:
            x: One row per text `(X, D)`.
            labels: Whether each text is positive; both classes occur.

        Raises:
            DataError: If the shapes do not fit, or a class is missing.
        """
        rows, truth = _checked(x, labels)
        folds = min(self._folds, int(truth.sum()), int((~truth).sum()))
        if len(self._candidates) > 1 and folds > 1:
            selection = self._sklearn["model_selection"]
            parts = selection.StratifiedKFold(folds, shuffle=True, random_state=self._seed)
            mean_auroc = [
                float(selection.cross_val_score(self._model(C), rows, truth, scoring="roc_auc", cv=parts).mean())
                for C in self._candidates
            ]
            self.C = self._candidates[int(np.argmax(mean_auroc))]
        self._fitted = self._model(self.C).fit(rows, truth)
        return self

    def score(self, x: Tensor | ArrayLike) -> Floats:
        """Log odds of the positive class. Shape `(X,)`."""
        return np.asarray(self._fitted.decision_function(_floats(x)), dtype=np.float64)

    def probability(self, x: Tensor | ArrayLike) -> Floats:
        """Probability of the positive class. Shape `(X,)`."""
        return np.asarray(self._fitted.predict_proba(_floats(x))[:, 1], dtype=np.float64)

    def _model(self, C: float) -> Any:
        logistic = self._sklearn["linear_model"].LogisticRegression(C=C, max_iter=2000)
        return self._sklearn["pipeline"].make_pipeline(self._scaler(), logistic)


def keyword_scores(
    texts_train: Sequence[str], labels: Sequence[bool] | ArrayLike, texts_test: Sequence[str], *, C: float = 10.0
) -> Floats:
    """What the words alone tell: logistic regression on TF-IDF of words and of character n-grams.

    Words and pairs of words, and one to three characters in a row for scripts that set no spaces; all in lower case.

    Args:
        texts_train: Texts to learn from.
        labels: Whether each of them is positive; both classes occur.
        texts_test: Texts to score.
        C: Inverse strength of the L2 penalty.

    Returns:
        Log odds of the positive class for each of `texts_test`. Shape `(X,)`.

    Raises:
        ConfigError: If scikit-learn is not installed.
        DataError: If there are not as many labels as texts, a class is missing, or the texts have no character.
    """
    truth = _classes(len(texts_train), labels)
    if not any(text.strip() for text in texts_train):
        raise DataError(f"None of the {len(texts_train)} texts has a character, so no words can be learned from them.")
    extraction, pipeline = _sklearn("feature_extraction.text"), _sklearn("pipeline")
    half = _KEYWORD_FEATURES // 2
    parts = pipeline.make_union(
        # `\w+` instead of the default, which leaves out words of one letter.
        extraction.TfidfVectorizer(
            ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True, max_features=half
        ),
        extraction.TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, max_features=half),
    )
    logistic = _sklearn("linear_model").LogisticRegression(C=C, max_iter=2000)
    model = pipeline.make_pipeline(parts, logistic).fit(list(texts_train), truth)
    return np.asarray(model.decision_function(list(texts_test)), dtype=np.float64)


def has_scikit_learn() -> bool:
    """Whether `LogisticProbe` and `keyword_scores` can be used."""
    return importlib.util.find_spec("sklearn") is not None


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as err:
        raise ConfigError(
            "Logistic probes and keyword baselines need scikit-learn, which is not installed. "
            "`pip install 'qscope-trl[data]'` installs it."
        ) from err


def _floats(x: Tensor | ArrayLike) -> Floats:
    if isinstance(x, Tensor):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def _checked(x: Tensor | ArrayLike, labels: Sequence[bool] | ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    rows = _floats(x)
    if rows.ndim != 2:
        raise DataError(f"A probe reads one row per text, got an array of the shape {rows.shape}.")
    return rows, _classes(len(rows), labels)


def _classes(count: int, labels: Sequence[bool] | ArrayLike) -> NDArray[np.bool_]:
    truth = np.asarray(labels).astype(bool)
    if truth.shape != (count,):
        raise DataError(f"There are {count} texts and labels of the shape {truth.shape}; give one label per text.")
    if truth.all() or not truth.any():
        which = "positive" if truth.all() else "negative"
        raise DataError(f"All {count} texts are {which}. A probe needs texts of both classes.")
    return truth
