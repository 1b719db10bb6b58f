"""Log-probability and entropy of the label in each row of logits, and the gradient with respect to the logits.

Each kernel gives a row to one program. The program walks the row in tiles of ``ROWS x COLS`` neighbouring columns; each
of the COLS lanes keeps its own running maximum and sums, and the lanes meet once, when the row ends. Whole tiles carry
no mask; the rest of the row is walked in masked tiles of ``1 x COLS``. A column's place in the sums follows from its
index, the vocabulary and the dtype, and no tile holds two rows: a row has the same bits alone and in any batch, at any
alignment.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

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

# Neither another shape nor a slice of the rows compiles a kernel again.
SIZES = ["vocab_size", "row_stride"]
ROW_VECTORS = ["labels_ptr", "row_temperature_ptr", "entropy_ptr", "max_ptr", "logsum_ptr"]
GRADIENTS = ["grad_logps_ptr", "grad_entropy_ptr"]


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
def _update(m, s, t, z, ENTROPY: tl.constexpr):
    """Fold a tile into the lanes: m = max z, s = sum exp(z - m), t = sum exp(z - m) (z - m)."""
    top = tl.maximum(m, tl.max(z, 0))
    reference = tl.where(top == float("-inf"), 0.0, top)  # a lane of banned columns only: -inf - -inf is NaN
    shift = m - reference
    decay = _exp(shift)
    offset = z - reference[None, :]
    weight = _exp(offset)
    if ENTROPY:
        t = (t + s * tl.maximum(shift, FLOOR)) * decay + tl.sum(weight * tl.maximum(offset, FLOOR), 0)
    s = s * decay + tl.sum(weight, 0)
    return top, s, t


@triton.jit
def _sum_lanes(x, LOG_COLS: tl.constexpr):
    """Sum of ``2^LOG_COLS`` lanes neighbour with neighbour: an order that no memory layout can change."""
    for step in tl.static_range(LOG_COLS):
        x = tl.sum(tl.reshape(x, (1 << (LOG_COLS - 1 - step), 2)), 1)
    return tl.sum(x, 0)


@triton.jit
def _combine(m, s, t, ENTROPY: tl.constexpr, LOG_COLS: tl.constexpr):
    """The row's maximum, logsum and entropy from its lanes."""
    top = tl.max(m, 0)
    shift = m - tl.where(top == float("-inf"), 0.0, top)
    decay = _exp(shift)
    total = _sum_lanes(s * decay, LOG_COLS)
    logsum = tl.log(total)
    entropy = logsum
    if ENTROPY:
        entropy -= _sum_lanes((t + s * tl.maximum(shift, FLOOR)) * decay, LOG_COLS) / total
    return top, logsum, entropy


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*ROW_VECTORS, "logps_ptr"])
def forward_kernel(
    logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    logsum_ptr,
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
    # The compiler learns the alignment from the last factor, and so how wide a load may be.
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logp = tl.full((), 0.0, dtype)
    top = logp
    logsum = logp
    entropy = logp
    if label != IGNORE:
        row_ptr = logits_ptr + row * row_stride
        inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
        m = tl.full((COLS,), float("-inf"), dtype)
        s = tl.zeros((COLS,), dtype)
        t = tl.zeros((COLS,), dtype)
        lane = tl.arange(0, COLS)[None, :]
        tile = tl.arange(0, ROWS)[:, None] * COLS + lane
        whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
        for start in range(0, whole, ROWS * COLS):
            x = tl.load(row_ptr + start + tile, eviction_policy="evict_first")
            z, _ = _scaled(x, inner, outer, HAS_SOFTCAP)
            m, s, t = _update(m, s, t, z, ENTROPY)
        for start in range(whole, vocab_size, COLS):
            mask = start + lane < vocab_size
            x = tl.load(row_ptr + start + lane, mask=mask, other=0.0, eviction_policy="evict_first")
            z, _ = _scaled(x, inner, outer, HAS_SOFTCAP)
            m, s, t = _update(m, s, t, tl.where(mask, z, float("-inf")), ENTROPY)
        top, logsum, entropy = _combine(m, s, t, ENTROPY, LOG_COLS)
        inside = (label >= 0) & (label < vocab_size)
        target, _ = _scaled(tl.load(row_ptr + label, mask=inside, other=0.0), inner, outer, HAS_SOFTCAP)
        logp = tl.where(label == ELSEWHERE, 0.0, tl.where(inside, (target - top) - logsum, float("nan")))
    tl.store(logps_ptr + row, logp)
    tl.store(max_ptr + row, top)
    tl.store(logsum_ptr + row, logsum)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def _gradient(x, col, target, g, e, top, logsum, entropy, inner, outer, HAS_SOFTCAP: tl.constexpr, HAS_E: tl.constexpr):
    """Gradient of g * logp + e * entropy with respect to a tile of logits."""
    z, slope = _scaled(x, inner, outer, HAS_SOFTCAP)
    log_p = (z - top) - logsum
    coefficient = -g
    if HAS_E:
        coefficient -= e * (tl.maximum(log_p, FLOOR) + entropy)
    return (_exp(log_p) * coefficient + tl.where(col == target, g, 0.0)) * slope


@triton.jit(do_not_specialize=[*SIZES, "out_stride"], do_not_specialize_on_alignment=[*ROW_VECTORS, *GRADIENTS])
def backward_kernel(
    out_ptr,
    logits_ptr,
    labels_ptr,
    row_temperature_ptr,
    max_ptr,
    logsum_ptr,
    entropy_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,
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
    HAS_E: tl.constexpr = grad_entropy_ptr is not None
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    out_stride = out_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row * out_stride
    lane = tl.arange(0, COLS)[None, :]
    tile = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    label = tl.load(labels_ptr + row)
    g = tl.load(grad_logps_ptr + row).to(dtype)
    e = tl.full((), 0.0, dtype)
    if HAS_E:
        e = tl.load(grad_entropy_ptr + row).to(dtype)
    if (label == IGNORE) | ((g == 0) & (e == 0)):
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
        entropy = e
        if HAS_E:
            entropy = tl.load(entropy_ptr + row)
        inside = (label >= 0) & (label < vocab_size)
        target = tl.where(inside, label, ELSEWHERE).to(tl.int32)
        g = tl.where(inside | (label == ELSEWHERE), g, float("nan"))
        for start in range(0, whole, ROWS * COLS):
            col = start + tile
            x = tl.load(row_ptr + col, eviction_policy="evict_first")
            dx = _gradient(x, col, target, g, e, top, logsum, entropy, inner, outer, HAS_SOFTCAP, HAS_E)
            tl.store(out_row_ptr + col, dx.to(out_dtype))
        for start in range(whole, vocab_size, COLS):
            col = start + lane
            mask = col < vocab_size
            x = tl.load(row_ptr + col, mask=mask, other=0.0, eviction_policy="evict_first")
            dx = _gradient(x, col, target, g, e, top, logsum, entropy, inner, outer, HAS_SOFTCAP, HAS_E)
            tl.store(out_row_ptr + col, dx.to(out_dtype), mask=mask)


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


def forward(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probability of each row's label, entropy, and the statistics that `backward` needs.

    With z = softcap(logit_scale * logits) / temperature: max = max_v z_v, logsum = ln sum_v exp(z_v - max),
    logp = (z_label - max) - logsum, entropy = logsum - sum_v p_v (z_v - max).

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64; copied when its columns are not adjacent.
        labels: ``[N]`` int32 or int64. -100: the row is not read and its outputs are 0. -1: the label lies in another
            slab of the vocabulary, logp is 0. Any other label outside ``[0, V)``: logp is NaN.
        temperature: one value, as a number or a tensor, or ``[N]``.
        softcap: the bound of ``softcap * tanh(x / softcap)``, or None.
        logit_scale: factor of the logits.
        entropy: whether to compute the entropy, in nats.

    Returns:
        logps, entropy or None, max, logsum: ``[N]`` fp32, or fp64 for fp64 logits.
    """
    logits = launch.unit_columns(logits)
    num_rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps, top, logsum = (torch.empty(num_rows, dtype=dtype, device=logits.device) for _ in range(3))
    entropies = torch.empty_like(logps) if entropy else None
    if num_rows:
        with launch.device(logits):
            forward_kernel[(num_rows,)](
                logits_ptr=logits,
                labels_ptr=labels.contiguous(),
                logps_ptr=logps,
                entropy_ptr=entropies,
                max_ptr=top,
                logsum_ptr=logsum,
                row_stride=logits.stride(0),
                **arguments(logits, [logits.stride(0)], temperature, softcap, logit_scale),
                **launch.options(logits),
            )
    return logps, entropies, top, logsum


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    logsum: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Write the gradient of ``grad_logps . logps + grad_entropy . entropy`` with respect to the logits into ``out``.

    With p = exp((z - max) - logsum), g and e the row's coefficients, y its label and H its entropy:
    dz_v = g (1[v = y] - p_v) - e p_v (ln p_v + H), and d logits = dz * logit_scale / temperature * (1 - tanh^2).

    Args:
        out: ``[N, V]``, written whole; may be ``logits``.
        logits, labels: as given to `forward`. A row labelled -100, or whose coefficients are zero, is not read and gets
            zeros; with label -1 it has no target term; with any other label outside ``[0, V)`` it gets NaN.
        max, logsum, entropy: ``[N]`` as returned by `forward`; entropy only with ``grad_entropy``.
        grad_logps, grad_entropy: ``[N]`` coefficients; ``grad_entropy`` may be None.
        temperature, softcap, logit_scale: as given to `forward`.

    Raises:
        ValueError: ``grad_entropy`` without ``entropy``.
    """
    if grad_entropy is not None and entropy is None:
        raise ValueError("grad_entropy needs the entropy of the forward: call forward with entropy=True")
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
                entropy_ptr=entropy if grad_entropy is not None else None,
                grad_logps_ptr=grad_logps.contiguous(),
                grad_entropy_ptr=grad_entropy.contiguous() if grad_entropy is not None else None,
                out_stride=target.stride(0),
                row_stride=logits.stride(0),
                **arguments(logits, strides, temperature, softcap, logit_scale),
                **launch.options(logits),
            )
    if target is not out:
        out.copy_(target)
