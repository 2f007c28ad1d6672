// How the backward's main loops are launched. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/tile_schedule.h"

namespace chunkattn::cuda {

// Launches a block for each tile of the schedule. Returns null, or what failed.
template <typename... Parameters, typename... Arguments>
const char* launch_key_tiles(void (*kernel)(Parameters...), const TileSchedule& schedule, int threads,
                             size_t shared_memory, cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_memory));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (schedule.count() > INT32_MAX) return "k has too many key tiles for one launch";
  kernel<<<static_cast<unsigned>(schedule.count()), threads, shared_memory, stream>>>(arguments...);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace chunkattn::cuda
