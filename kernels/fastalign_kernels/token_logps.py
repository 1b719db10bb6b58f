"""Log-probability and entropy of the label in each row of logits, and the gradient with respect to the logits.

Each kernel gives a row to one program. The program walks the row in tiles of ``ROWS x COLS`` neighbouring columns; each
of the COLS lanes keeps its own running maximum and sums, and the lanes meet once, when the row ends. Whole tiles carry
no mask; the rest of the row is walked in masked tiles of ``1 x COLS``. A column's place in the sums follows from its
index, the vocabulary and the dtype, and no tile holds two rows: a row has the same bits alone and in any batch, at any
alignment.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch
from fastalign_kernels.rows import (
    COEFFICIENTS,
    ELSEWHERE,
    IGNORE,
    ROW_VECTORS,
    SIZES,
    _combine,
    _factors,
    _gradient,
    _label_gradient,
    _leads,
    _scaled,
    _update,
    arguments,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*ROW_VECTORS, "logps_ptr"])
def forward_kernel(
    logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    logsum_ptr,
    total_ptr,
    top1_ptr,
    vocab_size,
    row_stride,
    temperature: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Statistics of one row: one read of its logits, or none when the row is masked."""
    dtype: tl.constexpr = logps_ptr.dtype.element_ty
    COLS: tl.constexpr = 1 << LOG_COLS
    ENTROPY: tl.constexpr = entropy_ptr is not None
    TOTAL: tl.constexpr = total_ptr is not None
    TOP1: tl.constexpr = top1_ptr is not None
    # The compiler learns the alignment from the last factor, and so how wide a load may be.
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logp = tl.full((), 0.0, dtype)
    top = logp
    logsum = logp
    entropy = logp
    total = logp
    top1 = logp
    if label != IGNORE:
        row_ptr = logits_ptr + row * row_stride
        inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
        m = tl.full((COLS,), float("-inf"), dtype)
        s = tl.zeros((COLS,), dtype)
        t = tl.zeros((COLS,), dtype)
        u = tl.zeros((COLS,), dtype)
        lane = tl.arange(0, COLS)[None, :]
        tile = tl.arange(0, ROWS)[:, None] * COLS + lane
        whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
        for start in range(0, whole, ROWS * COLS):
            x = tl.load(row_ptr + start + tile, eviction_policy="evict_first")
            z, _ = _scaled(x, inner, outer, HAS_SOFTCAP)
            m, s, t, u = _update(m, s, t, u, z, None, start // COLS, ENTROPY, TOTAL)
        for start in range(whole, vocab_size, COLS):
            mask = start + lane < vocab_size
            x = tl.load(row_ptr + start + lane, mask=mask, other=0.0, eviction_policy="evict_first")
            z, _ = _scaled(x, inner, outer, HAS_SOFTCAP)
            m, s, t, u = _update(m, s, t, u, z, mask, start // COLS, ENTROPY, TOTAL)
        top, logsum, entropy, total = _combine(m, s, t, u, vocab_size, ENTROPY, TOTAL, LOG_COLS)
        inside = (label >= 0) & (label < vocab_size)
        target, _ = _scaled(tl.load(row_ptr + label, mask=inside, other=0.0), inner, outer, HAS_SOFTCAP)
        logp = tl.where(label == ELSEWHERE, 0.0, tl.where(inside, (target - top) - logsum, float("nan")))
        if TOP1:
            hit = inside & (target == top) & (logp == logp)
            top1 = _leads(row_ptr, label, hit, m, top, inner, outer, HAS_SOFTCAP, LOG_COLS).to(dtype)
    tl.store(logps_ptr + row, logp)
    tl.store(max_ptr + row, top)
    tl.store(logsum_ptr + row, logsum)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if TOTAL:
        tl.store(total_ptr + row, total)
    if TOP1:
        tl.store(top1_ptr + row, top1)


@triton.jit(do_not_specialize=[*SIZES, "out_stride"], do_not_specialize_on_alignment=[*ROW_VECTORS, *COEFFICIENTS])
def backward_kernel(
    out_ptr,
    logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    max_ptr,
    logsum_ptr,
    g_ptr,
    alpha_ptr,
    beta_ptr,
    delta_ptr,
    vocab_size,
    out_stride,
    row_stride,
    temperature: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Gradient of one row: one read of its logits, or none when the gradient is zero, and one write.

    ``out_ptr`` may be ``logits_ptr``: a tile is read whole before it is written, and no other tile reads it.
    """
    dtype: tl.constexpr = max_ptr.dtype.element_ty
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    COLS: tl.constexpr = 1 << LOG_COLS
    HAS_BETA: tl.constexpr = beta_ptr is not None
    HAS_DELTA: tl.constexpr = delta_ptr is not None
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    out_stride = out_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * out_stride
    lane = tl.arange(0, COLS)[None, :]
    tile = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    label = tl.load(labels_ptr + row)
    g = tl.load(g_ptr + row).to(dtype)
    alpha = tl.full((), 0.0, dtype)
    beta = alpha
    delta = alpha
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + row).to(dtype)
    if HAS_BETA:
        beta = tl.load(beta_ptr + row).to(dtype)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row).to(dtype)
    if (label == IGNORE) | ((g == 0) & (alpha == 0) & (beta == 0) & (delta == 0)):
        for start in range(0, whole, ROWS * COLS):
            tl.store(out_row_ptr + start + tile, tl.zeros((ROWS, COLS), out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            tl.store(out_row_ptr + col, tl.zeros((1, COLS), out_dtype), mask=col < vocab_size)
    else:
        row_ptr = logits_ptr + row * row_stride
        inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
        top = tl.load(max_ptr + row)
        logsum = tl.load(logsum_ptr + row)
        inside = (label >= 0) & (label < vocab_size)
        target = tl.where(inside, label, ELSEWHERE).to(tl.int32)
        chosen = tl.load(row_ptr + label, mask=inside, other=0.0)
        at_label = _label_gradient(chosen, g, alpha, beta, delta, top, logsum, inner, outer, HAS_SOFTCAP)
        factor = tl.where(inside | (label == ELSEWHERE), alpha - g, float("nan"))
        tl.debug_barrier()  # every thread has read the label's logit before any overwrites it
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
                delta,
                top,
                logsum,
                inner,
                outer,
                HAS_SOFTCAP,
                HAS_BETA,
                HAS_DELTA,
            )
            tl.store(out_row_ptr + col, dx.to(out_dtype))
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
                delta,
                top,
                logsum,
                inner,
                outer,
                HAS_SOFTCAP,
                HAS_BETA,
                HAS_DELTA,
            )
            tl.store(out_row_ptr + col, dx.to(out_dtype), mask=mask)


def forward(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    total: bool = False,
    top1: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-probability of each row's label, entropy, and the statistics that `backward` needs.

    With z = softcap(logit_scale * logits) / temperature: max = max_v z_v, logsum = ln sum_v exp(z_v - max),
    logp = (z_label - max) - logsum, entropy = logsum - sum_v p_v (z_v - max), total = sum_v (z_v - max), top1 = 1 where
    the label is the first column whose z, as computed here, is max, else 0.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64; copied when its columns are not adjacent.
        labels: ``[N]`` int32 or int64. -100: the row is not read and its outputs are 0. -1: the label lies in another
            slab of the vocabulary, logp is 0. Any other label outside ``[0, V)``: logp is NaN.
        temperature: one value, as a number or a tensor, or ``[N]``.
        softcap: the bound of ``softcap * tanh(x / softcap)``, or None.
        logit_scale: factor of the logits.
        entropy, total, top1: whether to compute the entropy, in nats, the total, and top1.

    Returns:
        logps, entropy or None, max, logsum, total or None, top1 or None: ``[N]`` fp32, or fp64 for fp64 logits.
    """
    logits = launch.unit_columns(logits)
    num_rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps, top, logsum = (torch.empty(num_rows, dtype=dtype, device=logits.device) for _ in range(3))
    entropies, totals, hits = (torch.empty_like(logps) if wanted else None for wanted in (entropy, total, top1))
    if num_rows:
        with launch.device(logits):
            forward_kernel[(num_rows,)](
                logits_ptr=logits,
                labels_ptr=labels.contiguous(),
                logps_ptr=logps,
                entropy_ptr=entropies,
                max_ptr=top,
                logsum_ptr=logsum,
                total_ptr=totals,
                top1_ptr=hits,
                row_stride=logits.stride(0),
                **arguments(logits, [logits.stride(0)], temperature, softcap, logit_scale),
                **launch.options(logits),
            )
    return logps, entropies, top, logsum, totals, hits


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    logsum: Tensor,
    coefficients: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Write the gradient with respect to the logits into ``out``.

    With p = exp((z - max) - logsum) and y the row's label, dz_v = g (1[v = y] - p_v) + p_v (alpha + beta ln p_v)
    + delta and d logits = dz * logit_scale / temperature * (1 - tanh^2).

    Args:
        out: ``[N, V]``, written whole; may be ``logits``.
        logits, labels: as given to `forward`. A row labelled -100, or whose coefficients are zero, is not read and gets
            zeros; with label -1 it has no target term; with any other label outside ``[0, V)`` it gets NaN.
        max, logsum: ``[N]`` as returned by `forward`.
        coefficients: g, alpha, beta, delta, each ``[N]``; all but g may be None: 0 everywhere.
        temperature, softcap, logit_scale: as given to `forward`.
    """
    g, alpha, beta, delta = (x if x is None else x.contiguous() for x in coefficients)
    target = launch.unit_columns(out)
    logits = launch.unit_columns(logits)
    num_rows = logits.shape[0]
    if num_rows:
        strides = [logits.stride(0), target.stride(0)]
        with launch.device(logits):
            backward_kernel[(num_rows,)](
                out_ptr=target,
                logits_ptr=logits,
                labels_ptr=labels.contiguous(),
                max_ptr=max,
                logsum_ptr=logsum,
                g_ptr=g,
                alpha_ptr=alpha,
                beta_ptr=beta,
                delta_ptr=delta,
                out_stride=target.stride(0),
                row_stride=logits.stride(0),
                **arguments(logits, strides, temperature, softcap, logit_scale),
                **launch.options(logits),
            )
    if target is not out:
        out.copy_(target)
