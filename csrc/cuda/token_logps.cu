// Row statistics of logits on the GPU: one block per row reads it once, 16 bytes per thread and step.
//
// A column belongs to the same thread whether loads are wide or not, and the block's reduction has one order: the bits
// of a row depend on V and dtype alone, not on the row's address or its company.
#include "token_logps.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

namespace fastalign {
namespace {

constexpr int kThreads = 512;  // four blocks fill an SM of sm_80 to sm_100
constexpr int kWarp = 32;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

template <class T>
using Real = decltype(widen(T()));

// z = softcap(logit_scale * a) / temperature of one row.
template <class R, bool capped>
struct Transform {
  R inner, outer;

  __device__ Transform(const TokenLogps& op, int64_t row) {
    double temperature = op.temperature_of(row);
    inner = R(capped ? op.logit_scale / op.softcap : op.logit_scale / temperature);
    outer = R(op.softcap / temperature);
  }
  __device__ __forceinline__ R operator()(R a) const {
    return capped ? hyperbolic_tangent(a * inner) * outer : a * inner;
  }
};

// max z, sum exp(z - max), sum exp(z - max) (z - max) of the columns seen so far.
template <class R>
struct Online {
  R max = -INFINITY, sum = 0, weighted = 0;

  __device__ __forceinline__ void raise(R higher) {
    if (max > -INFINITY) {
      R shift = max - higher, factor = exponential(shift);
      weighted = factor == 0 ? 0 : factor * (weighted + sum * shift);
      sum *= factor;
    }
    max = higher;
  }
  __device__ __forceinline__ void add(R z) {
    R x = max > -INFINITY ? z - max : z, e = exponential(x);  // a row that begins with -inf is not yet lost
    sum += e;
    weighted += e == 0 ? 0 : e * x;
  }
  __device__ __forceinline__ void merge(Online other) {
    if (other.max > max) raise(other.max);
    else other.raise(max);
    sum += other.sum;
    weighted += other.weighted;
  }
  __device__ __forceinline__ Online from_lane(int offset) const {
    Online other;
    other.max = __shfl_down_sync(0xffffffff, max, offset);
    other.sum = __shfl_down_sync(0xffffffff, sum, offset);
    other.weighted = __shfl_down_sync(0xffffffff, weighted, offset);
    return other;
  }
};

template <class R>
__device__ Online<R> reduce_warp(Online<R> online) {
  for (int offset = kWarp / 2; offset; offset /= 2) online.merge(online.from_lane(offset));
  return online;
}

// Of the whole block, in thread 0.
template <class R>
__device__ Online<R> reduce_block(Online<R> online) {
  __shared__ R shared[3][kThreads / kWarp];
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  online = reduce_warp(online);
  if (lane == 0) {
    shared[0][warp] = online.max;
    shared[1][warp] = online.sum;
    shared[2][warp] = online.weighted;
  }
  __syncthreads();
  Online<R> mine;
  if (warp == 0 && lane < kThreads / kWarp) {
    mine.max = shared[0][lane];
    mine.sum = shared[1][lane];
    mine.weighted = shared[2][lane];
  }
  return warp == 0 ? reduce_warp(mine) : mine;
}

template <class T>
struct alignas(16) Pack {
  T values[16 / sizeof(T)];
};

template <class T, bool capped>
__device__ Online<Real<T>> sweep(const T* x, int64_t stride, int64_t columns, bool wide,
                                 const Transform<Real<T>, capped>& transform) {
  constexpr int kPack = 16 / sizeof(T);
  Online<Real<T>> online;
  for (int64_t v = int64_t(threadIdx.x) * kPack; v < columns; v += int64_t(kThreads) * kPack) {
    Real<T> z[kPack], largest = -INFINITY;
    Pack<T> pack;
    if (wide && v + kPack <= columns) {
      pack = *reinterpret_cast<const Pack<T>*>(x + v);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.values[i] = x[(v + i < columns ? v + i : v) * stride];
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      z[i] = v + i < columns ? transform(widen(pack.values[i])) : Real<T>(-INFINITY);
      largest = z[i] > largest ? z[i] : largest;
    }
    if (largest > online.max) online.raise(largest);
#pragma unroll
    for (int i = 0; i < kPack; ++i) online.add(z[i]);
  }
  return online;
}

template <class R>
__device__ void write_row(const TokenLogps& op, int64_t row, R logps, R max, R logsum, R entropy) {
  static_cast<R*>(op.logps)[row] = logps;
  static_cast<R*>(op.max)[row] = max;
  static_cast<R*>(op.logsum)[row] = logsum;
  if (op.entropy) static_cast<R*>(op.entropy)[row] = entropy;
}

template <class T, bool capped>
__global__ void __launch_bounds__(kThreads) forward_kernel(const TokenLogps op, bool wide) {
  using R = Real<T>;
  int64_t row = blockIdx.x, label = op.label(row);
  if (label == kIgnored) {
    if (threadIdx.x == 0) write_row<R>(op, row, 0, 0, 0, 0);
    return;
  }
  const T* x = static_cast<const T*>(op.logits.data) + row * op.logits.row_stride;
  Transform<R, capped> transform(op, row);
  Online<R> online = reduce_block(sweep<T, capped>(x, op.logits.col_stride, op.vocabulary, wide, transform));
  if (threadIdx.x != 0) return;

  R max = online.sum != online.sum && online.max < INFINITY ? R(NAN) : online.max;
  R logsum = log(online.sum), logps = label == kElsewhere ? R(0) : R(NAN);
  if (label >= 0 && label < op.vocabulary) logps = (transform(widen(x[label * op.logits.col_stride])) - max) - logsum;
  write_row<R>(op, row, logps, max, logsum, logsum - online.weighted / online.sum);
}

template <class T>
void launch(const TokenLogps& op, cudaStream_t stream) {
  auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  bool wide = op.logits.col_stride == 1 && aligned(reinterpret_cast<intptr_t>(op.logits.data)) &&
              aligned(op.logits.row_stride * int64_t(sizeof(T)));
  auto kernel = op.softcap != 0 ? forward_kernel<T, true> : forward_kernel<T, false>;
  kernel<<<static_cast<unsigned>(op.rows), kThreads, 0, stream>>>(op, wide);
}

}  // namespace
}  // namespace fastalign

extern "C" const char* fastalign_token_logps_forward_cuda(const fastalign::TokenLogps* op, uint64_t stream) {
  using namespace fastalign;
  auto queue = reinterpret_cast<cudaStream_t>(stream);
  if (op->rows == 0) return nullptr;
  switch (op->dtype) {
    case Dtype::float32: launch<float>(*op, queue); break;
    case Dtype::bfloat16: launch<__nv_bfloat16>(*op, queue); break;
    case Dtype::float16: launch<__half>(*op, queue); break;
    case Dtype::float64: launch<double>(*op, queue); break;
  }
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
