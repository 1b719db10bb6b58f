// The same in double, for gradient checks: plain loops over the library's exp, streams of any dtype.
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "divergence.h"

namespace fastalign::LEVEL {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// One row of one stream; max and logsum make z a log-probability.
struct Stream {
  const TokenLogps& op;
  int64_t row;
  double scale, outer, max = 0, logsum = 0;

  Stream(const TokenLogps& op, int64_t row)
      : op(op), row(row), scale(op.logit_scale / op.temperature_of(row)), outer(op.softcap / op.temperature_of(row)) {}
  template <class T>
  const T* at(int64_t v) const {
    return static_cast<const T*>(op.logits.data) + row * op.logits.row_stride + v * op.logits.col_stride;
  }
  double logit(int64_t v) const {
    switch (op.dtype) {
      case Dtype::float32: return *at<float>(v);
      case Dtype::bfloat16: return first(load(at<bfloat16>(v), 1));
      case Dtype::float16: return first(load(at<float16>(v), 1));
      default: return *at<double>(v);
    }
  }
  double tanh(int64_t v) const { return ::tanh(op.logit_scale * logit(v) / op.softcap); }
  double z(int64_t v) const { return op.softcap != 0 ? outer * tanh(v) : scale * logit(v); }
  double slope(int64_t v) const { return op.softcap != 0 ? scale * (1 - tanh(v) * tanh(v)) : scale; }
  double log_p(int64_t v) const { return (z(v) - max) - logsum; }
  void measure() {
    double top = -kInfinity, sum = 0;
    for (int64_t v = 0; v < op.vocabulary; ++v) top = z(v) <= top ? top : z(v);
    for (int64_t v = 0; v < op.vocabulary; ++v) sum += ::exp(z(v) - top);
    max = top;
    logsum = ::log(sum);
  }
};

double* stat(const Divergence& op, Stat which, int64_t row) {
  return static_cast<double*>(op.stats) + int(which) * op.rows() + row;
}

// exp(a) (a - b), and 0 where a is too little for a share.
double share(double a, double b) { return a < kNegligible ? 0 : ::exp(a) * (a - b); }

// -p ln p, and 0 where p is.
double entropy_share(double log_p) {
  double p = ::exp(log_p);
  return p == 0 ? 0 : -p * log_p;
}

double log_mixture(double log_p, double log_q, double mix) {
  double gap = log_q - log_p, far = gap > 0 ? 1 - mix : mix;
  return std::fmax(log_p, log_q) + ::log1p(far * ::expm1(-std::fabs(gap)));
}

struct Sums {
  double reference = 0, policy = 0;  // KL(pi || other), KL(p || other); the other is the mixture for jsd
  double banned = -kInfinity;        // apart: the largest ln of the first probability where the second is 0
};

Sums compare(const Divergence& op, const Stream& p, const Stream& q) {
  Sums sums;
  for (int64_t v = 0; v < op.vocabulary(); ++v) {
    double a = p.log_p(v), b = q.log_p(v);
    bool banned = a == -kInfinity && b == -kInfinity, forward = op.kind == Kind::forward_kl;
    if (op.apart && (forward ? p : q).z(v) == -kInfinity) {
      sums.banned = std::fmax(sums.banned, forward ? b : a);
      continue;
    }
    double m = op.kind != Kind::jsd || banned ? 0 : log_mixture(a, b, op.mix);
    if (op.kind != Kind::forward_kl) sums.policy += share(a, op.kind == Kind::jsd ? m : b);
    if (op.kind != Kind::reverse_kl) sums.reference += share(b, op.kind == Kind::jsd ? m : a);
  }
  return sums;
}

double* vector(void* values, int64_t row) { return static_cast<double*>(values) + row; }

double coefficient(const void* values, int64_t row) { return values ? static_cast<const double*>(values)[row] : 0; }

void write_tokens(const Divergence& op, const Stream& x) {
  int64_t label = x.op.label(x.row);
  bool inside = label >= 0 && label < op.vocabulary();
  double entropy = 0;
  for (int64_t v = 0; x.op.entropy && !op.masked(x.row) && v < op.vocabulary(); ++v) entropy += entropy_share(x.log_p(v));
  if (x.op.logps) *vector(x.op.logps, x.row) = inside ? x.log_p(label) : op.invalid(x.row) ? kNaN : 0;
  if (x.op.entropy) *vector(x.op.entropy, x.row) = entropy;
}

double* value_of(const Divergence& op, int64_t row) { return static_cast<double*>(op.value) + row; }

void forward_row(const Divergence& op, int64_t row) {
  Stream p(op.policy, row), q(op.reference, row);
  Sums sums;
  if (!op.masked(row)) {
    p.measure();
    q.measure();
    sums = compare(op, p, q);
  }
  double value = op.kind == Kind::jsd ? op.mix * sums.reference + (1 - op.mix) * sums.policy
                                      : sums.reference + sums.policy;
  *value_of(op, row) = op.invalid(row) ? kNaN : value;
  if (op.apart) *value_of(op, op.rows() + row) = sums.banned;
  *stat(op, Stat::max, row) = p.max;
  *stat(op, Stat::logsum, row) = p.logsum;
  *stat(op, Stat::reference_max, row) = q.max;
  *stat(op, Stat::reference_logsum, row) = q.logsum;
  *stat(op, Stat::pull, row) = sums.policy;
  write_tokens(op, p);
  write_tokens(op, q);
}

// Both streams with the normalisers of the saved statistics.
std::pair<Stream, Stream> saved(const Divergence& op, int64_t row) {
  Stream p(op.policy, row), q(op.reference, row);
  p.max = *stat(op, Stat::max, row);
  p.logsum = *stat(op, Stat::logsum, row);
  q.max = *stat(op, Stat::reference_max, row);
  q.logsum = *stat(op, Stat::reference_logsum, row);
  return {p, q};
}

void mixture_row(const Divergence& op, int64_t row) {
  auto [p, q] = saved(op, row);
  Sums sums = op.masked(row) ? Sums{} : compare(op, p, q);
  *value_of(op, row) = op.invalid(row) ? kNaN : sums.reference;
  *value_of(op, op.rows() + row) = sums.policy;
}

double slope_of(const Divergence& op, double log_p, double log_q, double pull) {
  double p = ::exp(log_p);
  if (op.kind == Kind::forward_kl) return p - ::exp(log_q);
  if (p == 0 || (op.kind == Kind::reverse_kl && log_p < kNegligible)) return 0;
  if (op.kind == Kind::reverse_kl) return p * (log_p - log_q - pull);
  return (1 - op.mix) * p * (log_p - log_mixture(log_p, log_q, op.mix) - pull);
}

void put(const TokenLogps& op, int64_t row, int64_t v, double x) {
  int64_t place = row * op.grad.row_stride + v * op.grad.col_stride;
  switch (op.dtype) {
    case Dtype::float32: static_cast<float*>(op.grad.data)[place] = float(x); break;
    case Dtype::bfloat16: store(static_cast<bfloat16*>(op.grad.data) + place, set(float(x)), 1); break;
    case Dtype::float16: store(static_cast<float16*>(op.grad.data) + place, set(float(x)), 1); break;
    case Dtype::float64: static_cast<double*>(op.grad.data)[place] = x; break;
  }
}

void backward_row(const Divergence& op, int64_t row) {
  auto [p, q] = saved(op, row);
  const TokenLogps& policy = op.policy;
  int64_t label = policy.label(row);
  double d = static_cast<const double*>(op.grad_value)[row], pull = *stat(op, Stat::pull, row);
  double g = coefficient(policy.g, row), alpha = coefficient(policy.alpha, row);
  double beta = coefficient(policy.beta, row), delta = coefficient(policy.delta, row);
  bool skip = op.masked(row) || (d == 0 && g == 0 && alpha == 0 && beta == 0 && delta == 0);
  for (int64_t v = 0; v < op.vocabulary(); ++v) {
    double dz = skip ? 0 : kNaN;
    if (!skip && !op.invalid(row)) {
      double log_p = p.log_p(v), mass = ::exp(log_p);
      dz = (v == label ? -g * ::expm1(log_p) : -g * mass) + (mass == 0 ? 0 : mass * (alpha + beta * log_p)) + delta;
      if (d != 0) dz += d * slope_of(op, log_p, q.log_p(v), pull);
      dz *= p.slope(v);
    }
    put(policy, row, v, dz);
  }
}

}  // namespace

void divergence_float64(const Divergence& op, Walk walk, int threads) {
  auto* visit = walk == Walk::forward ? forward_row : walk == Walk::mixture ? mixture_row : backward_row;
  parallel_for(op.rows(), op.rows() * op.vocabulary(), threads, [&](int64_t row) { visit(op, row); });
}

}  // namespace fastalign::LEVEL
