// Neighbouring columns of a row of logits, 16 bytes at a time wherever they begin.
#pragma once

#include <cstring>

#include "cuda/machine.h"
#include "token_logps.h"

namespace fastalign {
namespace {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ double widen(double x) { return x; }

template <class T>
using Real = decltype(widen(T()));

template <class T>
__device__ __forceinline__ T narrow(Real<T> x) {
  return T(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

using machine::Words;

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
__device__ __forceinline__ void unpack(const Words& words, Real<T> (&x)[kPack<T>]) {
  T values[kPack<T>];
  memcpy(values, &words, sizeof(Words));
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = widen(values[i]);
}

template <class T>
__device__ __forceinline__ Words pack(const Real<T> (&x)[kPack<T>]) {
  T values[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) values[i] = narrow<T>(x[i]);
  Words words;
  memcpy(&words, values, sizeof(Words));
  return words;
}

__device__ __forceinline__ unsigned misaligned(const void* address) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address) % sizeof(Words));
}

// The 16 bytes that begin `shift` bytes into `low`, before `high` follows.
__device__ __forceinline__ Words shifted(const Words& low, const Words& high, unsigned shift) {
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = low.word[i], w[i + 4] = high.word[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words.word[i] = static_cast<uint32_t>((uint64_t(w[i + 1]) << 32 | w[i]) >> (shift % 4 * 8));
  return words;
}

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.row_stride;
}

// n neighbouring columns of a row from `begin` on; a thread loads `unroll` packs before it uses the first.
template <class T, int unroll, bool copied = false>
struct Columns {
  const T* x;  // the first one, where wide loads go: in global memory, or in a copy in shared memory of the same alignment
  const TokenLogps& op;
  int64_t row, begin;
  int n;

  static __device__ __forceinline__ Words wide(const T* x) { return copied ? machine::load_shared(x) : machine::load_global(x); }

  // The columns, as counted here, that wide loads may touch: of this row, and a pack more than these at most.
  __device__ __forceinline__ int low() const { return begin ? -kPack<T> : 0; }
  __device__ __forceinline__ int high() const {
    int64_t left = op.vocabulary - begin - n;
    return n + static_cast<int>(left < kPack<T> ? left : kPack<T>);
  }
  // use(column, words) for each of `packs` packs from column `first` on that is this thread's.
  template <class Use>
  __device__ __forceinline__ void each(int first, int packs, int thread, int threads, const Use& use) const {
    if (op.logits.col_stride != 1 || misaligned(x + first)) {
#pragma unroll 1
      for (int p = thread; p < packs; p += threads) use(first + p * kPack<T>, anywhere(first + p * kPack<T>));
      return;
    }
#pragma unroll 1
    for (int p = thread; p < packs; p += unroll * threads) {
      Words words[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (p + u * threads < packs) words[u] = wide(x + first + (p + u * threads) * kPack<T>);
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (p + u * threads < packs) use(first + (p + u * threads) * kPack<T>, words[u]);
    }
  }
  // Of a row of odd width: two loads of neighbouring words, one of them from the cache.
  __device__ __forceinline__ Words anywhere(int column) const {
    unsigned shift = misaligned(x + column);
    int from = column - static_cast<int>(shift / sizeof(T));
    if (op.logits.col_stride == 1 && from >= low() && from + 2 * kPack<T> <= high())
      return shifted(wide(x + from), wide(x + from + kPack<T>), shift);
    T values[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] = at_home(column + i);
    Words words;
    memcpy(&words, values, sizeof(Words));
    return words;
  }
  __device__ __forceinline__ T at_home(int column) const {
    return row_of<const T>(op.logits, row)[(begin + column) * op.logits.col_stride];
  }
  __device__ __forceinline__ Real<T> one(int column) const { return widen(at_home(column)); }
};

template <class T, int unroll>
__device__ __forceinline__ Columns<T, unroll> columns_of(const TokenLogps& op, int64_t row, int64_t begin, int n) {
  return {row_of<const T>(op.logits, row) + begin * op.logits.col_stride, op, row, begin, n};
}

}  // namespace
}  // namespace fastalign
