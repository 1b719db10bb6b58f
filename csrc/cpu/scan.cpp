// Scans over packed tokens, each segment a loop of its own, carried in double. The recurrence is serial: wider vectors
// would not help, and one instruction set serves all.
#include "scan.h"

#include "cpu/parallel.h"

#if defined(LEVEL_scalar)

namespace fastalign {
namespace {

template <class T>
const T* read(const void* data) { return static_cast<const T*>(data); }

template <class T>
T* write(void* data) { return static_cast<T*>(data); }

// f(segment, start, stop) for every segment that has tokens.
template <class F>
void for_segments(const Segments& segments, int threads, F f) {
  int64_t tokens = segments.offsets[segments.count];
  LEVEL::parallel_for(segments.count, tokens, threads, [&](int64_t i) {
    if (segments.offsets[i] < segments.offsets[i + 1]) f(i, segments.offsets[i], segments.offsets[i + 1]);
  });
}

// decay(t): the factor between tokens t and t + 1.
template <class T, class Decay>
void scan_segment(const T* x, T* out, int64_t start, int64_t stop, bool reverse, Decay decay) {
  double carry = x[reverse ? stop - 1 : start];
  out[reverse ? stop - 1 : start] = T(carry);
  if (reverse)
    for (int64_t t = stop - 2; t >= start; --t) out[t] = T(carry = x[t] + decay(t) * carry);
  else
    for (int64_t t = start + 1; t < stop; ++t) out[t] = T(carry = x[t] + decay(t - 1) * carry);
}

template <class T>
void scan(const Scan& op, int threads) {
  const T *x = read<T>(op.x), *decays = read<T>(op.decays);
  for_segments(op.segments, threads, [&](int64_t, int64_t start, int64_t stop) {
    if (decays)
      scan_segment(x, write<T>(op.out), start, stop, op.reverse, [=](int64_t t) { return double(decays[t]); });
    else
      scan_segment(x, write<T>(op.out), start, stop, op.reverse, [&](int64_t) { return op.decay; });
  });
}

template <class T>
void gae(const Gae& op, int threads) {
  const T *rewards = read<T>(op.rewards), *values = read<T>(op.values), *last_values = read<T>(op.last_values);
  T *advantages = write<T>(op.advantages), *returns = write<T>(op.returns);
  double trace = op.gamma * op.lam;
  for_segments(op.segments, threads, [&](int64_t segment, int64_t start, int64_t stop) {
    double next = last_values ? last_values[segment] : 0, carry = 0;
    for (int64_t t = stop - 1; t >= start; --t) {
      double value = values[t];
      carry = (rewards[t] + op.gamma * next - value) + trace * carry;
      advantages[t] = T(carry);
      returns[t] = T(carry + value);
      next = value;
    }
  });
}

}  // namespace

void segment_scan(const Scan& op, int threads) { op.float64 ? scan<double>(op, threads) : scan<float>(op, threads); }

void gae(const Gae& op, int threads) { op.float64 ? gae<double>(op, threads) : gae<float>(op, threads); }

}  // namespace fastalign

#endif
