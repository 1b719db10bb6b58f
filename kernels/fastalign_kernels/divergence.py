"""Divergence of each row of logits from the same row of reference logits, and its gradient.

Each kernel gives a pair of rows to one program, which walks both in tiles like those of ``token_logps``: a column's
place in the sums follows from its index, the vocabulary and the dtype of the logits, and a row has the same bits alone
and in any batch. The mixture of the Jensen-Shannon divergence needs both normalisers first: there the forward walks
twice.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch
from fastalign_kernels.token_logps import IGNORE, _exp, _factors, _scaled, _sum_lanes, tile

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)

# Neither another shape nor a slice of the rows compiles a kernel again.
SIZES = ["num_rows", "vocab_size", "row_stride", "ref_row_stride"]
ROW_VECTORS = ["labels_ptr", "row_temperature_ptr", "stats_ptr"]


@triton.jit
def _load_row(ptr, col, vocab_size, inner, outer, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """A tile of z and its slope; -inf beyond the vocabulary."""
    if MASKED:
        x = tl.load(ptr + col, mask=col < vocab_size, other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(ptr + col, eviction_policy="evict_first")
    z, slope = _scaled(x, inner, outer, HAS_SOFTCAP)
    if MASKED:
        z = tl.where(col < vocab_size, z, float("-inf"))
    return z, slope


@triton.jit
def _finite(m):
    """A maximum as what is subtracted: 0 for a lane of banned columns only, where -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _fold(m, s, n, t, w, a, b, CROSS: tl.constexpr):
    """Fold a tile into the lanes: maxima m, n, sums s, t; with CROSS w = sum exp(a - m) ((a - m) - (b - n))."""
    top = tl.maximum(m, tl.max(a, 0))
    ref_top = tl.maximum(n, tl.max(b, 0))
    decay = _exp(m - _finite(top))
    offset = a - _finite(top)[None, :]
    ref_offset = b - _finite(ref_top)[None, :]
    weight = _exp(offset)
    if CROSS:
        shift = (_finite(m) - _finite(top)) - (_finite(n) - _finite(ref_top))
        share = tl.where(weight > 0, weight * (offset - ref_offset), 0.0)
        w = tl.where(decay > 0, (w + s * shift) * decay, 0.0) + tl.sum(share, 0)
    s = s * decay + tl.sum(weight, 0)
    t = t * _exp(n - _finite(ref_top)) + tl.sum(_exp(ref_offset), 0)
    return top, s, ref_top, t, w


@triton.jit
def _combine(m, s, n, t, w, LOG_COLS: tl.constexpr):
    """Both streams' maximum and logsum, and the divergence of the first from the second, from the lanes."""
    top = tl.max(m, 0)
    ref_top = tl.max(n, 0)
    decay = _exp(m - _finite(top))
    shift = (_finite(m) - _finite(top)) - (_finite(n) - _finite(ref_top))
    total = _sum_lanes(s * decay, LOG_COLS)
    ref_total = _sum_lanes(t * _exp(n - _finite(ref_top)), LOG_COLS)
    cross = _sum_lanes(tl.where(decay > 0, (w + s * shift) * decay, 0.0), LOG_COLS)
    logsum = tl.log(total)
    ref_logsum = tl.log(ref_total)
    return top, logsum, ref_top, ref_logsum, cross / total + (ref_logsum - logsum)


@triton.jit
def _over_mixture(log_p, log_q, mix):
    """ln(p / M) and ln(pi / M), by way of the larger of the two: exactly 0 where p and pi agree."""
    gap = log_q - log_p
    far = tl.where(gap > 0, 1 - mix, mix)
    log_m = tl.log(1 + far * (_exp(-tl.abs(gap)) - 1))
    return tl.minimum(-gap, 0.0) - log_m, tl.minimum(gap, 0.0) - log_m


