// What the kernels over two rows of logits share. Both rows are brought to z, block by block, into buffers that lie in the
// first-level cache; what follows knows neither dtypes nor strides. Compiled once per instruction set.
#pragma once

#include "cpu/log.h"
#include "cpu/rows.h"
#include "divergence.h"

namespace fastalign::LEVEL {
namespace {

constexpr int64_t kBlock = 2048;  // columns: two buffers of 8 KiB, and one more for the slopes
constexpr int64_t kStep = kAccumulators * kLanes;

struct Block {
  alignas(64) float z[kBlock];
  float max;
  int64_t size;  // padded with -inf to whole steps
};

using Read = void (*)(const TokenLogps& op, int64_t row, int64_t begin, int64_t n, Block& block, float* slopes);

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

inline Read reader(const TokenLogps& op) {
  if (op.dtype == Dtype::float32) return reader_of_form<float>(op);
  return op.dtype == Dtype::bfloat16 ? reader_of_form<bfloat16>(op) : reader_of_form<float16>(op);
}

inline float& stat(const Divergence& op, Stat which, int64_t row) {
  return static_cast<float*>(op.stats)[int(which) * op.rows() + row];
}

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

}  // namespace
}  // namespace fastalign::LEVEL
