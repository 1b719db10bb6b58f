// What the test calls, over ctypes, beside the launchers of csrc/cuda.h.
#include "cuda_runtime.h"

host::Device host::device = {{}, 8, nullptr, 0, 0, 0, 0, {}};

extern "C" void set_device(int multiprocessors, int shared_memory, int cache, int largest_cluster, unsigned order) {
  host::device.attributes[cudaDevAttrMultiProcessorCount] = multiprocessors;
  host::device.attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = shared_memory;
  host::device.attributes[cudaDevAttrL2CacheSize] = cache;
  host::device.attributes[cudaDevAttrClusterLaunch] = largest_cluster > 0;
  host::device.largest_cluster = largest_cluster;
  host::order = order;
}

extern "C" void set_readable(uint64_t low, uint64_t high) { host::readable = {low, high}; }

// Blocks, threads per block and blocks per cluster of the last launch, and how many launches there were.
extern "C" void last_launch(int* values) {
  const host::Device& device = host::device;
  values[0] = device.blocks, values[1] = device.threads, values[2] = device.cluster, values[3] = device.launches;
}
