// What the kernels over rows of fp32, bf16 and fp16 logits share: each row is read by groups of vectors that stay in
// registers between the maximum and the exponentials. Compiled once per instruction set.
#pragma once

#include <limits>

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "token_logps.h"

namespace fastalign::LEVEL {
namespace {

constexpr int kGroup = 8;         // vectors folded together
constexpr int kAccumulators = 4;  // enough independent sums to hide the latency of an addition
constexpr int64_t kAhead = 4096;  // bytes prefetched ahead: the processor's own prefetcher stops at the end of a page
constexpr int64_t kChunk = 2048;  // columns gathered at a time when they are not neighbours in memory
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Form { plain, scaled, capped };

// From a logit a to z = softcap(logit_scale * a) / temperature, and dz/da.
template <Form form>
struct Transform {
  vec inner, outer, chain;

  Transform(const TokenLogps& op, int64_t row) {
    double temperature = op.temperature_of(row);
    chain = set(float(op.logit_scale / temperature));
    inner = form == Form::capped ? set(float(op.logit_scale / op.softcap)) : chain;
    outer = set(float(op.softcap / temperature));
  }
  FORCE_INLINE vec operator()(vec a) const {
    if constexpr (form == Form::capped) return tanh_slope(a * inner).tanh * outer;
    return form == Form::scaled ? a * inner : a;
  }
  FORCE_INLINE TanhSlope with_slope(vec a) const {
    if constexpr (form == Form::capped) {
      TanhSlope t = tanh_slope(a * inner);
      return {t.tanh * outer, t.slope};
    }
    return {(*this)(a), set(1.0f)};
  }
};

// Of one slab: max z, sum exp(z - max), sum exp(z - max) (z - max), sum (z - max), and where the group of columns begins
// that has the first of the largest.
struct Partial {
  float max, sum, weighted;
  double total;
  int64_t first;
};

// What becomes of the exponentials of a sweep: here nothing.
struct Dropped {
  FORCE_INLINE void rebase(float) {}
  FORCE_INLINE void put(int, vec) {}
  FORCE_INLINE void next() {}
};

// The same, while the slab is being read. `base` is the running maximum, 0 as long as only -inf was seen. What a column
// adds to the plain sums stays relative to the base of its time; `lift` is what the later bases made of it.
template <bool entropy, bool total>
struct Online {
  float max = -kInfinity;
  double lift = 0;
  int64_t columns = 0, first = 0;
  vec top = set(-kInfinity), base = set(0.0f), sum[kAccumulators], weighted[kAccumulators], plain[kAccumulators];

