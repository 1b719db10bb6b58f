"""Token losses straight from logits, and their gradient, in one launch: statistics, functor, gradient row by row.

A program sweeps a row for its statistics, computes the row's loss and coefficients, and sweeps the row again for the
gradient, out of the second-level cache: no more rows are in flight than fit there. The columns' order in the sums is
that of ``token_logps``, for another number of threads.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch
from fastalign_kernels.functors import _clamp, _kl, _value
from fastalign_kernels.rows import (
    ELSEWHERE,
    IGNORE,
    ROW_VECTORS,
    SIZES,
    _combine,
    _exp,
    _factors,
    _gradient,
    _label_gradient,
    _leads,
    _scaled,
    _update,
    arguments,
)

THREADS = 512
"""Threads per program: few rows are in flight, so that each must keep many loads in flight. Half of it for fp64, whose
numbers take two registers."""
NUM_COLUMNS = 13
CACHE_SHARE = 0.6
"""Of the second-level cache, for rows between their two sweeps."""

SCALE_COLS: dict[str, Any] = {"COLS": 1024}

VECTORS = ["weights_ptr", "advantages_ptr", "old_logps_ptr", "ref_logps_ptr", "table_ptr"]


@triton.jit(
    do_not_specialize=[*SIZES, "out_stride", "num_rows"], do_not_specialize_on_alignment=[*ROW_VECTORS, *VECTORS]
)
def policy_loss_kernel(
    out_ptr,
    logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    weights_ptr,
    advantages_ptr,
    old_logps_ptr,
    ref_logps_ptr,
    table_ptr,
    num_rows,
    vocab_size,
    out_stride,
    row_stride,
    temperature: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    ratio_cap: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    LOSS: tl.constexpr,
    K2: tl.constexpr,
    HAS_KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Table and gradient of every ``num_programs``-th row. ``out_ptr`` may be ``logits_ptr``, or None: no gradient."""
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    COLS: tl.constexpr = 1 << LOG_COLS
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    out_stride = out_stride // STRIDE_ALIGN * STRIDE_ALIGN
    lane = tl.arange(0, COLS)[None, :]
    tile = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    zero = tl.full((), 0.0, dtype)
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        label = tl.load(labels_ptr + row)
        loss, logp, top, logsum, entropy = zero, zero, zero, zero, zero
        g, alpha, beta, at_label, factor = zero, zero, zero, zero, zero
        ratio, kl, low, high, top1 = zero, zero, zero, zero, zero
        inner, outer = zero, zero
        row_ptr = logits_ptr + row * row_stride
        target = tl.full((), ELSEWHERE, tl.int32)
        if label != IGNORE:
            inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
            m = tl.full((COLS,), float("-inf"), dtype)
            s = tl.zeros((COLS,), dtype)
            t = tl.zeros((COLS,), dtype)
            u = tl.zeros((COLS,), dtype)
            for start in range(0, whole, ROWS * COLS):
                z, _ = _scaled(tl.load(row_ptr + start + tile), inner, outer, HAS_SOFTCAP)
                m, s, t, u = _update(m, s, t, u, z, None, 0, ENTROPY, False)
            for start in range(whole, vocab_size, COLS):
                mask = start + lane < vocab_size
                z, _ = _scaled(tl.load(row_ptr + start + lane, mask=mask, other=0.0), inner, outer, HAS_SOFTCAP)
                m, s, t, u = _update(m, s, t, u, z, mask, 0, ENTROPY, False)
            top, logsum, h, _ = _combine(m, s, t, u, vocab_size, ENTROPY, False, LOG_COLS)
            if ENTROPY:
                entropy = h
            inside = (label >= 0) & (label < vocab_size)
            chosen = tl.load(row_ptr + label, mask=inside, other=0.0)
            z, _ = _scaled(chosen, inner, outer, HAS_SOFTCAP)
            logp = tl.where(inside, (z - top) - logsum, float("nan"))
            target = tl.where(inside, label, ELSEWHERE).to(tl.int32)
            hit = inside & (z == top) & (logp == logp)
            top1 = _leads(row_ptr, label, hit, m, top, inner, outer, HAS_SOFTCAP, LOG_COLS).to(dtype)

            w = tl.load(weights_ptr + row)
            advantage = zero + 1
            if advantages_ptr is not None:
                advantage = tl.load(advantages_ptr + row)
            ratio = tl.where(logp != logp, logp, 1.0)
            free = logp == logp
            if old_logps_ptr is not None:
                log_ratio, free = _clamp(logp - tl.load(old_logps_ptr + row))
                ratio = _exp(log_ratio)
            low_bound = tl.full((), ratio_low, dtype)
            high_bound = tl.full((), ratio_high, dtype)
            cap = tl.full((), ratio_cap, dtype)
            pos = tl.full((), tau_pos, dtype)
            neg = tl.full((), tau_neg, dtype)
            value, slope, is_low, is_high = _value(
                logp, ratio, free, advantage, low_bound, high_bound, cap, pos, neg, LOSS
            )
            loss = -w * (advantage * value)
            g = -w * (advantage * slope)
            low = is_low.to(dtype)
            high = is_high.to(dtype)
            if ref_logps_ptr is not None:
                kl, kl_slope = _kl(tl.load(ref_logps_ptr + row) - logp, K2)
                if HAS_KL:
                    scale = w * tl.full((), kl_coef, dtype)
                    loss += scale * kl
                    g += scale * kl_slope
            if HAS_BETA:
                beta = w * tl.full((), entropy_coef, dtype)
                alpha = tl.where(beta == 0, 0.0, beta * entropy)
                loss -= alpha
            g = tl.where(inside, g, float("nan"))
            factor = alpha - g
            at_label = _label_gradient(chosen, g, alpha, beta, zero, top, logsum, inner, outer, HAS_SOFTCAP)
        column_ptr = table_ptr + row
        tl.store(column_ptr, loss)
        tl.store(column_ptr + num_rows, logp)
        tl.store(column_ptr + 2 * num_rows, top)
        tl.store(column_ptr + 3 * num_rows, logsum)
        tl.store(column_ptr + 4 * num_rows, entropy)
        tl.store(column_ptr + 5 * num_rows, g)
        tl.store(column_ptr + 6 * num_rows, alpha)
        tl.store(column_ptr + 7 * num_rows, beta)
        tl.store(column_ptr + 8 * num_rows, ratio)
        tl.store(column_ptr + 9 * num_rows, kl)
        tl.store(column_ptr + 10 * num_rows, low)
        tl.store(column_ptr + 11 * num_rows, high)
        tl.store(column_ptr + 12 * num_rows, top1)
        if out_ptr is not None:
            out_row_ptr = out_ptr + row * out_stride
            out_dtype: tl.constexpr = out_ptr.dtype.element_ty
            tl.debug_barrier()  # every thread has read the label's logit before any overwrites it
            if (g == 0) & (alpha == 0) & (beta == 0):
                for start in range(0, whole, ROWS * COLS):
                    tl.store(out_row_ptr + start + tile, tl.zeros((ROWS, COLS), out_dtype))
                for start in range(whole, vocab_size, COLS):
                    col = start + lane
                    tl.store(out_row_ptr + col, tl.zeros((1, COLS), out_dtype), mask=col < vocab_size)
            else:
                for start in range(0, whole, ROWS * COLS):
                    col = start + tile
                    x = tl.load(row_ptr + col, eviction_policy="evict_first")
                    dx = _gradient(
                        x,
                        col,
                        target,
                        at_label,
                        factor,
                        beta,
                        zero,
                        top,
                        logsum,
                        inner,
                        outer,
                        HAS_SOFTCAP,
                        HAS_BETA,
                        False,
                    )
                    tl.store(out_row_ptr + col, dx.to(out_dtype), eviction_policy="evict_first")
                for start in range(whole, vocab_size, COLS):
                    col = start + lane
                    mask = col < vocab_size
                    x = tl.load(row_ptr + col, mask=mask, other=0.0, eviction_policy="evict_first")
                    dx = _gradient(
                        x,
                        col,
                        target,
                        at_label,
                        factor,
                        beta,
                        zero,
                        top,
                        logsum,
                        inner,
                        outer,
                        HAS_SOFTCAP,
                        HAS_BETA,
                        False,
                    )
                    tl.store(out_row_ptr + col, dx.to(out_dtype), mask=mask, eviction_policy="evict_first")
        row += tl.num_programs(0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["upstream_ptr"])
