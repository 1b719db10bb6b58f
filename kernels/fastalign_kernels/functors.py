"""A token's loss from its log-prob: value and slope of the policy losses, estimates of the KL.

A loss is one function here, one in ``fastalign.ops.functors`` and one in ``csrc/cpu/functors.h``, all of one name.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from fastalign_kernels.rows import _exp

LARGEST: tl.constexpr = tl.constexpr(20.0)
"""Log-ratios are clamped to it before ``exp``, and have no gradient outside."""


@triton.jit
def _pg(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg):
    """Value and slope of a loss ``-A value``, and whether the lower and the upper bound of the ratio act."""
    never = ratio != ratio
    return logp, tl.full((), 1.0, logp.dtype), never, never


@triton.jit
def _ppo(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg):
    low = (advantage < 0) & (ratio < low_bound)
    high = ((advantage > 0) & (ratio > high_bound)) | ((advantage < 0) & (ratio > cap))
    value = tl.where(low, low_bound, tl.where(high, tl.where(advantage > 0, high_bound, cap), ratio))
    return value, tl.where(low | high | (inside == 0), 0.0, ratio), low, high


@triton.jit
def _cispo(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg):
    low = ratio < low_bound
    high = ratio > high_bound
    clipped = tl.where(low, low_bound, tl.where(high, high_bound, ratio))
    return clipped * logp, clipped, low, high


@triton.jit
def _sapo(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg):
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = 1 / (1 + _exp(-tau * (ratio - 1)))
    never = ratio != ratio
    return 4 / tau * gate, tl.where(inside, 4 * gate * (1 - gate) * ratio, 0.0), never, never


@triton.jit
def _value(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg, LOSS: tl.constexpr):
    if LOSS == "ppo":
        value, slope, low, high = _ppo(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg)
    elif LOSS == "cispo":
        value, slope, low, high = _cispo(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg)
    elif LOSS == "sapo":
        value, slope, low, high = _sapo(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg)
    else:
        value, slope, low, high = _pg(logp, ratio, inside, advantage, low_bound, high_bound, cap, tau_pos, tau_neg)
    return value, slope, low, high


@triton.jit
def _clamp(x):
    """``x`` within ``LARGEST`` of 0, and whether it was; NaN counts as inside and stays."""
    inside = ((x > LARGEST) | (x < -LARGEST)) == 0
    return tl.where(inside, x, tl.where(x > 0, LARGEST, -LARGEST)).to(x.dtype), inside


@triton.jit
def _kl(y, K2: tl.constexpr):
    """Estimate of the KL from ``y = l_ref - l``, and its derivative in ``l``."""
    if K2:
        value = y * y / 2
        slope = -y
    else:
        x, inside = _clamp(y)
        change = _exp(x) - 1
        # Near 0, where the reference is near, 1 and x cancel: the Taylor series up to x^5 and x^6.
        near = tl.abs(x) < (0.01 if x.dtype == tl.float64 else 0.1)
        series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
        value = tl.where(near, series, change - x)
        slope = tl.where(inside, -tl.where(near, x + series, change), 0.0)
    return value, slope