  FORCE_INLINE Online() {
    for (int k = 0; k < kAccumulators; ++k) sum[k] = weighted[k] = plain[k] = set(0.0f);
  }
  template <class Exponentials>
  FORCE_INLINE void fold(const vec (&z)[kGroup], Exponentials& exponentials, int64_t width = kGroup * kLanes) {
    vec largest = max_(max_(max_(z[0], z[1]), max_(z[2], z[3])), max_(max_(z[4], z[5]), max_(z[6], z[7])));
    if (__builtin_expect(any_greater(largest, top), 0)) {
      raise(max_lane(largest));
      exponentials.rebase(max);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; ++j) {
      vec shifted = z[j] - base, x = clamp_low(shifted), e = exp_in_range(x);
      if (total) plain[j % kAccumulators] = plain[j % kAccumulators] + within(shifted, width - j * kLanes);
      exponentials.put(j, e);
      sum[j % kAccumulators] = sum[j % kAccumulators] + e;
      if (entropy) weighted[j % kAccumulators] = fma(e, x, weighted[j % kAccumulators]);
    }
    columns += width;
  }
  static FORCE_INLINE vec within(vec x, int64_t left) {
    return left >= kLanes ? x : keep(x, std::max<int64_t>(left, 0), 0.0f);
  }
  FORCE_INLINE void raise(float higher) {
    if (total && columns) lift += double(columns) * (double(max) - higher);
    vec shift = clamp_low(set(max - higher)), factor = exp_in_range(shift);  // from -inf: 0 times sums that are 0
    for (int k = 0; k < kAccumulators; ++k) {
      if (entropy) weighted[k] = factor * fma(sum[k], shift, weighted[k]);
      sum[k] = factor * sum[k];
    }
    max = higher;
    first = columns;
    top = base = set(higher);
  }
  FORCE_INLINE Partial partial() const {
    return {max, added(sum), entropy ? added(weighted) : 0.0f, total ? lift + added(plain) : 0.0, first};
  }
  static FORCE_INLINE float added(const vec (&x)[kAccumulators]) {
    static_assert(kAccumulators == 4);
    return sum_lanes((x[0] + x[1]) + (x[2] + x[3]));
  }
};

template <class T, Form form, bool entropy, bool total, class Exponentials>
FORCE_INLINE void fold_columns(Online<entropy, total>& online, const T* x, int64_t n, const Transform<form>& transform,
                               Exponentials& exponentials) {
  vec z[kGroup];
  int64_t v = 0;
  for (; v + kGroup * kLanes <= n; v += kGroup * kLanes) {
    const char* ahead = reinterpret_cast<const char*>(x + v) + kAhead;
    for (size_t line = 0; line < kGroup * kLanes * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; ++j) z[j] = transform(load(x + v + j * kLanes));
    online.fold(z, exponentials);
    exponentials.next();
  }
  if (v == n) return;
  int64_t width = n - v;
  for (int j = 0; j < kGroup; ++j, v += kLanes) {
    int64_t left = std::clamp<int64_t>(n - v, 0, kLanes);
    z[j] = left ? keep(transform(load(x + v, left)), left, -kInfinity) : set(-kInfinity);
  }
  online.fold(z, exponentials, width);
}

template <class T>
FORCE_INLINE const T* gather(const T* x, int64_t stride, int64_t n, T* neighbours) {
  for (int64_t i = 0; i < n; ++i) neighbours[i] = x[i * stride];
  return neighbours;
}

template <class T, Form form, bool entropy, bool total, class Exponentials>
Partial sweep(const T* x, int64_t stride, int64_t n, const Transform<form>& transform, Exponentials& exponentials) {
  Online<entropy, total> online;
  T chunk[kChunk];
  int64_t step = stride == 1 ? n : kChunk;
  for (int64_t v = 0; v < n; v += step) {
    int64_t width = std::min(step, n - v);
    const T* columns = stride == 1 ? x : gather(x + v * stride, stride, width, chunk);
    fold_columns(online, columns, width, transform, exponentials);
  }
  return online.partial();
}

// `first` as in Partial, of the row.
struct Statistics {
  float max, logsum, entropy, total;
  int64_t first;
};

// Slabs in their order, in double: few numbers, and the row's precision depends on them.
inline Statistics combine(const Partial* partials, int64_t vocabulary) {
  int64_t slabs = num_slabs(vocabulary), first = 0;
  float max = -kInfinity;
  for (int64_t k = 0; k < slabs; ++k)
    if (partials[k].max > max) max = partials[k].max, first = k * kSlab + partials[k].first;
  double sum = 0, weighted = 0, total = 0;
  for (int64_t k = 0; k < slabs; ++k) {
    double shift = double(partials[k].max) - max, columns = double(std::min(kSlab, vocabulary - k * kSlab));
    total += partials[k].total + columns * shift;
    double factor = partials[k].sum == 0 ? 0 : ::exp(shift);
    if (factor == 0) continue;  // nothing here but -inf, or all of it negligible
    sum += factor * partials[k].sum;
    weighted += factor * (partials[k].weighted + partials[k].sum * shift);
  }
  if (sum != sum && max < kInfinity) max = kNaN;
  return {max, float(::log(sum)), float(::log(sum) - weighted / sum), float(total), first};
}

template <class T>
FORCE_INLINE T* at(const Matrix& matrix, int64_t row, int64_t column = 0) {
  return static_cast<T*>(matrix.data) + row * matrix.row_stride + column * matrix.col_stride;
}

inline void write_row(const TokenLogps& op, int64_t row, float logps, Statistics s, bool top1) {
  static_cast<float*>(op.logps)[row] = logps;
  static_cast<float*>(op.max)[row] = s.max;
  static_cast<float*>(op.logsum)[row] = s.logsum;
  if (op.entropy) static_cast<float*>(op.entropy)[row] = s.entropy;
  if (op.total) static_cast<float*>(op.total)[row] = s.total;
  if (op.top1) static_cast<float*>(op.top1)[row] = top1;
}

// Whether a label whose z is the row's largest is the first such column: the sweep knows the group, the rest of it is
// looked at here.
template <class T, Form form>
bool comes_first(const TokenLogps& op, int64_t row, int64_t label, const Statistics& s) {
  int64_t n = label - s.first;
  if (n >= kGroup * kLanes) return false;
  Transform<form> transform(op, row);
  T chunk[kGroup * kLanes];
  const T* x = at<const T>(op.logits, row, s.first);
  if (op.logits.col_stride != 1) x = gather(x, op.logits.col_stride, n, chunk);
  vec largest = set(-kInfinity);
  int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) largest = max_(largest, transform(load(x + v)));
  if (v < n) largest = max_(largest, keep(transform(load(x + v, n - v)), n - v, -kInfinity));
  return max_lane(largest) < s.max;
}

template <class T, Form form>
void finish_row(const TokenLogps& op, int64_t row, const Partial* partials) {
  int64_t label = op.label(row);
  if (label == kIgnored) return write_row(op, row, 0, {0, 0, 0, 0, 0}, false);
  Statistics s = combine(partials, op.vocabulary);
  float logps = label == kElsewhere ? 0 : kNaN;
  bool top1 = false;
  if (label >= 0 && label < op.vocabulary) {
    float z = first(Transform<form>(op, row)(load(at<const T>(op.logits, row, label), 1)));
    logps = (z - s.max) - s.logsum;
    top1 = op.top1 && z == s.max && logps == logps && comes_first<T, form>(op, row, label, s);
  }
  write_row(op, row, logps, s, top1);
}

// A row's coefficient, 0 where there is none.
inline float coefficient(const void* values, int64_t row) { return values ? static_cast<const float*>(values)[row] : 0.0f; }

// d loss / d logit of a row from its four coefficients: (p (alpha - g + beta ln p) + delta) dz/da, and g dz/da more at
// the label.
template <Form form, bool has_beta, bool has_delta>
struct RowGradient {
  Transform<form> transform;
  float g, alpha, beta, delta, max, logsum;
  vec factor, slope, floor;

