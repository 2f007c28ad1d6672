// Launches kernels that go over their work in strides of the grid: however few thread blocks they get, they do it all.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace chunkattn::cuda {

// One block for each of `blocks` parts of the work of each of `entries` batch entries, or in all `most_blocks`, but at
// least one for each entry, or for as many as a grid can have. Returns null, or what failed.
template <typename... Parameters, typename... Arguments>
const char* launch_strided(void (*kernel)(Parameters...), int64_t blocks, int most_blocks, int entries, int threads,
                           cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0 || entries == 0) return nullptr;
  // A multiprocessor that a main loop leaves has its memory divided for that, and would wait to divide it anew.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  constexpr int kMostEntries = 65535;
  const int grid_entries = std::min(entries, kMostEntries);
  const int64_t most_of_entry = std::max(1, most_blocks / grid_entries);
  const dim3 grid(static_cast<unsigned>(std::min(blocks, most_of_entry)), static_cast<unsigned>(grid_entries));
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
