// A token's loss and coefficients from its log-prob, in double. A loss is one function here, one in cuda/functors.h, one
// in fastalign_kernels.functors and one in fastalign.ops.functors, all of one name.
#pragma once

#include <cmath>
#include <initializer_list>

#include "policy_loss.h"

namespace fastalign::LEVEL {

constexpr double kLargestLogRatio = 20;  // clamped to it before exp, without gradient outside

struct Token {
  double logps, ratio, advantage;
  bool inside;  // the ratio follows the log-prob: its logarithm is not clamped
};

// loss = -A value, d loss / d logps = -A slope; whether a bound of the ratio acts. A NaN ratio makes both NaN.
struct Value {
  double value, slope;
  bool low, high;
};

inline Value pg(const PolicyLoss&, const Token& t) { return {t.logps, 1, false, false}; }

inline Value ppo(const PolicyLoss& op, const Token& t) {
  bool low = t.advantage < 0 && t.ratio < op.ratio_low;
  bool high = (t.advantage > 0 && t.ratio > op.ratio_high) || (t.advantage < 0 && t.ratio > op.ratio_cap);
  if (low) return {op.ratio_low, 0, low, high};
  if (high) return {t.advantage > 0 ? op.ratio_high : op.ratio_cap, 0, low, high};
  return {t.ratio, t.inside ? t.ratio : 0, low, high};
}

inline Value cispo(const PolicyLoss& op, const Token& t) {
  bool low = t.ratio < op.ratio_low, high = t.ratio > op.ratio_high;
  double clipped = low ? op.ratio_low : high ? op.ratio_high : t.ratio;
  return {clipped * t.logps, clipped, low, high};
}

inline Value sapo(const PolicyLoss& op, const Token& t) {
  double tau = t.advantage > 0 ? op.tau_pos : op.tau_neg, gate = 1 / (1 + ::exp(-tau * (t.ratio - 1)));
  return {4 / tau * gate, t.inside ? 4 * gate * (1 - gate) * t.ratio : 0, false, false};
}

inline Value surrogate(const PolicyLoss& op, const Token& t) {
  switch (op.surrogate) {
    case Surrogate::ppo: return ppo(op, t);
    case Surrogate::cispo: return cispo(op, t);
    case Surrogate::sapo: return sapo(op, t);
    default: return pg(op, t);
  }
}

// The KL to the reference and its derivative: k2 = (l - l_ref)^2 / 2, k3 = exp(y) - 1 - y with y = l_ref - l.
inline Value kl(const PolicyLoss& op, double y) {
  if (op.k2) return {y * y / 2, -y, false, false};
  bool inside = !(::fabs(y) > kLargestLogRatio);
  double clamped = inside ? y : ::copysign(kLargestLogRatio, y), change = ::expm1(clamped);
  return {change - clamped, inside ? -change : 0, false, false};
}

// A view of the table and the inputs.
struct Policy {
  const PolicyLoss& op;

  float& at(Column column, int64_t row) const { return static_cast<float*>(op.table)[column * op.rows.rows + row]; }
  static double get(const void* values, int64_t row, double otherwise) {
    return values ? double(static_cast<const float*>(values)[row]) : otherwise;
  }
  Token token(int64_t row) const {
    double logps = at(kLogps, row), advantage = get(op.advantages, row, 1);
    if (!op.old_logps) return {logps, logps != logps ? logps : 1, advantage, true};
    double x = logps - get(op.old_logps, row, 0);
    bool inside = !(::fabs(x) > kLargestLogRatio);
    return {logps, ::exp(inside ? x : ::copysign(kLargestLogRatio, x)), advantage, inside};
  }
  // Fills what the table has beside the statistics; a row that is not scored has zeros.
  void finish(int64_t row) const {
    for (Column column : {kLoss, kG, kAlpha, kBeta, kRatio, kKl, kClipLow, kClipHigh}) at(column, row) = 0;
    if (!op.rows.entropy) at(kEntropy, row) = 0;
    if (op.rows.label(row) == kIgnored) return;
    double w = get(op.weights, row, 0);
    Token t = token(row);
    Value v = surrogate(op, t), k = op.ref_logps ? kl(op, get(op.ref_logps, row, 0) - t.logps) : Value{};
    double loss = -w * (t.advantage * v.value), g = -w * (t.advantage * v.slope);
    if (op.kl_coef != 0) loss += w * op.kl_coef * k.value, g += w * op.kl_coef * k.slope;
    double bonus = op.entropy_coef != 0 ? w * op.entropy_coef : 0;
    if (bonus != 0) loss -= bonus * at(kEntropy, row), at(kAlpha, row) = float(bonus * at(kEntropy, row));
    at(kLoss, row) = float(loss), at(kG, row) = float(g), at(kBeta, row) = float(bonus);
    at(kRatio, row) = float(t.ratio), at(kKl, row) = float(k.value), at(kClipLow, row) = v.low, at(kClipHigh, row) = v.high;
  }
};

}  // namespace fastalign::LEVEL
