"""The best evaluation of a run by one metric: its checkpoint is kept however many come after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LOWER = {"loss", "perplexity", "kl"}
HIGHER = {"accuracy", "accuracies", "margin", "margins", "reward", "rewards", "chosen"}
UNCLEAR = {"rejected", "std", "min", "max"}
"""Words in a metric's name that tell whether less of it is better, more of it, or neither can be said."""


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is; 0 where the name does not tell.

    Example:
        >>> direction("eval_loss"), direction("eval_rewards/margins"), direction("eval_completions/mean_length")
        (-1, 1, 0)
    """
    words = set(re.split(r"[_/]", metric))
    if words & UNCLEAR:
        return 0
    return -1 if words & LOWER else 1 if words & HIGHER else 0


def check(metric: str | None, evaluated: Sequence[str] | None) -> None:
    """Refuse a `run.keep_best` that cannot be followed.

    Args:
        metric: the setting.
        evaluated: metrics of an evaluation, ``eval_`` left out; None where nothing is evaluated.
    """
    if metric is None:
        return
    if evaluated is None:
        needs = "set data.eval_path, data.eval_split or data.eval_fraction"
        raise ValueError(f"run.keep_best {metric}: nothing is evaluated; {needs}")
    known = [f"eval_{name}" for name in evaluated if direction(name)]
    if metric not in known:
        raise ValueError(f"run.keep_best: expected one of {', '.join(known)}, got {metric!r}")


class Best:
    """The step with the best value so far.

    Args:
        metric: which; None: no step is the best.
        records: lines of metrics.jsonl of the steps behind the run.
    """

    def __init__(self, metric: str | None, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.metric, self.step, self.value = metric, None, math.nan
        for record in records:
            self.improves(record["step"], record)

    def improves(self, step: int, evaluated: Mapping[str, Any]) -> bool:
        """Take an evaluation down; whether it is better than all before."""
        value = evaluated.get(self.metric) if self.metric else None
        if value is None or not math.isfinite(value):
            return False
        assert self.metric is not None
        if self.step is not None and direction(self.metric) * (value - self.value) <= 0:
            return False
        self.step, self.value = step, value
        return True
