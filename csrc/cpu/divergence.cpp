// Divergence of two rows of logits and its gradient. Both rows are brought to z, block by block, into buffers that lie in
// the first-level cache; what follows knows neither dtypes nor strides. Compiled once per instruction set.
#include "divergence.h"

#include <memory>

#include "cpu/log.h"
#include "cpu/rows.h"

namespace fastalign::LEVEL {

// The same in double, for gradient checks.
void divergence_float64(const Divergence& op, Walk walk, int threads);

namespace {

constexpr int64_t kBlock = 2048;  // columns: two buffers of 8 KiB, and one more for the slopes
constexpr int64_t kStep = kAccumulators * kLanes;

struct Block {
  alignas(64) float z[kBlock];
  float max;
  int64_t size;  // padded with -inf to whole steps
};

using Read = void (*)(const TokenLogps& op, int64_t row, int64_t begin, int64_t n, Block& block, float* slopes);
using Write = void (*)(const TokenLogps& op, int64_t row, int64_t begin, int64_t n, const float* gradient);

template <class T, Form form>
void read(const TokenLogps& op, int64_t row, int64_t begin, int64_t n, Block& block, float* slopes) {
  Transform<form> transform(op, row);
  T chunk[kBlock];
  const T* x = at<const T>(op.logits, row, begin);
  if (op.logits.col_stride != 1) x = gather(x, op.logits.col_stride, n, chunk);
  vec top = set(-kInfinity);
  int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + v) + kAhead);
    TanhSlope z = transform.with_slope(load(x + v));
    store(block.z + v, z.tanh);
    if (form == Form::capped && slopes) store(slopes + v, z.slope);
    top = max_(z.tanh, top);
  }
  for (; v < n || v % kStep; v += kLanes) {
    int64_t left = std::clamp<int64_t>(n - v, 0, kLanes);
    TanhSlope z = left ? transform.with_slope(load(x + v, left)) : TanhSlope{set(0.0f), set(0.0f)};
    z.tanh = keep(z.tanh, left, -kInfinity);
    store(block.z + v, z.tanh);
    if (form == Form::capped && slopes) store(slopes + v, z.slope);
    top = max_(z.tanh, top);
  }
  block.max = max_lane(top);
  block.size = v;
}

template <class T>
Read reader_of_form(const TokenLogps& op) {
  if (op.softcap != 0) return read<T, Form::capped>;
  bool plain = !op.temperatures && op.temperature == 1 && op.logit_scale == 1;
  return plain ? read<T, Form::plain> : read<T, Form::scaled>;
}

Read reader(const TokenLogps& op) {
  if (op.dtype == Dtype::float32) return reader_of_form<float>(op);
  return op.dtype == Dtype::bfloat16 ? reader_of_form<bfloat16>(op) : reader_of_form<float16>(op);
}

template <class T>
void write(const TokenLogps& op, int64_t row, int64_t begin, int64_t n, const float* gradient) {
  T chunk[kBlock];
  T* out = at<T>(op.grad, row, begin);
  int64_t stride = op.grad.col_stride, v = 0;
  T* target = stride == 1 ? out : chunk;
  for (; v + kLanes <= n; v += kLanes) store(target + v, load(gradient + v));
  if (v < n) store(target + v, load(gradient + v, n - v), n - v);
  for (v = 0; stride != 1 && v < n; ++v) out[v * stride] = chunk[v];
}

Write writer(const TokenLogps& op) {
  if (op.dtype == Dtype::float32) return write<float>;
  return op.dtype == Dtype::bfloat16 ? write<bfloat16> : write<float16>;
}

// --- statistics of both streams, and E_a[ln a - ln b], in one read -----------------------------------------------------

// Of one slab: maxima, sums of exp(z - max), and the sum over columns of exp(a) (a - b), both relative to their maxima.
struct Pair {
  float a_max, a_sum, b_max, b_sum, cross;
};

float decay(float max, float higher) { return max == higher ? 1 : ::expf(max - higher); }

float base_of(float max) { return max == -kInfinity ? 0 : max; }

// Folds blocks; KL(a || b) when `cross` is wanted.
template <bool wants_cross>
struct Fold {
  float a_max = -kInfinity, b_max = -kInfinity;
  vec a_sum[kAccumulators], b_sum[kAccumulators], cross[kAccumulators];

