// The global function of the Hopper backward kernel and its launcher. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/backward/backward_sm90.cuh"
#include "cuda/backward/backward_sm90_wide.cuh"
#include "cuda/backward/launchers.h"
#include "cuda/common/tensor_map.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim>
using BackwardSm90Kernel =
    std::conditional_t<kHeadDim <= 128, BackwardSm90<T, kHeadDim>, BackwardSm90Wide<T, kHeadDim>>;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardSm90Block<T, kHeadDim>::kThreads, 1)
    dca_backward_sm90(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ BackwardWorkspace workspace,
                      const __grid_constant__ BackwardVectorPaths vectorized,
                      const __grid_constant__ TileSchedule schedule, const __grid_constant__ BackwardMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_backward_sm90<BackwardSm90Kernel<T, kHeadDim>>(params, workspace, vectorized, schedule, maps);
#endif
}

inline const char* encode_maps(BackwardMaps* maps, const BackwardParams& params, const BackwardWorkspace& workspace,
                               const KernelPlan& plan) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  const char* failure = nullptr;
  const auto encode = [&](CUtensorMap* map, const void* data, const Strides& strides, int rows, int heads,
                          int box_rows) {
    if (failure == nullptr) {
      failure =
          encode_row_map(map, {data, strides, forward.entries(), rows, heads, shape.head_dim}, forward.dtype, box_rows);
    }
  };
  for (int i = 0; i < 3; ++i) {
    // Without rows there is no tile of that regime either; the map must be a map all the same.
    const RegimeQueries& regime = workspace.regimes[workspace.regimes[i].rows > 0 ? i : 0];
    encode(maps->q + i, regime.q, regime.q_strides, regime.rows, shape.heads, plan.tile_m);
    if (failure == nullptr) {
      failure = encode_gradient_map(maps->dq + i, regime.dq, forward.planes(), regime.rows, shape.head_dim);
    }
  }
  encode(&maps->dout, params.dout, params.dout_strides, forward.rows_q(), shape.heads, plan.tile_m);
  encode(&maps->k, forward.k, forward.k_strides, forward.rows_k(), shape.kv_heads, plan.tile_n);
  encode(&maps->v, forward.v, forward.v_strides, forward.rows_k(), shape.kv_heads, plan.tile_n);
  return failure;
}

template <typename T, int kHeadDim>
const char* launch_backward_sm90(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  using Block = BackwardSm90Block<T, kHeadDim>;
  BackwardMaps maps;
  const char* failure = encode_maps(&maps, params, workspace, plan);
  if (failure != nullptr) return failure;
  const auto kernel = &dca_backward_sm90<T, kHeadDim>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Block::kSharedBytes));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const TileSchedule schedule = make_key_tile_schedule(params, workspace, plan.tile_n);
  if (schedule.count() > INT32_MAX) return "k has too many key tiles for one launch";
  kernel<<<static_cast<unsigned>(schedule.count()), Block::kThreads, Block::kSharedBytes, stream>>>(
      params, workspace, vectorized, schedule, maps);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace chunkattn::cuda
