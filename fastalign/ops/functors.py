"""A token's loss and coefficients from its log-prob: the one definition in Python of what ``policy_loss`` computes.

With ``l`` the log-prob, ``r`` the ratio, ``A`` the advantage and ``w`` the weight of a token:

    loss = -w A value(l) + w kl_coef kl(l) - w entropy_coef H
    g = d loss / d l = -w A slope + w kl_coef d kl / d l          beta = w entropy_coef          alpha = beta H

A loss is one function here, whose value ``fastalign.losses.policy`` and the reference of the op differentiate by
autograd; one in ``fastalign_kernels.functors`` and one in each of ``csrc/cpu/functors.h`` and ``csrc/cuda/functors.h``
have its name. ``tests/ops/testfunctors.py`` holds all of them to it, in every regime of their clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clamped to it before ``exp``; outside they have no gradient."""

STATISTICS = ("logps", "max", "logsum", "entropy")
METRICS = ("ratio", "kl", "clip_low", "clip_high")
COLUMNS = ("loss", *STATISTICS, "g", "alpha", "beta", *METRICS, "top1")
"""The rows of the ``[13, N]`` table that every backend writes, zero where a row is not scored."""


def columns(table: Tensor) -> dict[str, Tensor]:
    """The rows of a table by name, as views."""
    return dict(zip(COLUMNS, table, strict=True))


@dataclass(frozen=True)
class Knobs:
    """Parameters of the functors: absolute bounds of the ratio, sapo's gates, coefficients."""

    ratio_low: float = 0.0
    ratio_high: float = math.inf
    ratio_cap: float = math.inf
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


Value = tuple[Tensor, Tensor, Tensor, Tensor]
"""value, slope, whether the lower and whether the upper bound acts; each ``[N]``."""


def pg(logps: Tensor, ratio: Tensor, inside: Tensor, advantages: Tensor, knobs: Knobs) -> Value:
    """``value = l``: REINFORCE, and SFT when every advantage is 1."""
    never = torch.zeros_like(inside)
    return logps, torch.ones_like(logps), never, never


def ppo(logps: Tensor, ratio: Tensor, inside: Tensor, advantages: Tensor, knobs: Knobs) -> Value:
    """``value = min(r, high)`` for A > 0, ``min(max(r, low), cap)`` for A < 0."""
    value, low, high = clip(ratio, advantages, knobs.ratio_low, knobs.ratio_high, knobs.ratio_cap)
    return value, torch.where(low | high | ~inside, 0.0, ratio), low, high


