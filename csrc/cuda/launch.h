// Launches on the current device; its limits are queried, not assumed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastalign {
namespace {

inline int limit(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

struct Launch {
  int64_t blocks;
  int threads;
  uint64_t stream;
  int shared = 0;   // bytes of dynamic shared memory
  int cluster = 0;  // blocks in a cluster; 0: none

  // Attributes point into `attributes`, which must outlive the configuration.
  cudaLaunchConfig_t config(cudaLaunchAttribute* attributes) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    if (cluster == 0) return config;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = 1;
    return config;
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config = how.config(attributes);
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

inline const char* description(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace
}  // namespace fastalign
