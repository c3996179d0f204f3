"""What a rule reads: aggregated activations of features, document by document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureId
from qscope_trl.rules.tree import AGGREGATIONS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class FeatureValues(Protocol):
    """Aggregated activations of some features over some documents.

    A document without a token has 0 everywhere: nothing fires in it.
    """

    @property
    def num_documents(self) -> int:
        """How many documents there are."""

    def values(self, feature: FeatureId, aggregation: str) -> Any:
        """One number per document, `(num_documents,)`: a NumPy array of float64, or a torch tensor.

        Raises:
            DataError: If the feature or the aggregation is not among them.
        """


class TokenValues:
    """One text read token by token: "document" t is the text up to and including its t-th token.

    Args:
        features: Features, in the order of the columns.
        acts: Activations after TopK and ReLU at the tokens that count, in order; `(tokens, features)`. Leave position
            0 of the text out, as everything here does.

    Raises:
        ConfigError: If the shape is another.
        DataError: If a value is negative or not finite.
    """

    def __init__(self, features: Sequence[FeatureId], acts: ArrayLike) -> None:
        import numpy as np

        self.features = tuple(features)
        self.acts: NDArray[np.float64] = np.asarray(acts, dtype=np.float64)
        if self.acts.ndim != 2 or self.acts.shape[1] != len(self.features):
            raise ConfigError(
                f"`acts` has the shape {self.acts.shape}; it is (tokens, features) with {len(self.features)} features."
            )
        require_activations(self.acts, "`acts`")
        self._columns = {feature: column for column, feature in enumerate(self.features)}

    @property
    def num_documents(self) -> int:
        """Number of tokens: each ends one prefix of the text."""
        return len(self.acts)

    def values(self, feature: FeatureId, aggregation: str) -> NDArray[np.float64]:
        """Value of a feature over the first token, the first two, ...; rounded to fp32 as documents' values are."""
        import numpy as np

        require_aggregation(aggregation)
        if feature not in self._columns:
            raise DataError(f"{feature} is not among the features whose activations were given.")
        acts = self.acts[:, self._columns[feature]]
        if aggregation == "max":
            found = np.maximum.accumulate(acts)
        elif aggregation == "last":
            found = acts
        else:
            summed = np.cumsum(acts if aggregation == "mean" else acts > 0, dtype=np.float64)
            found = summed / np.arange(1, acts.size + 1)
        return found.astype(np.float32).astype(np.float64)


def require_aggregation(name: str) -> None:
    """Raise `ConfigError` unless `name` is an aggregation."""
    if name not in AGGREGATIONS:
        raise ConfigError(f"`{name}` is no aggregation; choose one of {', '.join(AGGREGATIONS)}.")


def require_activations(values: NDArray[np.float64], what: str) -> None:
    """Raise `DataError` if a value is negative, NaN or infinite: no rule could be decided by it."""
    import numpy as np

    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        raise DataError(
            f"{what} holds {float(values[bad][0])!r} ({int(bad.sum())} such values); activations after TopK and ReLU "
            f"are finite and not negative."
        )
