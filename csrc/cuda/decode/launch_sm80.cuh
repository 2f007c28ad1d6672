// The global functions of decoding and their launcher. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/launch_step.cuh"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/decode_sm80.cuh"
#include "cuda/decode/launchers.h"

namespace chunkattn::cuda {

// KV heads come first in the grid: blocks that run together read neighbouring rows of the same tokens. Later row tiles
// see more keys, so they start first.
template <typename T, int kHeadDim, bool kFloat8, bool kManyRows>
__global__ void __launch_bounds__(DecodeSm80<T, kHeadDim, kFloat8, kManyRows>::kThreads, 2)
    dca_decode_sm80(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodePlan plan,
                    const __grid_constant__ DecodePaths paths, const __grid_constant__ DecodeWorkspace workspace) {
  const int block = static_cast<int>(blockIdx.x);
  const int kv_head = block % params.kv_heads;
  // Few rows are one row tile.
  const int group = kManyRows ? block / params.kv_heads % plan.groups : block / params.kv_heads;
  const int row_tile = kManyRows ? plan.row_tiles - 1 - block / params.kv_heads / plan.groups : 0;
  const DecodeSm80<T, kHeadDim, kFloat8, kManyRows> decode{params, plan, paths, workspace, kv_head, row_tile, group};
  decode.run();
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMostCombineWarps * 32)
    dca_decode_combine(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodePlan plan,
                       const __grid_constant__ DecodeWorkspace workspace) {
  DecodeCombine<T, kHeadDim>::run(params, plan, workspace, static_cast<int>(blockIdx.x));
}

template <typename T, int kHeadDim>
const char* launch_decode(const DecodeParams& params, const DecodeWorkspace& workspace, const DecodePaths& paths,
                          const DecodePlan& plan, bool dependent_launch, cudaStream_t stream) {
  const auto kernel = params.cache.float8 ? plan.many_rows ? &dca_decode_sm80<T, kHeadDim, true, true>
                                                           : &dca_decode_sm80<T, kHeadDim, true, false>
                      : plan.many_rows    ? &dca_decode_sm80<T, kHeadDim, false, true>
                                          : &dca_decode_sm80<T, kHeadDim, false, false>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_memory));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const char* failure = launch_step(kernel, plan.blocks(), plan.warps * 32, plan.shared_memory, dependent_launch,
                                    stream, params, plan, paths, workspace);
  if (failure != nullptr || plan.combine_warps == 0) return failure;
  const int64_t rows = static_cast<int64_t>(params.batch) * params.seqlen_q * params.heads;
  return launch_step(&dca_decode_combine<T, kHeadDim>, rows, plan.combine_warps * 32, 0, dependent_launch, stream,
                     params, plan, workspace);
}

}  // namespace chunkattn::cuda
