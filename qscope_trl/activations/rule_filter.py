"""A rule as the function that `datasets` filters by.

Left out: reports of what left and why, and stores as the source of values; that is `qscope curate`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.feature_table import TableEncoder
from qscope_trl.activations.opening import open_model
from qscope_trl.activations.sources import ChatRenderer, text_of
from qscope_trl.bundled import sae_path
from qscope_trl.errors import ConfigError
from qscope_trl.features import FeatureSet
from qscope_trl.rules import Rule, load_rule
from qscope_trl.sae.suite import SAESuite


class RuleFilter:
    """Tells which rows of a batch stay.

    ```python
    dataset = dataset.filter(RuleFilter("rules/toxic.yaml", "Qwen/Qwen3-8B-Base", "Qwen/SAE-Res-...", keep="others"),
                             batched=True)
    ```

    Model and SAEs are opened when the first batch comes, in each process anew, and are no part of what is pickled: so
    `num_proc` works, and `datasets` finds its cache again. A model that is given as an object is pickled with it.

    Args:
        rule: `Rule`, rule file, or the text of a rule.
        model: Hub id, folder or `demo`; or a model on its device, then with its `tokenizer`.
        saes: Hub id, folder, file, `demo`, or an open `SAESuite`.
        tokenizer: Tokenizer of a model given as an object.
        sets: FeatureSets by the name that the rule uses.
        text_column: Column of the text; `prompt+completion` joins several. Conversations go through the chat template.
        keep: `matching` keeps rows for which the rule holds, `others` the rest.
        max_length: Tokens kept of each text: its first ones.
        batch_size: Texts in one forward.
        dtype: Dtype of a model given by name; `auto` is the checkpoint's.
        device: Its device; by default a GPU if there is one.
        model_revision: Its commit, tag or branch.
        sae_revision: Commit, tag or branch of the SAEs.
        sae_k: Active features per token, where the SAE's name does not say.

    Raises:
        ConfigError: If a setting does not fit.
        RuleError: If the rule cannot be read.
    """

    def __init__(
        self,
        rule: Rule | str | os.PathLike[str],
        model: str | nn.Module,
        saes: str | os.PathLike[str] | SAESuite,
        *,
        tokenizer: Any = None,
        sets: Mapping[str, FeatureSet] | None = None,
        text_column: str = "text",
        keep: str = "matching",
        max_length: int = 512,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str | None = None,
        model_revision: str | None = None,
        sae_revision: str | None = None,
        sae_k: int | None = None,
    ) -> None:
        if keep not in ("matching", "others"):
            raise ConfigError(f"`keep` is {keep!r}; choose `matching` or `others`.")
        if isinstance(model, str) is (tokenizer is not None):
            raise ConfigError("A model given as an object needs its `tokenizer`; one given by name brings its own.")
        self.rule = load_rule(rule, sets=sets)
        self.text_column, self.keep = text_column, keep
        self.max_length, self.batch_size = max_length, batch_size
        self._model, self._tokenizer, self._saes = model, tokenizer, saes
        self._model_settings = {"revision": model_revision, "dtype": dtype, "device": device}
        self._sae_settings = {"revision": sae_revision, "k": sae_k}
        self._encoder: TableEncoder | None = None
        self._chat: ChatRenderer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None, "_chat": None}

    @property
    def encoder(self) -> TableEncoder:
        """What gives the rule its values, opened on first use.

        Raises:
            ConfigError: If the model cannot be loaded.
            CheckpointError: If the SAEs cannot.
            RuleError: If the rule names a feature that is not there, or was made for other SAEs.
        """
        if self._encoder is None:
            source = self._saes if isinstance(self._saes, SAESuite) else sae_path(os.fspath(self._saes))
            saes = SAESuite.from_pretrained(source, **self._sae_settings)  # type: ignore[arg-type]
            self.rule.check(saes)
            model, tokenizer = self._model, self._tokenizer
            if isinstance(model, str):
                model, tokenizer = open_model(model, **self._model_settings)  # type: ignore[arg-type]
            self._encoder = TableEncoder(
                model,
                tokenizer,
                saes,
                self.rule.features,
                aggregations=sorted({aggregation for _, aggregation in self.rule.needs}),
                max_length=self.max_length,
                batch_size=self.batch_size,
                show_progress=False,
            )
        return self._encoder

    def _render(self, messages: list[Any]) -> str:
        if self._chat is None:
            name = self._model if isinstance(self._model, str) else type(self._model).__name__
            self._chat = chat_renderer(self.encoder.tokenizer, name=name)
        return self._chat(messages)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> list[bool]:
        """Whether each row of a batch stays.

        Args:
            batch: Columns, as `datasets` gives them with `batched=True`.

        Raises:
            DataError: If the text column is missing or holds something else than texts.
        """
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        texts = [
            text_of(row, text_column=self.text_column, source_name="batch", index=place, chat=self._render)
            for place, row in enumerate(rows)
        ]
        if not texts:
            return []
        held: list[bool] = self.rule.evaluate(self.encoder(texts)).tolist()
        return held if self.keep == "matching" else [not value for value in held]
