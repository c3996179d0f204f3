"""What a dashboard measures between training steps: activations at the tokens of fixed texts, and generations.

Nothing of the training is touched: `untouched` puts random states and modes back. Left out: when it is measured and
where it goes; that is `dashboard`.

Shape legend: `T` tokens of a text, `S` features.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qscope_trl.activations.encode import num_kept, residual_batches, tokenize
from qscope_trl.activations.opening import require_fit
from qscope_trl.activations.sampling import Sampling, generate_from_ids
from qscope_trl.errors import AttachError, DataError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.monitor.dashboard_things import Strongest
from qscope_trl.monitor.detectors import Detector
from qscope_trl.monitor.html import token_texts
from qscope_trl.sae.chosen import ChosenEncoder
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.attach import attachment_of
from qscope_trl.training.scores import scoring_of

ValueLists = dict[str, list[float | None]]
"""Per feature a value for each token; None where nothing was read."""

_BINS = 32
_MOST_SHOWN, _MOST_MONITORS = 16, 4
_DEFAULT_TEXTS = 32


class Watched(NamedTuple):
    """Some features of one set of SAEs."""

    open_suite: Callable[[], SAESuite]
    """Opens their SAEs."""

    features: FeatureSet
    """The features."""

    kind: str
    """`penalised` (or rewarded, steered) or `monitor`."""


def watched_of(trainer: Any) -> list[Watched]:
    """Features of the penalty that is attached to a trainer, its monitors, and those that score its rollouts.

    Raises:
        AttachError: If there are none.
    """
    found = []
    attachment = attachment_of(trainer)
    if attachment is not None:
        saes, revision, k = attachment._source
        for features, kind in ((attachment.features, "penalised"), (attachment.monitor_features, "monitor")):
            if features is not None:
                found.append(Watched(_opener(saes, features, revision, k), features, kind))
    scoring = scoring_of(trainer)
    for reader in () if scoring is None else scoring.readers.values():
        found.append(Watched(reader.suite, reader.features, "penalised" if _acts(reader) else "monitor"))
    if not found:
        raise AttachError(
            "`FeatureDashboard` has no features to show: no penalty is attached to the trainer, and no reward reads "
            "features. Put it after `SAEPenaltyCallback` in `callbacks`, or give it `saes` and `features`."
        )
    return found


def named(saes: Any, features: Any, monitors: Any, revision: str | None, k: int | None) -> list[Watched]:
    """Features that the user names, for a trainer without a penalty."""
    chosen = [(features, "penalised"), *([] if monitors is None else [(monitors, "monitor")])]
    loaded = [(FeatureSet.load(one), kind) for one, kind in chosen]
    return [Watched(_opener(saes, one, revision, k), one, kind) for one, kind in loaded]


def _opener(saes: Any, features: FeatureSet, revision: str | None, k: int | None) -> Callable[[], SAESuite]:
    return lambda: SAESuite.from_pretrained(saes, layers=features.layers, revision=revision, k=k)


def _acts(reader: Any) -> bool:
    return bool(getattr(reader, "scale", 1.0))


class FeatureValues:
    """Reads activations of chosen features, after TopK and ReLU, at each token of texts.

    The SAEs are opened for each call and let go after it, so between measurements they take no memory.

    Args:
        watched: Which features; one that comes twice counts where it came first.

    Raises:
        AttachError: If SAEs do not fit the model.
        FeatureSetError: If features belong to other SAEs.
        CheckpointError: If SAEs cannot be read.
    """

    def __init__(self, model: nn.Module, watched: Sequence[Watched]) -> None:
        self.kinds: dict[str, str] = {}
        self._opened: list[tuple[SAESuite, int, list[FeatureId]]] = []
        for one in watched:
            suite = one.open_suite()
            require_fit(model, suite, one.features, AttachError)
            new = [feature.id for feature in one.features.features if str(feature.id) not in self.kinds]
            self.kinds.update(dict.fromkeys(map(str, new), one.kind))
            for layer in sorted({feature.layer for feature in new}):
                self._opened.append((suite, layer, [feature for feature in new if feature.layer == layer]))
        self._column = {name: place for place, name in enumerate(self.kinds)}

    @property
    def names(self) -> list[str]:
        """The features, in the order of the columns: the penalised ones first, as they were given."""
        return list(self.kinds)

    def __call__(
        self, model: nn.Module, token_ids: Sequence[Sequence[int]], batch_size: int
    ) -> list[NDArray[np.float32]]:
        """Activations `(T, S)` of each text; NaN at position 0, which is not read.

        Raises:
            DataError: If a residual is not finite.
        """
        found = [np.full((len(ids), len(self.names)), np.nan, dtype=np.float32) for ids in token_ids]
        if not any(num_kept(len(ids)) for ids in token_ids):
            return found
        encoders = [
            (
                layer,
                [self._column[str(one)] for one in ids],
                ChosenEncoder.open(suite, layer, [one.index for one in ids]),
            )
            for suite, layer, ids in self._opened
        ]
        layers = sorted({layer for layer, _, _ in encoders})
        for batch in residual_batches(model, token_ids, layers, batch_size=batch_size, show_progress=False):
            for layer, columns, encode in encoders:
                acts_NS = encode(batch.residuals[layer]).acts.float().cpu().numpy()
                for text in torch.unique(batch.text_index).tolist():
                    found[text][1:, columns] = acts_NS[(batch.text_index == text).numpy()]
        return found


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put random states (Python, NumPy, torch on all devices) and every module's mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        for module, training in modes:
            module.training = training


def weights_are_spread(trainer: Any) -> bool:
    """Whether no process holds the whole model, so that none can run it alone (FSDP, ZeRO-3, tensor parallelism)."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if bool(getattr(trainer, "is_fsdp_enabled", False)) or (plugin is not None and plugin.zero_stage == 3):
        return True
    # What tells a `DTensor`, whatever spread it.
    return any(hasattr(parameter, "placements") for parameter in trainer.model.parameters())


