"""What the kernels of ``divergence`` do with a tile of two rows: reading, running sums, mixture, gradient."""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from fastalign_kernels.rows import ELSEWHERE, FLOOR, _exp, _expm1, _factors, _scaled, _sum_lanes

FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
NEGLIGIBLE: tl.constexpr = tl.constexpr(-87.0)
"""The least ln p with a share in a divergence; see ``fastalign.ops.rows``."""
MIXTURE: tl.constexpr = tl.constexpr(3)
"""The second walk of JSD alone, over columns whose normalisers are given: a slab of the vocabulary, perhaps."""
KINDS = {"forward_kl": FORWARD_KL.value, "reverse_kl": REVERSE_KL.value, "jsd": JSD.value, "mixture": MIXTURE.value}


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
def _weigh(e, s, shift, decay, weight, offset):
    """Fold a tile into e = sum exp(z - m) (z - m), for the entropy."""
    return (e + s * tl.maximum(shift, FLOOR)) * decay + tl.sum(weight * tl.maximum(offset, FLOOR), 0)


@triton.jit
def _fold(m, s, n, t, w, e, a, b, CROSS: tl.constexpr, ENTROPY: tl.constexpr):
    """Fold a tile into the lanes: maxima m, n, sums s, t; with CROSS w = sum exp(a - m) ((a - m) - (b - n)).

    ENTROPY: which stream e is of, 1 or 2; 0 for none.
    """
    top = tl.maximum(m, tl.max(a, 0))
    ref_top = tl.maximum(n, tl.max(b, 0))
    decay = _exp(m - _finite(top))
    ref_decay = _exp(n - _finite(ref_top))
    offset = a - _finite(top)[None, :]
    ref_offset = b - _finite(ref_top)[None, :]
    weight = _exp(offset)
    ref_weight = _exp(ref_offset)
    if CROSS:
        shift = (_finite(m) - _finite(top)) - (_finite(n) - _finite(ref_top))
        share = tl.where(weight > 0, weight * (offset - ref_offset), 0.0)
        w = tl.where(decay > 0, (w + s * shift) * decay, 0.0) + tl.sum(share, 0)
    if ENTROPY == 1:
        e = _weigh(e, s, m - _finite(top), decay, weight, offset)
    elif ENTROPY == 2:
        e = _weigh(e, t, n - _finite(ref_top), ref_decay, ref_weight, ref_offset)
    s = s * decay + tl.sum(weight, 0)
    t = t * ref_decay + tl.sum(ref_weight, 0)
    return top, s, ref_top, t, w, e


@triton.jit
def _combine(m, s, n, t, w, e, ENTROPY: tl.constexpr, LOG_COLS: tl.constexpr):
    """Both streams' maximum and logsum, the divergence of the first from the second, and an entropy, from the lanes."""
    top = tl.max(m, 0)
    ref_top = tl.max(n, 0)
    decay = _exp(m - _finite(top))
    ref_decay = _exp(n - _finite(ref_top))
    shift = (_finite(m) - _finite(top)) - (_finite(n) - _finite(ref_top))
    total = _sum_lanes(s * decay, LOG_COLS)
    ref_total = _sum_lanes(t * ref_decay, LOG_COLS)
    cross = _sum_lanes(tl.where(decay > 0, (w + s * shift) * decay, 0.0), LOG_COLS)
    logsum = tl.log(total)
    ref_logsum = tl.log(ref_total)
    entropy = logsum
    if ENTROPY == 1:
        entropy -= _sum_lanes((e + s * tl.maximum(m - _finite(top), FLOOR)) * decay, LOG_COLS) / total
    elif ENTROPY == 2:
        weighed = (e + t * tl.maximum(n - _finite(ref_top), FLOOR)) * ref_decay
        entropy = ref_logsum - _sum_lanes(weighed, LOG_COLS) / ref_total
    top = tl.where(total == total, top, total)  # beside a NaN it may be -inf, which would say that all is banned
    ref_top = tl.where(ref_total == ref_total, ref_top, ref_total)
    return top, logsum, ref_top, ref_logsum, cross / total + (ref_logsum - logsum), entropy


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
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_COLS: tl.constexpr,
):
    """One walk over a pair of rows: max and logsum of z and of q, (no meaning for JSD) the divergence, z's entropy."""
    COLS: tl.constexpr = 1 << LOG_COLS
    CROSS: tl.constexpr = KIND != JSD
    FIRST: tl.constexpr = 1 if ENTROPY else 0  # of the streams as _fold is given them
    SECOND: tl.constexpr = 2 if ENTROPY else 0
    m = tl.full((COLS,), float("-inf"), factors[0].dtype)
    n = tl.full((COLS,), float("-inf"), factors[0].dtype)
    s = tl.zeros((COLS,), factors[0].dtype)
    t = tl.zeros((COLS,), factors[0].dtype)
    w = tl.zeros((COLS,), factors[0].dtype)
    e = tl.zeros((COLS,), factors[0].dtype)
    lane = tl.arange(0, COLS)[None, :]
    spot = tl.arange(0, ROWS)[:, None] * COLS + lane
    whole = vocab_size // (ROWS * COLS) * (ROWS * COLS)
    for start in range(0, whole, ROWS * COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + spot, vocab_size, factors, CAPPED, REF_CAPPED, False)
        if KIND == FORWARD_KL:
            m, s, n, t, w, e = _fold(m, s, n, t, w, e, q, z, True, SECOND)
        else:
            m, s, n, t, w, e = _fold(m, s, n, t, w, e, z, q, CROSS, FIRST)
    for start in range(whole, vocab_size, COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + lane, vocab_size, factors, CAPPED, REF_CAPPED, True)
        if KIND == FORWARD_KL:
            m, s, n, t, w, e = _fold(m, s, n, t, w, e, q, z, True, SECOND)
        else:
            m, s, n, t, w, e = _fold(m, s, n, t, w, e, z, q, CROSS, FIRST)
    if KIND == FORWARD_KL:
        ref_top, ref_logsum, top, logsum, value, entropy = _combine(m, s, n, t, w, e, SECOND, LOG_COLS)
    else:
        top, logsum, ref_top, ref_logsum, value, entropy = _combine(m, s, n, t, w, e, FIRST, LOG_COLS)
    return top, logsum, ref_top, ref_logsum, value, entropy


