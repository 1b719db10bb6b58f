// Token losses and their gradient on the GPU, from statistics to gradient in one launch.
//
// Where the device has clusters of blocks (sm_90 and later), a row lives in the shared memory of a cluster: bulk copies
// bring it, its statistics meet through distributed shared memory, and its gradient leaves from there. Logits are read
// once. While a segment's gradient is on its way, the copy of that segment of the next row begins.
// Elsewhere the same code reads the row from global memory, twice; few rows at a time, so that the second read is served
// by the cache. Segments and their order are the same in both, and in clusters of any size: so are the bits.
#include "policy_loss.h"

#include "cuda.h"
#include "cuda/functors.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

namespace fastalign {
namespace {

template <class T>
constexpr int kMaxTeams = sizeof(T) == sizeof(double) ? 2 : 4;
constexpr int kSlack = 16;          // bytes by which a segment's copy is wider: it begins at the row's own alignment
constexpr int kPortableCluster = 8; // larger ones are an option of the device
constexpr double kCacheShare = 0.6; // of the second-level cache, for rows between their two sweeps

// Of a block, at the start of its dynamic shared memory; the copies of segments follow.
template <class R>
struct alignas(128) Shared {
  Partial<R> warps[kMaxSegments][kWarps];
  Partial<R> segments[2][kMaxSegments];  // of this row and of the one before, which other blocks may still read
  R target, max, logsum;
  RowCoefficients<R> coefficients;
#if FASTALIGN_CLUSTERS
  machine::Arrival arrivals[kMaxSegments];
#endif
};

template <class R>
__device__ Shared<R>& shared() {
  return *reinterpret_cast<Shared<R>*>(machine::shared_memory());
}

// The segments of this block are combined into those of the row, in the first warp.
// After this the gradient may overwrite the row's logits.
template <class T, bool capped>
__device__ __forceinline__ void reduce_own(Partial<Real<T>>* segments, int begin, int end, const TokenLogps& op, int64_t row) {
  __syncthreads();  // every team has left its sums
  int s = begin + static_cast<int>(threadIdx.x);
  if (s < end) segments[s] = settle<T, capped>(op, row, reduce_team(shared<Real<T>>().warps[s]));
}

// Rows in global memory: a block takes every gridDim.x-th.
template <class T>
struct InGlobalMemory {
  const TokenLogps& op;
  const Cut& cut;

  __device__ int64_t first_row() const { return blockIdx.x; }
  __device__ int64_t num_rows() const { return gridDim.x; }
  __device__ int begin() const { return 0; }
  __device__ int end() const { return cut.segments; }
  __device__ bool writes_table() const { return true; }
  __device__ void start() const {}
  __device__ void finish() const {}
  __device__ void want(int64_t, int) const {}
  __device__ void next() {}
  __device__ Columns<T, 1> columns(int64_t row, int s) const {
    return columns_of<T, 1>(op, row, cut.begin(s), cut.columns(s));
  }
  // Complete in the first warp, after every thread of the row has come here.
  template <bool capped>
  __device__ Partial<Real<T>> segment(int lane, int64_t row) const {
    using R = Real<T>;
    reduce_own<T, capped>(shared<R>().segments[0], 0, cut.segments, op, row);
    return lane < cut.segments ? shared<R>().segments[0][lane] : Partial<R>();
  }
};

#if FASTALIGN_CLUSTERS
// Rows in the shared memory of a cluster, each block with its share of the segments.
template <class T>
struct InCluster {
  using R = Real<T>;
  const TokenLogps& op;
  const Cut& cut;
  unsigned parity = 0;  // of the arrivals, in turn for each row that is copied

  __device__ int share() const { return cut.segments / static_cast<int>(machine::blocks_in_cluster()); }
  __device__ int64_t first_row() const { return blockIdx.x / machine::blocks_in_cluster(); }
  __device__ int64_t num_rows() const { return gridDim.x / machine::blocks_in_cluster(); }
  __device__ int begin() const { return static_cast<int>(machine::block_in_cluster()) * share(); }
  __device__ int end() const { return begin() + share(); }
  __device__ bool writes_table() const { return machine::block_in_cluster() == 0; }
  __device__ void start() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < share(); ++s) machine::start(&shared<R>().arrivals[s]);
      machine::publish();
    }
    __syncthreads();
  }
  // No block leaves while another may read its shared memory.
  __device__ void finish() const { machine::cluster_barrier(); }
  __device__ void next() { parity ^= 1; }

  __device__ unsigned char* buffer(int s) const {
    int64_t pitch = int64_t(cut.width) * int64_t(sizeof(T)) + kSlack;
    return machine::shared_memory() + sizeof(Shared<R>) + (s - begin()) * pitch;
  }
  // Copies what wide loads may touch. By one thread of the team that has read the row before, after its barrier.
  __device__ void want(int64_t row, int s) const {
    auto columns = columns_of<T, 1>(op, row, cut.begin(s), cut.columns(s));
    if (columns.n == 0) return;
    auto bytes = [&](int column) { return reinterpret_cast<const char*>(columns.x + column); };
    unsigned shift = misaligned(columns.x);
    const char *low = columns.begin ? bytes(0) - shift : bytes(0) + (sizeof(Words) - shift) % sizeof(Words);
    const char* high = bytes(columns.high()) - misaligned(bytes(columns.high()));
    machine::publish();  // the reads come before the copy writes
    machine::copy(buffer(s) + shift + (low - bytes(0)), low, static_cast<uint32_t>(high > low ? high - low : 0),
                  &shared<R>().arrivals[s - begin()]);
  }
  // Waits until they are there.
  __device__ Columns<T, 1, true> columns(int64_t row, int s) const {
    auto home = columns_of<T, 1>(op, row, cut.begin(s), cut.columns(s));
    if (home.n) machine::wait(&shared<R>().arrivals[s - begin()], parity);
    return {reinterpret_cast<const T*>(buffer(s) + misaligned(home.x)), op, row, home.begin, home.n};
  }
  template <bool capped>
  __device__ Partial<R> segment(int lane, int64_t row) const {
    // In turn: a block may still read those of the last row, but none those of the row before, for which all have waited.
    Partial<R>* segments = shared<R>().segments[parity];
    reduce_own<T, capped>(segments, begin(), end(), op, row);
    machine::cluster_barrier();
    return lane < cut.segments ? *machine::in_block(segments + lane, static_cast<unsigned>(lane / share())) : Partial<R>();
  }
};
#endif

