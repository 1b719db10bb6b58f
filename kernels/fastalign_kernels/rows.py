"""What the kernels over rows of logits share: scaling, statistics of a row, and its gradient from four coefficients.

A program walks its row in tiles of ``ROWS x COLS`` neighbouring columns; each of the COLS lanes keeps its own running
maximum and sums, and the lanes meet once, when the row ends.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
IGNORE: tl.constexpr = tl.constexpr(-100)
ELSEWHERE: tl.constexpr = tl.constexpr(-1)
FLOOR: tl.constexpr = tl.constexpr(-1000.0)
"""A bound for ln p where it multiplies p: exp(-1000) is already 0, and 0 * -inf would be NaN."""
LOWEST: tl.constexpr = tl.constexpr(-3e38)
"""The same where a number of columns multiplies, which is 0 for a lane that has seen none."""

# Neither another shape nor a slice of the rows compiles a kernel again.
SIZES = ["vocab_size", "row_stride"]
ROW_VECTORS = ["labels_ptr", "row_temperature_ptr", "entropy_ptr", "max_ptr", "logsum_ptr", "total_ptr", "top1_ptr"]
COEFFICIENTS = ["g_ptr", "alpha_ptr", "beta_ptr", "delta_ptr"]


@triton.jit
def _exp(x):
    """By exp2, which is one instruction where exp is five: what it flushes to zero is below 1e-37."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _tanh(x):
    magnitude = tl.abs(x)
    decay = _exp(-2 * magnitude)
    result = (1 - decay) / (1 + decay)
    if x.dtype == tl.float32:
        # Near zero 1 - decay cancels; the odd Taylor series up to x^9 is exact to fp32 below 1/4.
        square = x * x
        series = tl.fma(square, tl.fma(square, tl.fma(square, 62 / 2835, -17 / 315), 2 / 15), -1 / 3)
        series = tl.fma(magnitude * square, series, magnitude)
        result = tl.where(magnitude < 0.25, series, result)
    return tl.where(x < 0, -result, result)


@triton.jit
def _factors(
    row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, dtype: tl.constexpr
):
    """A row's (inner, outer): its scaled logits are inner * x, or outer * tanh(inner * x) under a soft-cap."""
    if row_temperature_ptr is not None:
        tau = tl.load(row_temperature_ptr + row).to(dtype)
    else:
        tau = tl.full((), temperature, dtype)
    scale = tl.full((), logit_scale, dtype)
    outer = tau
    if HAS_SOFTCAP:
        cap = tl.full((), softcap, dtype)
        inner = scale / cap
        outer = cap / tau
    else:
        inner = scale / tau
    return inner, outer


