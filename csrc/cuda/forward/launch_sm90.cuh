// The global function of the Hopper forward kernel and its launcher. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/tensor_map.h"
#include "cuda/forward/forward_sm90.cuh"
#include "cuda/forward/launchers.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm90<T, kHeadDim>::kThreads, 1)
    dca_forward_sm90(const __grid_constant__ ForwardParams params, const __grid_constant__ VectorPaths vectorized,
                     const __grid_constant__ TileSchedule schedule, const __grid_constant__ CUtensorMap key_map,
                     const __grid_constant__ CUtensorMap value_map, const __grid_constant__ CUtensorMap output_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ForwardSm90<T, kHeadDim>::run(params, vectorized, schedule, key_map, value_map, output_map, params.tile_counter);
#endif
}

template <typename T, int kHeadDim>
const char* launch_forward_sm90(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                                cudaStream_t stream) {
  const TileSchedule schedule = make_tile_schedule(params, plan.tile_m);
  if (schedule.count() > INT32_MAX) return "q has too many query tiles for one launch";
  CUtensorMap key_map, value_map, output_map{};
  const AttentionShape& shape = params.shape;
  const RowTensor k{params.k, params.k_strides, shape.batch, shape.seqlen_k, shape.kv_heads, shape.head_dim};
  const RowTensor v{params.v, params.v_strides, shape.batch, shape.seqlen_k, shape.kv_heads, shape.head_dim};
  const char* failure = encode_row_map(&key_map, k, params.dtype, plan.tile_n);
  if (failure == nullptr) failure = encode_row_map(&value_map, v, params.dtype, plan.tile_n);
  if (failure == nullptr && vectorized.out) {
    const RowTensor out{params.out, params.out_strides, shape.batch, shape.seqlen_q, shape.heads, shape.head_dim};
    constexpr int kWarpgroupRows = 64;
    failure = encode_row_map(&output_map, out, params.dtype, kWarpgroupRows);
  }
  if (failure != nullptr) return failure;

  const auto kernel = &dca_forward_sm90<T, kHeadDim>;
  constexpr size_t kSharedBytes = ForwardSm90<T, kHeadDim>::kSharedBytes;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (status == cudaSuccess) status = cudaMemsetAsync(params.tile_counter, 0, sizeof(int), stream);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const int blocks = schedule.count() < multiprocessors ? static_cast<int>(schedule.count()) : multiprocessors;
  kernel<<<blocks, ForwardSm90<T, kHeadDim>::kThreads, kSharedBytes, stream>>>(params, vectorized, schedule, key_map,
                                                                               value_map, output_map);
  status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
