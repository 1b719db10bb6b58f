// A token's loss and coefficients from its log-prob, in the precision of the statistics: the functors of cpu/functors.h
// under the same names.
#pragma once

#include "cuda/rows.h"
#include "policy_loss.h"

namespace fastalign {
namespace {

constexpr int kLargestLogRatio = 20;  // clamped to it before exp, without gradient outside

// A log-ratio that may be the argument of exp, and whether it was.
template <class R>
struct Clamped {
  R x;
  bool inside;

  __device__ explicit Clamped(R y)
      : x(fabs(y) > R(kLargestLogRatio) ? copysign(R(kLargestLogRatio), y) : y), inside(!(fabs(y) > R(kLargestLogRatio))) {}
};

template <class R>
struct Token {
  R logps, ratio, advantage;
  bool inside;  // the ratio follows the log-prob: its logarithm is not clamped
};

// loss = -A value, d loss / d logps = -A slope; whether a bound of the ratio acts. A NaN ratio makes both NaN.
template <class R>
struct Value {
  R value, slope;
  bool low, high;
};

template <class R>
__device__ Value<R> pg(const PolicyLoss&, const Token<R>& t) {
  return {t.logps, 1, false, false};
}

template <class R>
__device__ Value<R> ppo(const PolicyLoss& op, const Token<R>& t) {
  R low_bound = R(op.ratio_low), high_bound = R(t.advantage > 0 ? op.ratio_high : op.ratio_cap);
  bool low = t.advantage < 0 && t.ratio < low_bound;
  bool high = t.advantage != 0 && t.ratio > high_bound;
  if (low) return {low_bound, 0, low, high};
  if (high) return {high_bound, 0, low, high};
  return {t.ratio, t.inside ? t.ratio : R(0), low, high};
}

template <class R>
__device__ Value<R> cispo(const PolicyLoss& op, const Token<R>& t) {
  bool low = t.ratio < R(op.ratio_low), high = t.ratio > R(op.ratio_high);
  R clipped = low ? R(op.ratio_low) : high ? R(op.ratio_high) : t.ratio;
  return {clipped * t.logps, clipped, low, high};
}

template <class R>
__device__ Value<R> sapo(const PolicyLoss& op, const Token<R>& t) {
  R tau = R(t.advantage > 0 ? op.tau_pos : op.tau_neg), gate = 1 / (1 + exp(-tau * (t.ratio - 1)));
  return {4 / tau * gate, t.inside ? 4 * gate * (1 - gate) * t.ratio : R(0), false, false};
}

template <class R>
__device__ Value<R> surrogate(const PolicyLoss& op, const Token<R>& t) {
  switch (op.surrogate) {
    case Surrogate::ppo: return ppo(op, t);
    case Surrogate::cispo: return cispo(op, t);
    case Surrogate::sapo: return sapo(op, t);
    default: return pg(op, t);
  }
}

// The KL to the reference from y = l_ref - l, and its derivative in l.
template <class R>
__device__ Value<R> k2(R y) {
  return {y * y / 2, -y, false, false};
}

// exp(y) - 1 - y; near 0, where the reference is near, exp(y) - 1 and y cancel: the Taylor series up to y^6.
template <class R>
__device__ Value<R> k3(R y) {
  Clamped<R> clamped(y);
  R x = clamped.x, change = expm1(x);
  R series = x * x * (R(1) / 2 + x * (R(1) / 6 + x * (R(1) / 24 + x * (R(1) / 120 + x / 720))));
  bool near = sizeof(R) == sizeof(float) && fabs(x) < R(0.1);
  return {near ? series : change - x, clamped.inside ? -change : R(0), false, false};
}

// The columns of a row in the table, and what the losses are given, in the type of the statistics.
template <class R>
struct Policy {
  const PolicyLoss& op;
  int64_t row;

  __device__ R& at(Column column) const { return static_cast<R*>(op.table)[column * op.rows.rows + row]; }
  __device__ R get(const void* values, R otherwise) const {
    return values ? static_cast<const R*>(values)[row] : otherwise;
  }
  __device__ Token<R> token(R logps) const {
    R advantage = get(op.advantages, 1);
    if (!op.old_logps) return {logps, logps != logps ? logps : R(1), advantage, true};
    Clamped<R> log_ratio(logps - get(op.old_logps, 0));
    return {logps, exp(log_ratio.x), advantage, log_ratio.inside};
  }
  // The row's coefficients; `write` also fills its column of the table.
  __device__ RowCoefficients<R> finish(R logps, const Statistics<R>& s, bool top1, bool write) const {
    R w = get(op.weights, 0), kl_coef = w * R(op.kl_coef), bonus = w * R(op.entropy_coef);
    Token<R> t = token(logps);
    Value<R> v = surrogate(op, t), kl = {0, 0, false, false};
    if (op.ref_logps) kl = op.k2 ? k2(get(op.ref_logps, 0) - logps) : k3(get(op.ref_logps, 0) - logps);
    R loss = -w * (t.advantage * v.value), g = -w * (t.advantage * v.slope);
    if (op.kl_coef != 0) loss += kl_coef * kl.value, g += kl_coef * kl.slope;
    R alpha = bonus != 0 ? bonus * s.entropy : R(0);
    if (write) {
      const R columns[kColumns] = {loss - alpha, logps, s.max, s.logsum, op.rows.entropy ? s.entropy : R(0), g, alpha,
                                   bonus, t.ratio, kl.value, R(v.low), R(v.high), R(top1)};
      for (int column = 0; column < kColumns; ++column) at(Column(column)) = columns[column];
    }
    return {g, alpha, bonus, 0};
  }
  __device__ void zero() const {
    for (int column = 0; column < kColumns; ++column) at(Column(column)) = 0;
  }
};

}  // namespace
}  // namespace fastalign
