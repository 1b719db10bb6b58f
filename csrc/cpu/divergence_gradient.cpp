// The gradient of a divergence and of the statistics of token_logps, from a row's five coefficients. Compiled once per
// instruction set.
#include "cpu/streams.h"

namespace fastalign::LEVEL {
namespace {

using Write = void (*)(const TokenLogps& op, int64_t row, int64_t begin, int64_t n, const float* gradient);

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

// The divergence's part of dz, for a coefficient of 1; of jsd without its factor 1 - mix.
template <Kind kind>
struct Slope {
  Mixture mixture;
  vec pull;

  Slope(const Divergence& op, int64_t row) : mixture(op.mix), pull(set(stat(op, Stat::pull, row))) {}
  FORCE_INLINE vec operator()(vec log_p, vec p, vec log_q) {
    if constexpr (kind == Kind::forward_kl) return p - exp_in_range(clamp_low(log_q));
    if constexpr (kind == Kind::reverse_kl)
      return where_less(log_p, set(kNegligible), set(0.0f), p * ((log_p - log_q) - pull));
    mixture.compare(log_p, clamp_low(log_q));
    return p * (mixture.from_p - pull);
  }
};

// A row's coefficients, each times dz/da but for the soft-cap's part: d of the divergence, and those of token_logps.
struct Terms {
  float d, g, alpha, beta, delta;

  Terms(const Divergence& op, int64_t row) : d(static_cast<const float*>(op.grad_value)[row]) {
    const TokenLogps& policy = op.policy;
    g = coefficient(policy.g, row), alpha = coefficient(policy.alpha, row);
    beta = coefficient(policy.beta, row), delta = coefficient(policy.delta, row);
    double chain = op.invalid(row) ? kNaN : policy.logit_scale / policy.temperature_of(row);
    for (float* x : {&d, &g, &alpha, &beta, &delta})
      if (*x != 0) *x = float(*x * chain);
  }
  bool plain() const { return g == 0 && alpha == 0 && beta == 0 && delta == 0; }
  bool zero() const { return d == 0 && plain(); }
  // At the label 1 - p is taken as -expm1(ln p): a confident row keeps its digits.
  float at_label(double log_p) const {
    double p = ::exp(log_p);
    return float(-g * ::expm1(log_p) + (p == 0 ? 0 : p * (alpha + beta * log_p)) + delta);
  }
};

// Turns z into the gradient: the divergence's, that of the other coefficients, or both.
template <Kind kind, bool diverges, bool algebra>
void differentiate(const Divergence& op, int64_t row, const Terms& terms, Block& z, const Block& q) {
  LogProbs log_probs(op, row);
  Slope<kind> slope(op, row);
  vec d = set(kind == Kind::jsd ? float(terms.d * (1 - op.mix)) : terms.d), factor = set(terms.alpha - terms.g);
  vec beta = set(terms.beta), delta = set(terms.delta);
  for (int64_t v = 0; v < z.size; v += kStep) {
#pragma GCC unroll 4
    for (int k = 0; k < kAccumulators; ++k) {
      float* place = z.z + v + k * kLanes;
      vec log_p = clamp_low(log_probs.policy(load(place))), p = exp_in_range(log_p), dz = set(0.0f);
      if (diverges) dz = d * slope(log_p, p, log_probs.reference(load(q.z + v + k * kLanes)));
      if (algebra) dz = dz + fma(p, fma(beta, log_p, factor), delta);
      store(place, dz);
    }
  }
}

template <Kind kind>
void differentiate_block(const Divergence& op, int64_t row, const Terms& terms, Block& z, const Block& q) {
  if (terms.plain()) return differentiate<kind, true, false>(op, row, terms, z, q);
  if (terms.d == 0) return differentiate<kind, false, true>(op, row, terms, z, q);
  differentiate<kind, true, true>(op, row, terms, z, q);
}

void differentiate_block(const Divergence& op, int64_t row, const Terms& terms, Block& z, const Block& q) {
  switch (op.kind) {
    case Kind::forward_kl: return differentiate_block<Kind::forward_kl>(op, row, terms, z, q);
    case Kind::reverse_kl: return differentiate_block<Kind::reverse_kl>(op, row, terms, z, q);
    case Kind::jsd: return differentiate_block<Kind::jsd>(op, row, terms, z, q);
  }
}

// What the label's column gets beside the divergence's part, which lies in a block of its own here.
void set_label(const Divergence& op, int64_t row, const Terms& terms, float z, float q, float* place) {
  LogProbs log_probs(op, row);
  Block one, other;
  one.size = kStep;
  std::fill_n(one.z, kStep, z);
  std::fill_n(other.z, kStep, q);
  Terms alone = terms;
  alone.g = alone.alpha = alone.beta = alone.delta = 0;
  if (terms.d != 0) differentiate_block(op, row, alone, one, other);
  *place = (terms.d != 0 ? one.z[0] : 0.0f) + terms.at_label(first(log_probs.policy(set(z))));
}

void multiply(float* x, const float* factors, int64_t n) {
  for (int64_t v = 0; v < n; v += kLanes) store(x + v, load(x + v) * load(factors + v));
}

void differentiate_slab(const Divergence& op, int64_t row, int64_t begin, int64_t end) {
  const TokenLogps& policy = op.policy;
  Read read_z = reader(policy), read_q = reader(op.reference);
  Write write_dz = writer(policy);
  Terms terms(op, row);
  bool skip = op.masked(row) || terms.zero(), capped = policy.softcap != 0, algebra = !terms.plain();
  int64_t label = policy.label(row);
  alignas(64) float slopes[kBlock];
  Block z, q;
  if (skip) std::fill_n(z.z, kBlock, 0.0f);
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin), at = label - begin;
    if (!skip) {
      bool labelled = algebra && at >= 0 && at < n;
      read_z(policy, row, begin, n, z, capped ? slopes : nullptr);
      if (terms.d != 0) read_q(op.reference, row, begin, n, q, nullptr);
      float label_z = labelled ? z.z[at] : 0, label_q = labelled && terms.d != 0 ? q.z[at] : 0;
      differentiate_block(op, row, terms, z, q);
      if (labelled) set_label(op, row, terms, label_z, label_q, &z.z[at]);
      if (capped) multiply(z.z, slopes, z.size);
    }
    write_dz(policy, row, begin, n, z.z);
  }
}

}  // namespace

void divergence_gradient(const Divergence& op, int threads) {
  int64_t slabs = num_slabs(op.vocabulary());
  parallel_for(op.rows() * slabs, op.rows() * op.vocabulary(), threads, [&](int64_t item) {
    int64_t begin = item % slabs * kSlab;
    differentiate_slab(op, item / slabs, begin, std::min(begin + kSlab, op.vocabulary()));
  });
}

}  // namespace fastalign::LEVEL