def scale_kernel(grad_ptr, upstream_ptr, vocab_size, row_stride, COLS: tl.constexpr):
    """One row times the upstream scalar; nothing where that is 1."""
    upstream = tl.load(upstream_ptr)
    if upstream != 1:
        row_ptr = grad_ptr + tl.program_id(0).to(tl.int64) * row_stride
        for start in range(0, vocab_size, COLS):
            col = start + tl.arange(0, COLS)
            x = tl.load(row_ptr + col, mask=col < vocab_size)
            tl.store(row_ptr + col, (x.to(upstream.dtype) * upstream).to(x.dtype), mask=col < vocab_size)


def run(
    out: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    loss: str,
    kl_estimator: str,
    knobs: Any,
    entropy: bool,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor:
    """Losses, statistics, coefficients and metrics of every row, and the gradient of the summed losses.

    Args:
        out: ``[N, V]``, written whole; may be ``logits``; None when no gradient is wanted.
        logits, labels, temperature, softcap: as in ``token_logps.forward``.
        weights, advantages, old_logps, ref_logps: contiguous ``[N]`` of the statistics' dtype; what is None is 1, the
            log-probs themselves, no KL.
        loss: pg, sft, ppo, cispo or sapo.
        kl_estimator: k2 or k3.
        knobs: attributes ``ratio_low, ratio_high, ratio_cap, tau_pos, tau_neg, kl_coef, entropy_coef``.
        entropy: whether to compute the entropy.

    Returns:
        ``[13, N]`` fp32, or fp64 for fp64 logits: loss, logps, max, logsum, entropy, g, alpha, beta, ratio, KL,
        whether the lower and the upper bound of the ratio acts, and top1; zeros where the label is -100.
    """
    target = None if out is None else launch.unit_columns(out)
    logits = launch.unit_columns(logits)
    num_rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    table = torch.empty(NUM_COLUMNS, num_rows, dtype=dtype, device=logits.device)
    strides = [logits.stride(0), logits.stride(0) if target is None else target.stride(0)]
    flags: dict[str, Any] = {
        "LOSS": "pg" if loss == "sft" else loss,
        "K2": kl_estimator == "k2",
        "HAS_KL": knobs.kl_coef != 0,
        "ENTROPY": entropy or knobs.entropy_coef != 0,
        "HAS_BETA": knobs.entropy_coef != 0,
    }
    if num_rows:
        with launch.device(logits):
            policy_loss_kernel[(min(num_rows, rows_in_flight(logits, target)),)](
                out_ptr=target,
                logits_ptr=logits,
                labels_ptr=labels.contiguous(),
                weights_ptr=weights,
                advantages_ptr=advantages,
                old_logps_ptr=old_logps,
                ref_logps_ptr=ref_logps,
                table_ptr=table,
                num_rows=num_rows,
                out_stride=strides[1],
                row_stride=strides[0],
                **flags,
                **vars(knobs),
                **arguments(logits, strides, temperature, softcap, 1.0),
                **launch.options(logits, THREADS // 2 if dtype == torch.float64 else THREADS),
            )
    if out is not None and target is not None and target is not out:
        out.copy_(target)
    return table


def scale(grad: Tensor, upstream: Tensor) -> None:
    """``grad *= upstream`` in place; where the factor is 1, the kernel returns early, without a host sync.

    Args:
        grad: ``[N, V]`` with adjacent columns, or of any strides, which costs the multiplication even for 1.
        upstream: ``[]``.
    """
    if grad.stride(1) != 1:
        grad.mul_(upstream)
    elif grad.numel():
        with launch.device(grad):
            scale_kernel[(grad.shape[0],)](
                grad_ptr=grad,
                upstream_ptr=upstream,
                vocab_size=grad.shape[1],
                row_stride=grad.stride(0),
                **SCALE_COLS,
                **launch.options(grad),
            )


def rows_in_flight(logits: Tensor, out: Tensor | None) -> int:
    """How many rows, with their gradient unless it takes their place, fit the cache beside each other."""
    copies = 1 if out is None or out.data_ptr() == logits.data_ptr() else 2
    return max(1, int(CACHE_SHARE * _cache(logits.device)) // (copies * logits.shape[1] * logits.itemsize))


@functools.cache
def _cache(device: torch.device) -> int:
    """Bytes of the second-level cache; a common size where no device can be asked."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 << 20
