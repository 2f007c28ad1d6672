// Launches kernels whose blocks stay and take tiles from a counter, until there are none.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/device.h"

namespace chunkattn::cuda {

struct PersistentGrid {
  int64_t tiles;
  int threads;
  int shared_bytes;
  int per_multiprocessor = 1;  // blocks; 0: as many as fit
  int most = INT32_MAX;        // blocks in all
};

// No block without a first tile. Returns null, or what failed.
template <typename... Parameters, typename... Arguments>
const char* launch_persistent(void (*kernel)(Parameters...), const PersistentGrid& grid, int* tile_counter,
                              cudaStream_t stream, const Arguments&... arguments) {
  if (grid.tiles > INT32_MAX) return "q has too many tiles for one launch";
  int count = 0, resident = grid.per_multiprocessor;
  if (const char* failure = multiprocessors(&count)) return failure;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
  if (status == cudaSuccess && resident == 0) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, grid.threads, grid.shared_bytes);
  }
  if (status == cudaSuccess) status = cudaMemsetAsync(tile_counter, 0, sizeof(int), stream);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const int blocks = std::min({static_cast<int>(grid.tiles), count * resident, grid.most});
  kernel<<<blocks, grid.threads, grid.shared_bytes, stream>>>(arguments...);
  status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
