// What the kernels over rows of logits share: the sums of a row in one fixed order, its gradient.
//
// A row is cut into segments. A team of threads sweeps a segment, each thread its own columns; the threads of a warp meet
// in a butterfly, the warps of a team in their order, the segments in a butterfly again. Which blocks sweep which segments
// changes nothing, nor does the row's address: its bits depend on V and dtype alone.
#pragma once

#include <cmath>

#include "cuda/columns.h"
#include "token_logps.h"

namespace fastalign {
namespace {

constexpr int kWarp = 32;
constexpr int kTeam = 256;  // threads that sweep a segment together
constexpr int kWarps = kTeam / kWarp;
template <class T>
constexpr int kResident = sizeof(T) == sizeof(double) ? 2 : 4;  // teams that the registers of an SM are divided among
constexpr int kMaxSegments = 16;     // as many blocks may share a row, in a cluster or not
constexpr int64_t kSegment = 16384;  // columns worth a reduction of their own
constexpr int64_t kGrain = 256;      // a segment's width is a multiple: it starts where loads of its dtype may be wide

// How a row is cut. The last segments may be empty.
struct Cut {
  int segments, width;  // segments: a power of two
  int64_t vocabulary;

  HOST_DEVICE explicit Cut(int64_t vocabulary) : segments(1), vocabulary(vocabulary) {
    while (segments < kMaxSegments && segments * kSegment < vocabulary) segments *= 2;
    int64_t columns = (vocabulary + segments - 1) / segments;
    width = static_cast<int>((columns + kGrain - 1) / kGrain * kGrain);
  }
  HOST_DEVICE int64_t begin(int segment) const { return int64_t(segment) * width; }
  HOST_DEVICE int columns(int segment) const {
    int64_t left = vocabulary - begin(segment);
    return static_cast<int>(left < 0 ? 0 : left < width ? left : width);
  }
};

__device__ __forceinline__ float exponential(float x) { return machine::exp2(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }  // of a NaN and a number the number
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// Where ln p multiplies p: exp(-1000) is already 0, and 0 * -inf would be NaN.
template <class R>
__device__ __forceinline__ R floored(R x) {
  return larger(x, R(-1000));
}

// z = softcap(logit_scale * a) / temperature of one row, and dz / da = chain() * slope, the latter of the tanh.
template <class R, bool capped>
struct Transform {
  R inner, outer;

  __device__ Transform(const TokenLogps& op, int64_t row) {
    double temperature = op.temperature_of(row);
    inner = R(op.logit_scale / (capped ? op.softcap : temperature));
    outer = R(capped ? op.softcap / temperature : 1);
  }
  __device__ __forceinline__ R chain() const { return capped ? inner * outer : inner; }
  __device__ __forceinline__ R operator()(R a) const {
    R slope;
    return with_slope(a, slope);
  }
  __device__ __forceinline__ R with_slope(R a, R& slope) const {
    if (!capped) return slope = 1, a * inner;
    R t = tanh(a * inner);
    slope = (1 - t) * (1 + t);
    return t * outer;
  }
};

// --- sums ------------------------------------------------------------------------------------------------------------

// Of some columns: max z, and with x = z - max: sum exp(x), sum exp(x) x, sum x, how many; and where the pack of columns
// begins that has the first of the largest.
template <class R>
struct Partial {
  R max = -INFINITY, sum = 0, weighted = 0, total = 0, count = 0;
  int first = 0;

  // The same relative to a higher maximum. Columns that are all -inf have nothing to move.
  __device__ __forceinline__ void raise(R higher) {
    if (max > -INFINITY) {
      R shift = max - higher, factor = exponential(shift);
      weighted = factor * (weighted + sum * floored(shift));
      sum *= factor;
      total += count * shift;
    }
    max = higher;
  }
  __device__ __forceinline__ void add(const Partial& other) {
    sum += other.sum;
    weighted += other.weighted;
    total += other.total;
    count += other.count;
  }
  // Where the first of the largest is, if these columns have one; before `raise`.
  __device__ __forceinline__ int first_of(R largest) const { return max == largest ? first : INT32_MAX; }
};

template <class R>
__device__ __forceinline__ R sum_of(const R (&x)[2]) { return x[0] + x[1]; }
template <class R>
__device__ __forceinline__ R sum_of(const R (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }
template <class R>
__device__ __forceinline__ R sum_of(const R (&x)[8]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// The columns that one thread has seen so far; without `full`, maximum and sum alone. How many they are follows from the
// column, so that no register of the loop counts them.
template <class R, bool full>
struct Online : Partial<R> {
  R base = 0;  // the maximum, but 0 as long as there were only -inf

  template <int n>
  __device__ __forceinline__ void see(const R (&z)[n], int column) {
    R largest = z[0], e[n], x[n];
#pragma unroll
    for (int i = 1; i < n; ++i) largest = larger(largest, z[i]);
    if (largest > this->max) rise(largest, column, column / (n * kTeam) * n);
#pragma unroll
    for (int i = 0; i < n; ++i) e[i] = exponential(x[i] = z[i] - base);
    this->sum += sum_of(e);
    if (!full) return;
    this->total += sum_of(x);
#pragma unroll
    for (int i = 0; i < n; ++i) this->weighted = fma(e[i], floored(x[i]), this->weighted);
  }
  __device__ __forceinline__ void see_one(R z, int column, int seen) {
    if (z > this->max) rise(z, column, seen);
    R x = z - base, e = exponential(x);
    this->sum += e;
    this->total += x;
    this->weighted = fma(e, floored(x), this->weighted);
  }
  __device__ __forceinline__ void rise(R higher, int column, int seen) {
    this->count = R(seen);
    this->raise(base = higher);
    this->first = column;
  }
};

// Of all lanes of a warp, in every lane.
template <bool full, class R>
__device__ __forceinline__ Partial<R> reduce_warp(Partial<R> partial) {
  R max = partial.max;
#pragma unroll
  for (int lane = kWarp / 2; lane; lane /= 2) max = larger(max, __shfl_xor_sync(0xffffffff, max, lane));
  partial.first = partial.first_of(max);
#pragma unroll
  for (int lane = kWarp / 2; lane; lane /= 2) {
    int other = __shfl_xor_sync(0xffffffff, partial.first, lane);
    partial.first = other < partial.first ? other : partial.first;
  }
  partial.raise(max);
#pragma unroll
  for (int lane = 1; lane < kWarp; lane *= 2) {
    Partial<R> other;
    other.sum = __shfl_xor_sync(0xffffffff, partial.sum, lane);
    if (full) {
      other.weighted = __shfl_xor_sync(0xffffffff, partial.weighted, lane);
      other.total = __shfl_xor_sync(0xffffffff, partial.total, lane);
      other.count = __shfl_xor_sync(0xffffffff, partial.count, lane);
    }
    partial.add(other);
  }
  return partial;
}

// Of the warps of a team, in their order.
template <class R>
__device__ __forceinline__ Partial<R> reduce_team(const Partial<R> (&warps)[kWarps]) {
  Partial<R> all;
  all.first = INT32_MAX;
  for (int i = 0; i < kWarps; ++i) all.max = larger(all.max, warps[i].max);
  for (int i = 0; i < kWarps; ++i) {
    Partial<R> warp = warps[i];
    int first = warp.first_of(all.max);
    all.first = first < all.first ? first : all.first;
    warp.raise(all.max);
    all.add(warp);
  }
  return all;
}

// The columns of a segment, by a team; each warp leaves its share.
template <bool full, class T, int unroll, bool copied, bool capped>
__device__ __forceinline__ void sweep(const Columns<T, unroll, copied>& columns, const Transform<Real<T>, capped>& transform,
                                      Partial<Real<T>> (&warps)[kWarps]) {
  int thread = threadIdx.x % kTeam, packs = columns.n / kPack<T>;
  Online<Real<T>, full> online;
  columns.each(0, packs, thread, kTeam, [&](int v, const Words& words) {
    Real<T> z[kPack<T>];
    unpack<T>(words, z);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) z[i] = transform(z[i]);
    online.see(z, v);
  });
  int rest = packs * kPack<T> + thread, seen = thread < packs ? ((packs - 1 - thread) / kTeam + 1) * kPack<T> : 0;
  if (rest < columns.n) online.see_one(transform(columns.one(rest)), rest, seen);
  online.count = Real<T>(seen + (rest < columns.n));
  online.first += static_cast<int>(columns.begin);
  Partial<Real<T>> partial = reduce_warp<full>(static_cast<Partial<Real<T>>&>(online));
  if (thread % kWarp == 0) warps[thread / kWarp] = partial;
}

template <class R>
struct Statistics {
  R max, logsum, entropy, total;
  int first;

  Statistics() = default;
  __device__ explicit Statistics(const Partial<R>& row)
      : max(row.sum != row.sum && row.max < INFINITY ? R(NAN) : row.max),
        logsum(log(row.sum)),
        entropy(logsum - row.weighted / row.sum),
        total(row.total),
        first(row.first) {}
};

__device__ __forceinline__ bool inside(const TokenLogps& op, int64_t label) {
  return label >= 0 && label < op.vocabulary;
}

// z of the label, or anything where there is none.
template <class T, bool capped>
__device__ __forceinline__ Real<T> target_of(const TokenLogps& op, int64_t row, int64_t label,
                                             const Transform<Real<T>, capped>& transform) {
  if (!inside(op, label)) return 0;
  return transform(widen(row_of<const T>(op.logits, row)[label * op.logits.col_stride]));
}

template <class R>
__device__ __forceinline__ R logps_of(const TokenLogps& op, int64_t label, R target, const Statistics<R>& row) {
  if (inside(op, label)) return (target - row.max) - row.logsum;
  return label == kElsewhere ? R(0) : R(NAN);
}

// The same segment with `first` moved on, within its pack, to the first of the largest, or to the label if that comes before.
// Nothing is kept for it in registers: it is seldom that the label's pack is the first of the largest.
template <class T, bool capped>
__device__ __forceinline__ Partial<Real<T>> settle(const TokenLogps& op, int64_t row, Partial<Real<T>> segment) {
  const int64_t ahead = op.label(row) - segment.first;
  if (ahead <= 0 || ahead >= kPack<T>) return segment;
  const Transform<Real<T>, capped> transform(op, row);
  const int label = segment.first + static_cast<int>(ahead);
#pragma unroll 1
  while (segment.first < label && target_of<T>(op, row, segment.first, transform) != segment.max) ++segment.first;
  return segment;
}

// Whether the label, of this z, is the first column that has the row's largest. A row of NaN has none.
template <class R>
__device__ __forceinline__ bool is_top1(int64_t label, R target, R logps, const Statistics<R>& row) {
  return label == row.first && target == row.max && logps == logps;
}

// --- gradient --------------------------------------------------------------------------------------------------------

// The gradient of the loss in a row: d loss / d z_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta.
template <class R>
struct RowCoefficients {
  R g, alpha, beta, delta;

  __device__ bool zero() const { return g == 0 && alpha == 0 && beta == 0 && delta == 0; }
};

template <class R, bool capped>
struct Gradient {
  Transform<R, capped> transform;
  R max, logsum, others, beta, delta;  // the last three times chain

  __device__ Gradient(const Transform<R, capped>& transform, const RowCoefficients<R>& row, R max, R logsum)
      : transform(transform), max(max), logsum(logsum), others((row.alpha - row.g) * transform.chain()),
        beta(row.beta * transform.chain()), delta(row.delta * transform.chain()) {}

  __device__ __forceinline__ R operator()(R a) const {
    R slope, z = transform.with_slope(a, slope), x = (z - max) - logsum, p = exponential(x);
    R d = fma(p, fma(beta, floored(x), others), delta);
    return capped ? d * slope : d;
  }
  // 1 - p as -expm1(ln p): a confident row keeps its digits.
  __device__ R at_label(R a, const RowCoefficients<R>& row) const {
    R slope, z = transform.with_slope(a, slope), x = (z - max) - logsum, p = exponential(x);
    R d = p * (row.alpha + row.beta * floored(x)) - row.g * expm1(x) + row.delta;
    return d * transform.chain() * slope;
  }
};

// Where wide stores begin, and how many there are, in n columns of a gradient.
template <class T>
struct Stores {
  int head, packs, tail;

  __device__ Stores(const T* out, int n) {
    head = static_cast<int>((sizeof(Words) - misaligned(out)) % sizeof(Words) / sizeof(T));
    head = head < n ? head : n;
    packs = (n - head) / kPack<T>;
    tail = head + packs * kPack<T>;
  }
};

// The gradient of columns, by `threads` threads; label: its place from the first of them, also outside. `out` may be the
// columns: what a thread writes it has read itself, and no one else has still to read it. `row()` gives the coefficients
// once more, for the label: they need not be kept until then.
template <class T, int unroll, bool copied, bool capped, class Row>
__device__ __forceinline__ void differentiate(const Columns<T, unroll, copied>& columns, int64_t label,
                                              const Gradient<Real<T>, capped>& gradient, const Row& row, T* out,
                                              int64_t stride, int thread, int threads) {
  const int n = columns.n, y = label >= 0 && label < n ? static_cast<int>(label) : -1;
  Real<T> at_label = 0;
  bool mine = false;  // the label's column: set when it comes by, written last
  auto put = [&](int v) {
    Real<T> a = columns.one(v);
    if (v == y) mine = true, at_label = a;
    out[v * stride] = narrow<T>(gradient(a));
  };
  Stores<T> stores(out, stride == 1 ? n : 0);
  columns.each(stores.head, stores.packs, thread, threads, [&](int v, const Words& words) {
    Real<T> x[kPack<T>];
    unpack<T>(words, x);
    if (y >= v && y < v + kPack<T>) {
      mine = true;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) at_label = v + i == y ? x[i] : at_label;
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] = gradient(x[i]);
    machine::store_global(out + v, pack<T>(x));
  });
  if (thread < stores.head) put(thread);
  for (int v = stores.tail + thread; v < n; v += threads) put(v);
  if (mine) out[y * stride] = narrow<T>(gradient.at_label(at_label, row()));
}

// One value in n columns; the logits are not read.
template <class T>
__device__ __forceinline__ void fill(Real<T> value, int n, T* out, int64_t stride, int thread, int threads) {
  Stores<T> stores(out, stride == 1 ? n : 0);
  Real<T> values[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) values[i] = value;
  Words words = pack<T>(values);
  for (int p = thread; p < stores.packs; p += threads)
    machine::store_global(out + stores.head + p * kPack<T>, words);
  if (thread < stores.head) out[thread] = narrow<T>(value);
  for (int v = stores.tail + thread; v < n; v += threads) out[v * stride] = narrow<T>(value);
}

}  // namespace
}  // namespace fastalign