template <class T, bool capped, class Home>
__device__ void run(const PolicyLoss& op, const Cut& cut, Home home) {
  using R = Real<T>;
  const TokenLogps& rows = op.rows;
  const int team = threadIdx.x / kTeam, teams = blockDim.x / kTeam, thread = threadIdx.x % kTeam;
  const Matrix& grad = rows.grad;
  Shared<R>& block = shared<R>();
  auto scored = [&](int64_t row) { return row < rows.rows && rows.label(row) != kIgnored; };
  auto want = [&](int64_t row, int s) {
    if (thread == 0 && scored(row)) home.want(row, s);
  };

  home.start();
  for (int s = home.begin() + team; s < home.end(); s += teams) want(home.first_row(), s);
#pragma unroll 1
  for (int64_t row = home.first_row(); row < rows.rows; row += home.num_rows()) {
    const int64_t label = rows.label(row), following = row + home.num_rows();
    RowCoefficients<R> coefficients = {0, 0, 0, 0};
    Transform<R, capped> transform(rows, row);
    if (label != kIgnored) {
      if (threadIdx.x == 0) block.target = target_of<T>(rows, row, label, transform);
#pragma unroll 1
      for (int s = home.begin() + team; s < home.end(); s += teams)
        sweep<true>(home.columns(row, s), transform, block.warps[s]);
      Partial<R> segment = home.template segment<capped>(threadIdx.x, row);
      if (threadIdx.x < kWarp) {
        Statistics<R> statistics(reduce_warp<true>(segment));
        if (threadIdx.x == 0) {
          R logps = logps_of(rows, label, block.target, statistics);
          bool top1 = is_top1(label, block.target, logps, statistics);
          block.coefficients = Policy<R>{op, row}.finish(logps, statistics, top1, home.writes_table());
          block.max = statistics.max;
          block.logsum = statistics.logsum;
        }
      }
      __syncthreads();
      coefficients = block.coefficients;
    } else if (threadIdx.x == 0 && home.writes_table()) {
      Policy<R>{op, row}.zero();
    }
    bool zero = label == kIgnored || coefficients.zero(), nan = !zero && !inside(rows, label);
    Gradient<R, capped> gradient(transform, coefficients, block.max, block.logsum);
#pragma unroll 1
    for (int s = home.begin() + team; s < home.end(); s += teams) {
      if (grad.data) {
        T* out = row_of<T>(grad, row) + cut.begin(s) * grad.col_stride;
        int n = cut.columns(s);
        if (zero || nan) fill<T>(zero ? R(0) : R(NAN), n, out, grad.col_stride, thread, kTeam);
        else
          differentiate(home.columns(row, s), label - cut.begin(s), gradient, [&] { return block.coefficients; }, out,
                        grad.col_stride, thread, kTeam);
      }
      machine::barrier(1 + team, kTeam);  // the team has read its segment
      want(following, s);
    }
    if (label != kIgnored) home.next();
  }
  home.finish();
}

template <class T, bool capped>
__global__ void __launch_bounds__(kTeam* kMaxTeams<T>, 1) plain_kernel(const PolicyLoss op, const Cut cut) {
  run<T, capped>(op, cut, InGlobalMemory<T>{op.rows, cut});
}

template <class T, bool capped>
__global__ void __launch_bounds__(kTeam* kMaxTeams<T>, 1) cluster_kernel(const PolicyLoss op, const Cut cut) {
#if FASTALIGN_CLUSTERS
  run<T, capped>(op, cut, InCluster<T>{op.rows, cut});
#endif
}

// --- launches --------------------------------------------------------------------------------------------------------

