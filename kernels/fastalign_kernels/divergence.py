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
    FORWARD_KL,
    JSD,
    MIXTURE,
    REVERSE_KL,
    _divergence,
    _gradient,
    _mixture,
    _pair,
    _row_factors,
)
from fastalign_kernels.rows import ELSEWHERE, IGNORE, tile

KINDS = {"forward_kl": FORWARD_KL.value, "reverse_kl": REVERSE_KL.value, "jsd": JSD.value, "mixture": MIXTURE.value}

# Neither another shape nor a slice of the rows compiles a kernel again.
SIZES = ["num_rows", "vocab_size", "row_stride", "ref_row_stride"]
ROW_VECTORS = ["labels_ptr", "row_temperature_ptr", "stats_ptr"]


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
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Value and statistics of one pair of rows: one read of both, two for JSD, none when the row is masked.

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
            top, logsum, ref_top, ref_logsum, value = _divergence(
                z_ptr, q_ptr, vocab_size, factors, KIND, CAPPED, REF_CAPPED, ROWS, LOG_COLS
            )
            pull = value
        if (KIND == JSD) | (KIND == MIXTURE):
            norms = (top, logsum, ref_top, ref_logsum)
            share = tl.full((), mix, dtype)
            pull, value = _mixture(z_ptr, q_ptr, vocab_size, factors, norms, share, CAPPED, REF_CAPPED, ROWS, LOG_COLS)
            if KIND == JSD:
                value = share * value + (1 - share) * pull
        value = tl.where((label >= ELSEWHERE) & (label < vocab_size), value, float("nan"))
    tl.store(value_ptr + row, value)
    if KIND == MIXTURE:
        tl.store(value_ptr + pitch + row, pull)
    else:
        tl.store(place, top)
        tl.store(place + pitch, logsum)
        tl.store(place + 2 * pitch, ref_top)
        tl.store(place + 3 * pitch, ref_logsum)
        tl.store(place + 4 * pitch, pull)


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
    g = tl.load(grad_ptr + row).to(dtype)
    if (label == IGNORE) | (g == 0):
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
        g = tl.where((label >= ELSEWHERE) & (label < vocab_size), g, float("nan"))
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
            z, slope, q = _pair(z_ptr, q_ptr, col, vocab_size, factors, CAPPED, REF_CAPPED, False)
            dz = _gradient(z, q, g, top, logsum, ref_top, ref_logsum, pull, share, KIND)
            tl.store(out_row_ptr + col, (dz * slope).to(out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            z, slope, q = _pair(z_ptr, q_ptr, col, vocab_size, factors, CAPPED, REF_CAPPED, True)
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
        "CAPPED": softcap is not None,
        "REF_CAPPED": ref_softcap is not None,
        "ROWS": rows,
        "LOG_COLS": log_cols,
        "STRIDE_ALIGN": launch.alignment(itemsize, logits.stride(0), ref_logits.stride(0), *strides),
        "VOCAB_ALIGN": launch.alignment(itemsize, vocab_size),
    }
