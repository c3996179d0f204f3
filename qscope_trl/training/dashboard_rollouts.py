"""The last rollouts of a GRPO or RLOO trainer, for a dashboard: watched as they are scored, without a forward more.

Left out: rollouts of other processes than the main one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qscope_trl.errors import AttachError
from qscope_trl.monitor.html import token_texts
from qscope_trl.training.dashboard_reading import ValueLists, value_lists
from qscope_trl.training.generations import RolloutActivations, SeenRollouts
from qscope_trl.training.scores import RolloutScoring

Reading = Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[str]], list[ValueLists]]
"""Token ids, the first place that is wanted in each, and features: their values from there on."""

_log = logging.getLogger("qscope_trl")


class RolloutView:
    """Keeps the last generation of a trainer that makes rollouts; does nothing for others.

    Args:
        top: Rollouts that are shown.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._scoring: RolloutScoring | None = None
        self._seen: SeenRollouts | None = None

    def watch(self, trainer: Any) -> None:
        """See the trainer's rollouts from now on, if it makes any."""
        self.leave()
        if not hasattr(trainer, "_generate_and_score_completions"):
            return
        try:
            self._scoring = RolloutScoring.of(trainer)
        except AttachError as err:
            _log.warning("qscope_trl: the dashboard shows no rollouts. %s", err)
            return
        self._scoring.observers.append(self._keep)

    def leave(self) -> None:
        """See them no longer."""
        if self._scoring is not None:
            self._scoring.observers.remove(self._keep)
        self._scoring = self._seen = None

    def _keep(self, seen: SeenRollouts) -> None:
        self._seen = seen

    def rows(self, tokenizer: Any, shown: Sequence[str], read: Reading | None) -> list[dict[str, Any]]:
        """Rows of `rollouts.jsonl`, without their step; each generation is given once.

        Values are what the readers saw. Where no reader scores the rollouts, the few that are shown are read now.

        Args:
            tokenizer: The trainer's.
            shown: Features whose values are given.
            read: Reads token ids, from a place in each on; None where that cannot be done.
        """
        seen, self._seen = self._seen, None
        scoring = self._scoring
        if seen is None or scoring is None:
            return []
        names = list(getattr(scoring.trainer, "reward_func_names", []))
        rollouts = seen.rollouts
        count = min(self._top, len(rollouts.completions))
        if scoring.readers:
            values = [_values(row, shown) for row in seen.scores[:count]]
        elif read is not None:
            whole = [rollouts.prompts[n] + rollouts.completions[n] for n in range(count)]
            values = read(whole, [len(rollouts.prompts[n]) for n in range(count)], shown)
        else:
            values = [{} for _ in range(count)]
        return [
            {
                "prompt": tokenizer.decode(rollouts.prompts[n], skip_special_tokens=True),
                "tokens": token_texts(tokenizer, rollouts.completions[n]),
                "values": values[n],
                "score": self._score(seen.scores[n] if n < len(seen.scores) else None),
                "advantage_before": _number(seen.before_B[n]),
                "advantage": _number(seen.after_B[n]),
                "policy": seen.marks[n],
                "rewards": {}
                if seen.rewards_BF is None
                else dict(zip(names, map(_number, seen.rewards_BF[n]), strict=False)),
            }
            for n in range(count)
        ]

    def _score(self, row: Mapping[str, RolloutActivations] | None) -> float | None:
        """The score of the first reader that has one: what its reward or the policy makes of its tokens."""
        for name, reader in {} if self._scoring is None else self._scoring.readers.items():
            activations = None if row is None else row.get(name)
            score = getattr(reader, "score", None)
            if activations is not None and score is not None:
                found = score(activations)
                return None if found is None else float(found)
        return None


def _values(row: Mapping[str, RolloutActivations] | None, shown: Sequence[str]) -> ValueLists:
    found: ValueLists = {}
    for one in (row or {}).values():
        names = [str(feature) for feature in one.ids]
        chosen = [name for name in shown if name in names and name not in found]
        values_CS = one.values_CS.float().cpu().numpy().astype(np.float32)
        found.update(value_lists(values_CS, names, chosen))
    return found


def _number(value: Any) -> float | None:
    found = float(value)
    return found if math.isfinite(found) else None
