"""What the kernels of ``divergence`` do with a tile of two rows: reading, running sums, mixture, gradient."""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from fastalign_kernels.rows import _exp, _factors, _scaled, _sum_lanes

FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
MIXTURE: tl.constexpr = tl.constexpr(3)
"""The second walk of JSD alone, over columns whose normalisers are given: a slab of the vocabulary, perhaps."""


@triton.jit
def _row_factors(row, row_temperature_ptr, scales, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, dtype: tl.constexpr):
    """inner and outer of ``_factors`` for the policy, then for the reference."""
    tau, cap, ref_cap, scale, ref_scale = scales
    inner, outer = _factors(row, row_temperature_ptr, tau, cap, scale, CAPPED, dtype)
    ref_inner, ref_outer = _factors(row, row_temperature_ptr, tau, ref_cap, ref_scale, REF_CAPPED, dtype)
    return inner, outer, ref_inner, ref_outer


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
    top = tl.where(total == total, top, total)  # beside a NaN it may be -inf, which would say that all is banned
    ref_top = tl.where(ref_total == ref_total, ref_top, ref_total)
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


@triton.jit
def _pair(z_ptr, q_ptr, col, vocab_size, factors, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """A tile of both streams: z, its slope, q."""
    z, slope = _load_row(z_ptr, col, vocab_size, factors[0], factors[1], CAPPED, MASKED)
    q, _ = _load_row(q_ptr, col, vocab_size, factors[2], factors[3], REF_CAPPED, MASKED)
    return z, slope, q


@triton.jit
def _divergence(
    z_ptr,
    q_ptr,
    vocab_size,
    factors,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
):
    """One walk over a pair of rows: max and logsum of z and of q, and (no meaning for JSD) the divergence."""
    COLS: tl.constexpr = 1 << LOG_COLS
    m = tl.full((COLS,), float("-inf"), factors[0].dtype)
    n = tl.full((COLS,), float("-inf"), factors[0].dtype)
    s = tl.zeros((COLS,), factors[0].dtype)
    t = tl.zeros((COLS,), factors[0].dtype)
    w = tl.zeros((COLS,), factors[0].dtype)
    lane = tl.arange(0, COLS)[None, :]
    spot = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    for start in range(0, whole, ROWS * COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + spot, vocab_size, factors, CAPPED, REF_CAPPED, False)
        if KIND == FORWARD_KL:
            m, s, n, t, w = _fold(m, s, n, t, w, q, z, True)
        else:
            m, s, n, t, w = _fold(m, s, n, t, w, z, q, KIND == REVERSE_KL)
    for start in range(whole, vocab_size, COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + lane, vocab_size, factors, CAPPED, REF_CAPPED, True)
        if KIND == FORWARD_KL:
            m, s, n, t, w = _fold(m, s, n, t, w, q, z, True)
        else:
            m, s, n, t, w = _fold(m, s, n, t, w, z, q, KIND == REVERSE_KL)
    if KIND == FORWARD_KL:
        ref_top, ref_logsum, top, logsum, value = _combine(m, s, n, t, w, LOG_COLS)
    else:
        top, logsum, ref_top, ref_logsum, value = _combine(m, s, n, t, w, LOG_COLS)
    return top, logsum, ref_top, ref_logsum, value


@triton.jit
def _mixture(
    z_ptr,
    q_ptr,
    vocab_size,
    factors,
    norms,
    mix,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
):
    """One walk over a pair of rows whose normalisers are known: sum p ln(p / M) and sum pi ln(pi / M)."""
    COLS: tl.constexpr = 1 << LOG_COLS
    top, logsum, ref_top, ref_logsum = norms
    s = tl.zeros((COLS,), top.dtype)
    t = tl.zeros((COLS,), top.dtype)
    lane = tl.arange(0, COLS)[None, :]
    spot = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    for start in range(0, whole, ROWS * COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + spot, vocab_size, factors, CAPPED, REF_CAPPED, False)
        s, t = _fold_mixture(s, t, (z - top) - logsum, (q - ref_top) - ref_logsum, mix)
    for start in range(whole, vocab_size, COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + lane, vocab_size, factors, CAPPED, REF_CAPPED, True)
        s, t = _fold_mixture(s, t, (z - top) - logsum, (q - ref_top) - ref_logsum, mix)
    return _sum_lanes(s, LOG_COLS), _sum_lanes(t, LOG_COLS)


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
