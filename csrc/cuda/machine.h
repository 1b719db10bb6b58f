// The hardware features that the kernels use beyond plain CUDA C++, each behind a function. Tests that run the kernels on a
// CPU replace this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Whether device code of this compilation may use clusters of blocks and bulk copies.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTALIGN_CLUSTERS 1
#else
#define FASTALIGN_CLUSTERS 0
#endif

namespace fastalign::machine {

// One instruction, within 2 ulp; what would be denormal is 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct alignas(16) Words {
  uint32_t word[4];
};

// 16 bytes at an aligned address, in one instruction. (What a compiler sees through it may take apart again.)
__device__ __forceinline__ Words load_global(const void* from) {
  Words to;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return to;
}

__device__ __forceinline__ Words load_shared(const void* from) {
  Words to;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
  return to;
}

__device__ __forceinline__ void store_global(void* to, const Words& from) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(from.word[0]),
               "r"(from.word[1]), "r"(from.word[2]), "r"(from.word[3])
               : "memory");
}

// The dynamic shared memory of this block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// Of `threads` threads of the block that name the same barrier, 1 to 15; memory accesses before it are done after it.
__device__ __forceinline__ void barrier(int name, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

#if FASTALIGN_CLUSTERS
__device__ __forceinline__ unsigned block_in_cluster() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ unsigned blocks_in_cluster() {
  unsigned count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// Of all threads of the cluster; memory accesses before it, also to global memory, are done after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ const T* in_block(const T* shared, unsigned block) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(block));
  return reinterpret_cast<const T*>(address);
}

// Counts the bytes of bulk copies: each phase ends when all that were announced have arrived.
struct Arrival {
  uint64_t state;
};

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By one thread; then `publish`, then a barrier of the block.
__device__ __forceinline__ void start(Arrival* arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
}

// What this thread did to shared memory, or ordered before itself by a barrier, comes before bulk copies that follow.
__device__ __forceinline__ void publish() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

// By one thread, once in each phase. Addresses and bytes are multiples of 16; without bytes the phase ends at once.
__device__ __forceinline__ void copy(void* shared, const void* global, uint32_t bytes, Arrival* arrival) {
  uint32_t to = shared_address(shared), counter = shared_address(arrival);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(counter), "r"(bytes) : "memory");
  if (bytes == 0) return;
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(counter)
               : "memory");
}

// Until the phase of this parity has ended: 0 for the first phase, then 1, and so on in turn.
__device__ __forceinline__ void wait(Arrival* arrival, unsigned parity) {
  uint32_t counter = shared_address(arrival), done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(counter), "r"(parity)
        : "memory");
  } while (!done);
}
#endif

}  // namespace fastalign::machine
