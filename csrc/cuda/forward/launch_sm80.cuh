// The global functions of the portable forward kernel and their launchers. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/forward/forward_sm80.cuh"
#include "cuda/forward/launchers.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm80<T, kHeadDim, ChunkKeys>::kThreads)
    dca_forward_sm80(const __grid_constant__ ForwardParams params, const __grid_constant__ VectorPaths vectorized,
                     const __grid_constant__ TileSchedule schedule) {
  ForwardSm80<T, kHeadDim, ChunkKeys>::run(params, vectorized, ChunkKeys{}, schedule);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm80<T, kHeadDim, RegionKeys>::kThreads)
    select_merge_forward_sm80(const __grid_constant__ ForwardParams params,
                              const __grid_constant__ VectorPaths vectorized, const __grid_constant__ RegionKeys keys,
                              const __grid_constant__ TileSchedule schedule) {
  ForwardSm80<T, kHeadDim, RegionKeys>::run(params, vectorized, keys, schedule);
}

// Launches a block for each tile.
template <typename... Parameters, typename... Arguments>
const char* launch_tiles(void (*kernel)(Parameters...), const KernelPlan& plan, int64_t tiles, cudaStream_t stream,
                         const Arguments&... arguments) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_memory));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (tiles > INT32_MAX) return "q has too many query tiles for one launch";
  kernel<<<static_cast<unsigned>(tiles), plan.warps * 32, plan.shared_memory, stream>>>(arguments...);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <typename T, int kHeadDim>
const char* launch_forward_sm80(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                                cudaStream_t stream) {
  const TileSchedule schedule = make_tile_schedule(params, plan.tile_m);
  return launch_tiles(&dca_forward_sm80<T, kHeadDim>, plan, schedule.count(), stream, params, vectorized, schedule);
}

template <typename T, int kHeadDim>
const char* launch_region_forward_sm80(const ForwardParams& params, const AttendedRegions& regions,
                                       const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  const RegionKeys keys{regions, 0};
  const TileSchedule schedule = make_region_tile_schedule(params, regions.heads_per_list, plan.tile_m);
  return launch_tiles(&select_merge_forward_sm80<T, kHeadDim>, plan, schedule.count(), stream, params, vectorized, keys,
                      schedule);
}

}  // namespace chunkattn::cuda