  Fold() {
    for (int k = 0; k < kAccumulators; ++k) a_sum[k] = b_sum[k] = cross[k] = set(0.0f);
  }
  // Moves both bases at once: where the streams agree the shifts cancel before they are multiplied.
  void raise(float a_higher, float b_higher) {
    float shift = (base_of(a_max) - base_of(a_higher)) - (base_of(b_max) - base_of(b_higher));
    float a_factor = decay(a_max, a_higher), b_factor = decay(b_max, b_higher);
    for (int k = 0; k < kAccumulators; ++k) {
      // What became negligible is dropped, an infinite divergence included.
      cross[k] = a_factor == 0 ? set(0.0f) : set(a_factor) * fma(set(shift), a_sum[k], cross[k]);
      a_sum[k] = set(a_factor) * a_sum[k];
      b_sum[k] = set(b_factor) * b_sum[k];
    }
    a_max = a_higher;
    b_max = b_higher;
  }
  void fold(const Block& a, const Block& b) {
    if (a.max > a_max || b.max > b_max) raise(std::max(a_max, a.max), std::max(b_max, b.max));
    vec a_base = set(base_of(a_max)), b_base = set(base_of(b_max));
    for (int64_t v = 0; v < a.size; v += kStep) {
#pragma GCC unroll 4
      for (int k = 0; k < kAccumulators; ++k) {
        vec x = clamp_low(load(a.z + v + k * kLanes) - a_base), y = load(b.z + v + k * kLanes) - b_base;
        vec e = exp_in_range(x);
        a_sum[k] = a_sum[k] + e;
        b_sum[k] = b_sum[k] + exp_in_range(clamp_low(y));
        // Selected, not multiplied: a banned column has no share, and one banned in b alone makes it infinite.
        if (wants_cross) cross[k] = cross[k] + where_less(set(0.0f), e, e * (x - y), set(0.0f));
      }
    }
  }
  static float total(const vec (&x)[kAccumulators]) { return sum_lanes((x[0] + x[1]) + (x[2] + x[3])); }
  Pair pair() const { return {a_max, total(a_sum), b_max, total(b_sum), total(cross)}; }
};

template <bool wants_cross>
Pair fold_slab(const TokenLogps& a, const TokenLogps& b, int64_t row, int64_t begin, int64_t end) {
  Read read_a = reader(a), read_b = reader(b);
  Fold<wants_cross> fold;
  Block x, y;
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin);
    read_a(a, row, begin, n, x, nullptr);
    read_b(b, row, begin, n, y, nullptr);
    fold.fold(x, y);
  }
  return fold.pair();
}

struct Whole {
  float a_max, b_max;
  double a_logsum, b_logsum, divergence;
};

double share_of(float max, float sum, float whole_max) {
  return sum == 0 || sum != sum ? sum : ::exp(double(max) - whole_max);
}

// Slabs in their order, in double: few numbers, and the row's precision depends on them.
Whole combine(const Pair* pairs, int64_t slabs) {
  float a_max = -kInfinity, b_max = -kInfinity;
  for (int64_t k = 0; k < slabs; ++k) {
    a_max = std::max(a_max, pairs[k].a_max);
    b_max = std::max(b_max, pairs[k].b_max);
  }
  double a_sum = 0, b_sum = 0, cross = 0;
  for (int64_t k = 0; k < slabs; ++k) {
    const Pair& s = pairs[k];
    double a = share_of(s.a_max, s.a_sum, a_max), b = share_of(s.b_max, s.b_sum, b_max);
    if (b != 0) b_sum += b * s.b_sum;
    if (a == 0) continue;
    double shift = (double(base_of(s.a_max)) - base_of(a_max)) - (double(base_of(s.b_max)) - base_of(b_max));
    a_sum += a * s.a_sum;
    cross += a * (s.cross + s.a_sum * shift);
  }
  if (a_sum != a_sum) a_max = kNaN;  // beside a NaN the largest may be -inf, which would say that all is banned
  if (b_sum != b_sum) b_max = kNaN;
  double a_logsum = ::log(a_sum), b_logsum = ::log(b_sum);
  return {a_max, b_max, a_logsum, b_logsum, cross / a_sum + (b_logsum - a_logsum)};
}

float& stat(const Divergence& op, Stat which, int64_t row) {
  return static_cast<float*>(op.stats)[int(which) * op.rows() + row];
}

float& value_of(const Divergence& op, int64_t row) { return static_cast<float*>(op.value)[row]; }

// a is the stream that the mean is taken over: the reference for forward_kl.
void finish_row(const Divergence& op, int64_t row, const Pair* pairs, int64_t slabs) {
  bool forward = op.kind == Kind::forward_kl, masked = op.masked(row);
  Whole s = masked ? Whole{0, 0, 0, 0, 0} : combine(pairs, slabs);
  stat(op, forward ? Stat::reference_max : Stat::max, row) = s.a_max;
  stat(op, forward ? Stat::reference_logsum : Stat::logsum, row) = float(s.a_logsum);
  stat(op, forward ? Stat::max : Stat::reference_max, row) = s.b_max;
  stat(op, forward ? Stat::logsum : Stat::reference_logsum, row) = float(s.b_logsum);
  stat(op, Stat::pull, row) = forward ? 0 : float(s.divergence);
  value_of(op, row) = op.invalid(row) ? kNaN : float(s.divergence);
}

