"""Losses of supervised fine-tuning, per scored token."""

from __future__ import annotations

import math

from torch import Tensor

from fastalign.losses.reduce import sum_and_count
from fastalign.losses.traits import Family, Loss, Sums
from fastalign.types import TokenStats

MAX_EXPONENT = 700.0
"""exp of more overflows a double."""


def sft(logps: Tensor) -> Tensor:
    """SFT: imitate demonstrations, token by token.

    ``l_t = -ln p(y_t)`` in nats, to be reduced by ``token_mean``.
    Source: maximum likelihood over responses, as in Ouyang et al. 2022 (arXiv:2203.02155).

    Args:
        logps: ``[n]`` log-probs of the scored tokens.

    Returns:
        ``[n]`` losses.
    """
    return -logps


def metrics(stats: TokenStats, losses: Tensor) -> dict[str, Tensor]:
    """``[2]`` (sum, count) per metric: ``loss`` and those of ``token_metrics``."""
    return {"loss": sum_and_count(losses), **token_metrics(stats)}


def token_metrics(stats: TokenStats) -> dict[str, Tensor]:
    """``mean_token_accuracy`` and, when the head was asked for it, ``entropy``: means over scored tokens."""
    known = {"mean_token_accuracy": stats.is_top1, "entropy": stats.entropy}
    return {name: sum_and_count(value) for name, value in known.items() if value is not None}


def perplexity_of(sums: Sums, name: str) -> float:
    """``exp`` of a metric's mean over the step; nan where nothing was counted."""
    total, count = sums[name]
    return math.exp(min(total / count, MAX_EXPONENT)) if count else math.nan


LOSSES = {"sft": Loss(sft, reference=False, per_token=True)}
FAMILY = Family(
    "Demonstrations",
    "Rows of `prompt` and `completion`, `messages` or plain `text`; every assistant turn of a conversation is "
    "scored, with the token that ends it. The mean is over scored tokens of the whole step, on all ranks.",
    "`loss` and `perplexity` fall, `mean_token_accuracy` rises, also in their `eval_` twins; `entropy` near 0 is "
    "memorising.",
    LOSSES,
    derive=lambda sums: {"perplexity": perplexity_of(sums, "loss")},
)
