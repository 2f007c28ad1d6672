// The global function of the portable backward kernel and its launcher. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/backward/backward_sm80.cuh"
#include "cuda/backward/launchers.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, int kSharedKilobytes>
__global__ void __launch_bounds__(BackwardSm80<T, kHeadDim, kSharedKilobytes>::kThreads, 1)
    dca_backward_sm80(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ BackwardWorkspace workspace,
                      const __grid_constant__ BackwardVectorPaths vectorized,
                      const __grid_constant__ TileSchedule schedule) {
  BackwardSm80<T, kHeadDim, kSharedKilobytes>::run(params, workspace, vectorized, schedule);
}

template <typename T, int kHeadDim, int kSharedKilobytes>
const char* launch_backward_sm80_sized(const BackwardParams& params, const BackwardWorkspace& workspace,
                                       const BackwardVectorPaths& vectorized, cudaStream_t stream) {
  using Kernel = BackwardSm80<T, kHeadDim, kSharedKilobytes>;
  const auto kernel = &dca_backward_sm80<T, kHeadDim, kSharedKilobytes>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Kernel::kSharedBytes));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const TileSchedule schedule = make_key_tile_schedule(params, workspace, Kernel::kTileN);
  if (schedule.count() > INT32_MAX) return "k has too many key tiles for one launch";
  kernel<<<static_cast<unsigned>(schedule.count()), Kernel::kThreads, Kernel::kSharedBytes, stream>>>(
      params, workspace, vectorized, schedule);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <typename T, int kHeadDim>
const char* launch_backward_sm80(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  if constexpr (kHeadDim == 256) {
    if (plan.shared_memory > 163 * 1024) {
      return launch_backward_sm80_sized<T, kHeadDim, 227>(params, workspace, vectorized, stream);
    }
  }
  return plan.shared_memory > 99 * 1024
             ? launch_backward_sm80_sized<T, kHeadDim, 163>(params, workspace, vectorized, stream)
             : launch_backward_sm80_sized<T, kHeadDim, 99>(params, workspace, vectorized, stream);
}

}  // namespace chunkattn::cuda
