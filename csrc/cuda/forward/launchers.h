// The launchers that the instantiation files define, one file per kernel, element type and head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include <numeric>

#include "cuda/common/vector_paths.h"
#include "cuda/forward/plan.h"
#include "cuda/select_merge/attended_regions.h"
#include "params.h"

namespace chunkattn::cuda {

// Each returns null, or a sentence that says what failed.
template <typename T, int kHeadDim>
const char* launch_forward_sm80(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                                cudaStream_t stream);

// Needs aligned rows of k and v (vector_paths.h) and params.tile_counter.
template <typename T, int kHeadDim>
const char* launch_forward_sm90(const ForwardParams& params, const VectorPaths& vectorized, const KernelPlan& plan,
                                cudaStream_t stream);

// The same of select-and-merge attention, its params made by group_attention(). The Hopper kernel needs aligned rows of
// q, and regions of a multiple of 8 tokens, too.
template <typename T, int kHeadDim>
const char* launch_region_forward_sm80(const ForwardParams& params, const AttendedRegions& regions,
                                       const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream);
template <typename T, int kHeadDim>
const char* launch_region_forward_sm90(const ForwardParams& params, const AttendedRegions& regions,
                                       const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream);

// The same of dual chunk attention to a cache of 16-bit elements, to which seqlen_new tokens were appended since
// cache_seqlens were counted. k and v are those of the cache, seqlen_k is its capacity; queries that lie before the
// first token get nothing written. Needs cache_box_rows() to be a multiple of 8.
template <typename T, int kHeadDim>
const char* launch_cache_forward_sm90(const ForwardParams& params, const KeyValueCache& cache, int seqlen_new,
                                      const VectorPaths& vectorized, const KernelPlan& plan, cudaStream_t stream);

// Rows of a cache that the copy engine brings at once: key tiles begin where chunks do.
inline int cache_box_rows(const KeyValueCache& cache, const ChunkGeometry& geometry, int tile_n) {
  return cache.block_table == nullptr ? tile_n : std::gcd(std::gcd(cache.page_size, tile_n), geometry.stride());
}

}  // namespace chunkattn::cuda
