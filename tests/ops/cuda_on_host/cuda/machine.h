// In the place of csrc/cuda/machine.h: what device code needs, on the fibers of fibers.h.
#pragma once

#include <math.h>

#include "cpu/vec.h"
#include "cuda_runtime.h"

#define FASTALIGN_CLUSTERS 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct __nv_bfloat16 {
  fastalign::LEVEL::bfloat16 value;
};
struct __half {
  fastalign::LEVEL::float16 value;
};

inline float __bfloat162float(__nv_bfloat16 x) { return fastalign::LEVEL::widen(x.value); }
inline float __half2float(__half x) { return fastalign::LEVEL::widen(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 narrow;
  fastalign::LEVEL::narrow(x, &narrow.value);
  return narrow;
}
inline __half __float2half_rn(float x) {
  __half narrow;
  fastalign::LEVEL::narrow(x, &narrow.value);
  return narrow;
}

inline void __syncthreads() { host::meet(host::current->block->barriers[0], host::current->cluster->threads); }

template <class X>
X __shfl_xor_sync(unsigned mask, X x, int lane_mask) {
  int lane = static_cast<int>(threadIdx.x) % host::kWarp;
  host::Warp& warp = host::current->block->warps[threadIdx.x / host::kWarp];
  auto& values = warp.values[warp.turn[lane]++ % 2];  // the other half may still be read
  std::memcpy(values[lane], &x, sizeof(X));
  host::meet(warp.barrier, __builtin_popcount(mask));
  std::memcpy(&x, values[lane ^ lane_mask], sizeof(X));
  return x;
}

namespace fastalign::machine {

using host::Arrival;

inline float exp2(float x) { return ::exp2f(x); }
struct alignas(16) Words {
  uint32_t word[4];
};
inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Words)) host::fail("a misaligned access of 16 bytes");
}
inline Words load_shared(const void* from) {
  check_aligned(from);
  return *static_cast<const Words*>(from);
}
inline Words load_global(const void* from) {
  host::check_readable(from, sizeof(Words));
  return load_shared(from);
}
inline void store_global(void* to, const Words& from) {
  check_aligned(to);
  *static_cast<Words*>(to) = from;
}

inline unsigned char* shared_memory() { return host::current->block->shared; }
inline void barrier(int name, int threads) { host::meet(host::current->block->barriers[name], threads); }

inline unsigned block_in_cluster() { return host::current->block->rank; }
inline unsigned blocks_in_cluster() { return static_cast<unsigned>(host::current->cluster->blocks.size()); }
inline void cluster_barrier() {
  host::Cluster& cluster = *host::current->cluster;
  host::meet(cluster.barrier, cluster.threads * static_cast<int>(cluster.blocks.size()));
}
template <class T>
const T* in_block(const T* shared, unsigned block) {
  auto offset = reinterpret_cast<const unsigned char*>(shared) - host::current->block->shared;
  return reinterpret_cast<const T*>(host::current->cluster->blocks[block].shared + offset);
}

inline void start(Arrival* arrival) { *arrival = {false, 0}; }
inline void publish() {}

// The bytes come when someone waits for any; until then there is poison, which whoever reads too long will find.
inline void copy(void* shared, const void* global, uint32_t bytes, Arrival* arrival) {
  if (arrival->announced) host::fail("a second copy before the first has arrived");
  check_aligned(shared);
  check_aligned(static_cast<const char*>(global) + bytes);
  host::check_readable(global, bytes);
  arrival->announced = true;
  std::memset(shared, 0xff, bytes);
  host::current->cluster->copies.push_back({shared, global, bytes, arrival});
  host::progress();
}

inline void wait(Arrival* arrival, unsigned parity) {
  auto& copies = host::current->cluster->copies;
  while (arrival->phase % 2 == parity) {
    if (!copies.empty()) {
      host::Copy copy = copies.back();
      copies.pop_back();
      std::memcpy(copy.to, copy.from, copy.bytes);
      copy.arrival->announced = false;
      ++copy.arrival->phase;
      host::progress();
    }
    host::yield();
  }
}

}  // namespace fastalign::machine
