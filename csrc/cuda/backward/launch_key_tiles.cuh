// How the backward's main loops are launched. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/tile_schedule.h"

namespace chunkattn::cuda {

// Launches a block, or a cluster of blocks, for each tile of the schedule. Returns null, or what failed.
template <typename... Parameters, typename... Arguments>
const char* launch_key_tiles(void (*kernel)(Parameters...), const TileSchedule& schedule, int threads,
                             size_t shared_memory, cudaStream_t stream, int cluster_size,
                             const Arguments&... arguments) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_memory));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (schedule.count() * cluster_size > INT32_MAX) return "k has too many key tiles for one launch";
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(schedule.count() * cluster_size));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_memory;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_size > 1 ? 1 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace chunkattn::cuda