  RowGradient(const TokenLogps& op, int64_t row)
      : transform(op, row),
        g(coefficient(op.g, row)),
        alpha(coefficient(op.alpha, row)),
        beta(has_beta ? coefficient(op.beta, row) : 0.0f),
        delta(has_delta ? coefficient(op.delta, row) : 0.0f),
        max(static_cast<const float*>(op.max)[row]),
        logsum(static_cast<const float*>(op.logsum)[row]) {
    factor = set(alpha - g) * transform.chain;
    slope = set(beta) * transform.chain;
    floor = set(delta) * transform.chain;
  }
  bool zero() const { return g == 0.0f && alpha == 0.0f && beta == 0.0f && delta == 0.0f; }

  FORCE_INLINE vec operator()(vec a) const {
    TanhSlope z = transform.with_slope(a);
    vec x = clamp_low((z.tanh - set(max)) - set(logsum)), p = exp_in_range(x);
    vec share = has_beta ? fma(slope, x, factor) : factor;
    vec d = has_delta ? fma(p, share, floor) : p * share;
    return form == Form::capped ? d * z.slope : d;
  }
  // At the label 1 - p is taken as -expm1(ln p): a confident row keeps its digits.
  float at_label(vec a) const {
    TanhSlope z = transform.with_slope(a);
    double x = (first(z.tanh) - max) - logsum, p = ::exp(x);
    double d = -g * ::expm1(x) + (p == 0 ? 0 : p * (alpha + beta * x)) + delta;
    return float(d * first(transform.chain) * first(z.slope));
  }
};

template <class T, class Out, class Gradient>
FORCE_INLINE void differentiate(const Gradient& gradient, const T* x, Out* out, int64_t n) {
  int64_t v = 0;
#pragma GCC unroll 4
  for (; v + kLanes <= n; v += kLanes) store(out + v, gradient(load(x + v)));
  if (v < n) store(out + v, gradient(load(x + v, n - v)), n - v);
}

template <class T>
void fill(T* out, int64_t stride, int64_t n, float value) {
  T filler;
  store(&filler, set(value), 1);
  for (int64_t v = 0; v < n; ++v) out[v * stride] = filler;
}

template <class T, class Out, Form form, bool has_beta, bool has_delta>
void differentiate_slab(const TokenLogps& op, int64_t row, int64_t begin, int64_t n) {
  const T* x = at<const T>(op.logits, row, begin);
  Out* out = at<Out>(op.grad, row, begin);
  int64_t stride = op.logits.col_stride, out_stride = op.grad.col_stride, label = op.label(row);
  RowGradient<form, has_beta, has_delta> gradient(op, row);
  if (label == kIgnored || gradient.zero()) return fill(out, out_stride, n, 0);
  if (label != kElsewhere && (label < 0 || label >= op.vocabulary)) return fill(out, out_stride, n, kNaN);

  bool labelled = label >= begin && label < begin + n;
  vec at_label = labelled ? load(x + (label - begin) * stride, 1) : set(0.0f);  // before `out` may overwrite it
  T chunk[kChunk];
  Out made[kChunk];
  bool neighbours = stride == 1 && out_stride == 1;
  int64_t step = neighbours ? n : kChunk;
  for (int64_t v = 0; v < n; v += step) {
    int64_t width = std::min(step, n - v);
    const T* from = neighbours ? x : gather(x + v * stride, stride, width, chunk);
    differentiate(gradient, from, neighbours ? out : made, width);
    for (int64_t i = 0; i < width && !neighbours; ++i) out[(v + i) * out_stride] = made[i];
  }
  if (labelled) store(out + (label - begin) * out_stride, set(gradient.at_label(at_label)), 1);
}

using Differentiate = void (*)(const TokenLogps& op, int64_t row, int64_t begin, int64_t n);

// A row's gradient costs what its coefficients need: alpha nothing, beta and delta an operation each.
template <class T, class Out, Form form>
Differentiate differentiator(const TokenLogps& op) {
  if (op.beta)
    return op.delta ? differentiate_slab<T, Out, form, true, true> : differentiate_slab<T, Out, form, true, false>;
  return op.delta ? differentiate_slab<T, Out, form, false, true> : differentiate_slab<T, Out, form, false, false>;
}

}  // namespace
}  // namespace fastalign::LEVEL
