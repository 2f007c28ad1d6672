// The global functions of the portable backward kernel and their launchers. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/backward/backward_sm80.cuh"
#include "cuda/backward/launch_key_tiles.cuh"
#include "cuda/backward/launchers.h"

namespace chunkattn::cuda {

// Whether plan_backward picks this size on the architecture that is compiled for: others are left empty there.
template <int kHeadDim, int kSharedKilobytes>
constexpr bool is_launched_here() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return kSharedKilobytes == (kHeadDim == 256 ? 227 : 163);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return kSharedKilobytes < 227;
#else
  return true;
#endif
}

template <typename T, int kHeadDim, int kSharedKilobytes>
__global__ void __launch_bounds__(BackwardSm80<T, kHeadDim, kSharedKilobytes, ChunkKeyTiles>::kThreads, 1)
    dca_backward_sm80(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ BackwardWorkspace workspace,
                      const __grid_constant__ BackwardVectorPaths vectorized,
                      const __grid_constant__ TileSchedule schedule) {
  if constexpr (is_launched_here<kHeadDim, kSharedKilobytes>()) {
    BackwardSm80<T, kHeadDim, kSharedKilobytes, ChunkKeyTiles>::run(params, workspace, vectorized, ChunkKeyTiles{},
                                                                    schedule);
  }
}

template <typename T, int kHeadDim, int kSharedKilobytes>
__global__ void __launch_bounds__(BackwardSm80<T, kHeadDim, kSharedKilobytes, RegionKeyTiles>::kThreads, 1)
    select_merge_backward_sm80(const __grid_constant__ BackwardParams params,
                               const __grid_constant__ BackwardWorkspace workspace,
                               const __grid_constant__ BackwardVectorPaths vectorized,
                               const __grid_constant__ RegionKeyTiles keys,
                               const __grid_constant__ TileSchedule schedule) {
  if constexpr (is_launched_here<kHeadDim, kSharedKilobytes>()) {
    BackwardSm80<T, kHeadDim, kSharedKilobytes, RegionKeyTiles>::run(params, workspace, vectorized, keys, schedule);
  }
}

// Calls f with the kilobytes of shared memory of the plan, as a constant.
template <int kHeadDim, typename Function>
const char* with_shared_kilobytes(const KernelPlan& plan, Function&& f) {
  if constexpr (kHeadDim == 256) {
    if (plan.shared_memory > 163 * 1024) return f(std::integral_constant<int, 227>());
  }
  return plan.shared_memory > 99 * 1024 ? f(std::integral_constant<int, 163>()) : f(std::integral_constant<int, 99>());
}

template <typename T, int kHeadDim>
const char* launch_backward_sm80(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  const TileSchedule schedule = make_key_tile_schedule(params, workspace, plan.tile_n);
  return with_shared_kilobytes<kHeadDim>(plan, [&](auto kilobytes) {
    return launch_key_tiles(&dca_backward_sm80<T, kHeadDim, kilobytes()>, schedule, plan.warps * 32, plan.shared_memory,
                            stream, 1, params, workspace, vectorized, schedule);
  });
}

template <typename T, int kHeadDim>
const char* launch_region_backward_sm80(const BackwardParams& params, const BackwardWorkspace& workspace,
                                        const AttendedRegions& regions, const KeyGradientSums& sums,
                                        const BackwardVectorPaths& vectorized, const KernelPlan& plan,
                                        cudaStream_t stream) {
  const RegionKeyTiles keys = region_key_tiles(params, regions, sums, plan.tile_n, 1);
  TileSchedule schedule;
  if (const char* failure = schedule_region_key_tiles(params, keys, &schedule)) return failure;
  return with_shared_kilobytes<kHeadDim>(plan, [&](auto kilobytes) {
    return launch_key_tiles(&select_merge_backward_sm80<T, kHeadDim, kilobytes()>, schedule, plan.warps * 32,
                            plan.shared_memory, stream, 1, params, workspace, vectorized, keys, schedule);
  });
}

}  // namespace chunkattn::cuda