@triton.jit
def _fold_mixture(s, t, log_p, log_q, mix):
    """Add a tile's p ln(p / M) to the lanes s and its pi ln(pi / M) to t."""
    p = _exp(log_p)
    q = _exp(log_q)
    p_over_m, q_over_m = _over_mixture(log_p, log_q, mix)
    s += tl.sum(tl.where(p == 0, 0.0, p * p_over_m), 0)
    t += tl.sum(tl.where(q == 0, 0.0, q * q_over_m), 0)
    return s, t


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*ROW_VECTORS, "value_ptr"])
def divergence_forward_kernel(
    logits_ptr,
    ref_logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    stats_ptr,
    value_ptr,
    num_rows,
    vocab_size,
    row_stride,
    ref_row_stride,
    mix: tl.float64,
    temperature: tl.float64,
    softcap: tl.float64,
    ref_softcap: tl.float64,
    logit_scale: tl.float64,
    ref_logit_scale: tl.float64,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Value and statistics of one pair of rows: one read of both, two for JSD, none when the row is masked."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    COLS: tl.constexpr = 1 << LOG_COLS
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    ref_row_stride = ref_row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, dtype)
    top, logsum, ref_top, ref_logsum, value, pull = zero, zero, zero, zero, zero, zero
    if tl.load(labels_ptr + row) != IGNORE:
        z_ptr = logits_ptr + row * row_stride
        q_ptr = ref_logits_ptr + row * ref_row_stride
        inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
        ref_inner, ref_outer = _factors(
            row, row_temperature_ptr, temperature, ref_softcap, ref_logit_scale, HAS_REF_SOFTCAP, dtype
        )
        m = tl.full((COLS,), float("-inf"), dtype)
        n = tl.full((COLS,), float("-inf"), dtype)
        s = tl.zeros((COLS,), dtype)
        t = tl.zeros((COLS,), dtype)
        w = tl.zeros((COLS,), dtype)
        lane = tl.arange(0, COLS)[None, :]
        spot = tl.arange(0, ROWS)[:, None] * COLS + lane
        whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
        for start in range(0, whole, ROWS * COLS):
            z, _ = _load_row(z_ptr, start + spot, vocab_size, inner, outer, HAS_SOFTCAP, False)
            q, _ = _load_row(q_ptr, start + spot, vocab_size, ref_inner, ref_outer, HAS_REF_SOFTCAP, False)
            if KIND == FORWARD_KL:
                m, s, n, t, w = _fold(m, s, n, t, w, q, z, True)
            else:
                m, s, n, t, w = _fold(m, s, n, t, w, z, q, KIND == REVERSE_KL)
        for start in range(whole, vocab_size, COLS):
            z, _ = _load_row(z_ptr, start + lane, vocab_size, inner, outer, HAS_SOFTCAP, True)
            q, _ = _load_row(q_ptr, start + lane, vocab_size, ref_inner, ref_outer, HAS_REF_SOFTCAP, True)
            if KIND == FORWARD_KL:
                m, s, n, t, w = _fold(m, s, n, t, w, q, z, True)
            else:
                m, s, n, t, w = _fold(m, s, n, t, w, z, q, KIND == REVERSE_KL)
        if KIND == FORWARD_KL:
            ref_top, ref_logsum, top, logsum, value = _combine(m, s, n, t, w, LOG_COLS)
        else:
            top, logsum, ref_top, ref_logsum, value = _combine(m, s, n, t, w, LOG_COLS)
            pull = value
        if KIND == JSD:
            share = tl.full((), mix, dtype)
            s = tl.zeros((COLS,), dtype)
            t = tl.zeros((COLS,), dtype)
            for start in range(0, whole, ROWS * COLS):
                z, _ = _load_row(z_ptr, start + spot, vocab_size, inner, outer, HAS_SOFTCAP, False)
                q, _ = _load_row(q_ptr, start + spot, vocab_size, ref_inner, ref_outer, HAS_REF_SOFTCAP, False)
                s, t = _fold_mixture(s, t, (z - top) - logsum, (q - ref_top) - ref_logsum, share)
            for start in range(whole, vocab_size, COLS):
                z, _ = _load_row(z_ptr, start + lane, vocab_size, inner, outer, HAS_SOFTCAP, True)
                q, _ = _load_row(q_ptr, start + lane, vocab_size, ref_inner, ref_outer, HAS_REF_SOFTCAP, True)
                s, t = _fold_mixture(s, t, (z - top) - logsum, (q - ref_top) - ref_logsum, share)
            pull = _sum_lanes(s, LOG_COLS)
            value = share * _sum_lanes(t, LOG_COLS) + (1 - share) * pull
    place = stats_ptr + row
    pitch = tl.cast(num_rows, tl.int64)
    tl.store(place, top)
    tl.store(place + pitch, logsum)
    tl.store(place + 2 * pitch, ref_top)
    tl.store(place + 3 * pitch, ref_logsum)
    tl.store(place + 4 * pitch, pull)
    tl.store(value_ptr + row, value)


