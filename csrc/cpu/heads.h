// What attention does with the numbers of a head and with a row of scores, the same code wherever it is done.
#pragma once

#include "attention.h"
#include "cpu/typed.h"

namespace fastalign::LEVEL {

template <class T>
T* row_of(const Heads& x, int64_t row, int64_t head, T*) {
  return static_cast<T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// to[j] = factor * from[j] for j < size
template <class From, class To>
FORCE_INLINE void scaled(const From* from, To* to, int64_t size, float factor) {
  vec by = set(factor);
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) store(to + j, by * load(from + j));
  if (j < size) store(to + j, by * load(from + j, size - j), size - j);
}

// x[j] = softcap tanh(x[j] / softcap) for j < n, and for what fills the last vector; the slopes where they are wanted.
inline void cap(float* x, int64_t n, float softcap, float* slopes = nullptr) {
  for (int64_t j = 0; j < n; j += kLanes) {
    TanhSlope capped = tanh_slope(load(x + j) * set(1 / softcap));
    store(x + j, set(softcap) * capped.tanh);
    if (slopes) store(slopes + j, capped.slope);
  }
}

inline float max_of(const float* x, int64_t n) {
  vec best = set(-std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) best = max_(load(x + j), best);
  if (j < n) best = max_(keep(load(x + j), n - j, -std::numeric_limits<float>::infinity()), best);
  return max_lane(best);
}

// x[j] = exp(x[j] - shift) for j < n, 0 up to `end`, a whole number of vectors; returns the sum.
inline float exponentials(float* x, int64_t n, int64_t end, float shift) {
  vec sum = set(0), by = set(shift);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    vec e = exp_in_range(clamp_low(load(x + j) - by));
    store(x + j, e);
    sum = sum + e;
  }
  if (j < n) {
    vec e = keep(exp_in_range(clamp_low(load(x + j) - by)), n - j, 0);
    store(x + j, e);
    sum = sum + e;
    j += kLanes;
  }
  for (; j < end; j += kLanes) store(x + j, set(0));
  return sum_lanes(sum);
}

}  // namespace fastalign::LEVEL
