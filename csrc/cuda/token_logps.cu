// Row statistics of logits and their gradient on the GPU. With enough rows each block takes one. Few rows are shared by
// several blocks, each with some of the segments, and a warp per row combines the segments.
#include "token_logps.h"

#include "cuda.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

namespace fastalign {
namespace {

template <class T>
constexpr int kUnroll = sizeof(T) == sizeof(double) ? 2 : 4;
constexpr int kFinishers = 128;  // threads of a block that finishes rows, a warp each

// Of a block, in its dynamic shared memory.
template <class R>
struct Shared {
  Partial<R> warps[kMaxSegments][kWarps];
  R target;
};

// The partial results of the blocks that share a row.
template <class R>
struct Scratch {
  Partial<R> segments[kMaxSegments];
  R target;
};

template <class R>
__device__ void write_row(const TokenLogps& op, int64_t row, R logps, const Statistics<R>& s, bool top1) {
  static_cast<R*>(op.logps)[row] = logps;
  static_cast<R*>(op.max)[row] = s.max;
  static_cast<R*>(op.logsum)[row] = s.logsum;
  if (op.entropy) static_cast<R*>(op.entropy)[row] = s.entropy;
  if (op.total) static_cast<R*>(op.total)[row] = s.total;
  if (op.top1) static_cast<R*>(op.top1)[row] = top1;
}

template <class R>
__device__ void write_scored_row(const TokenLogps& op, int64_t row, R target, const Statistics<R>& s) {
  int64_t label = op.label(row);
  R logps = logps_of(op, label, target, s);
  write_row(op, row, logps, s, is_top1(label, target, logps, s));
}

template <class R>
__device__ void write_ignored_row(const TokenLogps& op, int64_t row) {
  Statistics<R> zero;
  zero.max = zero.logsum = zero.entropy = zero.total = 0;
  write_row<R>(op, row, 0, zero, false);
}

template <class T, bool capped, bool full>
__global__ void __launch_bounds__(kTeam, kResident<T>)
    forward_kernel(const TokenLogps op, const Cut cut, int blocks_per_row, Scratch<Real<T>>* scratch) {
  using R = Real<T>;
  int64_t row = blockIdx.x / blocks_per_row, label = op.label(row);
  if (label == kIgnored) {
    if (threadIdx.x == 0 && blocks_per_row == 1) write_ignored_row<R>(op, row);
    return;
  }
  auto& block = *reinterpret_cast<Shared<R>*>(machine::shared_memory());
  int share = cut.segments / blocks_per_row, first = blockIdx.x % blocks_per_row * share, lane = threadIdx.x;
  Transform<R, capped> transform(op, row);
  if (lane == 0) block.target = target_of<T>(op, row, label, transform);
  for (int s = first; s < first + share; ++s)
    sweep<full>(columns_of<T, kUnroll<T>>(op, row, cut.begin(s), cut.columns(s)), transform, block.warps[s]);
  __syncthreads();
  if (lane >= kWarp) return;
  Partial<R> segment;
  if (lane < share) segment = settle<T, capped>(op, row, reduce_team(block.warps[first + lane]));
  if (blocks_per_row > 1) {
    if (lane < share) scratch[row].segments[first + lane] = segment;
    if (lane == 0) scratch[row].target = block.target;
    return;
  }
  Statistics<R> statistics(reduce_warp<full>(segment));
  if (lane == 0) write_scored_row(op, row, block.target, statistics);
}

template <class R>
__global__ void __launch_bounds__(kFinishers) finish_kernel(const TokenLogps op, int segments, const Scratch<R>* scratch) {
  int64_t row = int64_t(blockIdx.x) * (kFinishers / kWarp) + threadIdx.x / kWarp;
  int lane = threadIdx.x % kWarp;
  if (row >= op.rows) return;
  if (op.label(row) == kIgnored) {
    if (lane == 0) write_ignored_row<R>(op, row);
    return;
  }
  Partial<R> segment;
  if (lane < segments) segment = scratch[row].segments[lane];
  Statistics<R> statistics(reduce_warp<true>(segment));
  if (lane == 0) write_scored_row(op, row, scratch[row].target, statistics);
}

template <class R>
__device__ R number(const void* values, int64_t row) {
  return values ? static_cast<const R*>(values)[row] : R(0);
}

template <class T, bool capped>
__global__ void __launch_bounds__(kTeam, kResident<T>)
    backward_kernel(const TokenLogps op, const Cut cut, int blocks_per_row) {
  using R = Real<T>;
  int64_t row = blockIdx.x / blocks_per_row, label = op.label(row);
  int share = cut.segments / blocks_per_row, first = blockIdx.x % blocks_per_row * share;
  int64_t begin = cut.begin(first), end = first + share == cut.segments ? cut.vocabulary : cut.begin(first + share);
  int n = static_cast<int>(end > begin ? end - begin : 0);
  T* out = row_of<T>(op.grad, row) + begin * op.grad.col_stride;
  auto coefficients = [&]() -> RowCoefficients<R> {
    return {number<R>(op.g, row), number<R>(op.alpha, row), number<R>(op.beta, row), number<R>(op.delta, row)};
  };
  bool zero = label == kIgnored || coefficients().zero();
  if (zero || (label != kElsewhere && !inside(op, label)))
    return fill<T>(zero ? R(0) : R(NAN), n, out, op.grad.col_stride, threadIdx.x, kTeam);
  Gradient<R, capped> gradient(Transform<R, capped>(op, row), coefficients(), number<R>(op.max, row),
                               number<R>(op.logsum, row));
  differentiate(columns_of<T, kUnroll<T>>(op, row, begin, n), label - begin, gradient, coefficients, out, op.grad.col_stride,
                threadIdx.x, kTeam);
}

template <class T, bool capped, bool full>
cudaError_t forward_as(const TokenLogps& op, int blocks_per_row, void* scratch, uint64_t stream) {
  using R = Real<T>;
  const Cut cut(op.vocabulary);
  auto* rows = static_cast<Scratch<R>*>(scratch);
  Launch how = {op.rows * blocks_per_row, kTeam, stream, int(sizeof(Shared<R>))};
  cudaError_t error = launch(how, forward_kernel<T, capped, full>, op, cut, blocks_per_row, rows);
  if (error != cudaSuccess || blocks_per_row == 1) return error;
  Launch after = {(op.rows * kWarp + kFinishers - 1) / kFinishers, kFinishers, stream};
  return launch(after, finish_kernel<R>, op, cut.segments, rows);
}

template <class T>
cudaError_t forward(const TokenLogps& op, int blocks_per_row, void* scratch, uint64_t stream) {
  constexpr bool always = sizeof(T) == sizeof(double);  // not worth a kernel of its own
  bool full = op.entropy || op.total;
  if (op.softcap != 0)
    return (full ? forward_as<T, true, true> : forward_as<T, true, always>)(op, blocks_per_row, scratch, stream);
  return (full ? forward_as<T, false, true> : forward_as<T, false, always>)(op, blocks_per_row, scratch, stream);
}

template <class T>
cudaError_t backward(const TokenLogps& op, int blocks_per_row, uint64_t stream) {
  Launch how = {op.rows * blocks_per_row, kTeam, stream};
  auto kernel = op.softcap != 0 ? backward_kernel<T, true> : backward_kernel<T, false>;
  return launch(how, kernel, op, Cut(op.vocabulary), blocks_per_row);
}

}  // namespace
}  // namespace fastalign

