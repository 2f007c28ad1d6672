// The global function of the portable forward kernel and its launcher. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/forward/forward_sm80.cuh"
#include "cuda/forward/launchers.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm80<T, kHeadDim>::kThreads)
    dca_forward_sm80(const __grid_constant__ ForwardParams params, const __grid_constant__ VectorPaths vectorized,
                     const __grid_constant__ TileSchedule schedule) {
  ForwardSm80<T, kHeadDim>::run(params, vectorized, schedule);
}

template <typename T, int kHeadDim>
const char* launch_forward_sm80(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                                cudaStream_t stream) {
  const auto kernel = &dca_forward_sm80<T, kHeadDim>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_memory));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const TileSchedule schedule = make_tile_schedule(params, plan.tile_m);
  if (schedule.count() > INT32_MAX) return "q has too many query tiles for one launch";
  kernel<<<static_cast<unsigned>(schedule.count()), plan.warps * 32, plan.shared_memory, stream>>>(params, vectorized,
                                                                                                   schedule);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace chunkattn::cuda