@triton.jit
def _gradient(z, q, g, top, logsum, ref_top, ref_logsum, pull, mix, KIND: tl.constexpr):
    """Gradient of g * value with respect to a tile of z."""
    log_p = (z - top) - logsum
    log_q = (q - ref_top) - ref_logsum
    p = _exp(log_p)
    if KIND == FORWARD_KL:
        dz = p - _exp(log_q)
    elif KIND == REVERSE_KL:
        dz = tl.where(p == 0, 0.0, p * ((log_p - log_q) - pull))
    else:
        p_over_m, _ = _over_mixture(log_p, log_q, mix)
        dz = tl.where(p == 0, 0.0, (1 - mix) * p * (p_over_m - pull))
    return g * dz


@triton.jit(do_not_specialize=[*SIZES, "out_stride"], do_not_specialize_on_alignment=[*ROW_VECTORS, "grad_ptr"])
def divergence_backward_kernel(
    out_ptr,
    logits_ptr,
    ref_logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    stats_ptr,
    grad_ptr,
    num_rows,
    vocab_size,
    out_stride,
    row_stride,
    ref_row_stride,
    mix: tl.float64,
    temperature: tl.float64,
    softcap: tl.float64,
    ref_softcap: tl.float64,
    logit_scale: tl.float64,
    ref_logit_scale: tl.float64,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Gradient of one row: one read of both streams, or none when it is zero, and one write; in place if wanted."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    COLS: tl.constexpr = 1 << LOG_COLS
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    ref_row_stride = ref_row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    out_stride = out_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * out_stride
    lane = tl.arange(0, COLS)[None, :]
    spot = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    g = tl.load(grad_ptr + row).to(dtype)
    if (tl.load(labels_ptr + row) == IGNORE) | (g == 0):
        for start in range(0, whole, ROWS * COLS):
            tl.store(out_row_ptr + start + spot, tl.zeros((ROWS, COLS), out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            tl.store(out_row_ptr + col, tl.zeros((1, COLS), out_dtype), mask=col < vocab_size)
    else:
        z_ptr = logits_ptr + row * row_stride
        q_ptr = ref_logits_ptr + row * ref_row_stride
        inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
        ref_inner, ref_outer = _factors(
            row, row_temperature_ptr, temperature, ref_softcap, ref_logit_scale, HAS_REF_SOFTCAP, dtype
        )
        place = stats_ptr + row
        pitch = tl.cast(num_rows, tl.int64)
        top = tl.load(place)
        logsum = tl.load(place + pitch)
        ref_top = tl.load(place + 2 * pitch)
        ref_logsum = tl.load(place + 3 * pitch)
        pull = tl.load(place + 4 * pitch)
        share = tl.full((), mix, dtype)
        for start in range(0, whole, ROWS * COLS):
            col = start + spot
            z, slope = _load_row(z_ptr, col, vocab_size, inner, outer, HAS_SOFTCAP, False)
            q, _ = _load_row(q_ptr, col, vocab_size, ref_inner, ref_outer, HAS_REF_SOFTCAP, False)
            dz = _gradient(z, q, g, top, logsum, ref_top, ref_logsum, pull, share, KIND)
            tl.store(out_row_ptr + col, (dz * slope).to(out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            z, slope = _load_row(z_ptr, col, vocab_size, inner, outer, HAS_SOFTCAP, True)
            q, _ = _load_row(q_ptr, col, vocab_size, ref_inner, ref_outer, HAS_REF_SOFTCAP, True)
            dz = _gradient(z, q, g, top, logsum, ref_top, ref_logsum, pull, share, KIND)
            tl.store(out_row_ptr + col, (dz * slope).to(out_dtype), mask=col < vocab_size)


def forward(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, *, kind: str, mix: float = 0.5, **scaling: Any
) -> tuple[Tensor, Tensor]:
    """The divergence of each row of ``logits`` from the same row of ``ref_logits``, and what `backward` needs.

    Args:
        logits, ref_logits: ``[N, V]`` of any float dtypes; copied when their columns are not adjacent.
        labels: ``[N]``; -100: the row is not read and its outputs are 0.
        kind: "forward_kl" KL(pi || p), "reverse_kl" KL(p || pi), or "jsd" with the reference's weight ``mix``.
        scaling: temperature (a number or ``[N]``), softcap, ref_softcap, logit_scale, ref_logit_scale.

    Returns:
        value ``[N]``, stats ``[5, N]`` (max and logsum of both streams, the mean that backward subtracts), in fp32, or
        fp64 when a stream is fp64.
    """
    logits, ref_logits = launch.unit_columns(logits), launch.unit_columns(ref_logits)
    num_rows = logits.shape[0]
    dtype = torch.float64 if torch.float64 in (logits.dtype, ref_logits.dtype) else torch.float32
    value = torch.empty(num_rows, dtype=dtype, device=logits.device)
    stats = torch.empty(5, num_rows, dtype=dtype, device=logits.device)
    if num_rows:
        with launch.device(logits):
            divergence_forward_kernel[(num_rows,)](
                stats_ptr=stats,
                value_ptr=value,
                **_arguments(logits, ref_logits, labels, kind, mix, [], **scaling),
                **launch.options(logits),
            )
    return value, stats


def backward(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad: Tensor,
    *,
    kind: str,
    mix: float = 0.5,
    **scaling: Any,
) -> None:
    """Write the gradient of ``grad . value`` with respect to the logits into ``out``, which may be ``logits``.

    Args:
        out: ``[N, V]``, written whole; rows that are masked or have ``grad`` 0 get zeros without being read.
        logits, ref_logits, labels, kind, mix, scaling: as given to `forward`; a slab of the columns will do.
        stats: ``[5, N]`` from `forward`.
        grad: ``[N]``.
    """
    target = launch.unit_columns(out)
    logits, ref_logits = launch.unit_columns(logits), launch.unit_columns(ref_logits)
    if logits.shape[0]:
        with launch.device(logits):
            divergence_backward_kernel[(logits.shape[0],)](
                out_ptr=target,
                stats_ptr=stats.contiguous(),
                grad_ptr=grad.contiguous(),
                out_stride=target.stride(0),
                **_arguments(logits, ref_logits, labels, kind, mix, [target.stride(0)], **scaling),
                **launch.options(logits),
            )
    if target is not out:
        out.copy_(target)


def _arguments(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    kind: str,
    mix: float,
    strides: list[int],
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    num_rows, vocab_size = logits.shape
    rows, log_cols = tile(vocab_size, logits.dtype if logits.itemsize >= ref_logits.itemsize else ref_logits.dtype)
    rows = min(rows, 2 if logits.dtype == ref_logits.dtype else 1)  # two streams share the registers
    per_row = temperature.contiguous() if isinstance(temperature, Tensor) else None
    itemsize = min(logits.itemsize, ref_logits.itemsize)  # the widest load counts most elements
    return {
        "logits_ptr": logits,
        "ref_logits_ptr": ref_logits,
        "labels_ptr": labels.contiguous(),
        "row_temperature_ptr": per_row,
        "num_rows": num_rows,
        "vocab_size": vocab_size,
        "row_stride": logits.stride(0),
        "ref_row_stride": ref_logits.stride(0),
        "mix": float(mix),
        "temperature": 1.0 if isinstance(temperature, Tensor) else float(temperature),
        "softcap": 1.0 if softcap is None else float(softcap),
        "ref_softcap": 1.0 if ref_softcap is None else float(ref_softcap),
        "logit_scale": float(logit_scale),
        "ref_logit_scale": float(ref_logit_scale),
        "KIND": KINDS[kind],
        "HAS_SOFTCAP": softcap is not None,
        "HAS_REF_SOFTCAP": ref_softcap is not None,
        "ROWS": rows,
        "LOG_COLS": log_cols,
        "STRIDE_ALIGN": launch.alignment(itemsize, logits.stride(0), ref_logits.stride(0), *strides),
        "VOCAB_ALIGN": launch.alignment(itemsize, vocab_size),
    }