def text_ids(tokenizer: Any, texts: Sequence[str] | None, dataset: Any, max_length: int) -> list[list[int]]:
    """Token ids of the fixed texts; without any, of the first rows of the training data that have some."""
    if texts is not None:
        return tokenize(tokenizer, texts, max_length=max_length)
    rows = _first_rows(dataset)
    ids = [list(row["input_ids"])[:max_length] for row in rows if "input_ids" in row]
    if ids:
        return ids
    found = [row["text"] for row in rows if isinstance(row.get("text"), str)]
    return tokenize(tokenizer, found, max_length=max_length) if found else []


def prompt_ids(tokenizer: Any, prompts: Sequence[Any] | None, dataset: Any, max_length: int) -> list[list[int]]:
    """Token ids of the prompts, texts or conversations: their last ones; without any, column `prompt` of the data.

    Raises:
        DataError: If the tokenizer has no chat template for a conversation.
    """
    if prompts is None:
        prompts = [row["prompt"] for row in _first_rows(dataset) if isinstance(row.get("prompt"), str | list)]
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found += tokenize(tokenizer, [prompt], max_length=max_length, positions="last")
            continue
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "A prompt of `FeatureDashboard` is a conversation, and its tokenizer has no chat template. Give texts "
                "or set its `chat_template`."
            )
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"][-max_length:])
    return found


def _first_rows(dataset: Any) -> list[Mapping[str, Any]]:
    """The first rows, where the data has places; of a stream nothing is taken."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return []
    rows = (dataset[place] for place in range(min(_DEFAULT_TEXTS, len(dataset))))
    return [row for row in rows if isinstance(row, Mapping)]


def samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    read: FeatureValues,
    shown: Sequence[str],
    detector: Detector | None,
) -> list[dict[str, Any]]:
    """Rows of `samples.jsonl`, without their step: one generation of each prompt."""
    generations = generate_from_ids(model, tokenizer, prompts, settings)
    whole = [[*one.prompt_ids, *one.ids] for one in generations]
    rows = []
    for index, (one, values) in enumerate(zip(generations, read(model, whole, settings.batch_size), strict=True)):
        rows.append(
            {
                "index": index,
                "prompt": tokenizer.decode(one.prompt_ids, skip_special_tokens=True),
                "text": one.text,
                "tokens": token_texts(tokenizer, one.ids),
                "values": value_lists(values[len(one.prompt_ids) :], read.names, shown),
                "is_shown": None if detector is None else detector.is_shown(one.text),
                "detector": None if detector is None else detector.name,
            }
        )
    return rows


def histograms(values: Sequence[NDArray[np.float32]], read: FeatureValues) -> list[dict[str, Any]]:
    """Rows of `histograms.jsonl`, without their step: of each feature, where it is active."""
    every = np.concatenate([one[1:] for one in values]) if values else np.zeros((0, len(read.names)))
    rows = []
    for place, (name, kind) in enumerate(read.kinds.items()):
        active = every[every[:, place] > 0, place]
        edges = np.linspace(0.0, _round_up(float(active.max(initial=0.0))), _BINS + 1)
        counts, _ = np.histogram(active, bins=edges)
        rows.append(
            {
                "feature": name,
                "kind": kind,
                "edges": [float(edge) for edge in edges],
                "counts": counts.tolist(),
                "num_tokens": len(every),
            }
        )
    return rows


def shown_features(read: FeatureValues) -> list[str]:
    """Features whose values at tokens are kept: the first ones, most of them penalised."""
    monitors = [name for name, kind in read.kinds.items() if kind == "monitor"][:_MOST_MONITORS]
    penalised = [name for name, kind in read.kinds.items() if kind == "penalised"]
    return penalised[: _MOST_SHOWN - len(monitors)] + monitors


def strongest(
    values: Sequence[NDArray[np.float32]],
    read: FeatureValues,
    shown: Sequence[str],
    tokenizer: Any,
    token_ids: Sequence[Sequence[int]],
) -> list[Strongest]:
    """Of each feature that is active somewhere, the text in which it is strongest."""
    found = []
    for name in shown:
        largest = _largest(values, read, name)
        text = int(np.argmax(largest))
        if largest[text] > 0:
            lists = value_lists(values[text], read.names, [name])
            found.append(Strongest(name, text, largest[text], token_texts(tokenizer, token_ids[text]), lists[name]))
    return found


def strongest_texts(
    values: Sequence[NDArray[np.float32]], read: FeatureValues, shown: Sequence[str], count: int
) -> list[int]:
    """Texts to show throughout: of one feature after another its strongest that is not among them."""
    orders = []
    for name in shown:
        largest = _largest(values, read, name)
        orders.append(np.argsort(-np.array(largest), kind="stable").tolist())
    chosen: list[int] = []
    for place in range(len(values)):
        chosen += [order[place] for order in orders if order[place] not in chosen]
    return sorted(list(dict.fromkeys(chosen))[:count])


def _largest(values: Sequence[NDArray[np.float32]], read: FeatureValues, name: str) -> list[float]:
    column = read.names.index(name)
    return [float(one[1:, column].max(initial=0.0)) for one in values]


def value_lists(values_TS: NDArray[np.float32], names: Sequence[str], shown: Sequence[str]) -> ValueLists:
    """Values of some features at each token, with four digits; None where nothing was read."""
    column = {name: place for place, name in enumerate(names)}
    return {name: [_short(value) for value in values_TS[:, column[name]].tolist()] for name in shown}


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ..., so that edges stay from one measurement to the next."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= value)