@triton.jit
def _scaled(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Scaled logits z and their slope dz/dx."""
    z = x.to(inner.dtype) * inner
    slope = inner
    if HAS_SOFTCAP:
        tanh = _tanh(z)
        z = outer * tanh
        slope = inner * outer * (1 - tanh) * (1 + tanh)
    return z, slope


@triton.jit
def _update(m, s, t, u, z, mask, num_seen, ENTROPY: tl.constexpr, TOTAL: tl.constexpr):
    """Fold a tile into the lanes: m = max z, s = sum exp(z - m), t = sum exp(z - m) (z - m), u = sum (z - m).

    ``mask`` says which columns exist, None: all; each lane has seen ``num_seen`` columns before.
    """
    if mask is not None:
        z = tl.where(mask, z, float("-inf"))
    top = tl.maximum(m, tl.max(z, 0))
    reference = tl.where(top == float("-inf"), 0.0, top)  # a lane of banned columns only: -inf - -inf is NaN
    shift = m - reference
    decay = _exp(shift)
    offset = z - reference[None, :]
    weight = _exp(offset)
    if ENTROPY:
        t = (t + s * tl.maximum(shift, FLOOR)) * decay + tl.sum(weight * tl.maximum(offset, FLOOR), 0)
    s = s * decay + tl.sum(weight, 0)
    if TOTAL:
        existing = offset if mask is None else tl.where(mask, offset, 0.0)
        u += tl.sum(existing, 0)
        u += num_seen * tl.maximum(shift, LOWEST)
    return top, s, t, u


@triton.jit
def _sum_lanes(x, LOG_COLS: tl.constexpr):
    """Sum of ``2^LOG_COLS`` lanes neighbour with neighbour: an order that no memory layout can change."""
    for step in tl.static_range(LOG_COLS):
        x = tl.sum(tl.reshape(x, (1 << (LOG_COLS - 1 - step), 2)), 1)
    return tl.sum(x, 0)


@triton.jit
def _combine(m, s, t, u, vocab_size, ENTROPY: tl.constexpr, TOTAL: tl.constexpr, LOG_COLS: tl.constexpr):
    """The row's maximum, logsum, entropy and total from its lanes."""
    top = tl.max(m, 0)
    shift = m - tl.where(top == float("-inf"), 0.0, top)
    decay = _exp(shift)
    norm = _sum_lanes(s * decay, LOG_COLS)
    logsum = tl.log(norm)
    entropy = logsum
    if ENTROPY:
        entropy -= _sum_lanes((t + s * tl.maximum(shift, FLOOR)) * decay, LOG_COLS) / norm
    total = logsum
    if TOTAL:
        COLS: tl.constexpr = 1 << LOG_COLS
        count = (vocab_size - tl.arange(0, COLS) + COLS - 1) // COLS
        total = _sum_lanes(u + count * tl.maximum(shift, LOWEST), LOG_COLS)
    return top, logsum, entropy, total


@triton.jit
def _leads(row_ptr, label, hit, m, top, inner, outer, HAS_SOFTCAP: tl.constexpr, LOG_COLS: tl.constexpr):
    """Whether a label that has the row's maximum is the first column that has it.

    Read again are the columns before the label, of lanes that saw the maximum: mostly of one. Without a hit none is.
    """
    COLS: tl.constexpr = 1 << LOG_COLS
    lane = tl.arange(0, COLS)
    tied = m == top
    earlier = tl.zeros((COLS,), tl.int32)
    for start in range(0, tl.where(hit, label, 0).to(tl.int32), COLS):
        mask = tied & (start + lane < label)
        z, _ = _scaled(tl.load(row_ptr + start + lane, mask=mask, other=0.0), inner, outer, HAS_SOFTCAP)
        earlier |= (mask & (z == top)).to(tl.int32)
    return hit & (tl.max(earlier, 0) == 0)


@triton.jit
def _expm1(x):
    """Without cancellation near 0, where fp32 needs it: e^x - 1 = tanh(x / 2) (e^x + 1)."""
    return _tanh(x / 2) * (_exp(x) + 1)


@triton.jit
def _label_gradient(x, g, alpha, beta, delta, top, logsum, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Gradient with respect to the label's logit: a confident row keeps the digits of 1 - p."""
    z, slope = _scaled(x, inner, outer, HAS_SOFTCAP)
    log_p = (z - top) - logsum
    return (_exp(log_p) * (alpha + beta * tl.maximum(log_p, FLOOR)) - g * _expm1(log_p) + delta) * slope


@triton.jit
def _gradient(
    x,
    col,
    target,
    at_label,
    factor,
    beta,
    delta,
    top,
    logsum,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """Gradient with respect to a tile of logits: (p (factor + beta ln p) + delta) dz/dx, and what is at the label."""
    z, slope = _scaled(x, inner, outer, HAS_SOFTCAP)
    log_p = (z - top) - logsum
    coefficient = factor
    if HAS_BETA:
        coefficient += beta * tl.maximum(log_p, FLOOR)
    dz = _exp(log_p) * coefficient
    if HAS_DELTA:
        dz += delta
    return tl.where(col == target, at_label, dz * slope)


def tile(vocab_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and log2 of the lanes of a tile: a function of vocabulary and dtype, because it fixes the bits."""
    widest = 9 if dtype == torch.float64 else 10
    log_cols = min(widest, max(7, (vocab_size - 1).bit_length()))
    return (4 if vocab_size >= 4 << log_cols else 1), log_cols


def arguments(
    logits: Tensor, strides: Sequence[int], temperature: float | Tensor, softcap: float | None, logit_scale: float
) -> dict[str, Any]:
    """The arguments that every kernel over logits takes last."""
    num_rows, vocab_size = logits.shape
    rows, log_cols = tile(vocab_size, logits.dtype)
    per_row = temperature.expand(num_rows).contiguous() if isinstance(temperature, Tensor) else None
    return {
        "row_temperature_ptr": per_row,
        "vocab_size": vocab_size,
        "temperature": 1.0 if isinstance(temperature, Tensor) else float(temperature),
        "softcap": 1.0 if softcap is None else float(softcap),
        "logit_scale": float(logit_scale),
        "HAS_SOFTCAP": softcap is not None,
        "ROWS": rows,
        "LOG_COLS": log_cols,
        "STRIDE_ALIGN": launch.alignment(logits.itemsize, *strides),
        "VOCAB_ALIGN": launch.alignment(logits.itemsize, vocab_size),
    }
