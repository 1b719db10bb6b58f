// Of the CUDA runtime what the launchers of csrc/cuda call, for the device of fibers.h.
#pragma once

#include <map>

#include "fibers.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch,
  cudaDevAttrCount  // not in CUDA
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct dim3 : host::Dim {
  dim3(unsigned x = 1) : host::Dim{x, 1, 1} {}
};
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    host::Dim clusterDim;
  } val;
  cudaLaunchAttribute() : val{{}} {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

namespace host {

struct Device {
  int attributes[cudaDevAttrCount];
  int largest_cluster;
  const char* error;  // of the last launch
  int blocks, threads, cluster, launches;  // of the last launch; how many there were
  std::map<const void*, int> shared_limits;
};
extern Device device;
constexpr int kDefaultShared = 48 << 10;

inline int shared_limit(const void* kernel) {
  auto known = device.shared_limits.find(kernel);
  return known == device.shared_limits.end() ? kDefaultShared : known->second;
}

}  // namespace host

inline const char* cudaGetErrorString(cudaError_t error) {
  return host::device.error ? host::device.error : error == cudaErrorInvalidConfiguration ? "invalid configuration" : "error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = host::device.attributes[attribute], cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    host::device.shared_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  if (size > host::device.largest_cluster) return cudaErrorInvalidConfiguration;
  if (static_cast<int>(config->dynamicSmemBytes) > host::shared_limit(reinterpret_cast<const void*>(kernel)))
    return cudaErrorInvalidValue;
  *clusters = host::device.attributes[cudaDevAttrMultiProcessorCount] / size;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  host::Device& device = host::device;
  unsigned size = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1, blocks = config->gridDim.x;
  int threads = static_cast<int>(config->blockDim.x);
  device.error = nullptr;
  device.blocks = static_cast<int>(blocks), device.threads = threads, device.cluster = config->numAttrs ? int(size) : 0;
  ++device.launches;
  if (static_cast<int>(config->dynamicSmemBytes) > host::shared_limit(reinterpret_cast<const void*>(kernel)))
    device.error = "more shared memory than the kernel was allowed";
  if (blocks == 0 || blocks % size || threads % host::kWarp || threads > 1024) device.error = "invalid configuration";
  for (unsigned first = 0; first < blocks && !device.error; first += size)
    device.error = host::run(first, size, blocks, threads, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return device.error ? cudaErrorLaunchFailure : cudaSuccess;
}
