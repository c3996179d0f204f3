"""Verification: encode a response where it stands, after its prompt, and see which features fire in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qscope_trl.activations.opening import Opened
from qscope_trl.analysis.synthesis.journal import Journal, Verdict
from qscope_trl.analysis.synthesis.plan import PLAIN, Candidate
from qscope_trl.analysis.synthesis.reading import FeatureReader, Readable, readable
from qscope_trl.config.synthesize import SynthesizeConfig
from qscope_trl.features import FeatureId
from qscope_trl.sae.topk_sae import TopKSAE

_BETWEEN = "\n\n"


class Verifier:
    """Encodes responses and says which features fire in them.

    Args:
        config: The settings.
        targets: All target features.
        matched: Names of the matched random features of each that is generated for.
        opened: Model and tokenizer.
        saes: One SAE a layer.
    """

    def __init__(
        self,
        config: SynthesizeConfig,
        targets: Sequence[FeatureId],
        matched: Mapping[str, Sequence[str]],
        opened: Opened,
        saes: Mapping[int, TopKSAE],
    ) -> None:
        self._config, self._opened = config, opened
        self._targets = tuple(targets)
        self._matched = {name: [FeatureId.parse(one) for one in others] for name, others in matched.items()}
        others = sorted({one for matched in self._matched.values() for one in matched})
        self._reader = FeatureReader(saes, [*self._targets, *others])
        self._slot = {one: place for place, one in enumerate(self._reader.features)}

    def verdicts(self, candidates: Sequence[Candidate], journal: Journal) -> list[tuple[Candidate, Verdict]]:
        """The verdict on each candidate; new ones are recorded first."""
        new = [one for one in candidates if one.key not in journal.verdicts]
        texts = [self._readable(one) for one in new]
        largest = self._reader.read(self._opened.model, texts, batch_size=self._config.batch_size).largest.tolist()
        found = {}
        for one, text, row in zip(new, texts, largest, strict=True):
            threshold = self._config.min_activation
            fires = {str(each): row[place] for place, each in enumerate(self._targets) if row[place] > threshold}
            matched = [row[self._slot[other]] > threshold for other in self._matched.get(one.target, [])]
            found[one.key] = Verdict(
                activation=0.0 if one.target == PLAIN else row[self._slot[FeatureId.parse(one.target)]],
                fires=fires,
                matched=sum(matched) / len(matched) if matched else None,
                tokens=max(0, text.stop - max(text.start, 1)),
            )
        journal.verdict(found)
        return [(one, journal.verdicts[one.key]) for one in candidates]

    def _readable(self, candidate: Candidate) -> Readable:
        tokenizer, length = self._opened.tokenizer, self._config.max_length
        prefix = _prefix(self._config, candidate.prompt, tokenizer)
        return readable(
            tokenizer,
            prefix,
            candidate.response,
            max_length=length,
            special_tokens=self._config.encode_as != "chat",
        )


def _prefix(config: SynthesizeConfig, prompt: str, tokenizer: Any) -> str:
    """What stands before the response where it is read."""
    if config.encode_as == "chat":
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return prompt + _between(config)


def whole_text(config: SynthesizeConfig, candidate: Candidate) -> str:
    """Prompt and response as one plain text."""
    return candidate.prompt + _between(config) + candidate.response


def _between(config: SynthesizeConfig) -> str:
    return _BETWEEN if config.writing_mode == "instruct" else ""