using namespace fastalign;

const char* fastalign_use_device_cuda(int device) { return description(cudaSetDevice(device)); }

int fastalign_blocks_per_row_cuda(int64_t rows, int64_t vocabulary) {
  int64_t multiprocessors = limit(cudaDevAttrMultiProcessorCount), blocks = 1;
  if (rows >= 2 * multiprocessors) return 1;
  while (blocks < Cut(vocabulary).segments && rows * blocks < kResident<float> * multiprocessors) blocks *= 2;
  return static_cast<int>(blocks);
}

int64_t fastalign_scratch_cuda(const TokenLogps* op) {
  return op->rows * int64_t(op->dtype == Dtype::float64 ? sizeof(Scratch<double>) : sizeof(Scratch<float>));
}

const char* fastalign_token_logps_forward_cuda(const TokenLogps* op, int blocks_per_row, void* scratch, uint64_t stream) {
  if (op->rows == 0) return nullptr;
  switch (op->dtype) {
    case Dtype::float32: return description(forward<float>(*op, blocks_per_row, scratch, stream));
    case Dtype::bfloat16: return description(forward<__nv_bfloat16>(*op, blocks_per_row, scratch, stream));
    case Dtype::float16: return description(forward<__half>(*op, blocks_per_row, scratch, stream));
    case Dtype::float64: return description(forward<double>(*op, blocks_per_row, scratch, stream));
  }
  return "unknown dtype";
}

const char* fastalign_token_logps_backward_cuda(const TokenLogps* op, int blocks_per_row, uint64_t stream) {
  if (op->rows == 0) return nullptr;
  switch (op->dtype) {
    case Dtype::float32: return description(backward<float>(*op, blocks_per_row, stream));
    case Dtype::bfloat16: return description(backward<__nv_bfloat16>(*op, blocks_per_row, stream));
    case Dtype::float16: return description(backward<__half>(*op, blocks_per_row, stream));
    case Dtype::float64: return description(backward<double>(*op, blocks_per_row, stream));
  }
  return "unknown dtype";
}