template <class T>
int threads(int segments) {
  return kTeam * (segments < kMaxTeams<T> ? segments : kMaxTeams<T>);
}

template <class T>
auto plain_kernel_of(const PolicyLoss& op) { return op.rows.softcap != 0 ? plain_kernel<T, true> : plain_kernel<T, false>; }

template <class T>
auto cluster_kernel_of(const PolicyLoss& op) {
  return op.rows.softcap != 0 ? cluster_kernel<T, true> : cluster_kernel<T, false>;
}

template <class T>
Launch cluster_launch(const Cut& cut, int cluster, uint64_t stream) {
  int64_t share = cut.segments / cluster, pitch = int64_t(cut.width) * int64_t(sizeof(T)) + kSlack;
  int64_t bytes = int64_t(sizeof(Shared<Real<T>>)) + share * pitch;
  return {cluster, threads<T>(int(share)), stream, int(bytes < INT32_MAX ? bytes : INT32_MAX), cluster};
}

// How many clusters of this size the device holds at a time; 0: it does not take them, or they do not fit the row.
template <class T>
int resident_clusters(const PolicyLoss& op, int size) {
  const Cut cut(op.rows.vocabulary);
  bool adjacent = op.rows.logits.col_stride == 1 && (!op.rows.grad.data || op.rows.grad.col_stride == 1);
  if (!adjacent || size < 1 || cut.segments % size || !limit(cudaDevAttrClusterLaunch)) return 0;
  Launch how = cluster_launch<T>(cut, size, 0);
  auto kernel = cluster_kernel_of<T>(op);
  cudaFuncAttributes compiled;
  if (how.shared > limit(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return 0;
  if (cudaFuncGetAttributes(&compiled, kernel) != cudaSuccess || compiled.ptxVersion < 90) return 0;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared);
  if (how.cluster > kPortableCluster) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config = how.config(attributes);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) clusters = 0;
  cudaGetLastError();  // the device may refuse a size: that is not an error here
  return clusters;
}

// The smallest cluster that holds a row; larger where few rows would leave most of the device idle.
template <class T>
int cluster_size(const PolicyLoss& op) {
  int64_t multiprocessors = limit(cudaDevAttrMultiProcessorCount);
  for (int size = 1; size <= kMaxSegments; size *= 2) {
    if (!resident_clusters<T>(op, size)) continue;
    while (2 * size <= kPortableCluster && op.rows.rows * 2 * size <= multiprocessors && resident_clusters<T>(op, 2 * size))
      size *= 2;
    return size;
  }
  return 0;
}

template <class T>
cudaError_t run_cluster(const PolicyLoss& op, int size, uint64_t stream) {
  int64_t clusters = resident_clusters<T>(op, size);
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  const Cut cut(op.rows.vocabulary);
  Launch how = cluster_launch<T>(cut, size, stream);
  how.blocks = size * (clusters < op.rows.rows ? clusters : op.rows.rows);
  return launch(how, cluster_kernel_of<T>(op), op, cut);
}

// Rows at a time: those that fit the cache, with their gradient unless it takes their place.
template <class T>
cudaError_t run_plain(const PolicyLoss& op, uint64_t stream) {
  const Cut cut(op.rows.vocabulary);
  bool apart = op.rows.grad.data && op.rows.grad.data != op.rows.logits.data;
  double row = double(op.rows.vocabulary) * sizeof(T) * (apart ? 2 : 1);
  int64_t fit = static_cast<int64_t>(kCacheShare * limit(cudaDevAttrL2CacheSize) / row), blocks = fit > 1 ? fit : 1;
  Launch how = {blocks < op.rows.rows ? blocks : op.rows.rows, threads<T>(cut.segments), stream,
                int(sizeof(Shared<Real<T>>))};
  return launch(how, plain_kernel_of<T>(op), op, cut);
}

template <class T>
cudaError_t run_as(const PolicyLoss& op, int cluster, uint64_t stream) {
  return cluster ? run_cluster<T>(op, cluster, stream) : run_plain<T>(op, stream);
}

}  // namespace
}  // namespace fastalign

using namespace fastalign;

int fastalign_policy_loss_cluster_cuda(const PolicyLoss* op) {
  switch (op->rows.dtype) {
    case Dtype::float32: return cluster_size<float>(*op);
    case Dtype::bfloat16: return cluster_size<__nv_bfloat16>(*op);
    case Dtype::float16: return cluster_size<__half>(*op);
    case Dtype::float64: return 0;  // for gradient checks: no kernel of its own
  }
  return 0;
}

const char* fastalign_policy_loss_cuda(const PolicyLoss* op, int cluster, uint64_t stream) {
  if (op->rows.rows == 0) return nullptr;
  switch (op->rows.dtype) {
    case Dtype::float32: return description(run_as<float>(*op, cluster, stream));
    case Dtype::bfloat16: return description(run_as<__nv_bfloat16>(*op, cluster, stream));
    case Dtype::float16: return description(run_as<__half>(*op, cluster, stream));
    case Dtype::float64: return description(run_plain<double>(*op, stream));
  }
  return "unknown dtype";
}
