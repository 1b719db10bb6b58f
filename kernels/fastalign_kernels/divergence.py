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
from fastalign_kernels.divergence_tiles import (
    JSD,
    KINDS,
    MIXTURE,
    _at_label,
    _divergence,
    _label_logp,
    _mixture,
    _pair,
    _pair_gradient,
    _row_factors,
    _settled,
)
from fastalign_kernels.rows import COEFFICIENTS, ELSEWHERE, IGNORE, tile

# Neither another shape nor a slice of the rows compiles a kernel again.
SIZES = ["num_rows", "vocab_size", "row_stride", "ref_row_stride"]
ROW_VECTORS = ["labels_ptr", "row_temperature_ptr", "stats_ptr"]
TOKENS = ["logps_ptr", "entropy_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*ROW_VECTORS, "value_ptr", *TOKENS])
def divergence_forward_kernel(
    logits_ptr,
    ref_logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    stats_ptr,
    value_ptr,
    logps_ptr,
    entropy_ptr,
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
    APART: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Value and statistics of one pair of rows: one read of both, two for JSD, none when the row is masked.

    A KL whose second row bans a column takes one more. APART: what ``_apart`` says of these columns.

    The log-probs of the label under both, and the policy's entropy, where there is room for them.
    MIXTURE reads the statistics instead, and writes both of JSD's sums.
    """
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    ref_row_stride = ref_row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    place = stats_ptr + row
    pitch = tl.cast(num_rows, tl.int64)
    zero = tl.full((), 0.0, dtype)
    top, logsum, ref_top, ref_logsum, value, pull = zero, zero, zero, zero, zero, zero
    entropy, logp, ref_logp = zero, zero, zero
    banned = tl.full((), float("-inf"), dtype)
    label = tl.load(labels_ptr + row)
    if label != IGNORE:
        z_ptr = logits_ptr + row * row_stride
        q_ptr = ref_logits_ptr + row * ref_row_stride
        scales = (temperature, softcap, ref_softcap, logit_scale, ref_logit_scale)
        factors = _row_factors(row, row_temperature_ptr, scales, CAPPED, REF_CAPPED, dtype)
        if KIND == MIXTURE:
            top, logsum = tl.load(place), tl.load(place + pitch)
            ref_top, ref_logsum = tl.load(place + 2 * pitch), tl.load(place + 3 * pitch)
        else:
            top, logsum, ref_top, ref_logsum, value, entropy = _divergence(
                z_ptr, q_ptr, vocab_size, factors, KIND, entropy_ptr is not None, CAPPED, REF_CAPPED, ROWS, LOG_COLS
            )
            if KIND != JSD:
                sums = (value, top, logsum, ref_top, ref_logsum)
                value, banned = _settled(
                    z_ptr, q_ptr, vocab_size, factors, sums, KIND, APART, CAPPED, REF_CAPPED, LOG_COLS
                )
            pull = value
        if logps_ptr is not None:
            logp = _label_logp(z_ptr, label, vocab_size, factors[0], factors[1], top, logsum, CAPPED)
            ref_logp = _label_logp(q_ptr, label, vocab_size, factors[2], factors[3], ref_top, ref_logsum, REF_CAPPED)
        if (KIND == JSD) | (KIND == MIXTURE):
            norms = (top, logsum, ref_top, ref_logsum)
            share = tl.full((), mix, dtype)
            pull, value = _mixture(z_ptr, q_ptr, vocab_size, factors, norms, share, CAPPED, REF_CAPPED, ROWS, LOG_COLS)
            if KIND == JSD:
                value = share * value + (1 - share) * pull
        value = tl.where((label >= ELSEWHERE) & (label < vocab_size), value, float("nan"))
    tl.store(value_ptr + row, value)
    if APART:
        tl.store(value_ptr + pitch + row, banned)
    if KIND == MIXTURE:
        tl.store(value_ptr + pitch + row, pull)
    else:
        tl.store(place, top)
        tl.store(place + pitch, logsum)
        tl.store(place + 2 * pitch, ref_top)
        tl.store(place + 3 * pitch, ref_logsum)
        tl.store(place + 4 * pitch, pull)
    if logps_ptr is not None:
        tl.store(logps_ptr + row, logp)
        tl.store(logps_ptr + pitch + row, ref_logp)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(
    do_not_specialize=[*SIZES, "out_stride"], do_not_specialize_on_alignment=[*ROW_VECTORS, "grad_ptr", *COEFFICIENTS]
)
def divergence_backward_kernel(
    out_ptr,
    logits_ptr,
    ref_logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    stats_ptr,
    grad_ptr,
    g_ptr,
    alpha_ptr,
    beta_ptr,
    delta_ptr,
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
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Gradient of one row: one read of both streams, or none when it is zero, and one write; in place if wanted."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    COLS: tl.constexpr = 1 << LOG_COLS
    ALGEBRA: tl.constexpr = g_ptr is not None
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    ref_row_stride = ref_row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    out_stride = out_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * out_stride
    lane = tl.arange(0, COLS)[None, :]
    spot = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    label = tl.load(labels_ptr + row)
    d = tl.load(grad_ptr + row).to(dtype)
    g = tl.full((), 0.0, dtype)
    alpha, beta, delta = g, g, g
    if ALGEBRA:
        g = tl.load(g_ptr + row).to(dtype)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + row).to(dtype)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + row).to(dtype)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row).to(dtype)
    if (label == IGNORE) | ((d == 0) & (g == 0) & (alpha == 0) & (beta == 0) & (delta == 0)):
        for start in range(0, whole, ROWS * COLS):
            tl.store(out_row_ptr + start + spot, tl.zeros((ROWS, COLS), out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            tl.store(out_row_ptr + col, tl.zeros((1, COLS), out_dtype), mask=col < vocab_size)
    else:
        z_ptr = logits_ptr + row * row_stride
        q_ptr = ref_logits_ptr + row * ref_row_stride
        scales = (temperature, softcap, ref_softcap, logit_scale, ref_logit_scale)
        factors = _row_factors(row, row_temperature_ptr, scales, CAPPED, REF_CAPPED, dtype)
        place = stats_ptr + row
        pitch = tl.cast(num_rows, tl.int64)
        top, logsum = tl.load(place), tl.load(place + pitch)
        norms = (top, logsum, tl.load(place + 2 * pitch), tl.load(place + 3 * pitch), tl.load(place + 4 * pitch))
        share = tl.full((), mix, dtype)
        valid = (label >= ELSEWHERE) & (label < vocab_size)
        target = tl.where(valid, label, ELSEWHERE).to(tl.int32)
        algebra = (g, g, g, g)
        if ALGEBRA:
            at_label = _at_label(
                _label_logp(z_ptr, label, vocab_size, factors[0], factors[1], top, logsum, CAPPED),
                g,
                alpha,
                beta,
                delta,
            )
            algebra = (at_label, tl.where(valid, alpha - g, float("nan")), beta, delta)
            tl.debug_barrier()  # every thread has read the label's logit before any overwrites it
        else:
            d = tl.where(valid, d, float("nan"))
        for start in range(0, whole, ROWS * COLS):
            col = start + spot
            z, slope, q = _pair(z_ptr, q_ptr, col, vocab_size, factors, CAPPED, REF_CAPPED, False)
            dz = _pair_gradient(z, q, col, d, norms, share, target, algebra, KIND, ALGEBRA)
            tl.store(out_row_ptr + col, (dz * slope).to(out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            z, slope, q = _pair(z_ptr, q_ptr, col, vocab_size, factors, CAPPED, REF_CAPPED, True)
            dz = _pair_gradient(z, q, col, d, norms, share, target, algebra, KIND, ALGEBRA)
            tl.store(out_row_ptr + col, (dz * slope).to(out_dtype), mask=col < vocab_size)


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    kind: str,
    mix: float = 0.5,
    tokens: bool = False,
    entropy: bool = False,
    apart: bool = False,
    **scaling: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The divergence of each row of ``logits`` from the same row of ``ref_logits``, and what `backward` needs.

    Args:
        logits, ref_logits: ``[N, V]`` of any float dtypes; copied when their columns are not adjacent.
        labels: ``[N]``; -100: the row is not read and its outputs are 0; -1: the label lies in another slab.
        kind: "forward_kl" KL(pi || p), "reverse_kl" KL(p || pi), or "jsd" with the reference's weight ``mix``.
        tokens, entropy: whether to return the label's log-probs, and the policy's entropy.
        apart: value is ``[2, N]``; see ``fastalign.ops.backends.torch.divergence.forward``.
        scaling: temperature (a number or ``[N]``), softcap, ref_softcap, logit_scale, ref_logit_scale.

    Returns:
        value ``[N]``; stats ``[5, N]``, max and logsum of both streams and the mean that backward subtracts; logps
        ``[2, N]`` under policy and reference, or None; entropy ``[N]`` or None; in fp32, or fp64 when a stream is fp64.
    """
    logits, ref_logits = launch.unit_columns(logits), launch.unit_columns(ref_logits)
    num_rows = logits.shape[0]
    dtype = torch.float64 if torch.float64 in (logits.dtype, ref_logits.dtype) else torch.float32
    value = torch.empty((2, num_rows) if apart else num_rows, dtype=dtype, device=logits.device)
    stats, entropies = value.new_empty(5, num_rows), value.new_empty(num_rows) if entropy else None
    logps = value.new_empty(2, num_rows) if tokens else None
    if num_rows:
        with launch.device(logits):
            divergence_forward_kernel[(num_rows,)](
                stats_ptr=stats,
                value_ptr=value,
                logps_ptr=logps,
                entropy_ptr=entropies,
                APART=apart,
                **_arguments(logits, ref_logits, labels, kind, mix, [], **scaling),
                **launch.options(logits),
            )
    return value, stats, logps, entropies


def mixture(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, stats: Tensor, *, mix: float = 0.5, **scaling: Any
) -> Tensor:
    """The sums that make the Jensen-Shannon divergence, over columns that may be a slab of the vocabulary.

    Args:
        logits, ref_logits, labels, mix, scaling: as given to `forward`.
        stats: ``[5, N]``, max and logsum of both streams over the whole vocabulary; its last row is not read.

    Returns:
        ``[2, N]`` of the dtype of ``stats``: sum pi ln(pi / M) and sum p ln(p / M).
    """
    logits, ref_logits = launch.unit_columns(logits), launch.unit_columns(ref_logits)
    sums = stats.new_empty(2, len(labels))
    if len(labels):
        with launch.device(logits):
            divergence_forward_kernel[(len(labels),)](
                stats_ptr=stats.contiguous(),
                value_ptr=sums,
                logps_ptr=None,
                entropy_ptr=None,
                APART=False,
                **_arguments(logits, ref_logits, labels, "mixture", mix, [], **scaling),
                **launch.options(logits),
            )
    return sums


def backward(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad: Tensor,
    coefficients: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None = None,
    *,
    kind: str,
    mix: float = 0.5,
    **scaling: Any,
) -> None:
    """Write the gradient of ``grad . value`` with respect to the logits into ``out``, which may be ``logits``.

    The coefficients of ``token_logps`` add g (1[v = y] - p_v) + p_v (alpha + beta ln p_v) + delta to dz_v.

    Args:
        out: ``[N, V]``, written whole; rows that are masked or have zeros only get zeros without being read.
        logits, ref_logits, labels, kind, mix, scaling: as given to `forward`; a slab of the columns will do.
        stats: ``[5, N]`` from `forward`.
        grad: ``[N]``.
        coefficients: g, alpha, beta, delta, each ``[N]``; all but g may be None: 0 everywhere.
    """
    g, alpha, beta, delta = (x if x is None else x.contiguous() for x in coefficients or (None,) * 4)
    target = launch.unit_columns(out)
    logits, ref_logits = launch.unit_columns(logits), launch.unit_columns(ref_logits)
    if logits.shape[0]:
        with launch.device(logits):
            divergence_backward_kernel[(logits.shape[0],)](
                out_ptr=target,
                stats_ptr=stats.contiguous(),
                grad_ptr=grad.contiguous(),
                g_ptr=g,
                alpha_ptr=alpha,
                beta_ptr=beta,
                delta_ptr=delta,
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
    light = logits.dtype == ref_logits.dtype != torch.float64
    rows = min(rows, 2 if light else 1)  # two streams share the registers
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
        "CAPPED": softcap is not None,
        "REF_CAPPED": ref_softcap is not None,
        "ROWS": rows,
        "LOG_COLS": log_cols,
        "STRIDE_ALIGN": launch.alignment(itemsize, logits.stride(0), ref_logits.stride(0), *strides),
        "VOCAB_ALIGN": launch.alignment(itemsize, vocab_size),
    }