def clip(ratio: Tensor, advantages: Tensor, low: float, high: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio within its bounds, and where the lower and where an upper one acts: beyond the bound, not on it.

    ``low`` and ``cap`` bound it where the advantage is negative, ``high`` where it is positive.
    """
    is_low, is_high = clip_bounds(ratio, advantages, low, high)
    is_high = is_high | ((advantages < 0) & (ratio > cap))
    return torch.where(is_high, by_sign(advantages, high, cap), torch.where(is_low, low, ratio)), is_low, is_high


def clip_bounds(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """``[n]`` bool: where the lower and where the upper bound of the clipped surrogate acts."""
    return (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)


def cispo(logps: Tensor, ratio: Tensor, inside: Tensor, advantages: Tensor, knobs: Knobs) -> Value:
    """``value = c l`` with the clipped ratio ``c`` held constant: no token loses its gradient."""
    clipped = ratio.detach().clamp(knobs.ratio_low, knobs.ratio_high)
    return clipped * logps, clipped, ratio < knobs.ratio_low, ratio > knobs.ratio_high


def sapo(logps: Tensor, ratio: Tensor, inside: Tensor, advantages: Tensor, knobs: Knobs) -> Value:
    """``value = 4 s(tau (r - 1)) / tau``, ``s`` the logistic function: the slope ``4 s (1 - s) r`` fades smoothly."""
    tau = by_sign(advantages, knobs.tau_pos, knobs.tau_neg)
    gate, never = torch.sigmoid(tau * (ratio - 1)), torch.zeros_like(inside)
    return 4 / tau * gate, torch.where(inside, 4 * gate * (1 - gate) * ratio, 0.0), never, never


def by_sign(advantages: Tensor, positive: float, otherwise: float) -> Tensor:
    """One number where the advantage is positive, the other elsewhere, in the dtype of the advantages."""
    return torch.where(advantages > 0, advantages.new_tensor(positive), advantages.new_tensor(otherwise))


FUNCTORS: dict[str, Callable[..., Value]] = {"pg": pg, "sft": pg, "ppo": ppo, "cispo": cispo, "sapo": sapo}


def k2(y: Tensor) -> tuple[Tensor, Tensor]:
    """``y^2 / 2`` and its derivative in ``l``, with ``y = l_ref - l``."""
    return y.square() / 2, -y


def k3(y: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(y) - 1 - y`` and its derivative in ``l``, with ``y = l_ref - l`` clamped."""
    clamped = y.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    change = torch.expm1(clamped)
    return change - clamped, torch.where(clamped == y, -change, torch.where(y.isnan(), y, 0.0))


KL_ESTIMATORS = {"k2": k2, "k3": k3}


def ratio_of(log_ratio: Tensor) -> Tensor:
    """``exp`` of a log-ratio within +-20, outside of which it has no gradient."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def fill(
    table: Tensor,
    masked: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    loss: str,
    kl_estimator: str,
    knobs: Knobs,
) -> None:
    """Complete a table that holds the statistics: loss, coefficients and metrics of every row, 0 where ``masked``."""
    column = columns(table)
    logps, entropy = column["logps"], column["entropy"]
    ones = torch.ones_like(logps)
    advantages = ones if advantages is None else advantages
    log_ratio = torch.where(logps.isnan(), logps, 0.0) if old_logps is None else logps - old_logps
    ratio, inside = ratio_of(log_ratio), ~(log_ratio.abs() > LARGEST_LOG_RATIO)
    value, slope, low, high = FUNCTORS[loss](logps, ratio, inside, advantages, knobs)
    total, g, kl = -weights * (advantages * value), -weights * (advantages * slope), torch.zeros_like(logps)
    if ref_logps is not None:
        kl, kl_slope = KL_ESTIMATORS[kl_estimator](ref_logps - logps)
        if knobs.kl_coef != 0:
            total, g = total + weights * knobs.kl_coef * kl, g + weights * knobs.kl_coef * kl_slope
    beta = weights * knobs.entropy_coef
    alpha = torch.where(beta == 0, 0.0, beta * entropy)
    made = {"loss": total - alpha, "g": g, "alpha": alpha, "beta": beta, "ratio": ratio, "kl": kl}
    for name, values in {**made, "clip_low": low, "clip_high": high}.items():
        column[name].copy_(values).masked_fill_(masked, 0)


def make_knobs(clip_low, clip_high, dual_clip, tau_pos, tau_neg, kl_coef, entropy_coef) -> list[float]:
    """The fields of ``Knobs``: distances from 1 become absolute bounds."""
    for name, clip in {"clip_low": clip_low, "clip_high": clip_high}.items():
        if clip is not None and not clip >= 0:
            raise ValueError(f"{name} is a distance of the ratio from 1: at least 0, or None for no bound; got {clip}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be larger than 1, or None; got {dual_clip}")
    if not (tau_pos > 0 and tau_neg > 0):
        raise ValueError(f"tau_pos and tau_neg must be positive, got {tau_pos} and {tau_neg}")
    low = 0.0 if clip_low is None else 1.0 - clip_low
    high, cap = (math.inf if x is None else x for x in (None if clip_high is None else 1.0 + clip_high, dual_clip))
    return [float(x) for x in (low, high, cap, tau_pos, tau_neg, kl_coef, entropy_coef)]


def check_loss(loss: str, advantages, dual_clip, kl_coef: float, ref_logps, kl_estimator: str) -> None:
    """The names are known, and what a loss needs is there.

    Raises:
        ValueError: otherwise.
    """
    if loss not in FUNCTORS:
        raise ValueError(f"loss must be one of {', '.join(FUNCTORS)}; got {loss!r}")
    if (advantages is None) != (loss == "sft"):
        raise ValueError(
            f'loss "{loss}" needs advantages [N]' if loss != "sft" else 'loss "sft" takes no advantages: use "pg"'
        )
    if dual_clip is not None and loss != "ppo":
        raise ValueError(f'dual_clip belongs to loss "ppo", not to "{loss}"')
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be k2 or k3 (k1 has no useful gradient); got {kl_estimator!r}")
    if kl_coef != 0 and ref_logps is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logps [N], the log-probs under the reference")