template <bool wants_cross>
void fold_rows(const Divergence& op, int threads) {
  int64_t slabs = num_slabs(op.vocabulary()), items = op.rows() * slabs;
  std::unique_ptr<Pair[]> pairs(new Pair[items]);
  bool forward = op.kind == Kind::forward_kl;
  parallel_for(items, op.rows() * op.vocabulary(), threads, [&](int64_t item) {
    int64_t row = item / slabs, begin = item % slabs * kSlab;
    if (op.masked(row)) return;
    pairs[item] = fold_slab<wants_cross>(forward ? op.reference : op.policy, forward ? op.policy : op.reference, row,
                                         begin, std::min(begin + kSlab, op.vocabulary()));
  });
  parallel_for(op.rows(), items, threads, [&](int64_t row) { finish_row(op, row, &pairs[row * slabs], slabs); });
}

// --- the mixture needs both normalisers first: a second read -----------------------------------------------------------

// Log-probabilities of a row from its saved statistics.
struct LogProbs {
  vec p_max, p_logsum, q_max, q_logsum;

  LogProbs(const Divergence& op, int64_t row)
      : p_max(set(stat(op, Stat::max, row))),
        p_logsum(set(stat(op, Stat::logsum, row))),
        q_max(set(stat(op, Stat::reference_max, row))),
        q_logsum(set(stat(op, Stat::reference_logsum, row))) {}
  FORCE_INLINE vec policy(vec z) const { return (z - p_max) - p_logsum; }
  FORCE_INLINE vec reference(vec q) const { return (q - q_max) - q_logsum; }
};

// ln(p / M) and ln(pi / M) from in-range log-probabilities, by way of the larger of the two: exactly 0 where they agree.
struct Mixture {
  vec mix, rest;
  vec from_p, from_q;

  FORCE_INLINE explicit Mixture(double mix) : mix(set(float(mix))), rest(set(float(1 - mix))) {}
  FORCE_INLINE void compare(vec log_p, vec log_q) {
    vec gap = log_q - log_p, smaller = exp_in_range(clamp_low(set(0.0f) - abs(gap)));
    vec far = where_less(set(0.0f), gap, rest, mix);
    vec log_s = log_of(fma(far, smaller - set(1.0f), set(1.0f)));
    from_p = min_(set(0.0f), set(0.0f) - gap) - log_s;
    from_q = min_(set(0.0f), gap) - log_s;
  }
};

struct MixturePartial {
  float policy, reference;  // of one slab: sum p ln(p / M), sum pi ln(pi / M)
};

MixturePartial mix_slab(const Divergence& op, int64_t row, int64_t begin, int64_t end) {
  Read read_z = reader(op.policy), read_q = reader(op.reference);
  LogProbs log_probs(op, row);
  Mixture mixture(op.mix);
  vec policy[kAccumulators], reference[kAccumulators];
  for (int k = 0; k < kAccumulators; ++k) policy[k] = reference[k] = set(0.0f);
  Block z, q;
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin);
    read_z(op.policy, row, begin, n, z, nullptr);
    read_q(op.reference, row, begin, n, q, nullptr);
    for (int64_t v = 0; v < z.size; v += kStep) {
#pragma GCC unroll 4
      for (int k = 0; k < kAccumulators; ++k) {
        vec log_p = clamp_low(log_probs.policy(load(z.z + v + k * kLanes)));
        vec log_q = clamp_low(log_probs.reference(load(q.z + v + k * kLanes)));
        mixture.compare(log_p, log_q);
        policy[k] = fma(exp_in_range(log_p), mixture.from_p, policy[k]);
        reference[k] = fma(exp_in_range(log_q), mixture.from_q, reference[k]);
      }
    }
  }
  return {Fold<false>::total(policy), Fold<false>::total(reference)};
}

// f(row, sum pi ln(pi / M), sum p ln(p / M)) for every row; 0 for masked ones.
template <class F>
void mix_rows(const Divergence& op, int threads, F f) {
  int64_t slabs = num_slabs(op.vocabulary()), items = op.rows() * slabs;
  std::unique_ptr<MixturePartial[]> partials(new MixturePartial[items]);
  parallel_for(items, op.rows() * op.vocabulary(), threads, [&](int64_t item) {
    int64_t row = item / slabs, begin = item % slabs * kSlab;
    if (!op.masked(row)) partials[item] = mix_slab(op, row, begin, std::min(begin + kSlab, op.vocabulary()));
  });
  for (int64_t row = 0; row < op.rows(); ++row) {
    double policy = 0, reference = op.invalid(row) ? double(kNaN) : 0;
    for (int64_t k = 0; k < slabs && !op.masked(row); ++k) {
      policy += partials[row * slabs + k].policy;
      reference += partials[row * slabs + k].reference;
    }
    f(row, reference, policy);
  }
}

