// The global function of the Hopper backward kernel and its launcher. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/backward/backward_sm90.cuh"
#include "cuda/backward/backward_sm90_pair.cuh"
#include "cuda/backward/launch_key_tiles.cuh"
#include "cuda/backward/launchers.h"
#include "cuda/common/tensor_map.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim, typename Keys>
using BackwardSm90Kernel =
    std::conditional_t<kHeadDim <= 128, BackwardSm90<T, kHeadDim, Keys>, BackwardSm90Pair<T, kHeadDim, Keys>>;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardSm90Block<T, kHeadDim, ChunkKeyTiles>::kThreads, 1)
    dca_backward_sm90(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ BackwardWorkspace workspace,
                      const __grid_constant__ BackwardVectorPaths vectorized,
                      const __grid_constant__ TileSchedule schedule, const __grid_constant__ BackwardMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_backward_sm90<BackwardSm90Kernel<T, kHeadDim, ChunkKeyTiles>>(params, workspace, vectorized, schedule,
                                                                    ChunkKeyTiles{}, maps);
#endif
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardSm90Block<T, kHeadDim, SequenceKeyTiles>::kThreads, 1)
    dca_varlen_backward_sm90(const __grid_constant__ BackwardParams params,
                             const __grid_constant__ BackwardWorkspace workspace,
                             const __grid_constant__ BackwardVectorPaths vectorized,
                             const __grid_constant__ TileSchedule schedule, const __grid_constant__ BackwardMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Block = BackwardSm90Block<T, kHeadDim, SequenceKeyTiles>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const SequenceKeyTiles keys{{}, &reinterpret_cast<typename Block::Control*>(shared_memory + Block::kTileBytes)->work};
  keys.find(params, workspace, schedule, blockIdx.x / Block::kClusterSize, Block::kTileM, Block::kTileN);
  run_backward_sm90<BackwardSm90Kernel<T, kHeadDim, SequenceKeyTiles>>(params, workspace, vectorized, schedule, keys,
                                                                       maps);
#endif
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardSm90Block<T, kHeadDim, RegionKeyTiles>::kThreads, 1)
    select_merge_backward_sm90(const __grid_constant__ BackwardParams params,
                               const __grid_constant__ BackwardWorkspace workspace,
                               const __grid_constant__ BackwardVectorPaths vectorized,
                               const __grid_constant__ TileSchedule schedule,
                               const __grid_constant__ RegionKeyTiles keys, const __grid_constant__ BackwardMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_backward_sm90<BackwardSm90Kernel<T, kHeadDim, RegionKeyTiles>>(params, workspace, vectorized, schedule, keys,
                                                                     maps);
#endif
}

// K and V come in boxes of `key_rows` rows.
inline const char* encode_maps(BackwardMaps* maps, const BackwardParams& params, const BackwardWorkspace& workspace,
                               const KernelPlan& plan, int key_rows) {
  const ForwardParams& forward = params.forward;
  const AttentionShape& shape = forward.shape;
  const char* failure = nullptr;
  const auto encode = [&](auto encode_map, CUtensorMap* map, const void* data, const Strides& strides, int rows,
                          int heads, int box_rows) {
    if (failure != nullptr) return;
    failure = encode_map(map, {data, strides, forward.entries(), rows, heads, shape.head_dim}, forward.dtype, box_rows);
  };
  const auto encode_queries = forward.packed() ? &encode_window_map : &encode_row_map;
  const auto encode_gradients = forward.packed() ? &encode_gradient_window_map : &encode_gradient_map;
  for (int i = 0; i < 3; ++i) {
    // Without rows there is no tile of that regime either; the map must be a map all the same.
    const RegimeQueries& regime = workspace.regimes[workspace.regimes[i].rows > 0 ? i : 0];
    encode(encode_queries, maps->q + i, regime.q, regime.q_strides, regime.rows, shape.heads, plan.tile_m);
    if (failure == nullptr) {
      failure = encode_gradients(maps->dq + i, regime.dq, forward.planes(), regime.rows, shape.head_dim);
    }
  }
  encode(encode_queries, &maps->dout, params.dout, params.dout_strides, forward.rows_q(), shape.heads, plan.tile_m);
  encode(&encode_row_map, &maps->k, forward.k, forward.k_strides, forward.rows_k(), shape.kv_heads, key_rows);
  encode(&encode_row_map, &maps->v, forward.v, forward.v_strides, forward.rows_k(), shape.kv_heads, key_rows);
  return failure;
}

template <typename T, int kHeadDim>
const char* launch_backward_sm90(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const BackwardVectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  const TileSchedule schedule = make_key_tile_schedule(params, workspace, plan.tile_n);
  using Block = BackwardSm90Block<T, kHeadDim, ChunkKeyTiles>;
  BackwardMaps maps;
  const char* failure = encode_maps(&maps, params, workspace, plan, Block::kBlockKeys);
  if (failure != nullptr) return failure;
  using SequenceBlock = BackwardSm90Block<T, kHeadDim, SequenceKeyTiles>;
  const bool packed = params.forward.packed();
  return launch_key_tiles(packed ? &dca_varlen_backward_sm90<T, kHeadDim> : &dca_backward_sm90<T, kHeadDim>, schedule,
                          Block::kThreads, packed ? SequenceBlock::kSharedBytes : Block::kSharedBytes, stream,
                          Block::kClusterSize, params, workspace, vectorized, schedule, maps);
}

template <typename T, int kHeadDim>
const char* launch_region_backward_sm90(const BackwardParams& params, const BackwardWorkspace& workspace,
                                        const AttendedRegions& regions, const KeyGradientSums& sums,
                                        const BackwardVectorPaths& vectorized, const KernelPlan& plan,
                                        cudaStream_t stream) {
  using Block = BackwardSm90Block<T, kHeadDim, RegionKeyTiles>;
  const RegionKeyTiles keys = region_key_tiles(params, regions, sums, plan.tile_n, Block::kClusterSize);
  TileSchedule schedule;
  BackwardMaps maps;
  const char* failure = schedule_region_key_tiles(params, keys, &schedule);
  if (failure == nullptr) failure = encode_maps(&maps, params, workspace, plan, keys.box_rows);
  if (failure != nullptr) return failure;
  return launch_key_tiles(&select_merge_backward_sm90<T, kHeadDim>, schedule, Block::kThreads, Block::kSharedBytes,
                          stream, Block::kClusterSize, params, workspace, vectorized, schedule, keys, maps);
}

}  // namespace chunkattn::cuda
