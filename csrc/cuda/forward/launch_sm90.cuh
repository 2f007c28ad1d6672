// The global functions of the Hopper forward kernel and their launchers. Included by the instantiations only.
#pragma once

#include <cuda_runtime.h>

#include <numeric>

#include "cuda/common/persistent_launch.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/forward/forward_sm90.cuh"
#include "cuda/forward/launchers.h"

namespace chunkattn::cuda {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm90<T, kHeadDim, ChunkKeys>::kThreads, 1)
    dca_forward_sm90(const __grid_constant__ ForwardParams params, const __grid_constant__ VectorPaths vectorized,
                     const __grid_constant__ TileSchedule schedule, const __grid_constant__ CUtensorMap key_map,
                     const __grid_constant__ CUtensorMap value_map, const __grid_constant__ CUtensorMap output_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ForwardSm90<T, kHeadDim, ChunkKeys>::run(params, vectorized, ChunkKeys{}, schedule, nullptr, key_map, value_map,
                                           output_map, params.tile_counter);
#endif
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm90<T, kHeadDim, RegionKeys>::kThreads, 1)
    select_merge_forward_sm90(const __grid_constant__ ForwardParams params,
                              const __grid_constant__ VectorPaths vectorized, const __grid_constant__ RegionKeys keys,
                              const __grid_constant__ TileSchedule schedule,
                              const __grid_constant__ CUtensorMap query_map,
                              const __grid_constant__ CUtensorMap key_map,
                              const __grid_constant__ CUtensorMap value_map,
                              const __grid_constant__ CUtensorMap output_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ForwardSm90<T, kHeadDim, RegionKeys>::run(params, vectorized, keys, schedule, &query_map, key_map, value_map,
                                            output_map, params.tile_counter);
#endif
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm90<T, kHeadDim, CacheKeys>::kThreads, 1)
    dca_cache_forward_sm90(const __grid_constant__ ForwardParams params, const __grid_constant__ VectorPaths vectorized,
                           const __grid_constant__ CacheKeys keys, const __grid_constant__ TileSchedule schedule,
                           const __grid_constant__ CUtensorMap key_map, const __grid_constant__ CUtensorMap value_map,
                           const __grid_constant__ CUtensorMap output_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ForwardSm90<T, kHeadDim, CacheKeys>::run(params, vectorized, keys, schedule, nullptr, key_map, value_map, output_map,
                                           params.tile_counter);
#endif
}

// Describes K and V, `batches` times `rows` rows each, in boxes of `key_rows` rows, and the output. Returns null, or
// what failed.
inline const char* encode_maps(const ForwardParams& params, const VectorPaths& vectorized, int batches, int rows,
                               int key_rows, CUtensorMap* key_map, CUtensorMap* value_map, CUtensorMap* output_map) {
  const AttentionShape& shape = params.shape;
  const RowTensor k{params.k, params.k_strides, batches, rows, shape.kv_heads, shape.head_dim};
  const RowTensor v{params.v, params.v_strides, batches, rows, shape.kv_heads, shape.head_dim};
  const char* failure = encode_row_map(key_map, k, params.dtype, key_rows);
  if (failure == nullptr) failure = encode_row_map(value_map, v, params.dtype, key_rows);
  if (failure == nullptr && vectorized.out) {
    const RowTensor out{params.out, params.out_strides, params.entries(), params.rows_q(), shape.heads, shape.head_dim};
    constexpr int kWarpgroupRows = 64;
    failure = encode_row_map(output_map, out, params.dtype, kWarpgroupRows);
  }
  return failure;
}

// Kernel is the ForwardSm90 that `kernel` runs.
template <typename Kernel, typename Function, typename... Arguments>
const char* launch_tiles(Function kernel, const TileSchedule& schedule, int* tile_counter, cudaStream_t stream,
                         const Arguments&... arguments) {
  const PersistentGrid grid{schedule.count(), Kernel::kThreads, static_cast<int>(Kernel::kSharedBytes)};
  return launch_persistent(kernel, grid, tile_counter, stream, arguments...);
}

template <typename T, int kHeadDim>
const char* launch_forward_sm90(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                                cudaStream_t stream) {
  using Kernel = ForwardSm90<T, kHeadDim, ChunkKeys>;
  const TileSchedule schedule = make_tile_schedule(params, plan.tile_m);
  CUtensorMap key_map, value_map, output_map{};
  const char* failure = encode_maps(params, vectorized, params.entries(), params.rows_k(), plan.tile_n, &key_map,
                                    &value_map, &output_map);
  if (failure != nullptr) return failure;
  return launch_tiles<Kernel>(&dca_forward_sm90<T, kHeadDim>, schedule, params.tile_counter, stream, params, vectorized,
                              schedule, key_map, value_map, output_map);
}

template <typename T, int kHeadDim>
const char* launch_region_forward_sm90(const ForwardParams& params, const AttendedRegions& regions,
                                       const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  using Kernel = ForwardSm90<T, kHeadDim, RegionKeys>;
  const int region_size = regions.geometry.region_size;
  const RegionKeys keys{regions, std::gcd(region_size, plan.tile_n), UINT64_MAX / region_size + 1};
  const TileSchedule schedule = make_region_tile_schedule(params, regions.heads_per_list, plan.tile_m);
  const AttentionShape& shape = params.shape;
  const RowTensor q{params.q, params.q_strides, shape.batch, shape.seqlen_q, shape.heads, shape.head_dim};
  CUtensorMap query_map, key_map, value_map, output_map{};
  const char* failure = encode_row_map(&query_map, q, params.dtype, plan.tile_m);
  if (failure == nullptr) {
    failure =
        encode_maps(params, vectorized, shape.batch, shape.seqlen_k, keys.box_rows, &key_map, &value_map, &output_map);
  }
  if (failure != nullptr) return failure;
  return launch_tiles<Kernel>(&select_merge_forward_sm90<T, kHeadDim>, schedule, params.tile_counter, stream, params,
                              vectorized, keys, schedule, query_map, key_map, value_map, output_map);
}

template <typename T, int kHeadDim>
const char* launch_cache_forward_sm90(const ForwardParams& params, const KeyValueCache& cache, int seqlen_new,
                                      const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream) {
  using Kernel = ForwardSm90<T, kHeadDim, CacheKeys>;
  const CacheKeys keys{cache, seqlen_new, cache_box_rows(cache, params.geometry, plan.tile_n)};
  const TileSchedule schedule = make_ragged_tile_schedule(params, plan.tile_m);
  const bool paged = cache.block_table != nullptr;
  CUtensorMap key_map, value_map, output_map{};
  const char* failure =
      encode_maps(params, vectorized, paged ? cache.num_pages : params.shape.batch,
                  paged ? cache.page_size : cache.capacity, keys.box_rows, &key_map, &value_map, &output_map);
  if (failure != nullptr) return failure;
  return launch_tiles<Kernel>(&dca_cache_forward_sm90<T, kHeadDim>, schedule, params.tile_counter, stream, params,
                              vectorized, keys, schedule, key_map, value_map, output_map);
}

}  // namespace chunkattn::cuda