void finish_mixture(const Divergence& op, int threads) {
  mix_rows(op, threads, [&](int64_t row, double reference, double policy) {
    stat(op, Stat::pull, row) = float(policy);
    value_of(op, row) = float(op.mix * reference + (1 - op.mix) * policy);
  });
}

void mixture_sums(const Divergence& op, int threads) {
  mix_rows(op, threads, [&](int64_t row, double reference, double policy) {
    value_of(op, row) = float(reference);
    value_of(op, op.rows() + row) = float(policy);
  });
}

// --- gradient ------------------------------------------------------------------------------------------------------------

template <Kind kind>
void differentiate(const Divergence& op, int64_t row, float coefficient, Block& z, const Block& q) {
  LogProbs log_probs(op, row);
  Mixture mixture(op.mix);
  vec g = set(kind == Kind::jsd ? float(coefficient * (1 - op.mix)) : coefficient), pull = set(stat(op, Stat::pull, row));
  for (int64_t v = 0; v < z.size; v += kStep) {
#pragma GCC unroll 4
    for (int k = 0; k < kAccumulators; ++k) {
      float* place = z.z + v + k * kLanes;
      vec log_p = clamp_low(log_probs.policy(load(place))), p = exp_in_range(log_p), slope;
      vec log_q = log_probs.reference(load(q.z + v + k * kLanes));
      if constexpr (kind == Kind::forward_kl) {
        slope = p - exp_in_range(clamp_low(log_q));
      } else if constexpr (kind == Kind::reverse_kl) {
        slope = where_less(p, set(0x1p-149f), set(0.0f), p * ((log_p - log_q) - pull));
      } else {
        mixture.compare(log_p, clamp_low(log_q));
        slope = p * (mixture.from_p - pull);
      }
      store(place, g * slope);
    }
  }
}

void differentiate_block(const Divergence& op, int64_t row, float coefficient, Block& z, const Block& q) {
  switch (op.kind) {
    case Kind::forward_kl: return differentiate<Kind::forward_kl>(op, row, coefficient, z, q);
    case Kind::reverse_kl: return differentiate<Kind::reverse_kl>(op, row, coefficient, z, q);
    case Kind::jsd: return differentiate<Kind::jsd>(op, row, coefficient, z, q);
  }
}

void multiply(float* x, const float* factors, int64_t n) {
  for (int64_t v = 0; v < n; v += kLanes) store(x + v, load(x + v) * load(factors + v));
}

void differentiate_slab(const Divergence& op, int64_t row, int64_t begin, int64_t end) {
  const TokenLogps& policy = op.policy;
  Read read_z = reader(policy), read_q = reader(op.reference);
  Write write_dz = writer(policy);
  float g = static_cast<const float*>(op.grad_value)[row];
  bool skip = op.masked(row) || g == 0, capped = policy.softcap != 0;
  if (op.invalid(row)) g = kNaN;
  float coefficient = float(g * (policy.logit_scale / policy.temperature_of(row)));
  alignas(64) float slopes[kBlock];
  Block z, q;
  if (skip) std::fill_n(z.z, kBlock, 0.0f);
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin);
    if (!skip) {
      read_z(policy, row, begin, n, z, capped ? slopes : nullptr);
      read_q(op.reference, row, begin, n, q, nullptr);
      differentiate_block(op, row, coefficient, z, q);
      if (capped) multiply(z.z, slopes, z.size);
    }
    write_dz(policy, row, begin, n, z.z);
  }
}

void backward_rows(const Divergence& op, int threads) {
  int64_t slabs = num_slabs(op.vocabulary());
  parallel_for(op.rows() * slabs, op.rows() * op.vocabulary(), threads, [&](int64_t item) {
    int64_t begin = item % slabs * kSlab;
    differentiate_slab(op, item / slabs, begin, std::min(begin + kSlab, op.vocabulary()));
  });
}

}  // namespace

void divergence(const Divergence& op, Walk walk, int threads) {
  if (op.wide()) return divergence_float64(op, walk, threads);
  if (walk == Walk::backward) return backward_rows(op, threads);
  if (walk == Walk::mixture) return mixture_sums(op, threads);
  if (op.kind != Kind::jsd) return fold_rows<true>(op, threads);
  fold_rows<false>(op, threads);
  finish_mixture(op, threads);
}

}  // namespace fastalign::LEVEL