@triton.jit
def _apart(
    z_ptr,
    q_ptr,
    vocab_size,
    factors,
    norms,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    LOG_COLS: tl.constexpr,
):
    """A second walk, where the second row bans a column: its probability in the first row needs that row's maximum.

    Returns the sum without banned columns, and the largest ln of the first row's probability among them.
    """
    COLS: tl.constexpr = 1 << LOG_COLS
    top, logsum, ref_top, ref_logsum = norms
    s = tl.zeros((COLS,), top.dtype)
    c = tl.full((COLS,), float("-inf"), top.dtype)
    lane = tl.arange(0, COLS)[None, :]
    for start in range(0, vocab_size, COLS):
        z, _, q = _pair(z_ptr, q_ptr, start + lane, vocab_size, factors, CAPPED, REF_CAPPED, True)
        log_p = (z - top) - logsum
        log_q = (q - ref_top) - ref_logsum
        log_a = log_q if KIND == FORWARD_KL else log_p
        log_b = log_p if KIND == FORWARD_KL else log_q
        banned = (z if KIND == FORWARD_KL else q) == float("-inf")
        s += tl.sum(tl.where(banned | (log_a < NEGLIGIBLE), 0.0, _exp(log_a) * (log_a - log_b)), 0)
        c = tl.maximum(c, tl.max(tl.where(banned, log_a, float("-inf")), 0))
    return _sum_lanes(s, LOG_COLS), tl.max(c, 0)


@triton.jit
def _settled(
    z_ptr,
    q_ptr,
    vocab_size,
    factors,
    sums,
    KIND: tl.constexpr,
    APART: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    LOG_COLS: tl.constexpr,
):
    """A KL, and the largest ln of the first's probability among the columns that the second bans; with APART without
    these columns. NaN where the second bans all.
    """
    value, top, logsum, ref_top, ref_logsum = sums
    banned = tl.full((), float("-inf"), top.dtype)
    other = logsum if KIND == FORWARD_KL else ref_logsum
    if (value == float("inf")) | (other == float("-inf")):
        norms = (top, logsum, ref_top, ref_logsum)
        value, banned = _apart(z_ptr, q_ptr, vocab_size, factors, norms, KIND, CAPPED, REF_CAPPED, LOG_COLS)
        if not APART:
            value = tl.where(banned < NEGLIGIBLE, value, float("inf"))
            value = tl.where(other == float("-inf"), float("nan"), value)
    return value, banned


@triton.jit
def _label_logp(row_ptr, label, vocab_size, inner, outer, top, logsum, CAPPED: tl.constexpr):
    """ln p of the label; 0 when it lives elsewhere, NaN when it is invalid."""
    inside = (label >= 0) & (label < vocab_size)
    z, _ = _scaled(tl.load(row_ptr + label, mask=inside, other=0.0), inner, outer, CAPPED)
    return tl.where(label == ELSEWHERE, 0.0, tl.where(inside, (z - top) - logsum, float("nan")))


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
def _slope(log_p, log_q, p, pull, mix, KIND: tl.constexpr):
    """Gradient of the divergence with respect to z."""
    if KIND == FORWARD_KL:
        dz = p - _exp(log_q)
    elif KIND == REVERSE_KL:
        dz = tl.where(log_p < NEGLIGIBLE, 0.0, p * ((log_p - log_q) - pull))
    else:
        p_over_m, _ = _over_mixture(log_p, log_q, mix)
        dz = tl.where(p == 0, 0.0, (1 - mix) * p * (p_over_m - pull))
    return dz


@triton.jit
def _pair_gradient(z, q, col, d, norms, mix, target, row, KIND: tl.constexpr, ALGEBRA: tl.constexpr):
    """Gradient with respect to a tile of z: d times the divergence's, and with ALGEBRA that of the row's coefficients.

    ``row`` holds what the label's column gets, alpha - g, beta and delta.
    """
    top, logsum, ref_top, ref_logsum, pull = norms
    log_p = (z - top) - logsum
    p = _exp(log_p)
    dz = d * _slope(log_p, (q - ref_top) - ref_logsum, p, pull, mix, KIND)
    if ALGEBRA:
        at_label, factor, beta, delta = row
        plain = p * (factor + beta * tl.maximum(log_p, FLOOR)) + delta
        dz = tl.where(d == 0, 0.0, dz) + tl.where(col == target, at_label, plain)
    return dz


@triton.jit
def _at_label(log_p, g, alpha, beta, delta):
    """What the coefficients make of the label's column: a confident row keeps the digits of 1 - p."""
    return _exp(log_p) * (alpha + beta * tl.maximum(log_p, FLOOR)) - g * _expm1(log_p) + delta
