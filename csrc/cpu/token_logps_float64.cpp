// The same in double, for gradient checks: plain loops over the library's exp.
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "token_logps.h"

namespace fastalign::LEVEL {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Row {
  const TokenLogps& op;
  int64_t row;
  double scale, outer;

  Row(const TokenLogps& op, int64_t row)
      : op(op), row(row), scale(op.logit_scale / op.temperature_of(row)), outer(op.softcap / op.temperature_of(row)) {}
  double tanh(int64_t v) const { return ::tanh(op.logit_scale * logit(v) / op.softcap); }
  double logit(int64_t v) const {
    return static_cast<const double*>(op.logits.data)[row * op.logits.row_stride + v * op.logits.col_stride];
  }
  double z(int64_t v) const { return op.softcap != 0 ? outer * tanh(v) : scale * logit(v); }
  double slope(int64_t v) const { return op.softcap != 0 ? scale * (1 - tanh(v) * tanh(v)) : scale; }
};

double get(const void* values, int64_t row) { return values ? static_cast<const double*>(values)[row] : 0; }

void put(void* values, int64_t row, double value) {
  if (values) static_cast<double*>(values)[row] = value;
}

void forward_row(const Row& x) {
  const TokenLogps& op = x.op;
  int64_t label = op.label(x.row);
  double max = label == kIgnored ? 0 : -kInfinity, logsum = 0, entropy = 0, logps = 0, total = 0;
  int64_t first = -1;
  if (label != kIgnored) {
    for (int64_t v = 0; v < op.vocabulary; ++v)
      if (double z = x.z(v); !(z <= max)) max = z, first = v;
    double sum = 0, weighted = 0;
    for (int64_t v = 0; v < op.vocabulary; ++v) {
      double shift = x.z(v) - max, e = ::exp(shift);
      sum += e;
      total += shift;
      weighted += e == 0 ? 0 : e * shift;
    }
    logsum = ::log(sum);
    entropy = logsum - weighted / sum;
    if (label != kElsewhere) logps = label >= 0 && label < op.vocabulary ? (x.z(label) - max) - logsum : kNaN;
  }
  put(op.logps, x.row, logps);
  put(op.max, x.row, max);
  put(op.logsum, x.row, logsum);
  put(op.entropy, x.row, entropy);
  put(op.total, x.row, total);
  put(op.top1, x.row, first >= 0 && label == first && logps == logps);
}

void backward_row(const Row& x) {
  const TokenLogps& op = x.op;
  int64_t label = op.label(x.row);
  double g = get(op.g, x.row), alpha = get(op.alpha, x.row), beta = get(op.beta, x.row), delta = get(op.delta, x.row);
  bool skip = label == kIgnored || (g == 0 && alpha == 0 && beta == 0 && delta == 0);
  bool wrong = label < kElsewhere || label >= op.vocabulary;
  for (int64_t v = 0; v < op.vocabulary; ++v) {
    double d = skip ? 0 : kNaN;
    if (!skip && !wrong) {
      double ln_p = (x.z(v) - get(op.max, x.row)) - get(op.logsum, x.row), p = ::exp(ln_p);
      d = (v == label ? -g * ::expm1(ln_p) : -g * p) + (p == 0 ? 0 : p * (alpha + beta * ln_p)) + delta;
      d *= x.slope(v);
    }
    static_cast<double*>(op.grad.data)[x.row * op.grad.row_stride + v * op.grad.col_stride] = d;
  }
}

}  // namespace

void token_logps_float64(const TokenLogps& op, bool backward, int threads) {
  parallel_for(op.rows, op.rows * op.vocabulary, threads,
               [&](int64_t row) { (backward ? backward_row : forward_row)(Row(op, row)); });
}

}  // namespace fastalign::LEVEL
